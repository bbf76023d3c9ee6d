"""Rules for MiniGrid and BabyAI: those of KIAN (Chiu et al. 2023, arXiv 2210.03729) as released, and `explore`.

Observations are dicts with `image` (B, 7, 7, 3): object, colour and state of the cell [x, y] that the agent sees, the
agent at (3, 6) facing smaller y. What it carries is drawn in its own cell, and fires no rule. A rule has no memory and
does not read the mission. Advice is (B, 7) float32 multi-hot, zeros where the rule is silent; (B, 3), the first three
actions, on Dynamic-Obstacles, which has no others.

Every rule may be named on every MiniGrid and BabyAI id. `minigrid.official` holds the released choice per task family,
`minigrid.ours` an obvious one for families without; `auto` is whichever there is. `minigrid.all` is KIAN's set of six.
"""

from functools import cache, wraps

import torch
from torch import Tensor

from knowledge.registry import Policy, group, rule

LEFT, RIGHT, FORWARD, PICKUP, TOGGLE, ACTIONS = 0, 1, 2, 3, 5, 7
EMPTY, WALL, FLOOR, DOOR, KEY, BALL, GOAL, LAVA = 1, 2, 3, 4, 5, 6, 8, 9
CLOSED, LOCKED = 1, 2


# A rule is a matrix (7, 49), what a cell there says about each action, times a mask of cells (B, 49), x-major. Entries
# are small integers: exact in every precision of matrix products. This way round it is several times faster on a CPU.


@cache
def toward_matrix(act: int | None, device: torch.device) -> Tensor:
    """Cells ask to turn to their side or to go forward; with `act`, the cell ahead asks for that alone."""
    says = torch.zeros(7, 7, ACTIONS)
    says[:3, :, LEFT] = says[4:, :, RIGHT] = says[:, :6, FORWARD] = 1
    if act is not None:
        says[3, 5, [LEFT, RIGHT, FORWARD]] = -49  # outvotes all other cells
        says[3, 5, act] = 1
    return says.flatten(0, 1).T.to(device).contiguous()  # (7, 7, 7) -> (7, 49)


@cache
def avoid_matrix(device: torch.device) -> tuple[Tensor, Tensor]:
    """The three moves (7, 1), and what a cell beside or ahead of the agent takes away from them (7, 49)."""
    says = torch.zeros(7, 7, ACTIONS)
    says[2, 6, LEFT] = says[4, 6, RIGHT] = says[3, 5, FORWARD] = -1
    moves = (torch.arange(ACTIONS) < 3).float().unsqueeze(1)
    return moves.to(device), says.flatten(0, 1).T.to(device).contiguous()


def toward(mask: Tensor, act: int | None = None) -> Tensor:
    """Advice (B, 7) to get to the cells of `mask` (B, 49): left, right and forward may be given together. With the
    target straight ahead, `act`."""
    return (toward_matrix(act, mask.device) @ mask.float().T).T.clamp(0, 1)


def avoid(mask: Tensor) -> Tensor:
    """Advice (B, 7) for left, right and forward, less those with a cell of `mask` (B, 49) beside or ahead."""
    moves, says = avoid_matrix(mask.device)
    return torch.addmm(moves, says, mask.float().T).T


def objects(obs: dict[str, Tensor]) -> Tensor:
    """(B, 49)"""
    return obs["image"][..., 0].flatten(1)


def doors(obs: dict[str, Tensor], state: int) -> Tensor:
    """Mask (B, 49) of the doors in that state."""
    return (objects(obs) == DOOR) & (obs["image"][..., 2].flatten(1) == state)


def grid_rule(name: str):
    """Decorator: the rule `name`, for every id, and its first three actions on Dynamic-Obstacles."""

    def register(function: Policy) -> Policy:
        @wraps(function)
        def three_actions(obs: dict[str, Tensor]) -> Tensor:
            return function(obs)[:, :3]

        rule(name, envs="MiniGrid-Dynamic-Obstacles")(three_actions)
        return rule(name, envs=("MiniGrid-", "BabyAI-"))(function)

    return register


@grid_rule("minigrid.get_key")
def get_key(obs: dict[str, Tensor]) -> Tensor:
    """Go to a key and pick it up."""
    return toward(objects(obs) == KEY, PICKUP)


@grid_rule("minigrid.get_ball")
def get_ball(obs: dict[str, Tensor]) -> Tensor:
    """Go to a ball and pick it up."""
    return toward(objects(obs) == BALL, PICKUP)


