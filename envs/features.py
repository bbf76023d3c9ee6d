"""Observations as what networks eat: one float32 matrix, shifted and scaled."""
import numpy as np
import torch

from envs.vector import Observation


def flatten(obs: Observation) -> torch.Tensor:
    """Features (B, f) float32. Goal environments: achieved goal, desired goal, observation (time feature last)."""
    if isinstance(obs, dict):
        obs = np.concatenate([obs["achieved_goal"], obs["desired_goal"], obs["observation"]], axis=1)
    return torch.from_numpy(np.asarray(obs, np.float32))


def unflatten(features: torch.Tensor, goal_dim: int) -> torch.Tensor | dict[str, torch.Tensor]:
    """The observation behind features (B, f): a dict of views if `goal_dim` > 0, else the features themselves."""
    if goal_dim == 0:
        return features
    g = goal_dim
    return {"achieved_goal": features[:, :g], "desired_goal": features[:, g:2 * g], "observation": features[:, 2 * g:]}


def to_tensors(obs: Observation) -> torch.Tensor | dict[str, torch.Tensor]:
    """A batch of observations as rules of grid tasks read them, a dict of tensors; of other tasks, features (B, f)."""
    return {k: torch.from_numpy(x) for k, x in obs.items()} if isinstance(obs, dict) else flatten(obs)


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

    def stats(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation, (f,) float32 each; at least 0.01: what hardly varies is not blown up."""
        if not self.on or self.count == 0:
            return torch.zeros(len(self.mean)), torch.ones(len(self.mean))
        return self.mean.float(), (self.square / self.count).clamp(min=1e-4).sqrt().float()

    def state_dict(self) -> dict:
        return {"count": self.count, "mean": self.mean, "square": self.square}

    def load_state_dict(self, state: dict) -> None:
        self.count, self.mean, self.square = state["count"], state["mean"], state["square"]
