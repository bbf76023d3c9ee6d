"""FrankaButton-v0: the arm of envs/franka.py presses a button on the table, seen in numbers or pictures.

The button tasks of the S-RL Toolbox (Raffin et al. 2018, arXiv 1809.09369), on a Franka arm: a button of 3 cm radius
stands at (0.6, 0) m, 4 cm high, and sinks by up to 1 cm on a spring. A step asks for 0.02 m.

    reward    1 where the button is pressed by 5 mm or more, -1 where the gripper is more than 0.5 m from it or a finger
              touches the table (which overrides the 1), else 0
    end       after 5 steps with the button pressed, which is success, or a finger on the table; cut after 200 steps

As in the toolbox, an action along z goes down, however it points: `force_down=False` lets the gripper up again. An
episode starts with five drawn steps from the arm's rest.

Ids have options behind the task: FrankaButtonRandomTarget-v0 draws the button's place within 0.15 m of (0.6, 0),
FrankaButtonContinuous-v0 takes actions in [-1, 1]^3; in this order both, FrankaButtonRandomTargetContinuous-v0.
`pixels=True` observes pictures (size, size, 3) uint8, as does an id with an encoder (envs/encoders.py):
FrankaButton-v0:pixels. These are drawn by MuJoCo, so they need EGL or OSMesa, and may differ in a few bits between
machines.
"""
import copy
from functools import cache
from itertools import product

import gymnasium as gym
import mujoco
import numpy as np

from envs import franka
from envs.ids import EnvError
from envs.vector import mujoco_restore, mujoco_snapshot, narrow_goals
from envs.world import Camera, WorldEnv, WorldVectorEnv, check_actions

HORIZON = 200
STEP, FAR = 0.02, 0.5  # m: what an action of 1 asks for; from the button on, too far
PLACE, RANGE = np.array([0.6, 0.0]), 0.15  # m: the button's place along x and y; half side of the square it is drawn in
RADIUS, HEIGHT, TRAVEL, PRESSED = 0.03, 0.04, 0.01, 0.005  # m: of the button; how far it sinks, and counts as pressed
STIFFNESS, DAMPING, MASS = 200.0, 14.0, 0.05  # N/m, N s/m, kg: back within 0.1 s
PRESSES = 5  # steps with the button pressed that are a success
DRAWN, DRAWN_STEP = 5, 0.03  # steps at the start, m each
LOW = np.array([franka.LOW[0], franka.LOW[1], 0.0])  # m, where the gripper may be sent; its fingers reach 9 mm lower
MOVES = np.array([[-1.0, 0, 0], [1, 0, 0], [0, -1, 0], [0, 1, 0], [0, 0, -1], [0, 0, 1]])  # of discrete actions
ACTION_WORDS = ("x-", "x+", "y-", "y+", "z-", "z+")
EYE, LOOK, WIDE = (1.3, -0.6, 0.6), (0.7766, 0.4659, 0.2182, 0.3637), 42  # of pictures: m, quaternion, degrees

IDS = [f"FrankaButton{''.join(words)}-v0" for words in product(("", "RandomTarget"), ("", "Continuous"))]
for env_id in IDS:
    gym.register(env_id, entry_point="envs.franka_button:ButtonEnv", max_episode_steps=HORIZON, kwargs={
        "random_target": "RandomTarget" in env_id, "continuous": "Continuous" in env_id, "pixels": False})


@cache
def build(visible: bool = False) -> mujoco.MjModel:
    """The model, compiled once and shared: the button stands on a mocap body, so that a place needs no other model."""
    spec = franka.assemble(franka.TASKS["Push"], visible)
    for name in ("object", "target"):
        spec.delete(spec.body(name))
    spec.worldbody.add_camera(name="near", pos=EYE, quat=LOOK, fovy=WIDE)
    button = spec.worldbody.add_body(name="base", mocap=True).add_body(name="button", gravcomp=1)
    button.add_joint(name="button", type=mujoco.mjtJoint.mjJNT_SLIDE, axis=(0, 0, 1), range=(-TRAVEL, 0),
                     armature=0.2, solref_limit=(0.004, 1), solimp_limit=(0.99, 0.999, 0.001, 0.5, 2))
    button.add_geom(name="button", type=mujoco.mjtGeom.mjGEOM_CYLINDER, size=(RADIUS, HEIGHT / 2, 0),
                    pos=(0, 0, HEIGHT / 2), mass=MASS, rgba=(0.8, 0.1, 0.1, 1), contype=0, conaffinity=3)
    for geom in spec.geoms:  # what the small pictures show of the arm
        if geom.group == 3:
            geom.rgba = (0.25, 0.25, 0.3, 1) if "finger" in geom.parent.name else (0.9, 0.9, 0.9, 1)
    model = spec.compile()
    joint = model.joint("button")
    model.jnt_stiffness[joint.id], model.dof_damping[joint.dofadr] = STIFFNESS, DAMPING
    return model


