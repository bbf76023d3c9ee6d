"""Observations as what networks eat: one float32 matrix, shifted and scaled."""
import gymnasium as gym
import numpy as np
import torch
from torch.utils._pytree import tree_map

from envs.crafter_text import CELLS
from envs.ids import EnvError
from envs.vector import Observation, VectorEnv

KINDS_OF_CELLS = len(CELLS)  # in Crafter


def continuous_sizes(vec: VectorEnv) -> tuple[int, int, int]:
    """How many numbers there are in the features, in an action, and in a goal (0: no goals). Raises EnvError for
    actions that are not continuous."""
    if not isinstance(vec.action_space, gym.spaces.Box):
        raise EnvError(f"{vec.env.spec.id} has {vec.action_space} actions; continuous ones (Box) are needed, "
                       "or a script for discrete ones, as algos/ppo.py")
    d = vec.action_space.shape[0]
    if len(vec.observation_space.shape or ()) == 3:
        raise EnvError(f"{vec.env.spec.id} observes pictures; name an encoder behind the id, as in "
                       f"{vec.env.spec.id}:pca")
    if not vec.is_goal_env:
        return vec.observation_space.shape[0], d, 0
    sizes = [vec.observation_space[part].shape[0] for part in ("achieved_goal", "desired_goal", "observation")]
    return sum(sizes), d, sizes[1]


def discrete_sizes(vec: VectorEnv, any_pictures: bool = False) -> tuple[tuple[int, ...], int]:
    """Shape of what `seen` gives, (7, 7, 3) cells of a grid, (64, 64, 3) pixels or (f,) features, and the number of
    actions. Raises EnvError for goals, for actions that are not discrete, and unless `any_pictures` for pictures of
    another shape."""
    if not isinstance(vec.action_space, gym.spaces.Discrete):
        raise EnvError(f"{vec.env.spec.id} has {vec.action_space} actions; discrete ones are needed, or a script for "
                       "continuous ones, as algos/sac.py")
    if vec.action_space.start != 0:
        raise EnvError(f"{vec.env.spec.id} counts its actions from {vec.action_space.start}; count them from 0")
    if vec.is_goal_env:
        raise EnvError(f"{vec.env.spec.id} has goals; a flat array or a view of a grid is needed")
    space = vec.observation_space
    if isinstance(space, gym.spaces.Dict) and "image" not in space.spaces:
        return (space["view"].shape[0] * space["view"].shape[1] * KINDS_OF_CELLS + space["status"].shape[0],), int(
            vec.action_space.n)
    shape = (space["image"] if isinstance(space, gym.spaces.Dict) else space).shape
    if len(shape) == 3 and not any_pictures and shape not in ((7, 7, 3), (64, 64, 3)):
        raise EnvError(f"{vec.env.spec.id} shows {' x '.join(map(str, shape))} numbers, and here are layers for "
                       "64 x 64 x 3; use algos/ppo_pixels.py, or name an encoder behind the id")
    return shape, int(vec.action_space.n)


def policy_sizes(vec: VectorEnv) -> tuple[tuple[int, ...], int, bool]:
    """For both kinds of actions: shape of what a learner sees, how many actions or numbers in an action there are, and
    whether actions are discrete. Raises EnvError as `discrete_sizes` and `continuous_sizes` do."""
    if isinstance(vec.action_space, gym.spaces.Discrete):
        return *discrete_sizes(vec), True
    f, d, _ = continuous_sizes(vec)
    return (f,), d, False


def to_env(vec: VectorEnv, action: torch.Tensor) -> np.ndarray:
    """Actions (B,) or (B, d) of a policy as `vec` takes them: discrete ones as they are, continuous ones clipped to
    [-1, 1] and put in the bounds of the action space."""
    if isinstance(vec.action_space, gym.spaces.Discrete):
        return action.cpu().numpy()
    return vec.to_box(action.clamp(-1, 1).cpu().numpy())