@grid_rule("minigrid.open_door")
def open_door(obs: dict[str, Tensor]) -> Tensor:
    """Go to a door and toggle it, whatever its state: an open one is closed."""
    return toward(objects(obs) == DOOR, TOGGLE)


@grid_rule("minigrid.open_unlocked_door")
def open_unlocked_door(obs: dict[str, Tensor]) -> Tensor:
    """Go to the closed doors that need no key and toggle them."""
    return toward(doors(obs, CLOSED), TOGGLE)


@grid_rule("minigrid.open_locked_door")
def open_locked_door(obs: dict[str, Tensor]) -> Tensor:
    """Go to the locked doors and toggle them, key or not."""
    return toward(doors(obs, LOCKED), TOGGLE)


@grid_rule("minigrid.open_one_unlocked_door")
def open_one_unlocked_door(obs: dict[str, Tensor]) -> Tensor:
    """As open_unlocked_door, for the leftmost of the closed doors in view, the farthest one among those."""
    closed = doors(obs, CLOSED)
    return toward(closed & (closed.cumsum(1) == 1), TOGGLE)


@grid_rule("minigrid.go_to_goal")
def go_to_goal(obs: dict[str, Tensor]) -> Tensor:
    """Go to the goal."""
    return toward(objects(obs) == GOAL)


@grid_rule("minigrid.avoid_obstacles")
def avoid_obstacles(obs: dict[str, Tensor]) -> Tensor:
    """Turn or go where there is neither wall nor lava."""
    seen = objects(obs)
    return avoid((seen == WALL) | (seen == LAVA))


@grid_rule("minigrid.avoid_ball")
def avoid_ball(obs: dict[str, Tensor]) -> Tensor:
    """Turn or go where there is no ball."""
    return avoid(objects(obs) == BALL)


@grid_rule("minigrid.explore")
def explore(obs: dict[str, Tensor]) -> Tensor:
    """Not in the paper: while no goal is in view, straight on until something is in the way, then to the side that is
    open (either, if both are or none is). A door is in the way, an open one as well."""
    seen = obs["image"][..., 0]
    free = (seen == EMPTY) | (seen == FLOOR)
    ahead, left, right = free[:, 3, 5], free[:, 2, 6], free[:, 4, 6]
    lost = ~(seen == GOAL).flatten(1).any(1)
    advice = torch.zeros(seen.shape[0], ACTIONS, device=seen.device)
    advice[:, FORWARD] = (lost & ahead).float()
    advice[:, LEFT] = (lost & ~ahead & (left | ~right)).float()
    advice[:, RIGHT] = (lost & ~ahead & (right | ~left)).float()
    return advice


def family(name: str, envs: str | tuple[str, ...], *rules: str, auto: bool = True) -> None:
    group(name, [f"minigrid.{rule}" for rule in rules], envs, auto)


official, ours = "minigrid.official", "minigrid.ours"
family(official, "MiniGrid-Empty", "go_to_goal")
family(official, "MiniGrid-Unlock-", "get_key", "open_door")
family(official, "MiniGrid-DoorKey", "get_key", "open_door", "go_to_goal")
family(official, "MiniGrid-Dynamic-Obstacles", "go_to_goal", "avoid_ball")
family(official, "MiniGrid-LavaCrossing", "go_to_goal", "avoid_obstacles")
family(official, ("MiniGrid-KeyCorridor", "BabyAI-KeyCorridor"), "open_one_unlocked_door", "open_locked_door",
       "get_key", "get_ball")
family(official, "MiniGrid-MultiRoom", "open_unlocked_door", "go_to_goal", "avoid_obstacles")
# Not in the paper. A box has no rule: the last step of UnlockPickup is left to the agent.
family(ours, ("MiniGrid-SimpleCrossing", "MiniGrid-LavaGap", "MiniGrid-DistShift", "MiniGrid-FourRooms"), "go_to_goal",
       "avoid_obstacles")
family(ours, "MiniGrid-LockedRoom", "open_unlocked_door", "open_locked_door", "get_key", "go_to_goal")
family(ours, "MiniGrid-UnlockPickup", "get_key", "open_locked_door")
family(ours, "MiniGrid-BlockedUnlockPickup", "get_ball", "get_key", "open_locked_door")
family("minigrid.all", ("MiniGrid-", "BabyAI-"), "get_key", "open_door", "go_to_goal", "avoid_ball", "avoid_obstacles",
       "open_unlocked_door", auto=False)
