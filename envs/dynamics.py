"""<Body>-dyn-v0 and Crippled<Body>-dyn-v0: locomotion under changed dynamics, the task families of SaMI (NeurIPS 2024).

A task is a scale of all masses, a scale of all joint dampings, and a set of crippled actuators. Every episode draws
one; its length is fixed, nothing terminates early. Tasks come in three splits, `train`, `moderate` and `extreme`, and
a split in buckets: copy i of a vector environment draws from bucket i modulo their number.

    vec = envs.make_vec("CrippledHalfCheetah-dyn-v0", 24, split="extreme", max_episode_steps=200)
    vec = envs.make_vec("Walker-dyn-v0", len(envs.all_tasks("Walker-dyn-v0", "train")), every_task=True)
    env = envs.make("Ant-dyn-v0"); env.reset(seed=1, options={"mass": 1.5, "damping": 0.5, "crippled": [2, 3]})

`World` holds simulators and knows the family; `DynamicsEnv` is one of them for gymnasium, `DynamicsVectorEnv` many.
FrankaSkill-v0 (envs/franka.py) has its splits here, too. docs/sami.md has the tables and the departures.
"""
import copy
import math
from dataclasses import dataclass, field
from itertools import combinations, product
from numbers import Integral, Real
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np

from envs.franka import FrankaVectorEnv
from envs.ids import EnvError
from envs.vector import Observation, mujoco_restore, mujoco_snapshot, narrow_goals
from envs.world import WorldEnv, WorldVectorEnv, check_actions

ASSETS = Path(gym.__file__).parent / "envs" / "mujoco" / "assets"  # v5's walker2d_v5.xml has another foot friction
SPLITS = ("train", "moderate", "extreme")
RED = (1.0, 0.1, 0.1, 1.0)  # of what a crippled actuator moves
Crippled = tuple[int, ...]  # indices of actuators that give no torque


@dataclass(frozen=True)
class Bucket:
    """The tasks that one copy draws from: any mass with any damping and any set of crippled actuators."""
    mass: tuple[float, ...]  # scales
    damping: tuple[float, ...] = (1.0,)  # scales
    crippled: tuple[Crippled, ...] = ((),)


def pairs(low: tuple[float, ...], high: tuple[float, ...]) -> list[Bucket]:
    """Four buckets: low or high mass with low or high damping."""
    return [Bucket(mass, damping) for mass in (low, high) for damping in (low, high)]


def limbs(mass: tuple[float, ...], *crippled: Crippled) -> list[Bucket]:
    """A bucket for each set of crippled actuators."""
    return [Bucket(mass, crippled=(each,)) for each in crippled]


LOW, HIGH = (0.75, 0.85), (1.0, 1.15, 1.25)
SEEN, MODERATE, EXTREME = LOW + HIGH, (0.4, 0.5, 1.5, 1.6), (0.2, 0.3, 1.7, 1.8)
SCALED = {"train": pairs(LOW, HIGH), "moderate": pairs(MODERATE[:2], MODERATE[2:]),
          "extreme": pairs(EXTREME[:2], EXTREME[2:])}
HUMANOID = {"train": pairs((0.8, 0.9), HIGH), "moderate": pairs((0.6, 0.7), (1.5, 1.6)),
            "extreme": pairs((0.4, 0.5), (1.7, 1.8))}
LEGS = ((2, 3), (4, 5), (6, 7), (0, 1))  # actuators of Ant's legs: front left, front right, back left, back right


@dataclass(frozen=True)
class Family:
    """One body and its tasks. The reward of a step is speed + alive - ctrl_cost * |torques|^2, unless `reward` names
    another."""
    xml: str
    frame_skip: int
    horizon: int  # steps of an episode
    noise: float  # of the first state
    splits: dict[str, list[Bucket]] = field(repr=False)
    ctrl_cost: float = 0.1
    alive: float = 0.0
    obs: str = "speed"  # speed along x, positions without x (and y), velocities; "plain": no speed; "clipped": no
    # speed, velocities within +-10; "pose": all positions, velocities, rotation matrix and place of the torso
    reward: str = "run"  # or "slim", "standup"
    gaussian: bool = False  # noise of the first velocities is Gaussian, in the plane that of the positions as well
    legs_apart: bool = False  # mass and damping scale the front legs, and their inverse the hind legs (see `apply`)


