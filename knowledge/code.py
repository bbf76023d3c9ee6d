"""BK-Code: a potential is Python code that a language model wrote, run in the sandbox (Zhang et al. 2024).

    def compute_reward(obs, past_obs, past_actions) -> (value, {name: part of it})

`obs` is the present observation, `past_obs` the K before it, oldest first, and `past_actions` the K actions between. On
grids `obs` is (3, 7, 7): object, colour and state of cell [x, y], the agent at (3, 6), the cell in front of it (3, 5).
In the released code these are scaled to [0, 1], while its prompt promises integers, so that `obs[0] == 6` is never
true; here they are what the prompt says. Of Crafter `obs` is a dict of `view` (9, 7) and `status` (20,).
"""
import numpy as np
import torch

from knowledge.history import History
from knowledge.registry import KnowledgeError
from llm.sandbox import Sandbox, SandboxError, SandboxUnavailable

FUNCTION = "compute_reward"
MOST_INVALID = 0.05  # share of moments on which code may fail


class Code:
    """The potential that `source` computes. Raises KnowledgeError where the code is refused, and lets through
    SandboxUnavailable, for which the code is not to blame."""

    def __init__(self, source: str, name: str):
        self.name = name
        try:
            self.box = Sandbox(source, [FUNCTION])
        except SandboxUnavailable:
            raise
        except SandboxError as error:
            raise KnowledgeError(f"potential {name}: {error}") from None

    def __call__(self, history: History) -> torch.Tensor:
        """(B,), NaN where the code fails. Raises KnowledgeError where it hangs."""
        try:
            return torch.from_numpy(self.box.call(FUNCTION, *arguments(history)))
        except SandboxUnavailable:
            raise
        except SandboxError as error:
            raise KnowledgeError(f"potential {self.name}: {error}") from None

    def explain(self, history: History) -> tuple[float, dict[str, float]]:
        """Value and its parts for a history of one episode."""
        return self.box.explain(FUNCTION, *arguments(history))


def arguments(history: History) -> tuple:
    """A history as the code sees it: present, past, actions, a row for each episode."""
    if "image" in history.obs:
        cells = history.obs["image"].permute(0, 1, 4, 2, 3).numpy()  # (B, K + 1, 3, 7, 7), integers
        cells = cells.astype(np.float32)
        return cells[:, -1], cells[:, :-1], history.action.numpy()
    obs = {name: x.numpy().astype(np.int64) for name, x in history.obs.items()}
    return ({name: x[:, -1] for name, x in obs.items()}, {name: x[:, :-1] for name, x in obs.items()},
            history.action.numpy())
