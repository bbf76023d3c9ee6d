"""The pairs of state features and intrinsic reward that ship for LESR (arXiv 2407.13237), one for each task.

They are the best ones that the authors found, written from their formulas and with the authors' numbers of the state:
on tasks with goals s is the observation, then the desired goal. e_0, e_1, ... are the features, in their order. What
their names promise is not always what they are: HalfCheetah's "energy" is squared joint angles; the mazes take height
and a part of the orientation for a position, because the true one is not in the observation.

Two guards are ours. A division by the length of a vector stays finite where that is 0 (hammer, door). The door's pair
had 56 features more, differences to the state that it was asked about before, which depend on who asks in which order.
"""
from typing import Callable, NamedTuple

import torch

SHORT = 1e-8  # of a vector that has no direction


class Pair(NamedTuple):
    """Functions of batches of the authors' states."""
    n: int  # numbers in a state
    extras: Callable[[torch.Tensor], torch.Tensor]  # s (B, n) -> features (B, m)
    reward: Callable[[torch.Tensor], torch.Tensor]  # [s, features] (B, n + m) -> (B,)
    goal: int = 0  # numbers of the desired goal at the end of s; 0: the task has none


def _var(x: torch.Tensor) -> torch.Tensor:
    """Population variance of each row, (B,)."""
    return x.var(1, correction=0)


def _std(x: torch.Tensor) -> torch.Tensor:
    return _var(x).sqrt()


def _length(x: torch.Tensor) -> torch.Tensor:
    """Length of each row, (B,)."""
    return x.square().sum(1).sqrt()


def _weighted(n: int, weights: dict[int, float], positive: bool = False) -> Callable[[torch.Tensor], torch.Tensor]:
    """The reward sum_i weights[i] e_i of the features that follow n numbers; `positive`: at least 0."""
    def reward(x: torch.Tensor) -> torch.Tensor:
        total = sum(weight * x[:, n + i] for i, weight in weights.items())
        return total.clamp(min=0) if positive else total
    return reward


# ---- MuJoCo ------------------------------------------------------------------------------------------------------


def half_cheetah(s: torch.Tensor) -> torch.Tensor:
    angle = s[:, 1:7].mean(1)
    return torch.stack([s[:, 8], angle, _var(s[:, 1:7]), s[:, 4:8].square().sum(1), s[:, 8] * angle.cos()], 1)


def hopper(s: torch.Tensor) -> torch.Tensor:
    return torch.stack([s[:, 2] - s[:, 1], s[:, 3] - s[:, 2], s[:, 4] - s[:, 3], _length(s[:, 5:7]), s[:, 1].abs(),
                        s[:, 7:11].abs().sum(1), s[:, 5]], 1)


def walker(s: torch.Tensor) -> torch.Tensor:
    energy = 0.5 * s[:, 8:17].square().sum(1)
    first = torch.stack([s[:, 8], s[:, 1].cos(), energy, s[:, 0], s[:, 8] / (energy + 1e-6)], 1)
    return torch.cat([first, s[:, 3:8] - s[:, 2:7]], 1)


def ant(s: torch.Tensor) -> torch.Tensor:
    return torch.stack([s[:, 13], s[:, 0], _var(s[:, 1:5]), _std(s[:, 19:27]), s[:, 5:13].square().sum(1),
                        s[:, 5:13].amin(1)], 1)


def swimmer(s: torch.Tensor) -> torch.Tensor:
    first = torch.stack([s[:, 3].square(), s[:, 5:8].square().sum(1)], 1)
    return torch.cat([first, s[:, 0:3].cos(), s[:, 0:3].sin(), s[:, 2:3] - s[:, 1:2]], 1)


# ---- mazes: s[27:29] is the goal -----------------------------------------------------------------------------------


def open_maze(s: torch.Tensor) -> torch.Tensor:
    way = torch.stack([s[:, 0] - s[:, 27], s[:, 27] - s[:, 28]], 1)  # no distance to the goal, but so it is theirs
    return torch.stack([_length(way), _var(s[:, 1:5]), _std(s[:, 19:27])], 1)


