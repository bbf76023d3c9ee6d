"""Train a preference model on labelled pairs: stage two of BK-Pref, after knowledge.label_preferences.

    python -m knowledge.train_preferences --labels runs/labels/preferences-minigrid.jsonl

About a minute for 5,000 pairs. Use the result as `python algos/bk_pref.py --knowledge pref:FILE`.
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from errors import UserError
from knowledge import labelling
from knowledge.dataset import Dataset, shipped_for
from knowledge.preferences import TIE, PreferenceModel, Shape, Steps, preference_loss, save
from llm import client

INVALID = -1
META = {"env": str, "dataset": str, "steps": int, "source": str}  # of the labels, beside others


@dataclass
class Args:
    """A model of preferences."""
    labels: str = ""  # file of knowledge.label_preferences
    dataset: str = ""  # folder of the dataset that was labelled; empty: the shipped one
    out: str = ""  # file to write; empty: beside the labels, ending in .pt
    size: Literal["small", "paper"] = "small"  # small, or paper: as large as released, for grids
    epochs: int = 10  # passes over the pairs
    batch_size: int = 32  # pairs per update
    learning_rate: float = 1e-3  # AdamW (paper: 3e-4)
    validation: float = 0.1  # share of pairs that are kept aside; the model that is best on them stays
    seed: int = 42


def read(args: Args) -> tuple[dict, Dataset, torch.Tensor, list[tuple[list[int], list[int]]]]:
    """Meta data, dataset, labels (n,) and places of the pairs. Raises UserError for a file that does not fit."""
    client.at_least(1, args, "epochs", "batch_size")
    if not 0 <= args.validation < 1:
        raise UserError(f"--validation is {args.validation}; it has to be a share below 1")
    file = Path(args.labels)
    if not file.is_file():
        raise UserError(f"--labels '{args.labels}' does not exist; make some with python -m "
                        "knowledge.label_preferences")
    try:
        meta, *rows = map(json.loads, file.read_text().splitlines())
        if not all(isinstance(meta[name], kind) for name, kind in META.items()):
            raise TypeError
        rows = [row for row in rows if row["label"] != INVALID]
        labels = torch.tensor([float(row["label"]) for row in rows])
        pairs = [(row["a"], row["b"]) for row in rows]
        dataset = Dataset(args.dataset or shipped_for(meta["env"]))
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"--labels {file} is no file of knowledge.label_preferences ({type(error).__name__})") from None
    if meta["dataset"] != dataset.hash:
        raise UserError(f"--labels {file} is about another dataset than {args.dataset or 'the shipped one'}; name it "
                        "with --dataset")
    if len(labels) < 20 or not (labels != TIE).any():
        raise UserError(f"--labels {file} has {len(labels)} labels; at least 20 are needed, and not ties alone")
    return meta, dataset, labels, pairs


def tensors_of(dataset: Dataset, places: list[list[int]], k: int) -> Steps:
    """The segments at (episode, start)."""
    segments = [dataset.segment(episode, start, k) for episode, start in places]
    obs = {name: torch.stack([torch.as_tensor(segment.obs[name][:-1]) for segment in segments]) for name in dataset.obs}
    timestep = torch.tensor([[segment.start + i for i in range(k)] for segment in segments])
    return Steps(obs, torch.stack([torch.as_tensor(segment.action).long() for segment in segments]), timestep)


def rows(steps: Steps, index: torch.Tensor) -> Steps:
    return Steps({name: x[index] for name, x in steps.obs.items()}, steps.action[index], steps.timestep[index])


def main(args: Args) -> Path:
    """Train and save; returns the file."""
    meta, dataset, labels, pairs = read(args)
    torch.manual_seed(args.seed)
    first, second = (tensors_of(dataset, [pair[k] for pair in pairs], meta["steps"]) for k in (0, 1))
    family = labelling.family_of(meta["env"])
    if args.size == "paper" and family != "minigrid":
        raise UserError("--size paper is for grids; take small")
    shape = Shape.paper(len(dataset.words)) if args.size == "paper" else Shape(family, len(dataset.words))
    model = PreferenceModel(shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    order = torch.randperm(len(labels))
    aside = max(1, int(args.validation * len(labels)))
    held, used = order[:aside], order[aside:]
    best, kept = -1.0, None

    def scores(index: torch.Tensor) -> torch.Tensor:
        return torch.stack([model(rows(first, index)), model(rows(second, index))], 1)  # (B, 2)

    def accuracy(index: torch.Tensor) -> float:
        """Share of pairs with a winner that the model tells."""
        index = index[labels[index] != TIE]
        with torch.no_grad():
            said = torch.cat([scores(part).argmax(1) for part in index.split(256)]) if len(index) else torch.zeros(0)
        return float((said == labels[index]).float().mean()) if len(index) else 0.0

    for epoch in tqdm(range(args.epochs), desc="epochs", disable=None):
        for batch in used[torch.randperm(len(used))].split(args.batch_size):
            loss = preference_loss(scores(batch), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        now = accuracy(held)
        print(f"epoch {epoch + 1}: loss {float(loss.detach()):.3f}, tells the winner in {now:.3f} of pairs that it has "
              f"not seen, {accuracy(used[:1000]):.3f} of others", file=sys.stderr)
        if now > best:
            best, kept = now, {name: x.clone() for name, x in model.state_dict().items()}
    model.load_state_dict(kept)
    out = Path(args.out or Path(args.labels).with_suffix(".pt"))
    save(model, out, labels=meta["source"], labelled_by=meta.get("model", "rules"), dataset=meta["dataset"],
         pairs=len(labels), accuracy=best)
    print(f"wrote {out}, trained on labels of {meta['source']}: use it as python algos/bk_pref.py --knowledge "
          f"pref:{out}")
    return out


if __name__ == "__main__":
    client.command(main, Args, __doc__)
