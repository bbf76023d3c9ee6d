"""MiniGrid and BabyAI tasks as vector environments.

Observations are {"image": (num_envs, 7, 7, 3) uint8, "direction": (num_envs,) int64}; the text mission is left out.
`image[:, x, y]` is (object, colour, state) of a cell as the agent sees it, the agent at (3, 6) facing smaller y.
`info["success"]` is 1 where a step is rewarded, else 0.

A step of minigrid spends its time in Python loops over the cells of the view. `MiniGridVectorEnv` has the grids of all
copies in one array of bytes and looks views up in it. It takes the tasks whose classes say that they step as it does;
the others run in `PlainMiniGridVectorEnv`. `tests/test_minigrid.py` steps both side by side, to the last bit.
"""
import contextlib
import io
import math
from functools import cache, partial

import gymnasium as gym
import numpy as np
from minigrid import envs as tasks
from minigrid.core.constants import COLOR_TO_IDX, OBJECT_TO_IDX
from minigrid.core.grid import Grid
from minigrid.core.world_object import Ball, Box, Door, Floor, Goal, Key, Lava, Wall, WorldObj
from minigrid.minigrid_env import MiniGridEnv

from envs.ids import EnvError
from envs.vector import GymVectorEnv, Observation, VectorEnv, layers

LEFT, RIGHT, FORWARD, PICKUP, DROP, TOGGLE, DONE = range(7)
STEPS = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]])  # (x, y) of one step in each direction; +1 turns right

# A cell is one byte, (object * 6 + colour) * 3 + state: what `encode` gives, and all that a step asks of an object.
KINDS = {kind: OBJECT_TO_IDX[kind.__name__.lower()] for kind in (Wall, Floor, Door, Key, Ball, Box, Goal, Lava)}
CODES = {(kind, colour): (KINDS[kind] * 6 + COLOR_TO_IDX[colour]) * 3 for kind in KINDS for colour in COLOR_TO_IDX}
TRIPLES = np.stack(np.unravel_index(np.arange(11 * 6 * 3), (11, 6, 3)), axis=1).astype(np.uint8)  # (198, 3), decoded
OBJECT, STATE = TRIPLES[:, 0], TRIPLES[:, 2]
OPEN, CLOSED, LOCKED = range(3)
EMPTY, OUTSIDE = OBJECT_TO_IDX["empty"] * 18, CODES[Wall, "grey"]
IS_OPEN_DOOR = (OBJECT == KINDS[Door]) & (STATE == OPEN)
ENTERED = np.isin(OBJECT, [OBJECT_TO_IDX["empty"], KINDS[Floor], KINDS[Goal], KINDS[Lava]]) | IS_OPEN_DOOR
CLEAR = ~np.isin(OBJECT, [KINDS[Wall], KINDS[Door]]) | IS_OPEN_DOOR  # seen through
HANDLED = np.zeros((7, len(TRIPLES)), bool)  # whether an action may change a cell ahead, or the hands
HANDLED[PICKUP] = np.isin(OBJECT, [KINDS[Key], KINDS[Ball], KINDS[Box]])
HANDLED[DROP] = OBJECT == OBJECT_TO_IDX["empty"]
HANDLED[TOGGLE] = np.isin(OBJECT, [KINDS[Door], KINDS[Box]])

# How an episode ends apart from goal, lava and time, by the function that a task's class has as its `step`.
ENDINGS = {MiniGridEnv.step: "", tasks.UnlockEnv.step: "unlock", tasks.DynamicObstaclesEnv.step: "obstacles",
           **{task.step: "pickup" for task in (tasks.UnlockPickupEnv, tasks.BlockedUnlockPickupEnv,
                                               tasks.KeyCorridorEnv, tasks.ObstructedMazeEnv)}}
UNTOUCHED = {gym.wrappers.OrderEnforcing, gym.wrappers.PassiveEnvChecker, gym.wrappers.TimeLimit}  # what is seen
INHERITED = ("reset", "gen_obs", "gen_obs_grid", "get_view_exts", "place_obj", "front_pos", "dir_vec", "_reward")


