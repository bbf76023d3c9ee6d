"""Franka{Push,Slide,PickAndPlace}{Sparse,Dense}-v0 and FrankaSkill-v0: a Panda arm, a table and an object in MuJoCo.

The tasks of panda_mujoco_gym (arXiv 2312.13788), and that of SaMI (NeurIPS 2024, a modified panda-gym), with the mass
of the object and the friction of the table as options of `reset`. The arm is made of the files that gymnasium-robotics
ships for its kitchen, read where they lie; docs/franka.md has the tables and what differs from the originals.

    env = envs.make("FrankaPushSparse-v0")
    obs, info = env.reset(seed=1, options={"mass": 5.0, "friction": 0.3})

`World` holds simulators and knows the task; `FrankaEnv` is one of them for gymnasium, `FrankaVectorEnv` many. An env
step is 0.05 s, in which the weld that leads the gripper moves along a ramp: a jump would tear heavy objects out of it.
"""
import copy
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from typing import Sequence
from xml.sax.saxutils import quoteattr

import gymnasium as gym
import gymnasium_robotics
import mujoco
import numpy as np
from gymnasium_robotics.utils import rotations

from envs.ids import EnvError
from envs.vector import Observation, mujoco_restore, mujoco_snapshot, narrow_goals
from envs.world import WorldEnv, WorldVectorEnv, check_actions

THRESHOLD = 0.05  # m between object and goal, below which the goal is reached
DT = 0.05  # s per env step; observed velocities are times this, except in FrankaSkill
REACH = 0.05  # m that an action of 1 asks for; the arm covers three quarters of it in a step
WIDTH = 0.2  # m that a finger action of 1 adds to the width: more than the 0.08 there are
RAMP = 5  # straight pieces in which the gripper is led through a step
LOW, HIGH = np.array([0.25, -0.40, 0.012]), np.array([0.95, 0.40, 0.60])  # m, where the gripper may be sent
RANGE = 0.15  # m, half side of the squares that objects and goals are drawn from
NEUTRAL = np.array([0.0, 0.41, 0.0, -1.85, 0.0, 0.69, 0.0046])  # rad; joints 6 and 7 as the shipped files count them
SITE, BODY = mujoco.mjtObj.mjOBJ_SITE, mujoco.mjtObj.mjOBJ_BODY
Values = float | Sequence[float] | None  # one for all simulators, or one each; None: as published
LIMITS = {"mass": (1e-3, 1e3), "friction": (0.0, 100.0)}  # kg; the simulator is stable within them
SKILLS = np.array(["down", "push", "roll", "pick"])  # of a step, in the order of what an episode is named after


@dataclass(frozen=True)
class Task:
    """What makes one of the tasks; lengths in m, masses in kg."""
    gripper: bool  # whether the fingers can be moved; else they stay shut
    goal_x: float = 0.6  # centre of the goals
    air: bool = False  # 70 % of the goals are above the table
    half: float = 0.02  # of the object's height
    shape: str = 'type="box" size=".02 .02 .02" friction="1 .05 .001"'
    mass: float = 1.0
    friction: float = 1.0  # sliding friction between table and object
    camera: str = 'pos="1.55 -1 .85" xyaxes=".69 .724 0 -.284 .271 .92" fovy="38"'
    sami: bool = False  # SaMI's: Bullet's friction, velocities in m/s and rad/s, steps labelled with skills


TASKS = {
    "Push": Task(gripper=False),
    "Slide": Task(gripper=False, goal_x=1.0, half=0.03, friction=0.04,
                  shape='type="cylinder" size=".03 .03" friction=".04 .05 .001"',
                  camera='pos="1.95 -1.05 .9" xyaxes=".649 .761 0 -.312 .266 .912" fovy="40"'),
    "PickAndPlace": Task(gripper=True, air=True, mass=0.1),
    "Skill": Task(gripper=True, sami=True),
}

IDS = {f"Franka{task}{reward.title()}-v0": (task, reward) for task in ("Push", "Slide", "PickAndPlace")
       for reward in ("sparse", "dense")} | {"FrankaSkill-v0": ("Skill", "dense")}
for env_id, (task, reward) in IDS.items():
    gym.register(env_id, entry_point="envs.franka:FrankaEnv", max_episode_steps=50,
                 kwargs={"task": task, "reward_type": reward})


def simulated(task: Task, friction: float) -> float:
    """Coefficient of sliding friction in the simulator, for a `friction` of the table as published. Bullet multiplies
    it with the cube's, which is 0.5 there, and stays below 10 (measured in pybullet 3.2.7)."""
    return min(0.5 * friction, 10.0) if task.sami else friction


