"""One environment, one transition at a time: what learners without a buffer step.

    env = envs.StreamEnv("HalfCheetah-v4")       # or CartPole-v1, MinAtar/Breakout-v1, dm_control/cheetah-run-v0, ...
    obs = env.reset(seed=1)
    obs, reward, terminated, truncated, over = env.step(action)      # over: call reset

MinAtar, dm_control (through shimmy) and Atari (through ale-py, with gymnasium's own preprocessing) are optional:
pip install -r requirements-envs.txt
"""
import importlib
import math
import sys
import warnings
import weakref
from pathlib import Path
from typing import Callable

import gymnasium as gym
import mujoco
import numpy as np

from envs import foreign
from envs.evaluation import can_be_filmed, in_learners_units, names_of_actions, or_no_film, tell
from envs.ids import EnvError, resolve, split_view
from envs.making import named
from envs.timeline import draw_actions
from envs.vector import (gym_restore, gym_snapshot, model_restore, model_snapshot, mujoco_restore, mujoco_snapshot,
                         random_state, set_random_state, time_limit, warn_of_statistics)
from envs.world import find_renderer

TIME_LIMIT = 1000  # what the time feature takes where a task names no limit; it is that of every dm_control task
CLASSIC, CLASSIC_LIMIT = ("CartPole", "Acrobot", "MountainCar"), 10_000  # as published: good agents should not meet it
PACKAGES = {"MinAtar/": "minatar", "dm_control/": "shimmy[dm-control]", "NoFrameskip": "ale-py"}


