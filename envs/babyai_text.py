"""BabyAI-Text: tasks in one square room of BabyAI, and captions of what the agent sees.

The tasks are those of Zhang et al. (2024, arXiv 2407.03964), made from the levels of the minigrid package. A target of
a fixed colour and type lies among random keys, balls and boxes. The mission is not observed: a learner finds out by
reward what the task is. Two tasks have two targets, which are to be reached one after the other.

`gym.make` gives observations with a `description`. `BabyAITextVectorEnv` steps all copies in arrays and leaves the text
out: a caption is a function of the image, so whoever reads it asks for it (`captions`). tests/test_babyai_text.py steps
both side by side, to the last bit.
"""
import contextlib
import io
import string
from functools import lru_cache

import gymnasium as gym
import numpy as np
from minigrid.core.constants import COLOR_TO_IDX, IDX_TO_COLOR, IDX_TO_OBJECT, OBJECT_TO_IDX
from minigrid.envs.babyai.core.levelgen import LevelGen
from minigrid.envs.babyai.core.roomgrid_level import RejectSampling, RoomGridLevel
from minigrid.envs.babyai.core.verifier import AfterInstr, BeforeInstr, GoToInstr, ObjDesc, PickupInstr

from envs.minigrid import DROP, EMPTY, PICKUP, MiniGridVectorEnv

UNSEEN, WALL, DOOR = (OBJECT_TO_IDX[name] for name in ("unseen", "wall", "door"))
DOOR_STATES = ("an open", "a closed", "a locked")
ACTION_WORDS = ("turn left", "turn right", "move forward", "pick up the object in front", "drop the object you carry",
                "toggle the object in front", "do nothing")


@lru_cache(200_000)
def _clauses(image: bytes) -> tuple[str, ...]:
    cells = np.frombuffer(image, np.uint8).reshape(7, 7, 3).tolist()
    said = []
    kind, colour, _ = cells[3][6]
    if kind > 1:
        said.append(f"You carry a {IDX_TO_COLOR[colour]} {IDX_TO_OBJECT[kind]}")
    for way, ray in (("forward", [cells[3][y] for y in range(5, -1, -1)]), ("left", [cells[x][6] for x in (2, 1, 0)]),
                     ("right", [cells[x][6] for x in (4, 5, 6)])):
        first = next((k for k, cell in enumerate(ray) if cell[0] > 1), None)  # what lies first hides a wall behind it
        if first is not None and ray[first][0] == WALL:
            said.append(f"You see a wall {steps(first + 1)} {way}")
    for x in range(7):
        for y in range(7):
            kind, colour, state = cells[x][y]
            if kind < 2 or kind == WALL or (x, y) == (3, 6):
                continue
            article = DOOR_STATES[state] if kind == DOOR else "a"
            side = [f"{steps(abs(x - 3))} {'left' if x < 3 else 'right'}"] if x != 3 else []
            ahead = [f"{steps(6 - y)} forward"] if y != 6 else []
            said.append(f"You see {article} {IDX_TO_COLOR[colour]} {IDX_TO_OBJECT[kind]} {' and '.join(side + ahead)}")
    return tuple(said) or ("You see nothing in front.",)


def steps(count: int) -> str:
    return f"{count} step" if count == 1 else f"{count} steps"


def clauses(image: np.ndarray) -> tuple[str, ...]:
    """What a view (7, 7, 3) uint8 shows, a phrase each: what is carried, walls in the three directions, then objects
    from left to right, the farthest of a column first. Hidden cells are left out."""
    return _clauses(np.ascontiguousarray(image, np.uint8).tobytes())


def caption(image: np.ndarray) -> str:
    """The view (7, 7, 3) uint8 as text, the phrases of `clauses` joined by ". "."""
    return ". ".join(clauses(image))


class Sought(ObjDesc):
    """A description of objects by colour and type. ObjDesc's own search is most of the time of a reset."""

    def find_matching_objs(self, env, use_location: bool = True):
        grid = env.unwrapped.grid
        found = [(obj, divmod(k, grid.width)[::-1]) for k, obj in enumerate(grid.grid)
                 if obj is not None and obj.type == self.type and obj.color == self.color
                 and (use_location or any(obj is known for known in self.obj_set))]
        if use_location:
            self.obj_set = [obj for obj, _ in found]
        self.obj_poss = [place for _, place in found]
        return self.obj_set, self.obj_poss


