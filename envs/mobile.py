"""Four tasks of a robot in a room, of the S-RL Toolbox (Raffin et al. 2018, arXiv 1809.09369), as numbers or pictures.

The room is 4 m wide; x grows downwards in the picture, y to the right. A step moves the robot by 0.1 m. Whoever bumps
into a wall stays. All episodes have 251 steps, because the toolbox ends them when its counter has passed 250.

    MobileRobot-v0             reward 1 within 0.4 m of the target, -1 for a bump wherever it is, else 0
    MobileRobot1D-v0           along x alone
    MobileRobot2Target-v0      reaching the first target makes the second one the target
    MobileRobotLineTarget-v0   reward within 0.1 m of the line 0.2 m before the target's x

Ids have options behind the task: MobileRobotRandomTarget-v0 draws targets in every episode, MobileRobotContinuous-v0
takes actions in [-1, 1]^2 (not 1D, not 2Target), MobileRobotShaped-v0 rewards by minus the distance; in this order all
of them, as in MobileRobotLineTargetRandomTargetContinuousShaped-v0. `pixels=True` observes pictures (size, size, 3)
uint8, as does an id with an encoder (envs/encoders.py): MobileRobot-v0:pixels.

An episode succeeds where each of its last ten steps was at the (last) target without a bump.
"""
from itertools import product

import gymnasium as gym
import numpy as np

from envs.ids import EnvError
from envs.vector import narrow_goals
from envs.world import WorldEnv, WorldVectorEnv, check_actions

TASKS = ("", "1D", "2Target", "LineTarget")
HORIZON = 251
STEP, REACHED, LINE, BEFORE = 0.1, 0.4, 0.1, 0.2  # m: a step; at a target, at a line; the line before its target
LOW, HIGH = np.array([0.425, 0.2]), np.array([3.575, 3.8])  # where the middle of the robot may be
STREAK = 10  # steps at the target that are a success
MOVES = np.array([[-STEP, 0], [STEP, 0], [0, -STEP], [0, STEP]])
ACTION_WORDS = ("x-", "x+", "y-", "y+")
FIRST, SECOND = (3.6, 3.0), (0.4, 3.0)  # targets that are not drawn

SIDE = 5.081  # m that a picture shows: a camera 4.4 m above the middle, 60 degrees wide
FLOOR, ROBOT, YELLOW, SECOND_RED = (225, 225, 225), (60, 60, 60), (255, 255, 0), (255, 0, 0)
WALLS = (((0, 4), (-0.05, 0.05), (204, 0, 0)), ((0, 4), (3.95, 4.05), (0, 204, 0)),
         ((-0.05, 0.05), (0, 4), (0, 0, 204)), ((3.95, 4.05), (0, 4), (0, 0, 0)))  # m: x, y; colour
ROBOT_HALF, DISC, BAR = (0.325, 0.1), 0.2, 0.1  # m: half sides, radius, half thickness of a line

IDS = [f"MobileRobot{task}{''.join(words)}-v0" for task in TASKS for words in product(
    ("", "RandomTarget"), ("", "Continuous")[:1 if task in ("1D", "2Target") else 2], ("", "Shaped"))]
for env_id in IDS:
    name = env_id.removeprefix("MobileRobot").removesuffix("-v0")
    gym.register(env_id, entry_point="envs.mobile:MobileEnv", max_episode_steps=HORIZON, kwargs={
        "task": next(task for task in reversed(TASKS) if name.startswith(task)),
        "random_target": "RandomTarget" in name, "continuous": "Continuous" in name, "shaped": "Shaped" in name,
        "pixels": False})