def seen(obs: torch.Tensor | dict[str, torch.Tensor]) -> torch.Tensor:
    """What a learner for discrete actions sees of observations: features (B, f), the cells (B, 7, 7, 3) of a grid, the
    pixels (B, 64, 64, 3) of Crafter, and of Crafter-Symbols features: what lies in each cell, one-hot, and status."""
    if not isinstance(obs, dict) or "image" in obs:
        return obs["image"] if isinstance(obs, dict) else obs
    cells = obs["view"].flatten(1).unsqueeze(2) == torch.arange(KINDS_OF_CELLS)  # (B, 63, 19)
    return torch.cat([cells.flatten(1).float(), obs["status"] / 9], 1)


def time_limit_of(vec: VectorEnv) -> int:
    """Steps of an episode, for hindsight. Raises EnvError where there is no limit, and for repeated actions."""
    if getattr(vec, "action_repeat", 1) > 1:
        raise EnvError(f"{vec.env.spec.id} with action_repeat: rewards for hindsight goals are those of one step; "
                       "leave it out, or use --her-goals 0")
    if vec.max_episode_steps is None:
        raise EnvError(f"{vec.env.spec.id} has no time limit: hindsight stores whole episodes; use --her-goals 0")
    return vec.max_episode_steps


def flatten(obs: Observation | torch.Tensor | dict[str, torch.Tensor]) -> torch.Tensor:
    """Features (B, f) float32. Goal environments: achieved goal, desired goal, observation (time feature last)."""
    if isinstance(obs, dict):
        parts = [torch.as_tensor(obs[name]) for name in ("achieved_goal", "desired_goal", "observation")]
        return torch.cat(parts, 1).float()
    return torch.as_tensor(obs).float()


def unflatten(features: torch.Tensor, goal_dim: int) -> torch.Tensor | dict[str, torch.Tensor]:
    """The observation behind features (B, f): a dict of views if `goal_dim` > 0, else the features themselves."""
    if goal_dim == 0:
        return features
    g = goal_dim
    return {"achieved_goal": features[:, :g], "desired_goal": features[:, g:2 * g], "observation": features[:, 2 * g:]}


def example_of(vec: VectorEnv, obs: Observation) -> torch.Tensor | dict[str, torch.Tensor]:
    """Two copies of the first of these observations, as external policies will meet them."""
    if not vec.is_goal_env:
        return tree_map(lambda x: torch.cat([x[:1], x[:1]]), to_tensors(obs))
    return unflatten(flatten(obs)[:1].repeat(2, 1), obs["desired_goal"].shape[1])


def to_tensors(obs: Observation) -> torch.Tensor | dict[str, torch.Tensor]:
    """A batch of observations as rules of grid tasks read them, a dict of tensors; pictures (B, h, w, c) as they are;
    of other tasks, features (B, f)."""
    if isinstance(obs, dict):
        return {k: torch.from_numpy(x) for k, x in obs.items()}
    return torch.from_numpy(obs) if obs.ndim == 4 else flatten(obs)


class Normalizer:
    """Running mean and standard deviation of all features seen; the identity when off."""

    def __init__(self, width: int, on: bool = True):
        self.on, self.count = on, 0
        self.mean, self.square = torch.zeros(2, width, dtype=torch.float64)  # square: summed squared deviations

    def add(self, features: torch.Tensor) -> None:
        """Count a batch (B, f) in (Chan et al. 1979)."""
        self.count += len(features)
        deviation = features - self.mean
        self.mean = self.mean + deviation.sum(0) / self.count
        self.square = self.square + (deviation * (features - self.mean)).sum(0)

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Features (B, f), shifted and scaled, clipped to +-5; as they are where it is off."""
        if not self.on:
            return features
        mean, std = self.stats()
        return ((features - mean) / std).clamp(-5, 5)

    def stats(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation, (f,) float32 each; at least 0.01: what hardly varies is not blown up."""
        if not self.on or self.count == 0:
            return torch.zeros(len(self.mean)), torch.ones(len(self.mean))
        return self.mean.float(), (self.square / self.count).clamp(min=1e-4).sqrt().float()

    def state_dict(self) -> dict:
        return {"count": self.count, "mean": self.mean, "square": self.square}

    def load_state_dict(self, state: dict) -> None:
        self.count = state["count"]
        self.mean.copy_(state["mean"])
        self.square.copy_(state["square"])
