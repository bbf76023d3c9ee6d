"""Fresh runs beside the committed ones: does a machine find what benchmarks/results/ says? benchmarks/run.py prints it
at the end of a suite.

A fresh run is one seed, so it is compared with the range of the committed seeds, at the step that it has reached. That
is no confidence interval: even a run that is just as good falls outside the range of n seeds in 2 of n + 1 cases, most
often by little. With the same seed, code and machine it repeats a committed one.
"""
import csv
import json
import tomllib
from pathlib import Path

from benchmarks.curves import RESULTS, load, real_id, task_of, variant


def committed(task: str, name: str, results: Path) -> tuple[str, list[dict[str, str]]]:
    """The method in `results` that has rows of a variant in a task, and these; "" and none where there is none. Of
    several methods the first by name."""
    name_of_file = real_id(task).replace("/", "-")  # a file may bear an older id
    for path in sorted(results.glob("*/*.csv")):
        if real_id(path.stem) == name_of_file and path.parent.name not in ("rules", "zero_shot", "speed") and (
                rows := [row for row in load(path) if row["variant"] == name]):
            return path.parent.name, rows
    return "", []


def verdict(folder: Path, results: Path = RESULTS) -> list[str]:
    """A row of the table for a finished run: variant, environment, step, committed, fresh, verdict."""
    config = json.loads((folder / "config.json").read_text())
    env, name = config["args"]["env"], variant(config)
    last = list(csv.DictReader((folder / "eval.csv").open()))[-1]
    method, rows = committed(task_of(config["args"]), name, results)
    score = tomllib.loads((results.parent / "paper.toml").read_text())["method"].get(method, {}).get("score", "")
    score = "return_mean" if last.get(score, "nan") in ("", "nan") else score  # a run has no online_return
    reached = {}  # {seed: score at the last evaluation up to that step}, of the seeds that have come as far
    for row in sorted(rows, key=lambda row: int(row["step"])):
        if int(row["step"]) <= int(last["step"]) <= max(int(r["step"]) for r in rows if r["seed"] == row["seed"]):
            reached[row["seed"]] = float(row[score])
    fresh, seeds = float(last[score]), sorted(reached.values())
    said = "nothing committed"
    if seeds:
        low, high = f"{seeds[0]:.3g}", f"{seeds[-1]:.3g}"
        said = "below" if float(f"{fresh:.3g}") < float(low) else "above" if float(f"{fresh:.3g}") > float(high) else (
            "inside")
        said = said if len(seeds) > 1 else f"{said.replace('inside', 'equal')}, of one seed"
    there = f"{low} to {high} ({len(seeds)} seeds)" if len(seeds) > 1 else f"{low} (one seed)" if seeds else ""
    return [name, env, last["step"], f"{score.split('_')[0]} {fresh:.3g}", there, said]


def table(folders: list[Path]) -> str:
    """The verdicts of finished runs, in columns. A run with files that cannot be read is named, and stops no others."""
    rows = [["", "environment", "step", "fresh", "range of committed seeds", "verdict"]]
    for folder in folders:
        try:
            rows.append(verdict(folder))
        except (OSError, ValueError, KeyError, IndexError, TypeError, csv.Error) as error:
            rows.append([str(folder), "", "", "", "", f"cannot be read ({type(error).__name__})"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