class World:
    """`num` rooms of a task, a row each.

    Attributes: position (num, 2) m; targets (num, 1 or 2, 2) m; current (num,), which of them is the target; streak
    (num,), steps in a row at the last target.
    """

    def __init__(self, task: str, num: int, random_target: bool = False, continuous: bool = False,
                 shaped: bool = False, pixels: bool = False, size: int = 64):
        if continuous and task in ("1D", "2Target"):
            raise EnvError(f"MobileRobot{task} has discrete actions alone; leave continuous out")
        if not isinstance(size, int) or size < 16:
            raise EnvError(f"size {size!r} is no whole number from 16 on: the pixels of a side")
        self.task, self.random_target, self.continuous, self.shaped = task, random_target, continuous, shaped
        self.pixels, self.size, self.axes = pixels, size, 1 if task == "1D" else 2
        self.moves = MOVES[:2 * self.axes]
        count = 2 if task == "2Target" else 1
        self.position, self.targets = np.zeros((num, 2)), np.tile((FIRST, SECOND)[:count], (num, 1, 1))
        if task == "1D":
            self.targets[:, :, 1] = 0.0
        self.current, self.streak = np.zeros(num, np.int64), np.zeros(num, np.int64)
        self.canvas = background(size)

    def reset(self, i: int, rng: np.random.Generator) -> None:
        """Start an episode of copy i."""
        self.position[i, :self.axes] = 2 + rng.uniform(-4 / 3, 4 / 3, self.axes)
        if self.random_target:
            axes = 1 if self.task == "LineTarget" else self.axes
            self.targets[i, :, :axes] = rng.uniform(0.4, 3.6, (self.targets.shape[1], axes))
        self.current[i] = self.streak[i] = 0

    def target(self) -> np.ndarray:
        """The target of each copy (num, 2) m; of a line, the middle of where it wants the robot."""
        target = self.targets[np.arange(len(self.current)), self.current]
        return np.stack([target[:, 0] - BEFORE, np.full(len(target), 2.0)], 1) if self.task == "LineTarget" else target

    def distance(self) -> np.ndarray:
        """Metres to each target (num,), along x alone where y does not count."""
        way = self.position - self.target()
        return np.abs(way[:, 0]) if self.task in ("1D", "LineTarget") else np.sqrt(np.square(way).sum(1))

    def step(self, action: np.ndarray) -> np.ndarray:
        """Move all copies by actions (num, 2), or (num,) whole numbers: x-, x+, y-, y+. Returns rewards (num,).

        Raises EnvError for other actions."""
        if self.continuous:
            check_actions(action, self.position.shape)
            move = np.clip(action, -1.0, 1.0).astype(np.float64) * STEP
        else:
            if action.shape != self.current.shape or not ((action >= 0) & (action < len(self.moves))).all():
                raise EnvError(f"actions {action} are not one of 0 to {len(self.moves) - 1} per copy")
            move = self.moves[action]
        new = self.position + move
        bumped = ((new < LOW) | (new > HIGH))[:, :self.axes].any(1)
        self.position = np.where(bumped[:, None], self.position, new)
        distance = self.distance()
        reached = distance <= (LINE if self.task == "LineTarget" else REACHED)
        last = self.targets.shape[1] - 1
        self.streak = np.where(reached & ~bumped & (self.current == last), self.streak + 1, 0)
        self.current = np.where(reached, np.minimum(self.current + 1, last), self.current)
        return -distance if self.shaped else np.where(bumped, -1.0, reached.astype(np.float64))

    def success(self) -> np.ndarray:
        """Whether each robot has been at its target for ten steps (num,)."""
        return self.streak >= STREAK

    def observe(self) -> np.ndarray:
        """The way from the target to the robot (num, 1 or 2) float32 in m, or pictures (num, size, size, 3) uint8."""
        if self.pixels:
            return np.stack([self.draw(i) for i in range(len(self.position))])
        return (self.position - self.target())[:, :self.axes].astype(np.float32)

    def ground_truth(self) -> dict[str, np.ndarray]:
        """What a representation should know, (num,) m each: the robot's place, and a target's if it is drawn."""
        truth = dict(zip("xy", self.position.T[:self.axes].copy()))
        if self.random_target:
            for k in range(self.targets.shape[1]):
                place = self.targets[:, k].T[:1 if self.task == "LineTarget" else self.axes].copy()
                truth |= dict(zip((f"target{k + 1}_x", f"target{k + 1}_y"), place))
        return truth

    def draw(self, i: int, canvas: np.ndarray | None = None) -> np.ndarray:
        """Picture of copy i, (size, size, 3) uint8, or of the size of a `canvas`. The robot hides its target."""
        picture = (self.canvas if canvas is None else canvas).copy()
        for (x, y), colour in reversed(list(zip(self.targets[i], (YELLOW, SECOND_RED)))):
            if self.task == "LineTarget":
                fill(picture, (x - BAR, x + BAR), (0.05, 3.95), colour)
            else:
                disc(picture, x, y, colour)
        x, y = self.position[i]
        fill(picture, (x - ROBOT_HALF[0], x + ROBOT_HALF[0]), (y - ROBOT_HALF[1], y + ROBOT_HALF[1]), ROBOT)
        return picture

    def snapshot(self, i: int) -> dict:
        """Copy i as plain numbers and arrays."""
        return {"position": self.position[i].copy(), "targets": self.targets[i].copy(),
                "current": int(self.current[i]), "streak": int(self.streak[i])}

    def restore(self, i: int, snapshot: dict) -> None:
        """Continue copy i from a `snapshot`, bit by bit."""
        self.position[i], self.targets[i] = np.asarray(snapshot["position"]), np.asarray(snapshot["targets"])
        self.current[i], self.streak[i] = snapshot["current"], snapshot["streak"]


