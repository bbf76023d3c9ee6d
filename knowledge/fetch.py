"""Rules for the Fetch tasks of gymnasium-robotics: Reach, Push, Slide, PickAndPlace.

`fetch.official` holds the two rules per task of KIAN (Chiu et al. 2023, arXiv 2210.03729), as released: they
use metres as actions, so each step covers about 5 % of the remaining distance, and in Push the gripper never
comes within their 0.03 m. `fetch.v4`, the default, holds rules written for the -v4 environments. Each is one
skill that does not solve its task alone (Reach apart); its docstring says what it does outside its region.

Observations are dicts: `observation` (B, 25) or more (10 for Reach), `achieved_goal` and `desired_goal` (B, 3).
Actions are (B, 4) in [-1, 1]: three displacements, in units of 0.05 m per step, and the fingers
(+1 opens, -1 closes; without effect in Reach, Push and Slide).
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from knowledge.registry import rule

official = partial(rule, group="fetch.official")
v4 = partial(rule, group="fetch.v4", auto=True)


def read(obs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Gripper p, object o and goal g, each (B, 3) in metres."""
    x = obs["observation"]
    return x[:, 0:3], x[:, 3:6], obs["desired_goal"]


def norm(v: Tensor) -> Tensor:
    """Length of each row, (B, k) -> (B, 1)."""
    return v.norm(dim=-1, keepdim=True)


def into_box(action: Tensor) -> Tensor:
    """Scale each row into [-1, 1], keeping its direction."""
    return action / action.abs().amax(-1, keepdim=True).clamp(min=1)


# ---- fetch.official: `near` is 0.03 m, and a row is scaled as a whole, fingers included -----------


@official("fetch.go_to_object", envs="FetchPickAndPlace")
def official_pick_object(obs: dict[str, Tensor]) -> Tensor:
    """Move to the object with open fingers; once near, stay and hold the fingers as they are."""
    p, o, _ = read(obs)
    h = obs["observation"][:, 9:10]  # opening of a finger, m
    far = torch.cat([o - p, torch.ones_like(h)], -1)
    return into_box(torch.where(norm(o - p) >= 0.03, far, pad(h, (3, 0))))


@official("fetch.go_to_target", envs="FetchPickAndPlace")
def official_pick_target(obs: dict[str, Tensor]) -> Tensor:
    """Near the object, close the fingers and move to the goal; elsewhere stay."""
    p, o, g = read(obs)
    h = obs["observation"][:, 9:10]
    near = torch.cat([g - p, -torch.ones_like(h)], -1)
    return into_box(torch.where(norm(o - p) >= 0.03, pad(h, (3, 0)), near))


@official("fetch.go_to_object", envs="FetchPush")
def official_push_object(obs: dict[str, Tensor]) -> Tensor:
    """Move to the object; once near, stay."""
    p, o, _ = read(obs)
    return into_box(pad(torch.where(norm(o - p) >= 0.03, o - p, 0.0), (0, 1)))


@official("fetch.go_to_target", envs="FetchPush")
def official_push_target(obs: dict[str, Tensor]) -> Tensor:
    """Near the object, move to the goal; elsewhere stay."""
    p, o, g = read(obs)
    return into_box(pad(torch.where(norm(o - p) >= 0.03, 0.0, g - p), (0, 1)))


def official_slide_waypoint(obs: dict[str, Tensor]) -> Tensor:
    """The way from the gripper to 0.1 m behind the object as seen from the goal, (B, 3)."""
    p, o, g = read(obs)
    return g + (o - g) * (1 + 0.1 / (norm(o - g) + 1e-6)) - p


@official("fetch.go_to_object", envs="FetchSlide")
def official_slide_object(obs: dict[str, Tensor]) -> Tensor:
    """Move to the point behind the object; once near it, stay."""
    v = official_slide_waypoint(obs)
    return into_box(pad(torch.where(norm(v) >= 0.03, v, 0.0), (0, 1)))


@official("fetch.go_to_target", envs="FetchSlide")
def official_slide_target(obs: dict[str, Tensor]) -> Tensor:
    """Near the point behind the object, move to the goal; elsewhere stay."""
    p, _, g = read(obs)
    return into_box(pad(torch.where(norm(official_slide_waypoint(obs)) >= 0.03, 0.0, g - p), (0, 1)))


# ---- fetch.v4 ------------------------------------------------------------------------------------