def assets() -> Path:
    """Folder of the Franka files inside gymnasium-robotics. Raises EnvError if the installed version has none."""
    folder = Path(gymnasium_robotics.__file__).parent / "envs" / "assets" / "kitchen_franka" / "franka_assets"
    if missing := [name for name in ("chain.xml", "assets.xml", "actuator.xml") if not (folder / name).is_file()]:
        raise EnvError(f"the installed gymnasium-robotics lacks {missing[0]} of the Franka arm; "
                       "pip install gymnasium-robotics==1.4.2")
    return folder


SCENE = """<mujoco model="franka">
  <include file={assets}/>
  <compiler angle="radian" autolimits="true" meshdir={meshes}/>
  <option timestep=".002" integrator="implicitfast" cone="elliptic" impratio="10"/>
  <visual><headlight ambient=".35 .35 .35" diffuse=".3 .3 .3"/><map znear=".02"/><quality shadowsize="2048"/></visual>
  <asset>
    <texture type="skybox" builtin="gradient" rgb1=".85 .9 .95" rgb2=".45 .55 .65" width="64" height="384"/>
    <texture name="tiles" type="2d" builtin="checker" rgb1=".42 .45 .5" rgb2=".38 .41 .46" width="128" height="128"/>
    <material name="ground" texture="tiles" texrepeat="8 8"/>
  </asset>
  <worldbody>
    <light pos="1.2 -.8 2" dir="-.3 .4 -1" diffuse=".6 .6 .6" specular=".1 .1 .1"/>
    <light pos=".4 1.2 2" dir=".1 -.6 -1" diffuse=".25 .25 .25" specular="0 0 0" castshadow="false"/>
    <camera name="front" {camera}/>
    <geom name="ground" type="plane" pos="0 0 -.4" size="3 3 .1" material="ground" contype="0" conaffinity="3"/>
    <geom name="table" type="box" pos=".75 0 -.2" size="1.15 .75 .2" rgba=".72 .66 .58 1" contype="0" conaffinity="3"
          condim="4" friction="{friction} .005 .0001" priority="1"/>
    <body name="object" pos=".6 0 {half}">
      <freejoint/>
      <geom name="object" {shape} mass="{mass}" rgba=".13 .42 .62 1" contype="1" conaffinity="3" condim="4"/>
    </body>
    <body name="ee_mocap" mocap="true" quat="0 1 0 0"/>
    <body name="target" mocap="true"><site name="target" size=".02" rgba=".85 .15 .12 1"/></body>
    <include file={chain}/>
  </worldbody>
  <equality>
    <weld body1="ee_mocap" body2="ee" relpose="0 0 0 1 0 0 0" solref=".01 1" solimp=".9 .95 .001 .5 2"/>
  </equality>
  <include file={actuators}/>
</mujoco>"""
# The table's priority is 1, or the larger of two frictions would count and a slippery table would do nothing. The
# second meshdir stands after the include, whose own is meant for another folder. The weld's pose is given, or it would
# be that of all joints at 0, which this arm cannot take.


@cache
def build(name: str, visible: bool = False) -> mujoco.MjModel:
    """The model of a task, compiled once and shared: who changes it, changes a copy. See `assemble`."""
    return assemble(TASKS[name], visible).compile()