def is_grid(env_id: str) -> bool:
    """Whether `env_id` is a task of the minigrid package."""
    return env_id.startswith(("MiniGrid-", "BabyAI-"))


def shows_grid(env: gym.Env) -> bool:
    """Whether `env` observes as its task does; a wrapper around it may make something else of it."""
    space = env.observation_space
    return isinstance(space, gym.spaces.Dict) and {"image", "direction"} <= space.spaces.keys()


def observation_space(env: gym.Env) -> gym.spaces.Dict:
    """What these classes observe of `env`."""
    return gym.spaces.Dict({key: env.observation_space[key] for key in ("image", "direction")})


def time_limit(env: gym.Env) -> int | None:
    """Steps of an episode. Tasks count them themselves, not in a wrapper; BabyAI has a limit for each mission, and 0
    before the first one."""
    return min(filter(None, (env.spec.max_episode_steps, env.unwrapped.max_steps)), default=None)


def missing_file(env: gym.Env) -> str:
    """Name of a file that the task needs and the minigrid package came without (the WFC tasks of 3.2.0), or ""."""
    pattern = getattr(getattr(env.unwrapped, "config", None), "pattern_path", None)
    return pattern.name if pattern and not pattern.exists() else ""


class PlainMiniGridVectorEnv(GymVectorEnv):
    """Any MiniGrid or BabyAI id, one copy after another."""

    def __init__(self, env_id: str, num_envs: int, time_feature: bool = True, **kwargs):
        super().__init__(env_id, num_envs, time_feature, **kwargs)
        if missing := missing_file(self.env):
            raise EnvError(f"{env_id} needs {missing}, which the installed minigrid lacks; use another task")
        self.observation_space, self.max_episode_steps = observation_space(self.env), time_limit(self.env)
        self.start: list[dict | None] = [None] * num_envs  # random stream from which the episode was made
        self.actions: list[list[int]] = [[] for _ in range(num_envs)]  # of the episode

    def _reset(self, i: int, seed: int | None) -> None:
        env = self.envs[i].unwrapped
        if seed is not None:
            env.np_random = gym.utils.seeding.np_random(seed)[0]
        self.start[i], self.actions[i] = env.np_random.bit_generator.state, []
        with contextlib.redirect_stdout(io.StringIO()):  # BabyAI prints each mission that it draws and rejects
            obs, _ = self.envs[i].reset()
        self.current[i] = {"image": obs["image"], "direction": obs["direction"]}

    def _step(self, action):
        for actions, a in zip(self.actions, action):
            actions.append(int(a))
        reward, terminated, truncated, _ = super()._step(action)
        self.current = [{"image": obs["image"], "direction": obs["direction"]} for obs in self.current]
        return reward.astype(np.float64), terminated, truncated, (reward > 0).astype(np.float64)

    def _snapshot(self, i: int) -> dict:
        # The state of a task is a web of objects: doors, boxes with contents, a verifier that holds some of them. Tasks
        # are deterministic given their random stream, so its state at the reset and the actions since say the same.
        return {"rng": self.start[i], "actions": np.array(self.actions[i], np.uint8)}

    def _restore(self, i: int, snapshot: dict) -> None:
        self.envs[i].unwrapped.np_random.bit_generator.state = snapshot["rng"]
        self._reset(i, None)
        for action in np.asarray(snapshot["actions"]).tolist():
            obs = self.envs[i].step(action)[0]
            self.actions[i].append(action)
            self.current[i] = {"image": obs["image"], "direction": obs["direction"]}


def code(obj: WorldObj | None) -> int:
    """The byte of a cell. Raises KeyError for what has no place in it: other classes, doors both open and locked."""
    if obj is None:
        return EMPTY
    cell = CODES[type(obj), obj.color]
    if type(obj) is Door:
        return cell + {(True, False): OPEN, (False, False): CLOSED, (False, True): LOCKED}[obj.is_open, obj.is_locked]
    return cell


