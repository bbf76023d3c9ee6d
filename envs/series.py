"""Prediction tasks: a series of rows, one column of which is to be predicted; and how good the predictions were.

`series/transformer` is generated here: a made-up power transformer, not data of a real one. A CSV file works as well.
"""
import csv
import math
import sys
import zlib
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


class SeriesEvaluator:
    """The predictions of a run beside the true returns, which are known afterwards. They are scored as they were made:
    on the way, once for every row.

    predicted (n,): those so far, in units of the cumulant, to be written by the run. It belongs into its checkpoints.
    """

    def __init__(self, args, series: Series):
        """`args` are those of the script. Raises EnvError for more steps than the series has."""
        self.args = args
        self.true = series.returns(args.gamma, args.lead)
        if args.total_timesteps >= len(self.true):
            raise EnvError(f"--total-timesteps {args.total_timesteps}: {args.env} has {len(self.true) - 1} at most")
        self.predicted = np.zeros(len(self.true))
        self.content = [*series.rows.shape, zlib.crc32(series.rows.tobytes())]

    def state_dict(self) -> dict:
        return {"predicted": self.predicted, "content": self.content}

    def load_state_dict(self, state: dict) -> None:
        """Raises EnvError where they are predictions of another series."""
        if state["content"] != self.content:
            raise EnvError(f"{self.args.env} has changed since the run began; restore it, or start a new run")
        self.predicted[:] = np.asarray(state["predicted"])

    def score(self, first: int, last: int, predicted: np.ndarray | None = None) -> dict[str, float]:
        """Columns of eval.csv for the rows from `first` to before `last`: return_mean is minus the root mean squared
        error, return_std the deviation of the truth. `predicted` (last - first,): other predictions than the run's."""
        predicted, true = self.predicted[first:last] if predicted is None else predicted, self.true[first:last]
        return {"episodes": 1, "return_mean": -float(np.sqrt(np.square(predicted - true).mean())),
                "return_std": float(true.std()), "success_rate": float("nan"), "length_mean": float(len(true))}

    def play(self, step: int) -> dict[str, float]:
        """The score since the evaluation before, at `step`."""
        every = self.args.eval_every
        return self.score((step - 1) // every * every if every else 0, step)

    def report(self, step: int) -> dict[str, float]:
        """What --evaluate does: score all, print, draw."""
        result = self.score(0, step)
        print(f"{self.args.env} after {step} rows: rmse {-result['return_mean']:.3f}, deviation of the true return "
              f"{result['return_std']:.3f}")
        self.film(step, Path(self.args.evaluate))
        return result

    def film(self, step: int, folder: Path) -> None:
        """Draw predictions over the truth, the first rows and the last ones, into the run `folder`, if `args.video`."""
        if not self.args.video:
            return
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(2, 1, figsize=(10, 5), constrained_layout=True)
        for axis, rows in zip(axes, (slice(0, min(step, 5000)), slice(max(step - 5000, 0), step))):
            axis.plot(np.arange(len(self.true))[rows], self.true[rows], label="true return")
            axis.plot(np.arange(len(self.true))[rows], self.predicted[rows], label="prediction", linewidth=0.8)
        axes[0].legend(loc="upper right", fontsize=8)
        axes[1].set_xlabel("row")
        path = folder / "video" / "prediction.png"
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, dpi=110)
        plt.close(figure)
        print(f"drawn: {path}", file=sys.stderr)
