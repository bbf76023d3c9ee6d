"""A potential, as a user writes one."""
import torch

from knowledge.history import History


def potential(history: History) -> torch.Tensor:
    """How near the goal is."""
    return -(history.last("desired_goal") - history.last("achieved_goal")).norm(dim=1)