def assemble(task: Task, visible: bool) -> mujoco.MjSpec:
    """The scene of a task, to be changed and compiled.

    Only the `visible` one has the meshes that are looked at: MuJoCo clears a flag for each of their 270,000 nodes in
    every simulated step, which takes a quarter of its time. The dynamics are the same to the last bit.
    """
    folder = assets()
    files = {key: quoteattr(str(folder / file)) for key, file in
             (("assets", "assets.xml"), ("chain", "chain.xml"), ("actuators", "actuator.xml"), ("meshes", "meshes"))}
    spec = mujoco.MjSpec.from_string(SCENE.format(
        **files, friction=simulated(task, task.friction), half=task.half, shape=task.shape, mass=task.mass,
        camera=task.camera))

    # The gripper is led by the weld, against which the servos of the arm would pull. Those of the fingers hold as in
    # PyBullet, whose 170 N each act through half of the friction: 85 N each hold 10 kg, and do not lift 30 kg.
    for actuator in list(spec.actuators):
        if not actuator.name.endswith("gripper_finger_joint"):
            spec.delete(actuator)
            continue
        actuator.gainprm[0], actuator.biasprm[1] = 5000, -5000
        actuator.forcerange = -85, 85
    for joint in spec.joints:
        if "finger" in joint.name:
            joint.armature, joint.damping[0] = 1, 100
        elif joint.name.startswith("robot:"):
            joint.damping[0] = 10
    if not visible:
        for part in [*(geom for geom in spec.geoms if geom.classname.name == "panda_viz"),
                     *(mesh for mesh in spec.meshes if mesh.name.endswith("_viz"))]:
            spec.delete(part)
    for body in spec.bodies:
        if body.name.startswith("panda0_"):
            body.gravcomp = 1  # without it, targets relative to a gripper that sags lower it at every step
    for geom in spec.geoms:
        if geom.classname.name == "panda_col":
            geom.contype, geom.conaffinity = 2, 0  # the arm meets table and object, never itself
    # The shipped fingers are stretched by 1.75. Theirs become a Panda's: one pad and one root each. A root
    # that reached further down would land on the edge of a cube that is pushed.
    for mesh in spec.meshes:
        if mesh.name.startswith("finger_"):
            mesh.scale = 1, 1, 1
    for side, sign in (("left", 1), ("right", -1)):
        finger = spec.body(f"panda0_{side}finger")
        for geom in list(finger.geoms):
            if geom.type != mujoco.mjtGeom.mjGEOM_MESH:
                spec.delete(geom)
        finger.mass, finger.ipos, finger.iquat = 0.1, (0, 0.012 * sign, 0.025), (1, 0, 0, 0)
        finger.inertia = 6e-5, 6e-5, 1e-5
        for part, size, position in (("pad", (0.0088, 0.0072, 0.0119), (0, 0.0074 * sign, 0.0419)),
                                     ("root", (0.0105, 0.007, 0.010), (0, 0.0185 * sign, 0.010))):
            finger.add_geom(name=f"{side}_{part}", type=mujoco.mjtGeom.mjGEOM_BOX, size=size, pos=position, group=3,
                            friction=(1, 0.05, 0.001), condim=4, contype=1, conaffinity=0, mass=0)
    grip = spec.body("panda0_link7").add_body(name="ee", pos=(0, 0, 0.2099), quat=(0.92388, 0, 0, -0.382683))
    grip.add_site(name="ee", size=(0.005, 0, 0), group=3)
    return spec


def settle(data: mujoco.MjData) -> np.ndarray:
    """Put the arm of fresh `data` at rest, from where every episode starts; returns the gripper's place (3,) there."""
    model = data.model
    arm = [int(model.joint(f"robot:panda0_joint{k}").qposadr[0]) for k in range(1, 8)]
    data.qpos[arm] = NEUTRAL
    mujoco.mj_kinematics(model, data)
    data.mocap_pos[0] = home = data.site_xpos[model.site("ee").id].copy()
    mujoco.mj_step(model, data, nstep=200)
    return home


def compute_reward(achieved_goal: np.ndarray, desired_goal: np.ndarray, dense: bool) -> np.ndarray:
    """Goals (..., 3) -> rewards (...): minus the distance, or -1 beyond the threshold and 0 within it."""
    distance = np.linalg.norm(np.subtract(achieved_goal, desired_goal), axis=-1)
    return -distance if dense else -(distance > THRESHOLD).astype(np.float32)


def skill(height: float, on_table: bool, held: bool) -> int:
    """How the cube, its centre at `height` m, is moved in a step: an index into SKILLS."""
    if height > 0.021:  # off the table, or on an edge
        return 3 if held and not on_table else 2
    return int(height > 0.019)


