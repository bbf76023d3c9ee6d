"""Fetch{Reach,Push,Slide,PickAndPlace}[Dense]-v4, many at a time: the bits of gymnasium-robotics in half the time.

All copies share one MjModel; each has its own MjData. A step of the original spends a third of its time looking up
joints and sites by name; here the addresses are looked up once. A thread pool uses every
core. `tests/test_envs.py` steps this class beside `gym.make` and compares to the last bit.
"""
import gymnasium as gym
import mujoco
import numpy as np
from gymnasium_robotics.utils import rotations

from envs.vector import Observation, Threads, VectorEnv, mujoco_restore, mujoco_snapshot, narrow_goals
from envs.world import check_actions

MOCAP_QUAT_DELTA = np.array([1.0, 0.0, 1.0, 0.0])  # added to the gripper's quaternion at every step, as upstream does


class FetchVectorEnv(VectorEnv):
    """`num_envs` Fetch tasks stepped by `threads` threads.

    Attributes beside VectorEnv's: goal (num_envs, 3); rng, one numpy Generator per copy, seeded as gymnasium does.
    """

    def __init__(self, env_id: str, num_envs: int, time_feature: bool = True, threads: int = 1,
                 goal_range: float = 0.0, **kwargs):
        env = narrow_goals(gym.make(env_id, disable_env_checker=True, **kwargs), goal_range)
        super().__init__(env, num_envs, time_feature)
        self.task = task = self.env.unwrapped
        self.model = model = task.model
        self.data = [mujoco.MjData(model) for _ in range(num_envs)]
        self.rng = [gym.utils.seeding.np_random()[0] for _ in range(num_envs)]
        self.goal = np.zeros((num_envs, 3))
        self.dt = task.n_substeps * model.opt.timestep

        def joint(name: str) -> int:
            return mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_JOINT, name)

        self.grip = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_SITE, "robot0:grip")
        fingers = [joint("robot0:r_gripper_finger_joint"), joint("robot0:l_gripper_finger_joint")]
        self.finger_qpos, self.finger_qvel = model.jnt_qposadr[fingers], model.jnt_dofadr[fingers]
        self.actuated_qpos = model.jnt_qposadr[model.actuator_trnid[:, 0]]
        self.position_actuator = model.actuator_biastype != 0
        weld = int(np.flatnonzero(model.eq_type == mujoco.mjtEq.mjEQ_WELD)[0])
        bodies = model.eq_obj1id[weld], model.eq_obj2id[weld]
        self.gripper_body = bodies[1] if model.body_mocapid[bodies[0]] != -1 else bodies[0]
        if task.has_object:
            self.object = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_SITE, "object0")
            self.object_qpos = int(model.jnt_qposadr[joint("object0:joint")])

        # What one copy's simulator is read into; the observation is then made for all copies at once.
        self.grip_pos, self.object_pos = np.zeros((num_envs, 3)), np.zeros((num_envs, 3))
        self.object_mat = np.zeros((num_envs, 3, 3))
        self.fingers, self.finger_vel = np.zeros((num_envs, 2)), np.zeros((num_envs, 2))
        self.grip_velp, self.object_velp, self.object_velr = (np.zeros((num_envs, 3)) for _ in range(3))
        self.jacobians = np.zeros((num_envs, 3, 3, model.nv))

        self.threads = Threads(threads, num_envs)

    def close(self) -> None:
        self.threads.close()
        self.env.close()

    def _read(self, i: int) -> None:
        model, data, qvel = self.model, self.data[i], self.data[i].qvel
        jac_grip, jac_pos, jac_rot = self.jacobians[i]
        mujoco.mj_jacSite(model, data, jac_grip, None, self.grip)
        self.grip_velp[i] = jac_grip @ qvel
        self.grip_pos[i] = data.site_xpos[self.grip]
        self.fingers[i], self.finger_vel[i] = data.qpos[self.finger_qpos], qvel[self.finger_qvel]
        if self.task.has_object:
            mujoco.mj_jacSite(model, data, jac_pos, jac_rot, self.object)
            self.object_velp[i], self.object_velr[i] = jac_pos @ qvel, jac_rot @ qvel
            self.object_pos[i] = data.site_xpos[self.object]
            self.object_mat[i] = data.site_xmat[self.object].reshape(3, 3)

    def _reset(self, i: int, seed: int | None) -> None:
        if seed is not None:
            self.rng[i] = gym.utils.seeding.np_random(seed)[0]
        task, data, rng = self.task, self.data[i], self.rng[i]
        mujoco.mj_resetData(self.model, data)
        data.time = task.initial_time
        data.qpos[:], data.qvel[:] = task.initial_qpos, task.initial_qvel
        if task.has_object:
            centre = xy = task.initial_gripper_xpos[:2]
            while np.linalg.norm(xy - centre) < 0.1:  # an object under the gripper would be inside it
                xy = centre + rng.uniform(-task.obj_range, task.obj_range, size=2)
            data.qpos[self.object_qpos:self.object_qpos + 2] = xy
        mujoco.mj_forward(self.model, data)
        goal = task.initial_gripper_xpos[:3] + rng.uniform(-task.target_range, task.target_range, size=3)
        if task.has_object:
            goal += task.target_offset
            goal[2] = task.height_offset
            if task.target_in_the_air and rng.uniform() < 0.5:
                goal[2] += rng.uniform(0, 0.45)
        self.goal[i] = goal
        self._read(i)

    def _step(self, action: np.ndarray):
        action = np.asarray(action)
        check_actions(action, (self.num_envs, 4))
        action = np.clip(action, -1.0, 1.0)
        displacement = action[:, :3] * action.dtype.type(0.05)  # in the action's own precision, as upstream
        grip = np.zeros(self.num_envs) if self.task.block_gripper else action[:, 3]

        def advance(i: int) -> None:
            data = self.data[i]
            target = np.full(self.model.nu, grip[i], np.float64)
            data.ctrl[:] = np.where(self.position_actuator, data.qpos[self.actuated_qpos] + target, target)
            data.mocap_pos[0] = data.xpos[self.gripper_body] + displacement[i]
            data.mocap_quat[0] = data.xquat[self.gripper_body] + MOCAP_QUAT_DELTA
            mujoco.mj_step(self.model, data, nstep=self.task.n_substeps)
            if self.task.block_gripper:
                data.qpos[self.finger_qpos] = 0.0
                mujoco.mj_forward(self.model, data)
            self._read(i)

        self.threads.each(advance)
        achieved = self.object_pos if self.task.has_object else self.grip_pos
        reward = self.compute_reward(achieved, self.goal)
        success = np.linalg.norm(achieved - self.goal, axis=-1) < self.task.distance_threshold
        never = np.zeros(self.num_envs, bool)
        return reward, never, never.copy(), success.astype(np.float64)

    def _observe(self) -> Observation:
        grip_velp, finger_vel = self.grip_velp * self.dt, self.finger_vel * self.dt
        if self.task.has_object:
            parts = [self.grip_pos, self.object_pos, self.object_pos - self.grip_pos, self.fingers,
                     rotations.mat2euler(self.object_mat), self.object_velp * self.dt - grip_velp,
                     self.object_velr * self.dt, grip_velp, finger_vel]
        else:
            parts = [self.grip_pos, self.fingers, grip_velp, finger_vel]
        achieved = self.object_pos if self.task.has_object else self.grip_pos
        return {"observation": np.concatenate(parts, axis=1), "achieved_goal": achieved.copy(),
                "desired_goal": self.goal.copy()}

    def _snapshot(self, i: int) -> dict:
        return {"rng": self.rng[i].bit_generator.state, "goal": self.goal[i].copy(),
                "mujoco": mujoco_snapshot(self.model, self.data[i])}

    def _restore(self, i: int, snapshot: dict) -> None:
        self.rng[i].bit_generator.state = snapshot["rng"]
        self.goal[i] = np.asarray(snapshot["goal"])
        mujoco_restore(self.model, self.data[i], snapshot["mujoco"])