class StreamEnv:
    """A gymnasium environment with a time feature and exact snapshots.

    An observation is one row of numbers, float64, the time feature last: -0.5 after a reset and -0.5 + (k - 1) / T at
    step k.

    Attributes: size, how many numbers that are; kind, "vector", "minatar" or "atari"; shape of an observation without
    the time, (n,) or channels first (C, h, w); frames, how many the learner is to stack; action_space;
    max_episode_steps, the limit T, None without one; evaluation_limit, the one the task is registered with, where
    evaluations stop (MinAtar has none: 10,000). Atari episodes end for the learner when a life is lost (terminated),
    and go on until the game is over (`over`).
    """

    def __init__(self, env_id: str, max_episode_steps: int = 0, time_feature: bool = True, **kwargs):
        """max_episode_steps 0: 10,000 on classic control with discrete actions, else the task's own.

        Raises EnvError for an unknown id, a missing package, or observations that are no arrays."""
        if env_id.startswith("ALE/"):
            raise EnvError(f"{env_id} skips frames on its own; a stream takes {env_id[4:].split('-')[0]}NoFrameskip-v4")
        register(env_id)
        if split_view(env_id)[1]:
            raise EnvError(f"{env_id}: a stream takes observations as they are; leave out what stands behind the id")
        self.evaluation_limit = gym.spec(resolve(env_id)).max_episode_steps
        max_episode_steps = max_episode_steps or (CLASSIC_LIMIT if env_id.split("-v")[0] in CLASSIC else 0)
        limit = {"max_episode_steps": max_episode_steps} if max_episode_steps else {}
        self.kind = "atari" if "NoFrameskip" in env_id else "minatar" if env_id.startswith("MinAtar/") else "vector"
        with named(env_id), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # v4 is asked for by name: papers report it
            self.env = foreign.make(resolve(env_id), **limit, **kwargs)
            if self.kind == "atari":
                self.env = gym.wrappers.AtariPreprocessing(self.env)
        warn_of_statistics(self.env)
        self.close_once = weakref.finalize(self, self.env.close)  # at the latest when the program ends
        self.action_space, space = self.env.action_space, self.env.observation_space
        if isinstance(self.action_space, gym.spaces.Discrete) and self.action_space.start != 0:
            raise EnvError(f"{env_id} counts its actions from {self.action_space.start}; count them from 0")
        self.declared = space.shape  # None of a Dict
        boxes = list(space.spaces.values()) if isinstance(space, gym.spaces.Dict) else [space]
        if not all(isinstance(box, gym.spaces.Box) for box in boxes):
            raise EnvError(f"{env_id} observes {space}; a stream needs arrays (Box, or a Dict of them)")
        if self.kind == "vector" and any(len(box.shape) > 2 for box in boxes):
            raise EnvError(f"{env_id} observes images; a stream takes those of Atari, named as BreakoutNoFrameskip-v4, "
                           "and of MinAtar")
        self.shape = (sum(int(np.prod(box.shape)) for box in boxes),)
        if self.kind == "minatar":
            self.shape = (space.shape[2], *space.shape[:2])
        elif self.kind == "atari":
            self.shape = (1, *space.shape)
        self.frames = 4 if self.kind == "atari" else 1
        self.max_episode_steps = self.env.spec.max_episode_steps
        self.horizon, self.limit = self.max_episode_steps or TIME_LIMIT, time_limit(self.env)
        if self.kind != "atari" and not self.evaluation_limit:  # Seaquest's submarine may stay up for ever
            self.evaluation_limit = CLASSIC_LIMIT
        self.timed = time_feature and self.kind == "vector"
        self.size = math.prod(self.shape) + self.timed
        self.elapsed, self.lives = 0, 0
        if self.kind == "atari":
            self.fire = "FIRE" in self.env.unwrapped.get_action_meanings()

    def _arrays(self, obs):
        """The observation as an array, or a dict of some. Raises EnvError for another shape than the task declares."""
        if type(obs) is np.ndarray and obs.shape == self.declared:
            return obs
        foreign.check_shapes(self.env, obs)
        return {name: np.asarray(part) for name, part in obs.items()} if isinstance(obs, dict) else np.asarray(obs)

    def _row(self, obs: np.ndarray | dict, time: float) -> np.ndarray:
        obs = self._arrays(obs)
        if isinstance(obs, dict):
            obs = np.concatenate([np.ravel(obs[name]) for name in self.env.observation_space.spaces])
        elif self.kind == "minatar":
            obs = obs.transpose(2, 0, 1)
        row = np.empty(self.size)
        if self.timed:
            row[:-1], row[-1] = obs.reshape(-1), time
        else:
            row[:] = obs.reshape(-1)
        foreign.check_finite(self.env, row)
        return row

    def reset(self, seed: int | None = None) -> np.ndarray:
        """First observation of an episode."""
        seed = None if seed is None else seed % 2 ** 32  # MinAtar and dm_control take no more: numpy's old generator
        obs, info = foreign.reset(self.env, seed)
        if seed is not None and self.kind == "minatar":  # it may repeat the last action, even that of another episode
            self.env.unwrapped.game.last_action = 0
        if self.kind == "atari":
            if self.fire:  # games that wait for it would stand still
                obs, _, terminated, truncated, info = self.env.step(1)
                if terminated or truncated:
                    obs, info = self.env.reset()
            self.lives = info["lives"]
        self.elapsed = 0
        return self._row(obs, -0.5)

    def step(self, action: np.ndarray | int, serve: bool = False) -> tuple[np.ndarray, float, bool, bool, bool]:
        """Observation, reward, terminated, truncated, and whether the episode is over and `reset` is due.

        serve, for evaluations: FIRE is pressed after a lost life, too (Atari). Training leaves it to the agent; one
        that never presses it would stand still up to the time limit."""
        if isinstance(action, np.ndarray):
            foreign.check_action(action)
        obs, reward, terminated, truncated, info = foreign.step(self.env, action)
        over = terminated or truncated
        if self.kind == "atari":
            lost, self.lives = info["lives"] < self.lives, info["lives"]
            if lost and serve and self.fire and not over:
                obs, more, terminated, truncated, _ = self.env.step(1)
                reward, over = reward + more, terminated or truncated
            terminated = terminated or lost
        time = -0.5 + self.elapsed / self.horizon
        self.elapsed += 1
        return self._row(obs, time), float(reward), terminated, truncated, over

    def close(self) -> None:
        """Free simulators and windows."""
        self.close_once()

    def state_dict(self) -> dict:
        """Everything that `load_state_dict` needs to continue bit by bit: plain numbers and arrays."""
        snap = {"elapsed": self.elapsed, "lives": self.lives,
                "limit": self.limit._elapsed_steps if self.limit else 0}  # on Atari in frames, of which a step has four
        env = self.env.unwrapped
        if self.kind == "minatar":
            state = {k: v for k, v in vars(env.game.env).items() if k != "random"}
            return snap | {"game": state, "last_action": env.game.last_action, "rng": random_state(env.game.random)}
        if self.kind == "atari":
            frames = {f"frame{k}": frame for k, frame in enumerate(self.env.obs_buffer)}
            return snap | frames | {"ale": np.frombuffer(env.clone_state(include_rng=True).__getstate__(), np.uint8),
                           "rng": env.np_random.bit_generator.state}
        if hasattr(env, "_env"):  # dm_control
            physics, task = env._env.physics, env._env.task
            plain = {k: v for k, v in vars(task).items() if isinstance(v, (bool, int, float, np.ndarray))}
            return snap | {"model": model_snapshot(physics.model.ptr), "task": plain,
                           "mujoco": mujoco_snapshot(physics.model.ptr, physics.data.ptr),
                           "steps": env._env._step_count, "rng": random_state(task.random)}
        return snap | {"gym": gym_snapshot(self.env)}

    def load_state_dict(self, snap: dict) -> None:
        """Continue from the `state_dict` of an environment of the same id."""
        self.reset(seed=0)  # builds what a first reset builds; all of it is overwritten below
        self.elapsed, self.lives = snap["elapsed"], snap["lives"]
        env = self.env.unwrapped
        if self.kind == "minatar":
            vars(env.game.env).update(as_arrays(snap["game"]))
            env.game.last_action = snap["last_action"]
            set_random_state(env.game.random, snap["rng"])
        elif self.kind == "atari":
            from ale_py import ALEState
            state = ALEState.__new__(ALEState)
            state.__setstate__(np.asarray(snap["ale"]).tobytes())
            env.restore_state(state)
            env.np_random.bit_generator.state = snap["rng"]
            for k, frame in enumerate(self.env.obs_buffer):
                frame[:] = np.asarray(snap[f"frame{k}"])
            self.env.lives, self.env.game_over = self.lives, False
        elif hasattr(env, "_env"):
            physics, task = env._env.physics, env._env.task
            vars(task).update(as_arrays(snap["task"]))
            model_restore(physics.model.ptr, snap.get("model", {}))  # older checkpoints have none
            mujoco_restore(physics.model.ptr, physics.data.ptr, snap["mujoco"])
            mujoco.mj_step1(physics.model.ptr, physics.data.ptr)  # dm_control leaves this first half of a step done
            env._env._step_count, env._env._reset_next_step = snap["steps"], False
            set_random_state(task.random, snap["rng"])
        else:
            gym_restore(self.env, snap["gym"])
        if self.limit:
            self.limit._elapsed_steps = snap["limit"]