class World:
    """`num` simulators of a task, and what is observed of them, one row each.

    The model is shared until `set_physics` gives a simulator its own mass and friction. Goals are the places of a mocap
    body without shape, so that they need no model of their own.

    Attributes: models, data (lists); goal, object_pos, ee_pos (num, 3) m; physics (num, 2), mass in kg and friction as
    published; skill, episode_skill (num,), indices into SKILLS, of the last step and of the episode so far.
    """

    def __init__(self, name: str, num: int, frame_skip: int = 25, mass: Values = None, friction: Values = None):
        if not isinstance(frame_skip, Integral) or frame_skip < RAMP or frame_skip % RAMP:
            raise EnvError(f"frame_skip {frame_skip!r} is no int and positive multiple of {RAMP}; the default is 25")
        self.task, self.base, self.nstep = TASKS[name], build(name), frame_skip // RAMP
        self.pieces = np.arange(1, RAMP + 1) / RAMP
        self.models = [self.base] * num
        self.data = [mujoco.MjData(self.base) for _ in range(num)]
        self.mocap = [data.mocap_pos for data in self.data]  # views: of the gripper's guide and of the target, (2, 3)
        model = self.base
        self.ee = model.site("ee").id
        self.object, self.table = model.body("object").id, model.geom("table").id
        self.object_geom = model.geom("object").id
        self.pads = [set(np.flatnonzero(model.geom_bodyid == model.body(f"panda0_{side}finger").id).tolist())
                     for side in ("left", "right")]
        self.object_qpos = int(model.jnt_qposadr[model.body_jntadr[self.object]])
        self.fingers = [int(model.joint(f"robot:panda0_finger_joint{k}").qposadr[0]) for k in (1, 2)]
        rest = mujoco.MjData(model)
        rest.qpos[self.object_qpos] = 1.7  # out of the way
        self.home = settle(rest)
        self.home_qpos = rest.qpos.copy()
        self.goal, self.ee_pos, self.object_pos = (np.zeros((num, 3)) for _ in range(3))
        self.ee_vel, self.object_vel = np.zeros((num, 6)), np.zeros((num, 6))  # angular, linear
        self.object_mat, self.width, self.ctrl = np.zeros((num, 3, 3)), np.zeros(num), np.zeros(num)
        self.physics = np.tile([self.task.mass, self.task.friction], (num, 1))
        self.skill, self.episode_skill = np.ones((2, num), np.int64)
        self.set_physics({key: value for key, value in (("mass", mass), ("friction", friction)) if value is not None})

    def set_physics(self, options: dict | None) -> None:
        """Give the simulators the `mass` (kg) and the `friction` of `options`, each a number or one per simulator
        (num,); those left out stay as they are.

        To be called before a reset. Raises EnvError, with nothing changed, for other options, another number of values,
        what is not within LIMITS.
        """
        wanted = {"mass": self.physics[:, 0].copy(), "friction": self.physics[:, 1].copy()}
        for key, values in (options or {}).items():
            if key not in wanted:
                raise EnvError(f"unknown option {key!r} of reset; known are mass (kg) and friction")
            values = np.array(values, object).ravel().tolist()
            if len(values) not in (1, len(self.data)):
                raise EnvError(f"{key} has {len(values)} values (copies: {len(self.data)}); give one, or one per copy")
            for value in values:
                low, high = LIMITS[key]
                if not isinstance(value, Real) or isinstance(value, bool) or not low <= value <= high:
                    raise EnvError(f"{key} {value!r} makes no sense; give a number from {low:g} to {high:g}")
            wanted[key][:] = values
        for i, physics in enumerate(zip(*(column.tolist() for column in wanted.values()))):
            self._apply(i, *physics)

    def _apply(self, i: int, mass: float, friction: float) -> None:
        if (self.physics[i] == (mass, friction)).all():
            return
        if self.models[i] is self.base:
            self.models[i] = copy.copy(self.base)
        model, base = self.models[i], self.base
        model.body_mass[self.object] = mass
        model.body_inertia[self.object] = base.body_inertia[self.object] * mass / base.body_mass[self.object]
        model.geom_friction[self.table, 0] = simulated(self.task, friction)
        mujoco.mj_setConst(model, mujoco.MjData(model))  # what follows from masses; it would overwrite data in use
        self.physics[i] = mass, friction

    def reset(self, i: int, rng: np.random.Generator, goal_range: float = RANGE) -> None:
        """Start an episode; goals are drawn within `goal_range` m of their centre along x and y."""
        model, data, task = self.models[i], self.data[i], self.task
        mujoco.mj_resetData(model, data)
        data.qpos[:] = self.home_qpos
        data.mocap_pos[0], data.mocap_quat[0] = self.home, (0, 1, 0, 0)
        place = rng.uniform(-RANGE, RANGE, size=2)
        data.qpos[self.object_qpos:self.object_qpos + 7] = 0.6 + place[0], place[1], task.half, 1, 0, 0, 0
        aside = rng.uniform(-goal_range, goal_range, size=2)
        height = rng.uniform(0, 0.2) * (rng.uniform() >= 0.3) if task.air else 0.0
        self.goal[i] = data.mocap_pos[1] = task.goal_x + aside[0], aside[1], task.half + height
        mujoco.mj_forward(model, data)
        self._read(i)
        self.skill[i], self.episode_skill[i] = skill(self.object_pos[i, 2], True, False), 1

    def aim(self, action: np.ndarray) -> None:
        """Actions (num, 3 or 4) of all simulators: what `advance` will do. Raises EnvError for another shape or NaN."""
        check_actions(action, (len(self.data), 4 if self.task.gripper else 3))
        action = np.clip(action, -1.0, 1.0).astype(np.float64)
        start = np.stack([mocap[0] for mocap in self.mocap])
        way = np.clip(self.ee_pos + REACH * action[:, :3], LOW, HIGH) - start
        self.ramp = start[:, None] + way[:, None] * self.pieces[:, None]  # (num, RAMP, 3)
        if self.task.gripper:
            self.ctrl = np.clip((self.width + WIDTH * action[:, 3]) / 2, 0.0, 0.04)

    def advance(self, i: int) -> None:
        """One env step of simulator i; simulators may advance in threads of their own."""
        model, data, mocap = self.models[i], self.data[i], self.mocap[i]
        data.ctrl[:] = self.ctrl[i]
        for point in self.ramp[i]:
            mocap[0] = point
            mujoco.mj_step(model, data, nstep=self.nstep)
        self._refresh(i)
        if self.task.sami:
            pairs = data.contact.geom
            # Not only those that overlap: fingers act from their margin of 1 mm on, and hold 5 kg from 0.4 mm.
            touching = set(pairs[(pairs == self.object_geom).any(axis=1)].ravel().tolist())
            self.skill[i] = skill(self.object_pos[i, 2], self.table in touching,
                                  all(touching & pads for pads in self.pads))
            self.episode_skill[i] = max(self.episode_skill[i], self.skill[i])

    def _refresh(self, i: int) -> None:
        """Read simulator i where it is now: mj_step leaves the kinematics of before its last 2 ms."""
        model, data = self.models[i], self.data[i]
        mujoco.mj_kinematics(model, data)
        mujoco.mj_comPos(model, data)
        mujoco.mj_comVel(model, data)
        self._read(i)

    def _read(self, i: int) -> None:
        model, data = self.models[i], self.data[i]
        mujoco.mj_objectVelocity(model, data, SITE, self.ee, self.ee_vel[i], 0)
        mujoco.mj_objectVelocity(model, data, BODY, self.object, self.object_vel[i], 0)
        self.ee_pos[i], self.object_pos[i] = data.site_xpos[self.ee], data.xpos[self.object]
        self.object_mat[i] = data.xmat[self.object].reshape(3, 3)
        self.width[i] = data.qpos[self.fingers[0]] + data.qpos[self.fingers[1]]

    def observe(self) -> dict[str, np.ndarray]:
        """`observation` (num, 18 or 19), `achieved_goal` and `desired_goal` (num, 3), float64."""
        scale = 1.0 if self.task.sami else DT
        parts = [self.ee_pos, self.ee_vel[:, 3:] * scale, self.object_pos, rotations.mat2euler(self.object_mat),
                 self.object_vel[:, 3:] * scale, self.object_vel[:, :3] * scale]
        if self.task.gripper:
            parts.insert(2, self.width[:, None])
        return {"observation": np.concatenate(parts, axis=1), "achieved_goal": self.object_pos.copy(),
                "desired_goal": self.goal.copy()}

    def success(self) -> np.ndarray:
        """Whether each object is at its goal, (num,) bool."""
        return np.linalg.norm(self.object_pos - self.goal, axis=-1) < THRESHOLD

    def info(self) -> dict[str, np.ndarray]:
        """Arrays (num,): mass, friction; in FrankaSkill skill and episode_skill, strings."""
        info = {"mass": self.physics[:, 0].copy(), "friction": self.physics[:, 1].copy()}
        if self.task.sami:
            info |= {"skill": SKILLS[self.skill], "episode_skill": SKILLS[self.episode_skill]}
        return info

    def snapshot(self, i: int) -> dict:
        """Simulator i as plain numbers and arrays."""
        return {"goal": self.goal[i].copy(), "physics": self.physics[i].copy(), "skill": int(self.skill[i]),
                "episode_skill": int(self.episode_skill[i]), "mujoco": mujoco_snapshot(self.models[i], self.data[i])}

    def restore(self, i: int, snapshot: dict) -> None:
        """Continue simulator i from a `snapshot`, bit by bit."""
        self._apply(i, *np.asarray(snapshot["physics"]).tolist())
        mujoco_restore(self.models[i], self.data[i], snapshot["mujoco"])
        self.goal[i] = np.asarray(snapshot["goal"])
        self.skill[i], self.episode_skill[i] = snapshot["skill"], snapshot["episode_skill"]
        self._refresh(i)


