"""Replay with hindsight goals (HER, strategy "future"): a ring of transitions that knows where episodes end.

Andrychowicz et al., "Hindsight Experience Replay" (2017). This code is shared because it is long and easy to get wrong,
and no script here is about it.
"""
from typing import Callable, NamedTuple

import numpy as np
import torch


class Batch(NamedTuple):
    """Transitions. Features of tasks with goals begin with the achieved goal and the desired goal."""
    obs: torch.Tensor  # (B, f)
    action: torch.Tensor  # (B, d)
    reward: torch.Tensor  # (B, 1)
    terminated: torch.Tensor  # (B, 1)
    next_obs: torch.Tensor  # (B, f)


class ReplayBuffer:
    """The last `capacity` transitions of completed episodes, at least one episode per environment.

    An episode has at most `horizon` steps. Open episodes are kept apart and never sampled. With horizon 1 every
    transition is an episode of its own.
    """

    def __init__(self, capacity: int, horizon: int, num_envs: int, f: int, d: int, g: int = 0,
                 compute_reward: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None):
        """f, d, g: how many numbers features, actions and goals have. `compute_reward`, which hindsight needs, maps
        achieved and desired goals (B, g) to rewards (B,)."""
        self.widths = [f, d, 1, 1, f]  # of Batch
        self.g, self.compute_reward = g, compute_reward
        self.rows = torch.zeros(max(capacity, num_envs * horizon), sum(self.widths))  # a ring, an episode in a row
        self.left = torch.zeros(len(self.rows), dtype=torch.long)  # how many steps of its episode follow a row
        self.open_rows = torch.zeros(num_envs, horizon, sum(self.widths))
        self.open_lengths = torch.zeros(num_envs, dtype=torch.long)
        self.stored = 0  # rows so far

    def add(self, obs: torch.Tensor, action: torch.Tensor, reward: np.ndarray, terminated: np.ndarray,
            truncated: np.ndarray, final_obs: torch.Tensor) -> None:
        """Store one step of every environment: obs and final_obs (num_envs, f), the rest as `vec.step` returns it. Of
        the two ends only `terminated` is stored, because at a time limit the target bootstraps."""
        outcome = torch.from_numpy(np.stack([reward, terminated], 1)).float()  # (num_envs, 2)
        ended = torch.from_numpy(terminated | truncated)
        horizon = self.open_rows.shape[1]
        self.open_rows[torch.arange(len(ended)), self.open_lengths] = torch.cat([obs, action, outcome, final_obs], 1)
        self.open_lengths += 1
        complete = ended | (self.open_lengths == horizon)
        left = self.open_lengths[complete].unsqueeze(1) - 1 - torch.arange(horizon)  # (k, horizon); below 0: no row
        held = left >= 0
        slots = (self.stored + torch.arange(int(held.sum()))) % len(self.rows)
        self.rows[slots], self.left[slots] = self.open_rows[complete][held], left[held]
        self.open_lengths[complete] = 0
        self.stored += len(slots)

    def sample(self, batch_size: int, relabelled: int = 0) -> Batch:
        """Random transitions, `relabelled` of them with a hindsight goal (fewer if most rows are the last of their
        episode)."""
        batch, later = self.draw(batch_size, relabelled)
        if relabelled:
            relabel(batch, later, self.g, self.compute_reward)
        return batch

    def draw(self, batch_size: int, relabelled: int) -> tuple[Batch, Batch]:
        """Random transitions, and for each of the first `relabelled` a later one of the same episode. Its achieved goal
        becomes the hindsight goal (strategy "future")."""
        n = min(self.stored, len(self.rows))
        first = torch.randint(n, (2 * relabelled,))  # twice as many: the last step of an episode has no later one
        first = first[self.left[first] > 0][:relabelled]
        index = torch.cat([first, torch.randint(n, (batch_size - len(first),))])
        later = (first + 1 + (torch.rand(len(first)) * self.left[first]).long()) % len(self.rows)  # 1 to left ahead
        return tuple(Batch(*self.rows[i].split(self.widths, 1)) for i in (index, later))

    def state_dict(self) -> dict:
        n = min(self.stored, len(self.rows))  # the rest is empty
        return {"rows": self.rows[:n].clone(), "left": self.left[:n].clone(), "open_rows": self.open_rows,
                "open_lengths": self.open_lengths, "stored": self.stored}

    def load_state_dict(self, state: dict) -> None:
        n = len(state["rows"])
        self.rows[:n], self.left[:n] = state["rows"], state["left"]
        self.open_rows, self.open_lengths, self.stored = (state[k] for k in ("open_rows", "open_lengths", "stored"))


def relabel(batch: Batch, later: Batch, g: int, compute_reward: Callable) -> None:
    """Give the first transitions of `batch` the goals (g numbers) that `later` achieved, and their rewards for these
    goals by `compute_reward(achieved, desired)`. In place. `terminated` stays: a hindsight goal ends no task."""
    r, goal = len(later.obs), later.obs[:, :g]
    batch.obs[:r, g:2 * g] = batch.next_obs[:r, g:2 * g] = goal
    reward = compute_reward(batch.next_obs[:r, :g].numpy(), goal.numpy())
    batch.reward[:r, 0] = torch.as_tensor(reward, dtype=torch.float32)