def medium_maze(s: torch.Tensor) -> torch.Tensor:
    way = s[:, 27:29] - s[:, 0:2]
    turned = s[:, 3] - torch.atan2(way[:, 1], way[:, 0])
    return torch.stack([_length(way), turned.cos(), _std(s[:, 5:13]), _var(s[:, 19:27])], 1)


def medium_maze_reward(x: torch.Tensor) -> torch.Tensor:
    e = x[:, 29:]
    return -0.5 * e[:, 0] + 0.3 * e[:, 1] + 0.2 * e[:, 2] + 0.1 * e[:, 3] + 5 * (0.5 - e[:, 2]).clamp(min=0)


def large_maze(s: torch.Tensor) -> torch.Tensor:
    return torch.stack([_length(s[:, 27:29] - s[:, 0:2]), 1 - s[:, 1:5].abs().sum(1),
                        _var(s[:, 5:13]) + _var(s[:, 19:27])], 1)


# ---- Fetch: s[25:28] is the goal -----------------------------------------------------------------------------------


def fetch_push(s: torch.Tensor) -> torch.Tensor:
    gripper, block, goal = s[:, 0:3], s[:, 3:6], s[:, 25:28]
    reach, push = block - gripper, goal - block
    cosine = (reach * push).sum(1) / (_length(reach) * _length(push) + SHORT)
    still = 1 / (1 + _length(s[:, 17:20]))
    first = torch.stack([_length(push), _length(reach), cosine.clamp(-1, 1).acos(), still], 1)
    return torch.cat([first, s[:, 20:23] - s[:, 14:17]], 1)


def fetch_push_reward(x: torch.Tensor) -> torch.Tensor:
    e = x[:, 28:]
    return -e[:, 0] - 0.5 * e[:, 1] - 0.5 * e[:, 2] + e[:, 3] + 0.1 * _length(e[:, 4:7])


# ---- Adroit ------------------------------------------------------------------------------------------------------


def hammer(s: torch.Tensor) -> torch.Tensor:
    upright = -s[:, 41] / _length(s[:, 39:42]).clamp(min=SHORT)
    return torch.stack([_length(s[:, 36:39] - s[:, 42:45]), upright, _std(s[:, 4:26]), _std(s[:, 0:4]), -s[:, 29]], 1)


def hammer_reward(x: torch.Tensor) -> torch.Tensor:
    e, k = x[:, 46:], torch.where(x[:, 26] < 0.1, 2.0, 0.5)
    return (-e[:, 0] + 2 * e[:, 1] + (1 + k) * (e[:, 2] + e[:, 3]) + 1.5 * e[:, 4]
            - (x[:, 45] - 15).clamp(min=0).square())


def door(s: torch.Tensor) -> torch.Tensor:
    way = s[:, 35:38]
    distance = _length(way).unsqueeze(1)  # (B, 1)
    return torch.cat([distance, way / distance.clamp(min=SHORT)], 1)


PAIRS = {  # by the beginning of the environment id
    "HalfCheetah-v": Pair(17, half_cheetah, _weighted(17, {0: 1, 2: -0.01, 3: -0.001, 4: 0.5})),
    "Hopper-v": Pair(11, hopper, _weighted(11, {3: 1, 6: 2, 4: -1, 5: -0.1})),
    "Walker2d-v": Pair(17, walker, _weighted(17, {0: 1, 4: 1, 1: 1, 2: -0.01})),
    "Ant-v": Pair(27, ant, _weighted(27, {0: 2, 1: 0.1, 2: -0.5, 3: -0.1, 4: -0.01, 5: 0.5})),
    "Swimmer-v": Pair(8, swimmer, _weighted(8, {0: 1, 1: -0.01}, positive=True)),
    "AntMaze_OpenDense-v": Pair(29, open_maze, _weighted(29, {0: -1, 1: 1, 2: 1}), goal=2),
    "AntMaze_MediumDense-v": Pair(29, medium_maze, medium_maze_reward, goal=2),
    "AntMaze_LargeDense-v": Pair(29, large_maze, _weighted(29, {0: -1, 1: 1, 2: 1}), goal=2),
    "FetchPushDense-v": Pair(28, fetch_push, fetch_push_reward, goal=3),
    "AdroitHandHammer-v": Pair(46, hammer, hammer_reward),
    "AdroitHandDoor-v": Pair(39, door, _weighted(39, {0: -1, 3: 1})),
}
