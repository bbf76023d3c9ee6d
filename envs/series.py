"""Prediction tasks: a series of rows, one column of which is to be predicted.

`series/transformer` is generated here: a made-up power transformer, not data of a real one. A CSV file works as well.
"""
import csv
import math
from pathlib import Path

import numpy as np

from envs.ids import EnvError, announce

ROWS, DAY = 70_000, 96  # two years of a row every 15 minutes


def transformer(seed: int) -> np.ndarray:
    """Six loads and an oil temperature (ROWS, 7), non-stationary on four time scales.

    Loads have a daily course, quiet weekends, and noise that lasts for hours; about once in two months each load
    changes its level and the size of its course for good. The oil follows the ambient temperature (seasons, days,
    weather of several days) and the square of the loads, with a lag of three hours; its cooling ages.
    """
    rng = np.random.default_rng(seed)
    t = np.arange(ROWS)
    week, day, year = t // DAY % 7, 2 * np.pi * t / DAY, 2 * np.pi * t / (365 * DAY)
    phase = rng.uniform(0, 2 * np.pi, 6)
    course = np.sin(day[:, None] - phase) + 0.4 * np.sin(2 * day[:, None] - 1.7 * phase)  # (ROWS, 6)
    course *= np.where(week >= 5, 0.5, 1.0)[:, None]
    level, size = (np.ones((ROWS, 6)) * rng.uniform(*bounds, 6) for bounds in ((2, 8), (0.5, 2)))
    for k in range(6):
        for start in np.cumsum(rng.exponential(60 * DAY, 40)).astype(int):
            if start < ROWS:
                level[start:, k], size[start:, k] = rng.uniform(2, 8), rng.uniform(0.5, 2)
    noise, weather, oil = np.zeros((ROWS, 6)), np.zeros(ROWS), np.zeros(ROWS)
    shocks, gusts, jitter = rng.normal(size=(ROWS, 6)), rng.normal(size=ROWS), rng.normal(size=ROWS)
    for i in range(1, ROWS):
        noise[i] = 0.97 * noise[i - 1] + 0.1 * shocks[i]
        weather[i] = 0.998 * weather[i - 1] + 0.25 * gusts[i]
    loads = np.maximum(level + size * course + noise, 0)
    ambient = 12 - 12 * np.cos(year) + 4 * np.sin(day - 2) + weather
    settled = ambient + (0.08 + 0.04 * t / ROWS) * np.square(loads).sum(1)
    oil[0] = settled[0]
    for i in range(1, ROWS):
        oil[i] = oil[i - 1] + (settled[i] - oil[i - 1]) / 12 + 0.1 * jitter[i]
    return np.column_stack([loads, oil])


def number(cell: str) -> float:
    """NaN where it is none."""
    try:
        return float(cell)
    except ValueError:
        return math.nan


def read(name: str) -> np.ndarray:
    """The columns (n, k) with numbers of a CSV file with one header line; the last must be one of them.

    Raises EnvError that names line and column where one of them has a gap."""
    try:
        with open(name, newline="") as file:
            table = csv.reader(file)
            lines = [(table.line_num, cells) for cells in table if cells]
    except (csv.Error, OSError, ValueError) as error:
        raise EnvError(f"{name} cannot be read: {str(error).splitlines()[0]}") from error
    if len(lines) < 2:
        raise EnvError(f"{name} has no rows below its header")
    (_, names), *rows = lines
    kept = [i for i in range(len(names))
            if any(math.isfinite(number(cells[i])) for _, cells in rows if i < len(cells))]
    if len(names) - 1 not in kept:
        raise EnvError(f"{name} has no number in its last column, {names[-1]!r}, which is what is predicted; columns "
                       "are separated by commas")
    for line, cells in rows:
        if len(cells) != len(names):
            raise EnvError(f"{name} has {len(cells)} columns in line {line}, and {len(names)} in its header")
        for i in kept:
            if not math.isfinite(number(cells[i])):
                raise EnvError(f"{name} has {cells[i]!r} in line {line}, column {names[i]!r}; a number is expected")
    announce(f"{name}: {', '.join(names[i] for i in kept)} predict {names[-1]}")
    return np.array([[number(cells[i]) for i in kept] for _, cells in rows])


class Series:
    """Rows (n, k) of inputs, and the target (n,): the last column, scaled to [0, 1] over the whole series."""

    def __init__(self, name: str, seed: int):
        """`series/transformer`, of this seed, or a CSV file (`read`); columns that are no numbers (dates) are left out.
        Raises EnvError for anything else."""
        if name == "series/transformer":
            self.rows = transformer(seed)
        elif not Path(name).is_file():
            raise EnvError(f"{name!r} is no series: there is no such file; series/transformer is generated")
        else:
            self.rows = read(name)
            if np.ptp(self.rows[:, -1]) == 0:
                raise EnvError(f"{name} has a last column that never changes; there is nothing to predict")
        target = self.rows[:, -1]
        self.target = (target - target.min()) / np.ptp(target)

    def returns(self, gamma: float, lead: int) -> np.ndarray:
        """True discounted return of every row t: target[t + lead] + gamma target[t + lead + 1] + ..., computed
        backwards. The last ones lack a future; with gamma 0.99, 500 rows before the end the lack is below 1 %.

        Raises EnvError for a lead beyond the series."""
        if lead >= len(self.target):
            raise EnvError(f"--lead {lead}: the series has {len(self.target)} rows")
        total, out = 0.0, np.zeros(len(self.target) - lead)
        for t in reversed(range(len(out))):
            total = out[t] = self.target[t + lead] + gamma * total
        return out
