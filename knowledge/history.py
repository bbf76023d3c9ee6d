"""What a potential reads: the last observations and actions of a batch of episodes."""
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from knowledge.registry import KnowledgeError

READ = {"image": (7, 7, 3), "view": (9, 7), "status": (20,)}  # what potentials and captions read of observations


class History(NamedTuple):
    """The last H steps of B episodes. Where an episode is younger, its first observation and no-ops fill the rest."""
    obs: dict[str, torch.Tensor]  # {name: (B, H + 1, ...)}, the present observation last
    action: torch.Tensor  # (B, H); action[:, k] led from obs[:, k] to obs[:, k + 1]
    step: torch.Tensor  # (B,), steps since the episode began

    def last(self, name: str) -> torch.Tensor:
        """The present observation, (B, ...)."""
        return self.obs[name][:, -1]

    def rows(self, index: torch.Tensor) -> "History":
        """Some of the episodes, by index or mask."""
        return History({name: x[index] for name, x in self.obs.items()}, self.action[index], self.step[index])

    def tail(self, horizon: int) -> "History":
        """The same with the last `horizon` steps alone. Raises KnowledgeError where there are fewer."""
        skipped = self.action.shape[1] - horizon
        if skipped < 0:
            raise KnowledgeError(f"this potential reads {horizon} steps of the past, not {self.action.shape[1]}; use "
                                 f"--horizon {horizon}")
        return History({name: x[:, skipped:] for name, x in self.obs.items()}, self.action[:, skipped:], self.step)


Potential = Callable[[History], torch.Tensor]  # -> (B,), how promising the present is


def readable(obs: dict[str, Any]) -> dict[str, Any]:
    """The entries of observations {name: (B, ...)}, tensors or arrays, that potentials read. Pictures are left out."""
    return {name: x for name, x in obs.items() if READ.get(name) == tuple(x.shape[1:])}


class Past:
    """The histories of `num_envs` episodes that are under way. The released code fills the actions of a young episode
    with its first one, which has not been taken yet; here they are no-ops."""

    def __init__(self, obs: dict[str, torch.Tensor], horizon: int, no_op: int):
        self.horizon, self.no_op = horizon, no_op
        self.now = self._fresh(readable(obs))

    def _fresh(self, obs: dict[str, torch.Tensor]) -> History:
        filled = {name: x.unsqueeze(1).repeat_interleave(self.horizon + 1, 1) for name, x in obs.items()}
        count = len(next(iter(obs.values())))
        action = torch.full((count, self.horizon), self.no_op)
        return History(filled, action, torch.zeros(count, dtype=torch.long))

    def step(self, action: torch.Tensor, final_obs: dict[str, torch.Tensor], obs: dict[str, torch.Tensor],
             ended: torch.Tensor) -> History:
        """Go on by one action (B,) to `final_obs`; returns the histories that end there. Where an episode `ended` (B,),
        the next one begins with `obs`: nothing of the last one is kept."""
        before = self.now
        grown = {name: torch.cat([before.obs[name][:, 1:], x.unsqueeze(1)], 1)
                 for name, x in readable(final_obs).items()}
        following = History(grown, torch.cat([before.action[:, 1:], action.unsqueeze(1)], 1), before.step + 1)
        self.now = following
        if ended.any():
            fresh = self._fresh({name: x[ended] for name, x in readable(obs).items()})
            self.now = History({name: x.index_put((ended,), fresh.obs[name]) for name, x in following.obs.items()},
                               following.action.index_put((ended,), fresh.action),
                               following.step.index_put((ended,), fresh.step))
        return following

    def state_dict(self) -> dict:
        return self.now._asdict()

    def load_state_dict(self, state: dict) -> None:
        self.now = History(**state)