def register(env_id: str) -> None:
    """Make the ids of an optional package known. Raises EnvError that names the package if it is not installed."""
    package = next((package for mark, package in PACKAGES.items() if mark in env_id), None)
    if package is None or env_id in gym.registry:
        return
    try:
        if package == "minatar":
            importlib.import_module("minatar.gym").register_envs()
        else:
            if package.startswith("shimmy"):
                find_renderer()  # dm_control chooses one when it is imported, a window if told of none
                importlib.import_module("dm_control.suite")
            gym.register_envs(importlib.import_module(package.split("[")[0].replace("-", "_")))
    except ImportError as error:
        raise EnvError(f"{env_id} needs a package that is not installed: pip install -r requirements-envs.txt "
                       f"({package})") from error


def as_arrays(state: dict) -> dict:
    """Tensors of a checkpoint as the arrays they were."""
    return {k: np.asarray(v).copy() if hasattr(v, "shape") else v for k, v in state.items()}


# What a stream agent does: (observation, state) -> (action, state). The state is what it keeps within an episode, such
# as the frames it saw; None at the start of one.
StreamAct = Callable[[np.ndarray, object], tuple[np.ndarray | int, object]]


class StreamEvaluator:
    """Evaluations and films of a stream's run, in an environment of their own: training does not notice them."""

    def __init__(self, args, **kwargs):
        """`args` are those of a script; `kwargs` go to the environment."""
        self.args, self.kwargs = args, kwargs
        self.env = StreamEnv(args.env, **kwargs)

    @foreign.global_draws_kept()
    def play(self, act: StreamAct, twice: bool = False) -> dict[str, float]:
        """`args.eval_episodes` episodes, or twice as many, from the same start states every time. An episode stops at
        the task's own limit where training has a later one; on MinAtar, which has none, after 10,000 steps. On Atari
        FIRE is pressed after every life.

        Returns the columns of eval.csv; success is not read (NaN)."""
        episodes, seed = self.args.eval_episodes * (2 if twice else 1), 10_000 * self.args.seed + 5_000
        returns, lengths = np.array([self._episode(act, self.env, seed + k) for k in range(episodes)]).T
        return {"episodes": episodes, "return_mean": float(returns.mean()), "return_std": float(returns.std()),
                "success_rate": float("nan"), "length_mean": float(lengths.mean())}

    def report(self, act: StreamAct, step: int) -> dict[str, float]:
        """What --evaluate does: play, print, film."""
        result = self.play(act)
        tell(self.args, step, result)
        self.film(act, Path(self.args.evaluate))
        return result

    @foreign.global_draws_kept()
    def film(self, act: StreamAct, folder: Path) -> None:
        """Film `args.video` episodes into the run `folder`, and draw the actions; without a working renderer, say what
        to install."""
        env_id, folder = self.args.env, folder / "video"
        if self.args.video < 1:
            return
        drawn_by = env_id + str(gym.spec(resolve(env_id)).entry_point)
        painted = any(mark in drawn_by for mark in ("MinAtar/", "NoFrameskip", "classic_control"))
        if not can_be_filmed(resolve(env_id), painted):
            return
        import imageio.v2 as imageio  # slow to import, and only filming needs it

        folder.mkdir(parents=True, exist_ok=True)
        with or_no_film():
            env = StreamEnv(env_id, render_mode="rgb_array", **self.kwargs)
            for k in range(self.args.video):
                frames, actions = [], []
                self._episode(act, env, 10_000 * self.args.seed + 7_000 + k, frames, actions)
                if frames[0].dtype != np.uint8:  # MinAtar draws 10x10 pixels with colours in [0, 1]
                    frames = [(255 * f).astype(np.uint8).repeat(16, 0).repeat(16, 1) for f in frames]
                imageio.mimwrite(folder / f"episode-{k}.mp4", frames, fps=env.env.metadata.get("render_fps") or 25)
                draw_actions(frames, in_learners_units(np.array(actions), env.action_space), (),
                             names_of_actions(env_id, env.action_space), folder / f"actions-{k}.png", crop=False)
            env.close()
            print(f"filmed into {folder}", file=sys.stderr)

    @staticmethod
    def _episode(act: StreamAct, env: StreamEnv, seed: int, frames: list | None = None, actions: list | None = None
                 ) -> tuple[float, int]:
        """Return and length of an episode; its pictures go to `frames`, what was done to `actions`."""
        obs, state, over, total, length = env.reset(seed), None, False, 0.0, 0
        while not over:
            if frames is not None:
                frames.append(foreign.render(env.env))
            action, state = act(obs, state)
            if actions is not None:
                actions.append(action)
            obs, reward, _, _, over = env.step(action, serve=True)
            total, length = total + reward, length + 1
            over = over or length == env.evaluation_limit
        return total, length
