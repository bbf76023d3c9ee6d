"""Environments that cost no time, and rules for them, as users write theirs: `--env tests.tasks:Point-v0`."""
import os
import signal
import tempfile
from functools import cache
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

import envs
from envs import offline

NUMBERS = gym.spaces.Box(-1, 1, (2,), np.float64)
SIGNAL_AT = "POINT_SIGNAL_AT"  # environment variable: "100 SIGINT" sends this signal at the hundredth step, to the
# whole process group, as a terminal does


class Point(gym.Env):
    """Move a point in a square to a goal, within twelve steps of at most 0.3 per axis."""

    observation_space = gym.spaces.Dict(observation=NUMBERS, achieved_goal=NUMBERS, desired_goal=NUMBERS)
    action_space = gym.spaces.Box(-0.3, 0.3, (2,), np.float32)
    steps = 0  # of all points of the process

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.position, self.goal = self.np_random.uniform(-1, 1, (2, 2))
        return self.look(), {}

    def look(self):
        return {"observation": self.goal - self.position, "achieved_goal": self.position.copy(),
                "desired_goal": self.goal.copy()}

    def compute_reward(self, achieved_goal, desired_goal, info):
        return -(np.abs(achieved_goal - desired_goal).max(-1) > 0.15).astype(np.float32)

    def step(self, action):
        Point.steps += 1
        at, _, name = os.environ.get(SIGNAL_AT, "").partition(" ")
        if str(Point.steps) == at:
            os.killpg(os.getpgrp(), signal.Signals[name])
        self.position = np.clip(self.position + action, -1, 1)
        reward = float(self.compute_reward(self.position, self.goal, {}))
        return self.look(), reward, False, False, {"is_success": np.abs(self.position - self.goal).max() <= 0.15}


class Dense(Point):
    """The reward is the distance, so that returns tell any two policies apart."""

    def compute_reward(self, achieved_goal, desired_goal, info):
        return -np.abs(achieved_goal - desired_goal).max(-1).astype(np.float32)


class Hopeless(Point):
    """No goal is ever reached."""

    def compute_reward(self, achieved_goal, desired_goal, info):
        return -np.ones(np.shape(achieved_goal)[:-1], np.float32)


if "Point-v0" not in gym.registry:  # a rule file is executed once more
    gym.register("Point-v0", Point, max_episode_steps=12)
    gym.register("PointDense-v0", Dense, max_episode_steps=12)
    gym.register("Hopeless-v0", Hopeless, max_episode_steps=12)


@cache
def dataset() -> str:
    """A file of 64 episodes of uniform actions in Point-v0."""
    vec, rng = envs.make_vec("tests.tasks:Point-v0", 4), np.random.default_rng(0)
    data = offline.collect(lambda obs: rng.uniform(-0.3, 0.3, (4, 2)).astype(np.float32), vec, 64, seed=0)
    path = Path(tempfile.mkdtemp(), "point.npz")
    offline.save(path, data._replace(meta={"env": "Point-v0", "ref_min": -12.0, "ref_max": 0.0}))
    return str(path)


def go_right(obs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Right, wherever the goal is."""
    return torch.ones_like(obs["desired_goal"]) * torch.tensor([0.5, 0.0], dtype=obs["desired_goal"].dtype)


def approach(obs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Towards the goal, at half speed."""
    return (2 * (obs["desired_goal"] - obs["achieved_goal"])).clamp(-0.5, 0.5)