class World:
    """`num` simulators, and what is observed of them, one row each.

    Attributes: data (list); ee_pos (num, 3) and top (num, 3) m, of the gripper and of the button's top when nobody
    presses it; sunk (num,) m; presses (num,), steps with the button pressed; touched (num,), whether a finger is on the
    table.
    """

    def __init__(self, num: int, random_target: bool = False, continuous: bool = False, pixels: bool = False,
                 size: int = 64, force_down: bool = True):
        if not isinstance(size, int) or size < 16:
            raise EnvError(f"size {size!r} is no whole number from 16 on: the pixels of a side")
        self.random_target, self.continuous, self.force_down = random_target, continuous, force_down
        self.pixels, self.size, self.camera, self.model = pixels, size, None, build()
        self.pieces, model = np.arange(1, franka.RAMP + 1) / franka.RAMP, self.model
        self.data = [mujoco.MjData(model) for _ in range(num)]
        rest = mujoco.MjData(model)
        self.home = franka.settle(rest)
        self.home_qpos = rest.qpos.copy()
        self.ee, self.base = model.site("ee").id, int(model.body("base").mocapid[0])
        self.joint, self.table = int(model.joint("button").qposadr[0]), model.geom("table").id
        self.fingers = np.array(["finger" in model.body(k).name for k in model.geom_bodyid])  # of each geom
        self.ee_pos, self.top, self.sunk = np.zeros((num, 3)), np.zeros((num, 3)), np.zeros(num)
        self.ramp = np.zeros((num, franka.RAMP, 3))
        self.presses, self.touched = np.zeros(num, np.int64), np.zeros(num, bool)

    def reset(self, i: int, rng: np.random.Generator) -> None:
        """Start an episode of copy i."""
        data = self.data[i]
        mujoco.mj_resetData(self.model, data)
        data.qpos[:] = self.home_qpos
        data.mocap_pos[0], data.mocap_quat[0] = self.home, (0, 1, 0, 0)
        aside = rng.uniform(-RANGE, RANGE, 2) if self.random_target else np.zeros(2)
        data.mocap_pos[self.base] = *(PLACE + aside), 0.0
        self.top[i] = *(PLACE + aside), HEIGHT
        mujoco.mj_forward(self.model, data)
        self._read(i)
        for move in MOVES[rng.integers(len(MOVES), size=DRAWN)]:
            self._lead(i, DRAWN_STEP * move)
            self.advance(i)
        self.presses[i], self.touched[i] = 0, False

    def aim(self, action: np.ndarray) -> None:
        """Actions of all simulators, (num, 3) in [-1, 1] or (num,) whole numbers x-, x+, y-, y+, z-, z+: what `advance`
        will do. Raises EnvError for others."""
        if self.continuous:
            check_actions(action, self.ee_pos.shape)
            move = np.clip(action, -1.0, 1.0).astype(np.float64)
        else:
            if action.shape != self.presses.shape or not ((action >= 0) & (action < len(MOVES))).all():
                raise EnvError(f"actions {action} are not one of 0 to {len(MOVES) - 1} per copy")
            move = MOVES[action]
        if self.force_down:
            move = np.concatenate([move[:, :2], -np.abs(move[:, 2:])], 1)  # (num, 3)
        for i in range(len(self.data)):
            self._lead(i, STEP * move[i])

    def _lead(self, i: int, move: np.ndarray) -> None:
        """Plan to move the guide of gripper i so far (3,) m. The gripper lags behind it by 0.3 of a step along
        y and z, and by 0.3 to 0.6 along x."""
        start = self.data[i].mocap_pos[0].copy()
        way = np.clip(start + move, LOW, franka.HIGH) - start
        self.ramp[i] = start + way * self.pieces[:, None]  # (RAMP, 3)

    def advance(self, i: int) -> None:
        """One env step of simulator i, 0.05 s; simulators may advance in threads of their own."""
        data = self.data[i]
        for point in self.ramp[i]:
            data.mocap_pos[0] = point
            mujoco.mj_step(self.model, data, nstep=round(franka.DT / self.model.opt.timestep) // franka.RAMP)
        pairs = data.contact.geom
        self.touched[i] = self.fingers[pairs[(pairs == self.table).any(1)]].any()
        self._refresh(i)
        self.presses[i] += self.sunk[i] >= PRESSED

    def _refresh(self, i: int) -> None:
        """Read simulator i where it is now: mj_step leaves the kinematics of before its last 2 ms."""
        mujoco.mj_kinematics(self.model, self.data[i])
        self._read(i)

    def _read(self, i: int) -> None:
        self.ee_pos[i], self.sunk[i] = self.data[i].site_xpos[self.ee], -self.data[i].qpos[self.joint]

    def reward(self) -> np.ndarray:
        """Rewards (num,) of the last step."""
        far = np.linalg.norm(self.ee_pos - self.top, axis=1) > FAR
        return np.where(far | self.touched, -1.0, (self.sunk >= PRESSED).astype(np.float64))

    def success(self) -> np.ndarray:
        """Whether each button has been pressed often enough (num,), and no finger is on the table."""
        return (self.presses >= PRESSES) & ~self.touched

    def terminated(self) -> np.ndarray:
        return (self.presses >= PRESSES) | self.touched

    def observe(self) -> np.ndarray:
        """The way from the button's top to the gripper (num, 3) float32, m, or pictures (num, size, size, 3) uint8."""
        if not self.pixels:
            return (self.ee_pos - self.top).astype(np.float32)
        if self.camera is None:  # here, for it opens a context of OpenGL
            self.camera = Camera(copy.copy(self.model), "near", self.size)
        return np.stack([self.camera(data) for data in self.data])

    def ground_truth(self) -> dict[str, np.ndarray]:
        """What a representation should know, (num,) m each: the gripper's place, and the button's if it is drawn."""
        truth = dict(zip("xyz", self.ee_pos.T.copy()))
        return truth | dict(zip(("target_x", "target_y"), self.top.T[:2].copy())) if self.random_target else truth

    def snapshot(self, i: int) -> dict:
        """Simulator i as plain numbers and arrays."""
        return {"top": self.top[i].copy(), "presses": int(self.presses[i]), "touched": bool(self.touched[i]),
                "mujoco": mujoco_snapshot(self.model, self.data[i])}

    def restore(self, i: int, snapshot: dict) -> None:
        """Continue simulator i from a `snapshot`, bit by bit."""
        mujoco_restore(self.model, self.data[i], snapshot["mujoco"])
        self.top[i], self.presses[i] = np.asarray(snapshot["top"]), snapshot["presses"]
        self.touched[i] = snapshot["touched"]
        self._refresh(i)


class ButtonEnv(WorldEnv):
    """One simulator, for gymnasium: the reference for the vectorised class, and the way to render."""
    metadata = {**WorldEnv.metadata, "render_fps": round(1 / franka.DT)}

    def __init__(self, random_target: bool = False, continuous: bool = False, pixels: bool = False, size: int = 64,
                 force_down: bool = True, render_mode: str | None = None, width: int = 480, height: int = 480):
        super().__init__(World(1, random_target, continuous, pixels, size, force_down), render_mode, width, height)
        self.shown = None
        self.action_space = (gym.spaces.Box(-1.0, 1.0, (3,), np.float32) if continuous
                             else gym.spaces.Discrete(len(MOVES)))
        self.observation_space = (gym.spaces.Box(0, 255, (size, size, 3), np.uint8) if pixels
                                  else gym.spaces.Box(-2.0, 2.0, (3,), np.float32))

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.world.reset(0, self.np_random)
        if self.render_mode == "human":
            self.render()
        return self.world.observe()[0], self._info()

    def step(self, action) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.world.aim(np.asarray(action)[None])
        self.world.advance(0)
        if self.render_mode == "human":
            self.render()
        reward, terminated = self.world.reward()[0], self.world.terminated()[0]
        return self.world.observe()[0], float(reward), bool(terminated), False, self._info()

    def _scene(self) -> tuple[mujoco.MjModel, mujoco.MjData, str | None]:
        if self.shown is None:
            self.shown = mujoco.MjData(build(visible=True))
        data = self.world.data[0]
        self.shown.qpos[:], self.shown.mocap_pos[:] = data.qpos, data.mocap_pos
        mujoco.mj_forward(self.shown.model, self.shown)
        return self.shown.model, self.shown, "front" if self.render_mode == "rgb_array" else None

    def _info(self) -> dict:
        return {"is_success": float(self.world.success()[0]),
                **{key: float(value[0]) for key, value in self.world.ground_truth().items()}}


class ButtonVectorEnv(WorldVectorEnv):
    """`num_envs` buttons, for `envs.make_vec`. `info` of a step also has the ground truth."""

    def __init__(self, env_id: str, num_envs: int, time_feature: bool = True, threads: int = 1,
                 goal_range: float = 0.0, **kwargs):
        env = narrow_goals(gym.make(env_id, disable_env_checker=True, **kwargs), goal_range)
        one = env.unwrapped.world
        world = World(num_envs, one.random_target, one.continuous, one.pixels, one.size, one.force_down)
        super().__init__(env, num_envs, time_feature, world, threads)

    def ground_truth(self) -> dict[str, np.ndarray]:
        """Numbers (num_envs,) that pictures of now show."""
        return self.world.ground_truth()

    def _begin(self, i: int) -> None:
        self.world.reset(i, self.rng[i])

    def _step(self, action: np.ndarray):
        self.world.aim(np.asarray(action))
        self.threads.each(self.world.advance)
        self.labels = self.world.ground_truth()  # before a reset draws the next start
        return (self.world.reward(), self.world.terminated(), np.zeros(self.num_envs, bool),
                self.world.success().astype(np.float64))
