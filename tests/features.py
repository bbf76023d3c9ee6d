"""A pair of functions for LESR, as a user writes them."""
import torch


def revise_state(s: torch.Tensor) -> torch.Tensor:
    return torch.cat([s, s[:, :1].square()], 1)


def intrinsic_reward(x: torch.Tensor) -> torch.Tensor:
    return -x[:, -1].clamp(max=9)
