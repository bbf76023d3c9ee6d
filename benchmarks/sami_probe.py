"""Does one observation already tell the task? Then a context has little to add, whatever it is trained by.

    python benchmarks/sami_probe.py runs/bench/tesac/CrippledHalfCheetah-dyn-v0/context-none-*/seed*/

A small network learns from single observations in a run's replay, without history and actions, which bucket of tasks
(which broken joint) they are from. It learns from two thirds of the episodes; scores are of the last third, in whole
blocks of episodes that were played together. Beside them stand the scores after shuffling the buckets over the
episodes, and the share of the most frequent bucket.
"""
import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import start  # noqa: F401  before numpy

import torch

from errors import UserError

EVERY = 4  # steps between two observations of an episode that are used


def replay(run: Path, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """The last `count` episodes of a run, the oldest first: observations (n, horizon, f), their number (n,) in each,
    buckets (n,), and how many episodes are played together. Raises UserError for a run without such."""
    if not (run / "checkpoint.pt").is_file():
        raise UserError(f"{run} has no checkpoint.pt: name the folder of a run that has come to its first one")
    try:
        saved = torch.load(run / "checkpoint.pt", weights_only=True, map_location="cpu", mmap=True)
    except Exception as error:  # zipfile, pickle and torch have many names for it
        raise UserError(f"{run / 'checkpoint.pt'} is damaged ({type(error).__name__}); start the run anew") from error
    buffer = saved.get("buffer") if isinstance(saved, dict) else None
    if not isinstance(buffer, dict) or "kept" not in buffer:
        raise UserError(f"{run} keeps no trajectories: name a run of tesac, ccm, satesac or saccm")
    kept, f, (together, horizon) = buffer["kept"], len(saved["normalizer"]["mean"]), buffer["open"]["reward"].shape
    order = ((torch.arange(len(kept["task"])) + buffer["stored"]) % max(len(kept["task"]), 1))[-count:]
    if len(order) < 3 * together:
        raise UserError(f"{run}: {len(order)} episodes are too few to hold a third back; it takes {3 * together}")
    rows = kept["rows"][order][:, -horizon - 1:-1, :f]  # before an episode's first row are empty ones
    return rows, kept["length"][order], kept["task"][order], together


def accuracy(obs: torch.Tensor, length: torch.Tensor, bucket: torch.Tensor, held_out: torch.Tensor) -> float:
    """Share of the observations (n, T, f) of the episodes `held_out` (n,) whose bucket is found by a network that
    learns on the others. The first tenth of an episode is left out: there the body still stands as it was put."""
    step = torch.arange(obs.shape[1] // 10, obs.shape[1], EVERY)
    played = step < length.unsqueeze(1)  # (n, T')
    x, y = obs[:, step][played], bucket.unsqueeze(1).expand_as(played)[played]
    test = held_out.unsqueeze(1).expand_as(played)[played]
    x = ((x - x[~test].mean(0)) / (x[~test].std(0) + 1e-3)).clamp(-5, 5)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(x.shape[1], 64), torch.nn.ReLU(), torch.nn.Linear(64, int(y.max()) + 1))
    adam, train = torch.optim.Adam(net.parameters(), 3e-3), torch.nonzero(~test)[:, 0]
    for _ in range(600):
        pick = train[torch.randint(len(train), (256,))]
        loss = torch.nn.functional.cross_entropy(net(x[pick]), y[pick])
        adam.zero_grad()
        loss.backward()
        adam.step()
    return (net(x[test]).argmax(1) == y[test]).float().mean().item()


def main(words: list[str] | None = None) -> None:
    """Print a row of a table for each run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--episodes", type=int, default=360, help="so many of the last episodes are used")
    flags = parser.parse_args(words)
    replays = [replay(run, max(flags.episodes, 1)) for run in flags.runs]
    print("| run | accuracy | with shuffled buckets | most frequent bucket |\n|---|---|---|---|")
    for run, (obs, length, bucket, together) in zip(flags.runs, replays):
        held_out = torch.arange(len(bucket)) // together % 3 == 0
        shuffled = bucket[torch.randperm(len(bucket), generator=torch.Generator().manual_seed(0))]
        found, by_chance = (accuracy(obs, length, labels, held_out) for labels in (bucket, shuffled))
        most = bucket[held_out].bincount().max().item() / int(held_out.sum())
        print(f"| {'/'.join(run.parts[-3:])} | {found:.3f} | {by_chance:.3f} | {most:.3f} |", flush=True)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"sami_probe: {error}", file=sys.stderr)
        sys.exit(2)
