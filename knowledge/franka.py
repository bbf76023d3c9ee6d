"""Rules for the Franka tasks of `envs/franka.py`: Push, Slide, PickAndPlace, whose rules also fit FrankaSkill.

Each is one skill that does not solve its task alone; its docstring says what it does outside its region. Measured alone
and in turns: docs/franka.md.

Observations are dicts: `observation` (B, 18) or more, (B, 19) where the fingers are free, `achieved_goal` and
`desired_goal` (B, 3). Actions are (B, 3) or (B, 4) in [-1, 1]: three displacements in units of 0.05 m, of which the arm
covers three quarters within the step, and the fingers (+1 opens, -1 closes; 0 keeps the width and hardly grips).
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from knowledge.fetch import from_above, into_box, norm
from knowledge.registry import rule

v0 = partial(rule, group="franka.v0", auto=True)


def read(obs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Gripper p, object o and goal g, each (B, 3) in metres."""
    return obs["observation"][:, 0:3], obs["achieved_goal"], obs["desired_goal"]


def move(v: Tensor) -> Tensor:
    """Action along v (B, 3), in metres, slowing down on arrival."""
    return into_box(15 * v)  # half of the distance per step: 15 * 0.05 m * 3/4


def grip(v: Tensor, grasp: Tensor) -> Tensor:
    """`move`, with fingers that close where `grasp` (B, 1) and open elsewhere."""
    return torch.cat([move(v), torch.where(grasp, -1.0, 1.0).to(v)], -1)


@v0("franka.reach_object", envs=("FrankaPickAndPlace", "FrankaSkill"))
def reach_object(obs: dict[str, Tensor]) -> Tensor:
    """Come down on the object with open fingers; there, stay and close them."""
    p, o, _ = read(obs)
    there = norm(o - p) < 0.015
    return grip(torch.where(there, 0.0, from_above(o - p)), there)


@v0("franka.carry_to_goal", envs=("FrankaPickAndPlace", "FrankaSkill"))
def carry_to_goal(obs: dict[str, Tensor]) -> Tensor:
    """With the object between the fingers, close them and move it to the goal; elsewhere stay with open fingers."""
    p, o, g = read(obs)
    between = norm(o - p) < 0.025
    return grip(torch.where(between, g - o, 0.0), between)


def behind(obs: dict[str, Tensor], distance: float) -> tuple[Tensor, Tensor]:
    """The way from the gripper to `distance` m behind the object as seen from the goal, and the level direction from
    the object to the goal, (B, 3) each."""
    p, o, g = read(obs)
    line = pad((g - o)[:, :2], (0, 1))
    line = line / (norm(line) + 1e-6)
    return o - distance * line - p, line


def is_behind(obs: dict[str, Tensor], near: float, far: float, aside: float) -> Tensor:
    """Whether the gripper is low, `near` to `far` m behind the object and at most `aside` m off the line, (B, 1)."""
    p, o, _ = read(obs)
    r, (_, line) = o - p, behind(obs, 0.0)
    along = (r * line).sum(-1, keepdim=True)
    off = norm(r[:, :2]).square() - along.square()
    return (along > near) & (along < far) & (off < aside**2) & (r[:, 2:].abs() < 0.025)


def get_behind(obs: dict[str, Tensor], distance: float) -> Tensor:
    """Come down `distance` m behind the object, passing over it and not through it; there, stay."""
    return move(from_above(behind(obs, distance)[0]))


@v0("franka.get_behind_object", envs="FrankaPush")
def get_behind_to_push(obs: dict[str, Tensor]) -> Tensor:
    """Come down 0.06 m behind the object, passing over it and not through it; there, stay."""
    return get_behind(obs, 0.06)


@v0("franka.push_to_goal", envs="FrankaPush")
def push_to_goal(obs: dict[str, Tensor]) -> Tensor:
    """Behind the object, push it to the goal; elsewhere stay."""
    _, o, g = read(obs)
    v = pad((g - o)[:, :2], (0, 1)) + behind(obs, 0.06)[0]
    return move(torch.where(is_behind(obs, 0.0, 0.10, aside=0.022), v, 0.0))


@v0("franka.get_behind_object", envs="FrankaSlide")
def get_behind_to_strike(obs: dict[str, Tensor]) -> Tensor:
    """Come down 0.08 m behind the puck, passing over it and not through it; there, stay."""
    return get_behind(obs, 0.08)


@v0("franka.strike_to_goal", envs="FrankaSlide")
def strike_to_goal(obs: dict[str, Tensor]) -> Tensor:
    """Behind the puck, strike it so that it slides to the goal; elsewhere, and once it slides, stay."""
    _, o, g = read(obs)
    line = behind(obs, 0.0)[1]
    speed = norm(obs["observation"][:, 12:15]) / 0.05  # puck's, m/s; the env gives metres per 0.05 s
    enough = (2 * 9.81 * 0.04 * norm((g - o)[:, :2])).sqrt()  # friction takes 0.39 m/s^2
    go = is_behind(obs, 0.0, 0.12, aside=0.015) & (speed < 0.9 * enough)
    # an action of 1 moves the gripper by three quarters of 0.05 m in 0.05 s: 1.3 times the speed is about that speed
    return into_box(torch.where(go, 1.3 * enough * line, 0.0))