def to_pixels(metres: np.ndarray | float, size: int) -> np.ndarray | float:
    """A coordinate in the picture: pixel k reaches from k to k + 1."""
    return size / 2 + (metres - 2) * size / SIDE


def fill(picture: np.ndarray, x: tuple[float, float], y: tuple[float, float], colour: tuple[int, int, int]) -> None:
    """Paint the pixels whose middle is within these metres."""
    rows, columns = (np.ceil(to_pixels(np.array(side), len(picture)) - 0.5).astype(int).clip(0) for side in (x, y))
    picture[slice(*rows), slice(*columns)] = colour


def disc(picture: np.ndarray, x: float, y: float, colour: tuple[int, int, int]) -> None:
    """Paint a disc around (x, y) m."""
    size = len(picture)
    row, column, radius = to_pixels(x, size), to_pixels(y, size), DISC * size / SIDE
    top, left = max(0, int(row - radius)), max(0, int(column - radius))
    window = picture[top:int(row + radius) + 2, left:int(column + radius) + 2]
    rows, columns = np.ogrid[top:top + window.shape[0], left:left + window.shape[1]]
    window[np.square(rows + 0.5 - row) + np.square(columns + 0.5 - column) <= radius ** 2] = colour


def background(size: int) -> np.ndarray:
    """The room without robot and target (size, size, 3)."""
    picture = np.full((size, size, 3), FLOOR, np.uint8)
    for x, y, colour in WALLS:
        fill(picture, x, y, colour)
    return picture


class MobileEnv(WorldEnv):
    """One room, for gymnasium: the reference for the vectorised class, and the way to render."""
    metadata = {"render_modes": ["rgb_array"], "render_fps": 25}

    def __init__(self, task: str, random_target: bool = False, continuous: bool = False, shaped: bool = False,
                 pixels: bool = False, size: int = 64, render_mode: str | None = None):
        super().__init__(World(task, 1, random_target, continuous, shaped, pixels, size), render_mode, 224, 224)
        axes = self.world.axes
        self.action_space = (gym.spaces.Box(-1.0, 1.0, (2,), np.float32) if continuous
                             else gym.spaces.Discrete(len(self.world.moves)))
        self.observation_space = (gym.spaces.Box(0, 255, (size, size, 3), np.uint8) if pixels
                                  else gym.spaces.Box(-4.0, 4.0, (axes,), np.float32))

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.world.reset(0, self.np_random)
        return self.world.observe()[0], self._info()

    def step(self, action) -> tuple[np.ndarray, float, bool, bool, dict]:
        reward = self.world.step(np.asarray(action)[None])[0]
        return self.world.observe()[0], float(reward), False, False, self._info()

    def render(self) -> np.ndarray:
        """Frame (224, 224, 3) uint8. Raises EnvError without a `render_mode`."""
        if self.render_mode is None:
            raise EnvError("render_mode is None; make the task with render_mode='rgb_array'")
        return self.world.draw(0, background(self.size[0]))

    def _info(self) -> dict:
        return {"is_success": float(self.world.success()[0]),
                **{key: float(value[0]) for key, value in self.world.ground_truth().items()}}


class MobileVectorEnv(WorldVectorEnv):
    """`num_envs` rooms, for `envs.make_vec`. `info` of a step also has the ground truth."""

    def __init__(self, env_id: str, num_envs: int, time_feature: bool = True, goal_range: float = 0.0, **kwargs):
        env = narrow_goals(gym.make(env_id, disable_env_checker=True, **kwargs), goal_range)
        one = env.unwrapped.world
        world = World(one.task, num_envs, one.random_target, one.continuous, one.shaped, one.pixels, one.size)
        super().__init__(env, num_envs, time_feature, world, threads=1)

    def ground_truth(self) -> dict[str, np.ndarray]:
        """Numbers (num_envs,) that pictures of now show."""
        return self.world.ground_truth()

    def _begin(self, i: int) -> None:
        self.world.reset(i, self.rng[i])

    def _step(self, action: np.ndarray):
        reward, no = self.world.step(np.asarray(action)), np.zeros(self.num_envs, bool)
        self.labels = self.world.ground_truth()  # before a reset draws the next start
        return reward, no, no.copy(), self.world.success().astype(np.float64)