CHEETAH = dict(xml="half_cheetah.xml", frame_skip=5, horizon=1000, noise=1e-3, gaussian=True)
ANT = dict(xml="ant.xml", frame_skip=5, horizon=2000, noise=0.1, gaussian=True, ctrl_cost=0.01, alive=1.0)
HOPPER = dict(xml="hopper.xml", frame_skip=4, horizon=1000, noise=5e-3, alive=1.0, obs="clipped")
WALKER = dict(xml="walker2d.xml", frame_skip=4, horizon=2000, noise=5e-3, alive=1.0, ctrl_cost=1e-3, obs="clipped")
STANDUP = dict(xml="humanoidstandup.xml", frame_skip=5, noise=0.01, obs="plain", splits=HUMANOID)
FAMILIES = {
    "HalfCheetah": Family(**CHEETAH, splits=SCALED),
    "CrippledHalfCheetah": Family(**CHEETAH, splits={
        "train": limbs(SEEN, (3,), (4,), (5,)),  # front leg
        "moderate": limbs(MODERATE, (0,), (1,), (2,)),  # back leg
        "extreme": limbs(EXTREME, (0, 3), (1, 4), (2, 5))}),
    "Ant": Family(**ANT, legs_apart=True, splits=SCALED),
    "CrippledAnt": Family(**ANT, obs="pose", splits={
        "train": limbs(SEEN, *LEGS), "moderate": limbs(MODERATE, *LEGS),
        "extreme": limbs(EXTREME, *(a + b for a, b in combinations(LEGS, 2)))}),
    "Hopper": Family(**HOPPER, splits=SCALED),
    "CrippledHopper": Family(**HOPPER, ctrl_cost=1e-3, splits={
        "train": [Bucket(LOW), Bucket(HIGH)], "moderate": [Bucket(MODERATE[:2]), Bucket(MODERATE[2:])],
        "extreme": limbs(EXTREME, (0,), (1,), (2,))}),
    "Walker": Family(**WALKER, splits=SCALED),
    "CrippledWalker": Family(**WALKER, splits={
        "train": limbs(LOW, (0, 1, 2)) + limbs(HIGH, (0, 1, 2)),  # right leg
        "moderate": limbs(MODERATE, (0,), (1,), (2,)),
        "extreme": limbs(EXTREME, (3, 4, 5), (3,), (4,), (5,))}),  # left leg
    "SlimHumanoid": Family(**STANDUP, horizon=1000, reward="slim"),  # its published code starts lying, too
    "HumanoidStandup": Family(**STANDUP, horizon=2000, reward="standup"),
}
FRANKA = {  # (mass in kg, friction of the table), one bucket each
    "train": [(1, 0.1), (5, 0.1), (10, 0.1), (1, 1), (1, 5), (1, 10)],
    "moderate": [(mass, friction) for friction in (1, 5, 10) for mass in (5, 10)],
    "extreme": [(mass, friction) for friction in (0.1, 1, 5, 10, 30) for mass in (1, 5, 10, 30)
                if mass == 30 or friction == 30]}

IDS = {f"{name}-dyn-v0": name for name in FAMILIES}
for env_id, name in IDS.items():
    gym.register(env_id, entry_point="envs.dynamics:DynamicsEnv", max_episode_steps=FAMILIES[name].horizon,
                 kwargs={"family": name})


def all_tasks(env_id: str, split: str) -> list[dict]:
    """Every task of a split: keyword arguments of `envs.make`, mass and damping or friction, and crippled actuators.

    Raises EnvError for an id without splits, and an unknown split.
    """
    if env_id == "FrankaSkill-v0":
        return [{"mass": mass, "friction": friction} for mass, friction in of_split(FRANKA, split)]
    if env_id not in IDS:
        raise EnvError(f"{env_id} has no task splits; known are {', '.join(IDS)} and FrankaSkill-v0")
    return [{"mass": mass, "damping": damping, "crippled": crippled}
            for bucket in of_split(FAMILIES[IDS[env_id]].splits, split)
            for mass, damping, crippled in product(bucket.mass, bucket.damping, bucket.crippled)]