class FrankaEnv(WorldEnv):
    """One simulator, for gymnasium: the reference for the fast class, and the way to render.

    `terminate_on_success` ends an episode once the object is at its goal, be it in passing, as the originals do;
    `frame_skip` counts simulated steps of 2 ms per env step, while observed velocities stay times 0.05 s. `mass` and
    `friction` are those until `reset` is told others, which then stay.
    """
    metadata = {**WorldEnv.metadata, "render_fps": round(1 / DT)}

    def __init__(self, task: str, reward_type: str, terminate_on_success: bool = True, frame_skip: int = 25,
                 mass: Values = None, friction: Values = None, render_mode: str | None = None, width: int = 480,
                 height: int = 480):
        if reward_type not in ("sparse", "dense"):
            raise EnvError(f"unknown reward_type {reward_type!r}; known are sparse and dense")
        super().__init__(World(task, 1, frame_skip, mass, friction), render_mode, width, height)
        self.name, self.dense, self.terminate_on_success = task, reward_type == "dense", terminate_on_success
        self.target_range, self.shown = RANGE, None
        self.action_space = gym.spaces.Box(-1.0, 1.0, (4 if TASKS[task].gripper else 3,), np.float32)
        self.observation_space = gym.spaces.Dict({
            key: gym.spaces.Box(-np.inf, np.inf, value.shape[1:], np.float64)
            for key, value in self.world.observe().items()})

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        self.world.set_physics(options)
        super().reset(seed=seed)
        self.world.reset(0, self.np_random, self.target_range)
        if self.render_mode == "human":
            self.render()
        return self._observe(), self._info()

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        self.world.aim(np.asarray(action)[None])
        self.world.advance(0)
        reward = self.compute_reward(self.world.object_pos, self.world.goal)[0]
        if self.render_mode == "human":
            self.render()
        info = self._info()
        return self._observe(), float(reward), bool(info["is_success"] and self.terminate_on_success), False, info

    def compute_reward(self, achieved_goal: np.ndarray, desired_goal: np.ndarray, info=None) -> np.ndarray:
        """Goals (..., 3) -> rewards (...)."""
        return compute_reward(achieved_goal, desired_goal, self.dense)

    def _scene(self) -> tuple[mujoco.MjModel, mujoco.MjData, str | None]:
        if self.shown is None:
            self.shown = mujoco.MjData(build(self.name, visible=True))
        data = self.world.data[0]
        self.shown.qpos[:], self.shown.mocap_pos[:] = data.qpos, data.mocap_pos
        mujoco.mj_forward(self.shown.model, self.shown)
        return self.shown.model, self.shown, "front" if self.render_mode == "rgb_array" else None

    def _observe(self) -> dict[str, np.ndarray]:
        return {key: value[0] for key, value in self.world.observe().items()}

    def _info(self) -> dict:
        return {"is_success": float(self.world.success()[0]),
                **{key: value[0].item() for key, value in self.world.info().items()}}


