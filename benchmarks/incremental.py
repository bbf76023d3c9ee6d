"""One task after another: each run starts from the keys, the query and the inner policy of the one before (KIAN's
incremental learning), against learning each from scratch.

    python benchmarks/incremental.py --seeds 5

Runs go to runs/incremental/seed<k>/<env>/, what they print to <env>.log beside it; finished ones are skipped, cut ones
resume. `curves.py gather runs/incremental` adds their curves, as variants `ppo_kian --init-from <env>`, beside those
of the suite.
"""
import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.run import Cell, Engine

SEQUENCE = {"MiniGrid-Empty-Random-5x5-v0": 100_000, "MiniGrid-Unlock-v0": 200_000, "MiniGrid-DoorKey-5x5-v0": 200_000}


class Link(Cell):
    """A run of the sequence: a cell in a folder named by its environment."""

    @property
    def folder(self) -> Path:
        return self.root / f"seed{self.seed}" / self.env


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="seeds 1 to this one")
    parser.add_argument("--root", type=Path, default=ROOT / "runs" / "incremental", help="above all runs")
    flags = parser.parse_args()
    for seed in range(1, flags.seeds + 1):
        before: list[str] = []
        for env, steps in SEQUENCE.items():
            link = Link("ppo_kian", env, seed, ("--total-timesteps", str(steps), *before), flags.root.resolve())
            if not link.finished():
                engine = Engine(workers=1)
                returncode = engine.run([link])[link]
                if engine.stop or not link.finished():  # runs already, by another engine: None
                    return 128 + engine.stop if engine.stop else returncode or 1
            before = ["--init-from", str(link.folder)]
    return 0


if __name__ == "__main__":
    sys.exit(main())