def num_buckets(env_id: str) -> int:
    """How many buckets of training tasks there are. Raises EnvError for an id without splits."""
    all_tasks(env_id, "train")
    buckets = FAMILIES[IDS[env_id]].splits["train"] if env_id in IDS else FRANKA["train"]
    return len(buckets)


def horizon_of(env_id: str, at_most: int = 0) -> int:
    """Steps of an episode: as many as the task is registered with, but `at_most` so many (0: no limit). Raises EnvError
    for an id without splits."""
    all_tasks(env_id, "train")
    own = gym.spec(env_id).max_episode_steps
    return min(own, at_most) if at_most else own


def of_split(splits: dict, split: str) -> list:
    if split not in splits:
        raise EnvError(f"unknown split {split!r}; known are {', '.join(splits)}")
    return splits[split]


def shrink(model: mujoco.MjModel, family: str, crippled: Crippled) -> None:
    """Make crippled limbs of CrippledAnt and CrippledWalker thin and short, as published."""
    size, pos = model.geom_size, model.geom_pos
    if family == "CrippledAnt":
        for leg in (leg for leg, actuators in enumerate(LEGS) if set(actuators) <= set(crippled)):
            g = 3 + 3 * leg  # its leg; g + 1 is its ankle
            size[g:g + 2, :2] *= 0.5
            pos[g + 1] = pos[g]
    elif family == "CrippledWalker":
        for joint in crippled:
            g = joint + 2  # thigh, leg, foot of the right leg, then of the left one
            size[g, :2] *= 0.5
            if joint in (2, 5):
                pos[g] = pos[g - 1]
            else:
                pos[g + 1] = pos[g]
            if joint in (0, 3):
                pos[g + 2] = pos[g + 1]


