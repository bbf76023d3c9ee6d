"""Trained agents in tasks that they have not seen: scores into benchmarks/results/zero_shot/<algo>.csv

    python benchmarks/zero_shot.py runs/bench/ppo_kian/MiniGrid-DoorKey-5x5-v0/*/seed*/ \
        --test "--env MiniGrid-DoorKey-8x8-v0" --test "--env MiniGrid-DoorKey-16x16-v0"

Each test is what is added to `python algos/<algo>.py --evaluate RUN`. A row that is there already is replaced.
"""
import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.curves import RESULTS, load, variant, write_table

COLUMNS = ["variant", "seed", "trained_in", "test", "step", "episodes", "return_mean", "return_std", "success_rate",
           "length_mean", "commit"]
KEY = ("variant", "seed", "trained_in", "test")


def score(folder: Path, test: str) -> dict[str, str]:
    """One row. Raises ValueError, with the script's own last line, for a run or a test that does not work."""
    config = json.loads((folder / "config.json").read_text())
    command = [sys.executable, f"algos/{config['algo']}.py", "--evaluate", str(folder.resolve()), *shlex.split(test)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"OMP_NUM_THREADS": "1", **os.environ})
    if done.returncode:
        raise ValueError(f"{folder}: {(done.stderr.splitlines() or ['no message'])[-1]}")
    line = done.stdout.splitlines()[-1]  # the one that counts: actions, or who acts, drawn as in training
    found = dict(re.findall(r"(\w+) (-?[\d.]+|nan)(?:,|$)", line))
    return {"variant": variant(config), "seed": str(config["args"]["seed"]), "trained_in": config["args"]["env"],
            "test": test, "step": re.search(r"after (\d+) steps", line)[1], "commit": config.get("commit") or "",
            **{name: found[name] for name in COLUMNS[5:10]}, "episodes": f"{float(found['episodes']):.0f}"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--test", action="append", required=True, help="flags of one test; may be given several times")
    flags = parser.parse_args()
    for folder in flags.runs:
        path = RESULTS / "zero_shot" / f"{json.loads((folder / 'config.json').read_text())['algo']}.csv"
        rows = {tuple(row[k] for k in KEY): row for row in (load(path) if path.exists() else [])}
        for test in flags.test:
            row = score(folder, test)
            old = rows.get(key := tuple(row[k] for k in KEY))
            if old and int(old["step"]) > int(row["step"]):  # a smoke run has the same name
                print(f"kept, longer: {row['variant']}, seed {row['seed']}, {test}, after {old['step']} steps; to "
                      f"replace it by {folder}, delete its row")
                continue
            rows[key] = row
            print(f"{row['variant']}, seed {row['seed']}, {test}: return {row['return_mean']}, "
                  f"success {row['success_rate']}", flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            keys = sorted(rows, key=lambda k: (k[2], k[3], k[0], int(k[1])))
            write_table(path, COLUMNS, [rows[key] for key in keys])  # after every test: the next one may fail
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        print(f"zero_shot: {error}", file=sys.stderr)
        sys.exit(2)
