"""Environments around a `World`: the simulators of a task of ours, one row each, with what they show and earn.

A world has `aim(action)` (num, d), `advance(i)`, `observe()`, `info()`, `snapshot(i)` and `restore(i, snapshot)`.
"""
import atexit
import os
import subprocess
import sys
import weakref
from functools import cache

import gymnasium as gym
import mujoco
import numpy as np

from envs.foreign import check_action
from envs.ids import EnvError
from envs.vector import Observation, Threads, VectorEnv


def check_actions(action: np.ndarray, shape: tuple[int, int]) -> None:
    """Raises EnvError for actions of another shape than (num, d), or with NaN: it would end in every observation."""
    if action.shape != shape:
        raise EnvError(f"actions have shape {action.shape}; this task takes {shape}: one row per copy")
    check_action(action)


@cache
def find_renderer() -> str | None:
    """Name of a MuJoCo renderer that works without a display ("egl", "osmesa"), set in MUJOCO_GL; None if none does.

    A failed attempt poisons a process (PyOpenGL fixes its platform at import), so each is tried in one of its own.
    """
    chosen = os.environ.get("MUJOCO_GL")
    for name in [chosen] if chosen else ["egl", "osmesa"]:
        probe = f"from mujoco.{name} import GLContext; c = GLContext(64, 64); c.make_current(); c.free()"
        if subprocess.run([sys.executable, "-c", probe], env={**os.environ, "MUJOCO_GL": name},
                          capture_output=True).returncode == 0:
            os.environ["MUJOCO_GL"] = name
            return name
    return None


class Camera:
    """Small pictures of simulators of one `model`, as its camera `name` sees them: without shadows, reflections and
    smoothing, and of the shapes that collide, so that one takes about 1 ms. Raises EnvError where nothing can draw."""

    def __init__(self, model: mujoco.MjModel, name: str, size: int):
        if not find_renderer():
            raise EnvError("neither EGL nor OSMesa works here, which draw the pictures; on Debian or Ubuntu: apt-get "
                           "install libegl1 libgl1 libosmesa6")
        from gymnasium.envs.mujoco.mujoco_rendering import OffScreenViewer  # it opens a context of OpenGL

        model.vis.quality.offsamples, model.vis.global_.offwidth, model.vis.global_.offheight = 0, size, size
        self.viewer, self.camera = OffScreenViewer(model, mujoco.MjData(model), size, size), model.camera(name).id
        self.viewer.vopt.geomgroup[3] = 1
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self.viewer.scn.flags[flag] = 0
        viewer = weakref.ref(self.viewer)
        atexit.register(lambda: viewer() and viewer().free())  # later, OpenGL is gone, and complains

    def __call__(self, data: mujoco.MjData) -> np.ndarray:
        """Picture (size, size, 3) uint8 of a simulator."""
        self.viewer.make_context_current()
        self.viewer.data = data
        return self.viewer.render("rgb_array", self.camera)


class WorldEnv(gym.Env):
    """One simulator, for gymnasium. A subclass says how to reset and step it, and what a camera sees."""
    metadata = {"render_modes": ["human", "rgb_array"]}

    def __init__(self, world, render_mode: str | None, width: int, height: int):
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise EnvError(f"unknown render_mode {render_mode!r}; known are "
                           f"{' and '.join(self.metadata['render_modes'])}")
        self.world, self.render_mode, self.size, self.renderer = world, render_mode, (width, height), None

    def _scene(self) -> tuple:
        """The model and the data to draw, and the name of the camera or None."""
        raise NotImplementedError

    def render(self) -> np.ndarray | None:
        """Frame (height, width, 3) uint8, or None in a window. Raises EnvError without a `render_mode`."""
        if self.render_mode is None:
            raise EnvError("render_mode is None; make the task with render_mode='rgb_array'")
        model, data, camera = self._scene()
        if self.renderer is None:  # here, for it opens a context of OpenGL
            from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer

            self.renderer = MujocoRenderer(model, data, width=self.size[0], height=self.size[1], camera_name=camera)
        if self.renderer.viewer is not None and self.render_mode != "human":
            self.renderer.viewer.make_context_current()  # a `Camera` of this process may have drawn since
        return self.renderer.render(self.render_mode)

    def close(self) -> None:
        if self.renderer is not None:
            self.renderer.close()
            self.renderer = None

    def snapshot(self) -> dict:
        """State of the simulator as plain numbers and arrays, for `envs.snapshot`."""
        return self.world.snapshot(0)

    def restore(self, snapshot: dict) -> None:
        """Continue from a `snapshot`."""
        self.world.restore(0, snapshot)


class WorldVectorEnv(VectorEnv):
    """The copies of a world, stepped by `threads` threads, without gymnasium's wrappers. A subclass says how to begin
    an episode of copy i (`_begin`) and what a step earns (`_step`, which also keeps `World.info` in `labels`).

    Attributes beside VectorEnv's: world; rng, one numpy Generator per copy, seeded as gymnasium does. `info` of a step
    also has `labels`.
    """

    def __init__(self, env: gym.Env, num_envs: int, time_feature: bool, world, threads: int):
        super().__init__(env, num_envs, time_feature)
        self.world, self.threads = world, Threads(threads, num_envs)
        self.rng = [gym.utils.seeding.np_random()[0] for _ in range(num_envs)]

    def step(self, action: np.ndarray) -> tuple[Observation, np.ndarray, np.ndarray, np.ndarray, dict]:
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, reward, terminated, truncated, info | self.labels

    def close(self) -> None:
        self.threads.close()
        self.env.close()

    def _begin(self, i: int) -> None:
        raise NotImplementedError

    def _reset(self, i: int, seed: int | None) -> None:
        if seed is not None:
            self.rng[i] = gym.utils.seeding.np_random(seed)[0]
        self._begin(i)

    def _observe(self) -> Observation:
        return self.world.observe()

    def _snapshot(self, i: int) -> dict:
        return {"rng": self.rng[i].bit_generator.state, **self.world.snapshot(i)}

    def _restore(self, i: int, snapshot: dict) -> None:
        self.rng[i].bit_generator.state = snapshot["rng"]
        self.world.restore(i, snapshot)