class World:
    """`num` simulators of a family with a model each, and what is observed of them, one row each.

    Masses are scaled and inertias are not, and what MuJoCo derives from masses when it compiles stays: as published.

    Attributes: models, data (lists); buckets, the tasks of the split; bucket (num,), which of them each episode's task
    is from, -1 where it was named; mass, damping (num,) scales; mask (num, d), 0 where an actuator is crippled.
    """

    def __init__(self, name: str, num: int, split: str = "train", every_task: bool = False, mass: float | None = None,
                 damping: float | None = None, crippled: Crippled | None = None):
        self.name, self.family = name, FAMILIES[name]
        self.buckets = of_split(self.family.splits, split)
        if every_task:
            self.buckets = [Bucket((task["mass"],), (task["damping"],), (task["crippled"],))
                            for task in all_tasks(f"{name}-dyn-v0", split)]
        self.base = base = mujoco.MjModel.from_xml_path(str(ASSETS / self.family.xml))
        self.models = [copy.copy(base) for _ in range(num)]
        self.data = [mujoco.MjData(model) for model in self.models]
        self.dt, self.planar = base.opt.timestep * self.family.frame_skip, base.nq == base.nv
        self.qpos, self.qvel, self.speed = np.tile(base.qpos0, (num, 1)), np.zeros((num, base.nv)), np.zeros(num)
        self.bucket, self.mass, self.damping = np.zeros(num, np.int64), np.ones(num), np.ones(num)
        self.mask = np.ones((num, base.nu))
        self.named = None  # the task of all episodes, (mass, damping, crippled), or None: drawn
        self.name_task({key: value for key, value in (("mass", mass), ("damping", damping), ("crippled", crippled))
                        if value is not None})

    def name_task(self, options: dict | None) -> None:
        """Give all later episodes of all copies the task of `options`: scales `mass` and `damping` (1 if left out), and
        `crippled`, indices of actuators (none if left out). Without options, tasks go on as before.

        Raises EnvError, with nothing changed, for other options and for what makes no sense.
        """
        if not options:
            return
        if unknown := sorted(options.keys() - {"mass", "damping", "crippled"}):
            raise EnvError(f"unknown option {unknown[0]!r} of reset; known are mass, damping and crippled")
        scales = [options.get(key, 1.0) for key in ("mass", "damping")]
        for key, value in zip(("mass", "damping"), scales):
            if not isinstance(value, Real) or isinstance(value, bool) or not 0.01 <= value <= 100:
                raise EnvError(f"{key} {value!r} makes no sense; give a scale from 0.01 to 100")
        crippled = options.get("crippled", ())
        if not isinstance(crippled, (list, tuple, np.ndarray)):
            raise EnvError(f"crippled {crippled!r} is no list of indices; [0, 3] cripples two actuators")
        for index in crippled:
            if not isinstance(index, Integral) or not 0 <= index < self.base.nu:
                raise EnvError(f"crippled {index!r} is no actuator; give indices from 0 to {self.base.nu - 1}")
        self.named = (*map(float, scales), tuple(sorted(int(index) for index in crippled)))

    def apply(self, i: int, mass: float, damping: float, crippled: Crippled) -> None:
        """Make the simulator of copy i that of a task, always from the published model."""
        model, base = self.models[i], self.base
        body, dof = np.full(base.nbody, float(mass)), np.full(base.nv, float(damping))
        if self.family.legs_apart:  # as published, with the indices of bodies also for joints: 6 of 8 count as hind
            body[:8], body[8:] = (1, 1, *[mass] * 6), 1 / mass
            dof[:8], dof[8:] = (*[1] * 6, damping, damping), 1 / damping
        model.body_mass[:], model.dof_damping[:] = base.body_mass * body, base.dof_damping * dof
        model.geom_size[:], model.geom_pos[:], model.geom_rgba[:] = base.geom_size, base.geom_pos, base.geom_rgba
        shrink(model, self.name, crippled)
        self.mask[i] = 1
        self.mask[i, list(crippled)] = 0
        joints = base.actuator_trnid[list(crippled), 0]
        model.geom_rgba[np.isin(base.geom_bodyid, base.jnt_bodyid[joints])] = RED
        self.mass[i], self.damping[i] = mass, damping

    def reset(self, i: int, bucket: int | None, rng: np.random.Generator) -> None:
        """Start an episode of copy i: a task of this bucket (None: of any), then a state near the published one."""
        if self.named:
            self.bucket[i] = -1
            self.apply(i, *self.named)
        else:
            self.bucket[i] = rng.integers(len(self.buckets)) if bucket is None else bucket % len(self.buckets)
            tasks = self.buckets[self.bucket[i]]
            drawn = [values[rng.integers(len(values))] for values in (tasks.mass, tasks.damping, tasks.crippled)]
            self.apply(i, *drawn)
        model, data, noise = self.models[i], self.data[i], self.family.noise
        mujoco.mj_resetData(model, data)

        def uniform(size: int) -> np.ndarray:
            return rng.uniform(-noise, noise, size)

        def gaussian(size: int) -> np.ndarray:
            return noise * rng.standard_normal(size)

        data.qpos[:] += gaussian(model.nq) if self.family.gaussian and self.planar else uniform(model.nq)
        data.qvel[:] = gaussian(model.nv) if self.family.gaussian else uniform(model.nv)
        mujoco.mj_forward(model, data)
        self.qpos[i], self.qvel[i], self.speed[i] = data.qpos, data.qvel, 0.0

    def aim(self, action: np.ndarray) -> None:
        """Actions (num, d) of all copies: what `advance` will do. Raises EnvError for another shape or NaN."""
        check_actions(action, self.mask.shape)
        low, high = self.base.actuator_ctrlrange.T
        self.ctrl = np.clip(action, low, high) * self.mask
        self.before = self.qpos[:, 0].copy(), self.qvel[:, 0].copy()

    def advance(self, i: int) -> None:
        """One env step of copy i; copies may advance in threads of their own."""
        data = self.data[i]
        data.ctrl[:] = self.ctrl[i]
        mujoco.mj_step(self.models[i], data, self.family.frame_skip)
        self.qpos[i], self.qvel[i] = data.qpos, data.qvel

    def reward(self) -> np.ndarray:
        """Rewards (num,) of the step that all copies have advanced. The contact costs that Ant and HumanoidStandup once
        had are left out: the simulator of the published numbers did not compute contact forces."""
        family, height = self.family, self.qpos[:, 2]
        self.speed = (self.qpos[:, 0] - self.before[0]) / self.dt
        cost = family.ctrl_cost * np.square(self.ctrl).sum(1)
        if family.reward == "slim":
            return 0.25 / 0.015 * self.before[1] + 5.0 * ((height >= 1) & (height <= 2)) - cost
        if family.reward == "standup":
            return height / 0.003 + 1 - cost
        return self.speed + family.alive - cost

    def observe(self) -> np.ndarray:
        """Observations (num, n) float64."""
        qpos, qvel, kind = self.qpos, self.qvel, self.family.obs
        if kind == "pose":
            return np.hstack([qpos, qvel, rotation(qpos[:, 3:7]), qpos[:, :3]])
        inner = qpos[:, 1:] if self.planar else qpos[:, 2:]
        if kind == "clipped":
            return np.hstack([inner, qvel.clip(-10, 10)])
        if kind == "plain":
            return np.hstack([inner, qvel])
        return np.hstack([self.speed[:, None], inner, qvel])

    def task_features(self) -> np.ndarray:
        """Tasks as numbers (num, 2 + d) float32: log2 of mass and damping, then the mask."""
        return np.column_stack([np.log2(self.mass), np.log2(self.damping), self.mask]).astype(np.float32)

    def info(self) -> dict[str, np.ndarray]:
        """The tasks of all copies: mass, damping, bucket (num,), mask (num, d)."""
        return {"mass": self.mass.copy(), "damping": self.damping.copy(), "bucket": self.bucket.copy(),
                "mask": self.mask.copy()}

    def snapshot(self, i: int) -> dict:
        """Copy i as plain numbers and arrays."""
        return {"task": [float(self.mass[i]), float(self.damping[i])], "crippled": np.flatnonzero(self.mask[i] == 0),
                "bucket": int(self.bucket[i]), "named": [] if self.named is None else [*self.named[:2], *self.named[2]],
                "speed": float(self.speed[i]), "mujoco": mujoco_snapshot(self.models[i], self.data[i])}

    def restore(self, i: int, snapshot: dict) -> None:
        """Continue copy i from a `snapshot`, bit by bit."""
        named = snapshot["named"]
        self.named = (*named[:2], tuple(named[2:])) if named else None
        self.apply(i, *snapshot["task"], tuple(np.asarray(snapshot["crippled"]).tolist()))
        self.bucket[i], self.speed[i] = snapshot["bucket"], snapshot["speed"]
        mujoco_restore(self.models[i], self.data[i], snapshot["mujoco"])
        self.qpos[i], self.qvel[i] = self.data[i].qpos, self.data[i].qvel