def place_obj(task: MiniGridEnv, obj: WorldObj | None, top=None, size=None, reject_fn=None, max_tries=math.inf):
    """`MiniGridEnv.place_obj`, the same draws in half the time: most of a reset is trying cells."""
    integers, grid, agent = task.np_random.integers, task.grid, tuple(map(int, task.agent_pos))
    left, upper = (max(edge, 0) for edge in top or (0, 0))
    width, height = size or (grid.width, grid.height)
    right, lower, tries = min(left + width, grid.width), min(upper + height, grid.height), 0
    while tries <= max_tries:
        tries += 1
        x, y = place = integers(left, right), integers(upper, lower)
        if grid.grid[y * grid.width + x] is None and place != agent and not (reject_fn and reject_fn(task, place)):
            grid.grid[y * grid.width + x] = obj
            if obj is not None:
                obj.init_pos = obj.cur_pos = place
            return place
    raise RecursionError("rejection sampling failed in place_obj")  # what tasks catch


@cache
def sight(width: int) -> np.ndarray:
    """How sight spreads along a row of the view and to the row behind it, for every row at once.

    Index: cells seen so far << 7 | cells seen through, as bits, x = 0 the lowest. Entry: cells seen of the row behind
    << 7 | cells seen of this one, (2 ** 14,) uint16. Minigrid's `process_vis` as a table.
    """
    seen, through = np.divmod(np.arange(2 ** 14), 128)
    behind = np.zeros_like(seen)
    for side, cells in ((1, range(width - 1)), (-1, range(width - 1, 0, -1))):
        for x in cells:
            spreads = (seen & through) >> x & 1
            seen = seen | spreads << (x + side)
            behind = behind | spreads << x | spreads << (x + side)
    return (behind << 7 | seen).astype(np.uint16)