class Described:
    """What all levels here share: `description`, a caption of the image, in the observations, and a faster check."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        text = gym.spaces.Text(4096, charset=string.printable)  # the default charset has neither space nor period
        self.observation_space = gym.spaces.Dict({**self.observation_space.spaces, "description": text})

    def gen_obs(self) -> dict:
        obs = super().gen_obs()
        return obs | {"description": caption(obs["image"])}

    def check_objs_reachable(self, raise_exc: bool = True) -> bool:
        """RoomGridLevel's, for grids without doors, in a fraction of the time."""
        width, cells = self.grid.width, self.grid.grid
        reached, stack = bytearray(len(cells)), [int(self.agent_pos[1]) * width + int(self.agent_pos[0])]
        while stack:
            k = stack.pop()
            if not reached[k]:
                reached[k] = 1
                if cells[k] is None:
                    stack += (k - 1, k + 1, k - width, k + width)
        lost = any(obj is not None and obj.type != "wall" and not reached[k] for k, obj in enumerate(cells))
        if lost and raise_exc:
            raise RejectSampling("an object cannot be reached")
        return not lost


class GoToLevel(Described, RoomGridLevel):
    """Face an object of one colour and type."""

    def __init__(self, colours: tuple[str, ...], types: tuple[str, ...], room_size: int, num_dists: int,
                 max_steps: int | None = None, **kwargs):
        self.colours, self.types, self.num_dists = colours, types, num_dists
        super().__init__(num_rows=1, num_cols=1, room_size=room_size, max_steps=max_steps or room_size ** 2, **kwargs)

    def gen_mission(self) -> None:
        self.place_agent()
        # of several, one is drawn for each episode; the released code asks numpy's global generator, whatever the seed
        colour, kind = (x[0] if len(x) == 1 else self._rand_elem(x) for x in (self.colours, self.types))
        self.add_object(0, 0, kind, colour)
        self.add_distractors(num_distractors=self.num_dists, all_unique=False)
        self.check_objs_reachable()
        self.targets = [(kind, colour)]
        self.instrs = GoToInstr(Sought(kind, colour))


class FixedTargets(Described, LevelGen):
    """Levels with the given targets in one room, the agent placed last."""

    navigations = 1  # a task may take room_size ** 2 steps for each

    def __init__(self, targets: tuple[tuple[str, str], ...], room_size: int, num_dists: int,
                 max_steps: int | None = None, **kwargs):
        self.targets = targets  # (type, colour), in the order in which they are wanted
        super().__init__(room_size=room_size, num_rows=1, num_cols=1, num_dists=num_dists, locked_room_prob=0,
                         locations=False, unblocking=False, max_steps=max_steps or self.navigations * room_size ** 2,
                         **kwargs)

    def gen_mission(self) -> None:
        self.connect_all()
        for kind, colour in self.targets:
            self.add_object(0, 0, kind, colour)
        self.add_distractors(num_distractors=self.num_dists, all_unique=False)
        self.place_agent()
        self.check_objs_reachable()
        self.instrs = self.instruction(*(Sought(kind, colour) for kind, colour in self.targets))


class SequenceLevel(FixedTargets):
    """Face the first target, then the second one. The second one before the first one counts for nothing."""

    navigations = 2

    def instruction(self, first: Sought, second: Sought):
        if self._rand_elem(["before", "after"]) == "before":
            return BeforeInstr(GoToInstr(first), GoToInstr(second))
        return AfterInstr(GoToInstr(second), GoToInstr(first))


class GreenKeyLevel(SequenceLevel):
    """Purple ball, then green key; as released, in spite of its name, purple ball, then purple box."""

    def __init__(self, official_target: bool = False, **kwargs):
        second = ("box", "purple") if official_target else ("key", "green")
        super().__init__(targets=(("ball", "purple"), second), **kwargs)


class PickUpLevel(FixedTargets):
    """Pick up an object of one colour and type."""

    def instruction(self, target: Sought):
        return PickupInstr(target)