def rotation(quaternion: np.ndarray) -> np.ndarray:
    """Quaternions (num, 4), real part first -> rotation matrices, row by row (num, 9)."""
    out = np.empty((len(quaternion), 9))
    for matrix, q in zip(out, quaternion):
        mujoco.mju_quat2Mat(matrix, q / np.linalg.norm(q))
    return out


class DynamicsEnv(WorldEnv):
    """One simulator, for gymnasium: the reference for the fast class, and the way to render.

    `mass`, `damping` and `crippled` name the task, as do the options of `reset`, until others do; else it is drawn from
    a bucket of the split (`bucket=None`: from all)."""

    def __init__(self, family: str, split: str = "train", bucket: int | None = None, mass: float | None = None,
                 damping: float | None = None, crippled: Crippled | None = None, render_mode: str | None = None,
                 width: int = 480, height: int = 480):
        world = World(family, 1, split, mass=mass, damping=damping, crippled=crippled)
        super().__init__(world, render_mode, width, height)
        self.metadata, self.bucket = {**self.metadata, "render_fps": round(1 / world.dt)}, bucket
        low, high = self.world.base.actuator_ctrlrange.T.astype(np.float32)
        self.action_space = gym.spaces.Box(low, high)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, self.world.observe().shape[1:], np.float64)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        self.world.name_task(options)
        super().reset(seed=seed)
        self.world.reset(0, self.bucket, self.np_random)
        if self.render_mode == "human":
            self.render()
        return self.world.observe()[0], self._info()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.world.aim(np.asarray(action)[None])
        self.world.advance(0)
        reward = self.world.reward()[0]
        if self.render_mode == "human":
            self.render()
        return self.world.observe()[0], float(reward), False, False, self._info()

    def _scene(self) -> tuple[mujoco.MjModel, mujoco.MjData, str]:
        return self.world.models[0], self.world.data[0], "track"

    def _info(self) -> dict:
        return {key: value[0] for key, value in self.world.info().items()}


