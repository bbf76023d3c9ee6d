"""Replay with hindsight goals (HER, strategy "future"): a ring of transitions that knows where episodes end. Below it,
whole episodes for policies that see more than the last observation.

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
        if g and horizon > 1 and compute_reward:
            compute_reward(np.zeros((2, g)), np.zeros((2, g)))  # a task that cannot says so now, before a run begins
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


class TrajectoryBuffer:
    """The last whole episodes of at most `horizon` steps, with the task that each was played on, sampled in windows.

    A row is what a policy sees of a step, `width` numbers; an episode of n steps has n + 1 of them. The window of step
    t is rows t - window + 1 to t, zeros where the episode had not begun. Open episodes wait aside, never sampled.

    stored: episodes so far; after a ring of another size was loaded, only the kept ones count. transitions: steps of
    those that are kept. length, task (n,) int64, mean_reward (n,): one number for each of the n episodes in the buffer.
    """

    def __init__(self, capacity: int, horizon: int, window: int, num_envs: int, width: int, d: int,
                 bootstrap: bool = True):
        """Room for `capacity // horizon` episodes, and for one per environment at least: `capacity` transitions where
        all have `horizon` steps, fewer where some end early. Without `bootstrap`, a time limit is stored as terminal.
        """
        def empty(n: int) -> dict[str, torch.Tensor]:
            return {"rows": torch.zeros(n, window + horizon, width), "action": torch.zeros(n, horizon, d),
                    "reward": torch.zeros(n, horizon), "terminated": torch.zeros(n, horizon),
                    "length": torch.zeros(n, dtype=torch.long), "task": torch.zeros(n, dtype=torch.long)}

        self.window, self.horizon, self.bootstrap, self.stored = window, horizon, bootstrap, 0
        self.kept, self.open = empty(max(num_envs, capacity // horizon)), empty(num_envs)
        self._count()

    def add(self, row: torch.Tensor, action: torch.Tensor, reward: np.ndarray, terminated: np.ndarray,
            truncated: np.ndarray, final_row: torch.Tensor, task: np.ndarray) -> None:
        """One step of every environment: row and final_row (num_envs, width), before and after it; the rest as
        `vec.step` gives it; task (num_envs,) int."""
        ended = terminated | truncated
        terminal = terminated if self.bootstrap else ended
        parts, i, t = self.open, torch.arange(len(row)), self.open["length"].clone()
        parts["rows"][i, self.window - 1 + t], parts["rows"][i, self.window + t] = row, final_row
        parts["action"][i, t] = action
        parts["reward"][i, t], parts["terminated"][i, t] = (torch.from_numpy(x).float() for x in (reward, terminal))
        parts["length"] += 1
        if not ended.any():
            return
        ended = torch.from_numpy(ended)
        parts["task"] = torch.as_tensor(task)
        slots = (self.stored + torch.arange(int(ended.sum()))) % len(self.kept["task"])
        for name, part in parts.items():
            self.kept[name][slots] = part[ended]
            part[ended] = 0
        self.stored += len(slots)
        self._count()

    def _count(self) -> None:
        n = min(self.stored, len(self.kept["task"]))
        self.length, self.task = self.kept["length"][:n], self.kept["task"][:n]
        self.ends = self.length.cumsum(0)
        self.transitions = int(self.ends[-1]) if n else 0
        self.mean_reward = self.kept["reward"][:n].sum(1) / self.length

    def sample(self, batch_size: int) -> Batch:
        """Random transitions, all steps alike; obs and next_obs are windows (window, B, width)."""
        pick = torch.randint(self.transitions, (batch_size,))
        episode = torch.searchsorted(self.ends, pick, right=True)
        step = pick - self.ends[episode] + self.length[episode]
        rows = self.windows(episode, step, more=1)
        action, reward, terminated = (self.kept[name][episode, step] for name in ("action", "reward", "terminated"))
        return Batch(rows[:-1], action, reward.unsqueeze(1), terminated.unsqueeze(1), rows[1:])

    def windows(self, episode: torch.Tensor, step: torch.Tensor, more: int = 0) -> torch.Tensor:
        """Windows of steps (B,) of episodes (B,), with so many `more` rows after them: (window + more, B, width)."""
        rows = self.kept["rows"]
        first = episode * rows.shape[1] + step  # as if all episodes were one
        return rows.view(-1, rows.shape[2])[first + torch.arange(self.window + more).unsqueeze(1)]

    def latest(self, task: int, count: int) -> torch.Tensor:
        """The `count` last episodes of a task, fewer where there are not as many, the oldest first."""
        episodes = torch.nonzero(self.task == task)[:, 0]
        age = (episodes - self.stored) % len(self.kept["task"])  # 0: the oldest
        return episodes[age.argsort()][-count:]

    def state_dict(self) -> dict:
        n = min(self.stored, len(self.kept["task"]))  # the rest is empty
        kept = {name: part[:n].clone() for name, part in self.kept.items()}
        return {"kept": kept, "open": self.open, "stored": self.stored}

    def load_state_dict(self, state: dict) -> None:
        kept, stored = state["kept"], state["stored"]
        n, room = len(kept["task"]), len(self.kept["task"])
        if n > room or n < min(stored, room):  # of a ring of another size, which was full: the oldest is the first here
            order = ((torch.arange(n) + stored) % n)[-room:]
            kept, stored = {name: part[order] for name, part in kept.items()}, len(order)
        for name, part in kept.items():
            self.kept[name][:len(part)] = part
        self.open, self.stored = state["open"], stored
        self._count()


class Windows:
    """The last `window` rows of the episode that every environment is in, zeros before its first one."""

    def __init__(self, window: int, num_envs: int, width: int, hide_first: bool = False):
        """`hide_first`: of the first row of an episode, the last number becomes 0, which marks it as not there."""
        self.rows, self.hide_first = torch.zeros(window, num_envs, width), hide_first

    def push(self, row: torch.Tensor, began: torch.Tensor) -> torch.Tensor:
        """Rows (window, num_envs, width) that end with `row` (num_envs, width), the first one where an episode
        `began` (num_envs,) bool."""
        self.rows[:, began] = 0
        self.rows = torch.cat([self.rows[1:], row.unsqueeze(0)])
        if self.hide_first:
            self.rows[-1, began, -1] = 0
        return self.rows

    def state_dict(self) -> dict:
        return {"rows": self.rows}

    def load_state_dict(self, state: dict) -> None:
        self.rows = state["rows"].clone()