class FrankaVectorEnv(WorldVectorEnv):
    """`num_envs` Franka tasks, for `envs.make_vec`."""

    def __init__(self, env_id: str, num_envs: int, time_feature: bool = True, threads: int = 1,
                 goal_range: float = 0.0, frame_skip: int = 25, mass: Values = None, friction: Values = None,
                 **kwargs):
        env = narrow_goals(gym.make(env_id, disable_env_checker=True, **kwargs), goal_range)
        world = World(env.spec.kwargs["task"], num_envs, frame_skip, mass, friction)
        super().__init__(env, num_envs, time_feature, world, threads)

    def reset(self, seed: int | None = None, options: dict | None = None) -> Observation:
        """Reset all copies; `options`: mass and friction of all, each a number or one per copy (num_envs,)."""
        self.world.set_physics(options)
        return super().reset(seed)

    def _begin(self, i: int) -> None:
        self.world.reset(i, self.rng[i], self.env.unwrapped.target_range)

    def _step(self, action: np.ndarray):
        self.world.aim(np.asarray(action))
        self.threads.each(self.world.advance)
        reward = self.compute_reward(self.world.object_pos, self.world.goal)
        success = self.world.success()
        terminated = success if self.env.unwrapped.terminate_on_success else np.zeros(self.num_envs, bool)
        self.labels = self.world.info()  # before a reset clears them
        return reward, terminated, np.zeros(self.num_envs, bool), success.astype(np.float64)