class DynamicsVectorEnv(WorldVectorEnv):
    """`num_envs` copies, for `envs.make_vec`.

    With `every_task`, each task of the split is a bucket of its own, in the order of `all_tasks`. Attributes beside
    WorldVectorEnv's: num_tasks, how many buckets there are.
    """

    def __init__(self, env_id: str, num_envs: int, time_feature: bool = True, threads: int = 1, goal_range: float = 0.0,
                 split: str = "train", every_task: bool = False, mass: float | None = None,
                 damping: float | None = None, crippled: Crippled | None = None, **kwargs):
        env = narrow_goals(gym.make(env_id, disable_env_checker=True, **kwargs), goal_range)
        world = World(IDS[env_id], num_envs, split, every_task, mass, damping, crippled)
        super().__init__(env, num_envs, time_feature, world, threads)
        self.num_tasks = len(world.buckets)

    @property
    def bucket(self) -> np.ndarray:
        """Which bucket each copy's task is from (num_envs,)."""
        return self.world.bucket

    def task_features(self) -> np.ndarray:
        """The tasks of the episodes that are being played, as numbers (num_envs, p) float32."""
        return self.world.task_features()

    def reset(self, seed: int | None = None, options: dict | None = None) -> Observation:
        """Reset all copies; `options` name one task for all, until others do (`World.name_task`)."""
        self.world.name_task(options)
        return super().reset(seed)

    def _begin(self, i: int) -> None:
        self.world.reset(i, i, self.rng[i])

    def _step(self, action: np.ndarray):
        self.world.aim(np.asarray(action))
        self.threads.each(self.world.advance)
        reward, no = self.world.reward(), np.zeros(self.num_envs, bool)
        self.labels = self.world.info()  # before a reset draws the next task
        return reward, no, no.copy(), np.full(self.num_envs, math.nan)


class FrankaTasksVectorEnv(FrankaVectorEnv):
    """FrankaSkill-v0 with the masses and frictions of a split: copy i plays task i modulo their number for ever.

    Attributes beside FrankaVectorEnv's: num_tasks; bucket (num_envs,). `info` of a step also has bucket.
    """

    def __init__(self, env_id: str, num_envs: int, split: str = "train", every_task: bool = False, **kwargs):
        tasks = all_tasks(env_id, split)  # each is a bucket of its own, every_task or not
        self.num_tasks, self.bucket = len(tasks), np.arange(num_envs) % len(tasks)
        super().__init__(env_id, num_envs, mass=[tasks[k]["mass"] for k in self.bucket],
                         friction=[tasks[k]["friction"] for k in self.bucket], **kwargs)

    def task_features(self) -> np.ndarray:
        """log2 of mass and friction (num_envs, 2) float32."""
        return np.log2(self.world.physics).astype(np.float32)

    def step(self, action: np.ndarray) -> tuple[Observation, np.ndarray, np.ndarray, np.ndarray, dict]:
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, reward, terminated, truncated, info | {"bucket": self.bucket.copy()}