class BabyAITextVectorEnv(MiniGridVectorEnv):
    """`num_envs` copies of one task in arrays, without text.

    Attributes beside MiniGridVectorEnv's: wanted (k, num_envs), bytes of the k targets; places (k, size of `flat`)
    bool, where the task takes them to be; reached (num_envs,), how many targets have been reached.
    """

    def __init__(self, env_id: str, num_envs: int, time_feature: bool = True, **kwargs):
        super().__init__(env_id, num_envs, time_feature, **kwargs)
        self.picks_up = isinstance(self.task, PickUpLevel)
        k = 2 if isinstance(self.task, SequenceLevel) else 1
        self.wanted, self.places = np.zeros((k, num_envs), np.uint8), np.zeros((k, self.flat.size), bool)
        self.reached, self.moved = np.zeros(num_envs, np.int64), np.zeros(num_envs, bool)
        # moved: whether an object has left its place or come to one since the task last looked for its targets

    def _reset(self, i: int, seed: int | None) -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # minigrid prints each mission that it draws and rejects
            super()._reset(i, seed)
        self.wanted[:, i] = [(OBJECT_TO_IDX[kind] * 6 + COLOR_TO_IDX[colour]) * 3 for kind, colour in self.task.targets]
        self.reached[i] = 0
        self._look(i)

    def _look(self, i: int) -> None:
        """Find the targets of copy i, as minigrid's verifier does at resets and after every drop. Until a drop, a
        target that was picked up still counts at the place where it lay."""
        held = slice(self.first[i], self.first[i] + self.cells[i].size)
        self.places[:, held] = self.flat[held] == self.wanted[:, i:i + 1]
        self.moved[i] = False

    def _handle(self, i: int, action: int, front: int) -> bool:
        self.moved[i] = True
        return super()._handle(i, action, front)

    def _step(self, action):
        action, hands = np.asarray(action), self.carried.copy()
        _, terminated, truncated, _ = super()._step(action)
        if self.picks_up:
            succeeded = (action == PICKUP) & (hands == EMPTY) & (self.carried == self.wanted[0])
        else:
            for i in np.flatnonzero((action == DROP) & self.moved):
                self._look(i)
            front = self.here + self.ahead[self.direction]
            for k, places in enumerate(self.places):
                self.reached += (self.reached == k) & places[front]
            succeeded = self.reached == len(self.wanted)
        reward = np.where(succeeded, 1 - 0.9 * ((self.elapsed + 1) / self.task.max_steps), 0.0)
        return reward, terminated | succeeded, truncated, succeeded.astype(np.float64)

    def _snapshot(self, i: int) -> dict:
        held = slice(self.first[i], self.first[i] + self.cells[i].size)
        return super()._snapshot(i) | {"wanted": self.wanted[:, i].copy(), "places": self.places[:, held].copy(),
                                       "reached": int(self.reached[i]), "moved": bool(self.moved[i])}

    def _restore(self, i: int, snapshot: dict) -> None:
        super()._restore(i, snapshot)
        held = slice(self.first[i], self.first[i] + self.cells[i].size)
        self.wanted[:, i], self.places[:, held] = np.asarray(snapshot["wanted"]), np.asarray(snapshot["places"])
        self.reached[i], self.moved[i] = snapshot["reached"], snapshot["moved"]


def _register() -> None:
    """The 17 tasks of the paper, and three of ours: larger, or with a short time limit (-L<steps>)."""
    here, prefix = __name__, "BabyAI-Text-"
    named = {"RedBall": ("ball", "red"), "PurpleBall": ("ball", "purple"), "RedKey": ("key", "red"),
             "PurpleKey": ("key", "purple"), "BlueBox": ("box", "blue")}
    gym.register(f"{prefix}GoToLocal-Pretraining-S20", f"{here}:GoToLevel", kwargs=dict(
        colours=("red", "green", "blue"), types=("ball", "box"), room_size=20, num_dists=7))
    for size, distractors in ((20, 7), (23, 12), (25, 15), (28, 20), (30, 25)):
        for name in ("RedBall", "PurpleBall", "RedKey", "PurpleKey") if size == 20 else ("RedBall", "PurpleKey"):
            kind, colour = named[name]
            gym.register(f"{prefix}GoToLocal-{name}-S{size}", f"{here}:GoToLevel", kwargs=dict(
                colours=(colour,), types=(kind,), room_size=size, num_dists=distractors))
    gym.register(f"{prefix}GoTo-RedBallBlueBox-S20", f"{here}:SequenceLevel", kwargs=dict(
        targets=(named["RedBall"], named["BlueBox"]), room_size=20, num_dists=7))
    gym.register(f"{prefix}GoTo-PurpleBallGreenKey-S20", f"{here}:GreenKeyLevel", kwargs=dict(
        room_size=20, num_dists=7))
    for name in ("RedBall", "PurpleKey"):
        gym.register(f"{prefix}PickUp-{name}-S20", f"{here}:PickUpLevel", kwargs=dict(
            targets=(named[name],), room_size=20, num_dists=8))
    both = (named["RedBall"], named["BlueBox"])
    for end, room_size, distractors, limit in (("S30", 30, 25, None), ("S20-L200", 20, 7, 200)):
        gym.register(f"{prefix}GoTo-RedBallBlueBox-{end}", f"{here}:SequenceLevel", kwargs=dict(
            targets=both, room_size=room_size, num_dists=distractors, max_steps=limit))
    gym.register(f"{prefix}PickUp-RedBall-S30-L80", f"{here}:PickUpLevel", kwargs=dict(
        targets=(named["RedBall"],), room_size=30, num_dists=25, max_steps=80))


_register()