class MiniGridVectorEnv(VectorEnv):
    """`num_envs` copies of one task in arrays. One task object of minigrid makes all their grids, each from its own
    random stream.

    Attributes beside VectorEnv's: cells (num_envs, height + 2 margin, width + 2 margin), walls around the grid so that
    no view leaves it; here (num_envs,), the agents' places as indices into cells.ravel(); direction (num_envs,).
    """

    def __init__(self, env_id: str, num_envs: int, time_feature: bool = True, **kwargs):
        super().__init__(gym.make(env_id, disable_env_checker=True, **kwargs), num_envs, time_feature)
        self.observation_space, self.max_episode_steps = observation_space(self.env), time_limit(self.env)
        self.task = task = self.env.unwrapped
        task.gen_obs, task.place_obj = dict, partial(place_obj, task)  # a reset need not observe
        self.ending = ENDINGS.get(type(task).step, "")  # "": a subclass may know how it ends
        self.rng = [gym.utils.seeding.np_random()[0] for _ in range(num_envs)]
        view = self.view = task.agent_view_size
        self.margin = view - 1
        self.cells = np.full((num_envs, task.height + 2 * self.margin, task.width + 2 * self.margin), OUTSIDE, np.uint8)
        self.flat, self.row = self.cells.reshape(-1), self.cells.shape[2]
        self.first = np.arange(num_envs) * self.cells[0].size  # index of each copy's first cell
        self.here, self.direction = np.zeros((2, num_envs), np.int64)
        self.carried = np.full(num_envs, EMPTY, np.uint8)
        # what boxes hold, by cell, and the carried one; EMPTY for nothing
        self.inside, self.carried_inside = np.full_like(self.flat, EMPTY), self.carried.copy()
        self.target = np.full(num_envs, -1)  # the cell of the task's object; -1 where it is gone
        self.obstacles: list[list[list[int]]] = [[] for _ in range(num_envs)]  # [x, y] of each

        self.ahead = STEPS @ [1, self.row]  # (4,), from a cell to the one ahead
        right, (x, y) = np.roll(self.ahead, -1), np.indices((view, view)).reshape(2, -1)
        # (4, view * view), from the agent to the cells of its view
        self.window = np.outer(self.ahead, view - 1 - y) + np.outer(right, x - view // 2)

    @staticmethod
    def fits(env: gym.Env) -> bool:
        """Whether this class steps the task as its own class does: by its methods, by the objects of a grid, and by
        what is around it, of which only time limits are known here."""
        task = env.unwrapped
        if {type(layer) for layer in layers(env)} - UNTOUCHED:
            return False
        if task.render_mode or type(task).step not in ENDINGS or task.agent_view_size > 7 or missing_file(env) or any(
                getattr(type(task), name) is not getattr(MiniGridEnv, name) for name in INHERITED):
            return False
        task.reset(seed=0)
        try:
            for obj in task.grid.grid:
                code(obj)
                code(getattr(obj, "contains", None))
        except KeyError:
            return False
        return type(task.grid) is Grid

    def _reset(self, i: int, seed: int | None) -> None:
        if seed is not None:
            self.rng[i] = gym.utils.seeding.np_random(seed)[0]
        task, edge = self.task, self.margin
        task.np_random = self.rng[i]
        task.reset()
        grid, height, width = task.grid.grid, task.height, task.width
        codes = [EMPTY if obj is None else code(obj) for obj in grid]  # row by row
        self.cells[i, edge:edge + height, edge:edge + width].flat = codes
        self.here[i] = self.place(i, *task.agent_pos)
        self.direction[i], self.carried[i] = task.agent_dir, EMPTY
        for k, obj in enumerate(grid):
            if type(obj) is Box:
                self.inside[self.place(i, k % width, k // width)] = code(obj.contains)
        if self.ending in ("unlock", "pickup"):
            wanted = task.door if self.ending == "unlock" else task.obj
            k = next(k for k, obj in enumerate(grid) if obj is wanted)
            self.target[i] = self.place(i, k % width, k // width)
        elif self.ending == "obstacles":
            self.obstacles[i] = [list(map(int, obj.cur_pos)) for obj in task.obstacles]

    def place(self, i: int, x: int, y: int) -> int:
        """Index into `flat` of the cell (x, y) of copy i's grid."""
        return int(self.first[i]) + (y + self.margin) * self.row + x + self.margin

    def _step(self, action):
        action = np.asarray(action)
        blocked = None
        if self.ending == "obstacles":
            front = self.flat[self.here + self.ahead[self.direction]]
            blocked = (action == FORWARD) & (front != EMPTY) & (OBJECT[front] != KINDS[Goal])
            for i in range(self.num_envs):
                self._move_obstacles(i)
        front = self.here + self.ahead[self.direction]  # of actions other than turns, which ask for none
        ahead = self.flat[front]
        forward = action == FORWARD
        self.here = np.where(forward & ENTERED[ahead], front, self.here)
        self.direction = (self.direction + (action == RIGHT) - (action == LEFT)) & 3
        kind = OBJECT[ahead]
        rewarded = forward & (kind == KINDS[Goal])
        terminated = rewarded | forward & (kind == KINDS[Lava])
        picked = [i for i in np.flatnonzero(HANDLED[action, ahead]) if self._handle(i, action[i], front[i])]
        if self.ending == "pickup":
            rewarded[picked] = terminated[picked] = True
        elif self.ending == "unlock":
            opened = (action == TOGGLE) & IS_OPEN_DOOR[self.flat[self.target]]
            rewarded, terminated = rewarded | opened, terminated | opened
        reward = np.where(rewarded, 1 - 0.9 * ((self.elapsed + 1) / self.task.max_steps), 0.0)
        if blocked is not None:
            reward, terminated = np.where(blocked, -1.0, reward), terminated | blocked
        return reward, terminated, np.zeros(self.num_envs, bool), (reward > 0).astype(np.float64)

    def _handle(self, i: int, action: int, front: int) -> bool:
        """Pickup, drop or toggle of copy i; whether it takes the task's object."""
        cell, hands = int(self.flat[front]), int(self.carried[i])
        if action == PICKUP and hands == EMPTY:
            self.carried[i], self.carried_inside[i] = cell, self.inside[front]
            self.flat[front] = EMPTY
            return front == self.target[i]
        if action == DROP and hands != EMPTY:
            self.flat[front], self.inside[front] = hands, self.carried_inside[i]
            self.carried[i] = EMPTY
        elif action == TOGGLE and OBJECT[cell] == KINDS[Box]:  # what it holds takes its place
            self.flat[front] = self.inside[front]
            if front == self.target[i]:
                self.target[i] = -1
        elif action == TOGGLE and STATE[cell] != LOCKED:
            self.flat[front] = cell + 1 if STATE[cell] == OPEN else cell - 1
        elif action == TOGGLE and OBJECT[hands] == KINDS[Key] and TRIPLES[hands, 1] == TRIPLES[cell, 1]:
            self.flat[front] = cell - LOCKED
        return False

    def _move_obstacles(self, i: int) -> None:
        """Each obstacle goes to a random free cell around it, drawn as the original draws it."""
        cells, edge, integers, agent = self.cells[i], self.margin, self.rng[i].integers, self.here[i]
        for place in self.obstacles[i]:
            left, top = max(place[0] - 1, 0), max(place[1] - 1, 0)
            right, bottom = min(left + 3, self.task.width), min(top + 3, self.task.height)
            for _ in range(101):
                x, y = int(integers(left, right)), int(integers(top, bottom))
                if cells[y + edge, x + edge] == EMPTY and self.place(i, x, y) != agent:
                    cells[y + edge, x + edge] = cells[place[1] + edge, place[0] + edge]
                    cells[place[1] + edge, place[0] + edge] = EMPTY
                    place[:] = x, y
                    break

    def _observe(self) -> Observation:
        view, n = self.view, self.num_envs
        cells = self.flat[self.here[:, None] + self.window[self.direction]].reshape(n, view, view)
        if not self.task.see_through_walls:
            through = np.packbits(CLEAR[cells], axis=1, bitorder="little")[:, 0].T  # (n, x, y) -> (y, n), x as bits
            table, rows = sight(view), np.empty((view, n), np.uint16)
            row = np.full(n, 1 << view // 2 + 7, np.uint16)  # the agent sees its own cell
            for y in reversed(range(view)):
                row = rows[y] = table[row & 0x3F80 | through[y]]
            seen = np.unpackbits(rows.T.astype(np.uint8)[:, None], axis=1, count=view, bitorder="little")  # (n, x, y)
            cells *= seen  # 0 is the code of an unseen cell
        cells[:, view // 2, view - 1] = self.carried
        return {"image": TRIPLES[cells], "direction": self.direction.copy()}

    def _snapshot(self, i: int) -> dict:
        held = slice(self.first[i], self.first[i] + self.cells[i].size)
        return {"rng": self.rng[i].bit_generator.state, "cells": self.flat[held].copy(),
                "inside": self.inside[held].copy(), "here": int(self.here[i] - self.first[i]),
                "direction": int(self.direction[i]), "carried": int(self.carried[i]),
                "carried_inside": int(self.carried_inside[i]), "target": int(self.target[i] - self.first[i]),
                "obstacles": [list(place) for place in self.obstacles[i]]}

    def _restore(self, i: int, snapshot: dict) -> None:
        self.rng[i].bit_generator.state = snapshot["rng"]
        held = slice(self.first[i], self.first[i] + self.cells[i].size)
        self.flat[held], self.inside[held] = np.asarray(snapshot["cells"]), np.asarray(snapshot["inside"])
        for name in ("here", "target"):
            getattr(self, name)[i] = snapshot[name] + self.first[i]
        for name in ("direction", "carried", "carried_inside"):
            getattr(self, name)[i] = snapshot[name]
        self.obstacles[i] = [list(map(int, place)) for place in snapshot["obstacles"]]
