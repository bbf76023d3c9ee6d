"""BK-Pref: a potential learned from which of two segments was preferred (Zhang et al. 2024).

A preference transformer (Kim et al. 2023, arXiv 2303.00957) reads K steps (s_1, a_1), ..., (s_K, a_K) and gives each a
value w_i; the score of a segment is the sum of all w_j, each weighted by attention:

    score = sum_i sum_{j <= i} softmax_j(q_i . k_j) w_j
    P(A preferred) = softmax(score_A, score_B)

The potential of a moment t is the value of the last step that led there, w of (s_{t-1}, a_{t-1}).
"""
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from knowledge.history import History
from knowledge.registry import KnowledgeError

SMOOTHING = 0.3  # weight of the second term of the loss
TIE = 0.5  # label of a pair without a winner


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; the defaults are those of the shipped ones, `paper` those of the released code."""
    family: str  # minigrid: images; crafter: view and status
    num_actions: int
    width: int = 32
    hidden: int = 64  # of the encoder of states
    feedforward: int = 64
    timesteps: int = 1000  # later ones count as the last
    convolutions: bool = False  # three of 32, 64 and 64 channels, else each cell by what it is

    @staticmethod
    def paper(num_actions: int) -> "Shape":
        return Shape("minigrid", num_actions, width=128, hidden=512, feedforward=2048, convolutions=True)


class Steps(NamedTuple):
    """K steps of B segments."""
    obs: dict[str, torch.Tensor]  # {name: (B, K, ...)}, before each action
    action: torch.Tensor  # (B, K)
    timestep: torch.Tensor  # (B, K), steps since the episode began


def steps_of(history: History) -> Steps:
    """What the model reads of a history: all but its present observation."""
    timestep = history.step[:, None] - torch.arange(history.action.shape[1], 0, -1)  # (B, K)
    return Steps({name: x[:, :-1] for name, x in history.obs.items()}, history.action, timestep.clamp(min=0))


class Cells(nn.Module):
    """Observations -> (B, hidden): a vector for every cell and what it may hold, summed."""

    def __init__(self, family: str, hidden: int):
        super().__init__()
        self.family = family
        sizes = [11, 6, 3] * 49 if family == "minigrid" else [19] * 63
        self.table = nn.EmbeddingBag(sum(sizes), hidden, mode="sum")
        self.register_buffer("offset", torch.tensor([0, *sizes]).cumsum(0)[:-1], persistent=False)
        nn.init.normal_(self.table.weight, std=len(sizes) ** -0.5)
        if family == "crafter":
            self.status = nn.Linear(20, hidden)

    def forward(self, obs: dict[str, torch.Tensor]) -> torch.Tensor:
        if self.family == "minigrid":
            return self.table(obs["image"].flatten(1).long() + self.offset)  # (B, 7, 7, 3) -> (B, 147)
        return self.table(obs["view"].flatten(1).long() + self.offset) + self.status(obs["status"].float() / 9)


class Pictures(nn.Module):
    """Images (B, 7, 7, 3) -> (B, hidden), as released."""

    def __init__(self, hidden: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 49, hidden))

    def forward(self, obs: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.layers(obs["image"].permute(0, 3, 1, 2) / torch.tensor([10.0, 5.0, 3.0])[:, None, None])


class PreferenceModel(nn.Module):
    """Values of steps, and scores of segments."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape, d = shape, shape.width
        encoder = Pictures(shape.hidden) if shape.convolutions else Cells(shape.family, shape.hidden)
        self.state = nn.Sequential(encoder, nn.ReLU(), nn.Linear(shape.hidden, d))
        self.action, self.timestep = nn.Embedding(shape.num_actions, d), nn.Embedding(shape.timesteps, d)
        self.decoder = nn.TransformerDecoderLayer(d, 1, shape.feedforward, dropout=0.0, batch_first=True)
        self.query, self.key, self.value = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, 1)

    def hidden(self, steps: Steps) -> torch.Tensor:
        """What the transformer makes of each step, (B, K, d)."""
        batch, k = steps.action.shape
        states = self.state({name: x.flatten(0, 1) for name, x in steps.obs.items()}).view(batch, k, -1)
        when = self.timestep(steps.timestep.clamp(max=self.shape.timesteps - 1))
        tokens = torch.stack([states + when, self.action(steps.action) + when], 2).flatten(1, 2)  # (B, 2K, d)
        mask = torch.ones(2 * k, 2 * k, dtype=torch.bool).triu(1)  # true: hidden
        return self.decoder(tokens, tokens, tgt_mask=mask, memory_mask=mask)[:, 1::2]

    def values(self, steps: Steps) -> torch.Tensor:
        """w (B, K)."""
        return self.value(self.hidden(steps)).squeeze(-1)

    def forward(self, steps: Steps) -> torch.Tensor:
        """Scores (B,)."""
        x = self.hidden(steps)
        return score(self.query(x) @ self.key(x).transpose(1, 2), self.value(x).squeeze(-1))


def score(logits: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """sum_i sum_{j <= i} softmax_j(logits_ij) w_j of logits (B, K, K) and values w (B, K): (B,)."""
    later = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    weights = torch.softmax(logits.masked_fill(later, -torch.inf), -1)
    return (weights @ values.unsqueeze(-1)).sum((1, 2))


def preference_loss(scores: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Loss of scores (B, 2) of pairs and labels (B,): 0 where the first is preferred, 1 the second, 0.5 neither. The
    cross-entropy of pairs with a winner (Bradley and Terry 1952), and a term that pulls both scores together: all that
    ties are for."""
    log_probs = torch.log_softmax(scores, 1)
    decided = label != TIE
    smoothing = SMOOTHING * -log_probs.mean()
    if not decided.any():
        return smoothing
    return F.nll_loss(log_probs[decided], label[decided].long()) + smoothing


def save(model: PreferenceModel, path: Path, **about) -> None:
    """Write a model; `about` says what it was trained on, plain types."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"shape": asdict(model.shape), "weights": model.state_dict(), "about": about}, path)


def load(path: Path) -> "Preferred":
    """The potential of a saved model. Raises KnowledgeError for a file that is none."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        model = PreferenceModel(Shape(**saved["shape"]))
        model.load_state_dict(saved["weights"])
    except Exception as error:  # a stranger's file fails in any way
        raise KnowledgeError(f"{path} holds no preference model ({type(error).__name__}); make one with python -m "
                             "knowledge.train_preferences") from None
    return Preferred(model.eval())


class Preferred:
    """The potential of a preference model."""

    def __init__(self, model: PreferenceModel):
        self.model = model

    def __call__(self, history: History) -> torch.Tensor:
        """(B,)"""
        names = {"minigrid": ("image",), "crafter": ("view", "status")}[self.model.shape.family]
        if missing := [name for name in names if name not in history.obs]:
            raise KnowledgeError(f"the preference model reads {missing[0]}, which these observations lack; it is for "
                                 f"{self.model.shape.family} tasks")
        if int(history.action.max()) >= self.model.shape.num_actions:
            raise KnowledgeError(f"the preference model knows {self.model.shape.num_actions} actions; this environment "
                                 "has more")
        return self.model.values(steps_of(history))[:, -1]