def move(v: Tensor, grasp: Tensor | None = None) -> Tensor:
    """Action along v (B, 3), in metres, slowing down on arrival; fingers close where `grasp` (B, 1), else open."""
    fingers = torch.zeros_like(v[:, :1]) if grasp is None else torch.where(grasp, -1.0, 1.0).to(v)
    return torch.cat([into_box(10 * v), fingers], -1)  # gain 10: half of the distance per step


def from_above(v: Tensor) -> Tensor:
    """Lift the end of the way v (B, 3) by up to 0.15 m while it is still aside, so as to come down on it."""
    height = (2 * norm(v[:, :2]) - 0.02).clamp(0, 0.15)
    return v + pad(height, (2, 0))


def behind(obs: dict[str, Tensor], distance: float) -> Tensor:
    """The way from the gripper to `distance` m behind the object as seen from the goal, (B, 3)."""
    p, o, g = read(obs)
    line = pad((g - o)[:, :2], (0, 1))  # level: both are pushed along the table
    return o - distance * line / (norm(line) + 1e-6) - p


def is_behind(obs: dict[str, Tensor], aside: float) -> Tensor:
    """Whether the gripper is low, close behind the object and at most `aside` m off the line, (B, 1) bool."""
    p, o, g = read(obs)
    r, line = o - p, (g - o)[:, :2]
    along = (r[:, :2] * line).sum(-1, keepdim=True) / (norm(line) + 1e-6)
    off = norm(r[:, :2]).square() - along.square()
    return (along > 0) & (along < 0.12) & (off < aside**2) & (r[:, 2:].abs() < 0.03)


@v4("fetch.move_to_goal", envs="FetchReach")
def move_to_goal(obs: dict[str, Tensor]) -> Tensor:
    """Move the gripper to the goal."""
    return move(obs["desired_goal"] - obs["observation"][:, 0:3])


@v4("fetch.reach_object", envs="FetchPickAndPlace")
def reach_object(obs: dict[str, Tensor]) -> Tensor:
    """Come down on the object with open fingers; there, stay and close them."""
    p, o, _ = read(obs)
    there = norm(o - p) < 0.02
    return move(torch.where(there, 0.0, from_above(o - p)), grasp=there)


@v4("fetch.carry_to_goal", envs="FetchPickAndPlace")
def carry_to_goal(obs: dict[str, Tensor]) -> Tensor:
    """With the object between the fingers, close them and move to the goal; elsewhere stay with open fingers."""
    p, o, g = read(obs)
    between = norm(o - p) < 0.03
    return move(torch.where(between, g - o, 0.0), grasp=between)


@v4("fetch.get_behind_object", envs=("FetchPush", "FetchSlide"))
def get_behind_object(obs: dict[str, Tensor]) -> Tensor:
    """Come down 0.08 m behind the object, passing over it and not through it; there, stay."""
    return move(from_above(behind(obs, 0.08)))


@v4("fetch.push_to_goal", envs="FetchPush")
def push_to_goal(obs: dict[str, Tensor]) -> Tensor:
    """Behind the object, push it to the goal; elsewhere stay."""
    _, o, g = read(obs)
    # `behind` steers back onto the line, as an object pushed off its centre turns away, and it ends the push in
    # time: in contact, at about 0.045 m, it pulls back as much as 0.035 m to the goal drive on.
    v = g - o + behind(obs, 0.08)
    return move(torch.where(is_behind(obs, aside=0.03), v, 0.0))


@v4("fetch.strike_to_goal", envs="FetchSlide")
def strike_to_goal(obs: dict[str, Tensor]) -> Tensor:
    """Behind the object, strike it so that it slides to the goal; elsewhere, and once it slides, stay."""
    _, o, g = read(obs)
    x, line = obs["observation"], pad((g - o)[:, :2], (0, 1))
    speed = norm(x[:, 14:16] + x[:, 20:22]) / 0.04  # object's, m/s; the env gives metres per step of 0.04 s
    enough = (2 * norm(line)).sqrt()  # friction takes 1 m/s^2
    strike = 0.95 * enough * line / (norm(line) + 1e-6)  # an action of 1 sends the object off at about 1 m/s
    go = is_behind(obs, aside=0.01) & (speed < 0.85 * enough)
    return into_box(pad(torch.where(go, strike, 0.0), (0, 1)))
