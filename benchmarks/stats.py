"""Statistics of a few runs, after Agarwal et al. 2021, "Deep RL at the Edge of the Statistical Precipice".

Scores are arrays (runs, tasks). A run is one seed. Point estimates and the bootstrap are those of rliable, and tests
compare them. The intervals differ. rliable takes percentiles of the bootstrap, and with few runs these are too narrow:
with 3, 5 and 10 runs a 95 % interval holds the true mean in 75, 83 and 90 of 100 cases. Here a mean has a t interval,
and the probability of improvement has a score interval. These hold the true value in 95 of 100 cases if the scores of
runs are normal, and in about 90 if they are skewed.
"""
from typing import Callable, Sequence

import numpy as np

Statistic = Callable[[np.ndarray], np.ndarray]  # (..., runs, tasks) -> (...)


def mean(scores: np.ndarray) -> np.ndarray:
    """Mean over runs and tasks, (..., runs, tasks) -> (...)."""
    return np.asarray(scores).mean((-2, -1))


def iqm(scores: np.ndarray) -> np.ndarray:
    """Interquartile mean: of the middle half of all runs and tasks, (..., runs, tasks) -> (...)."""
    scores = np.asarray(scores)
    ordered = np.sort(scores.reshape(*scores.shape[:-2], -1), -1)
    cut = ordered.shape[-1] // 4
    return ordered[..., cut:ordered.shape[-1] - cut].mean(-1)


def probability_of_improvement(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How likely a run of X scores more than one of Y, ties counting half, mean over tasks. NaN, of a
    run that diverged, is below everything.

    (..., runs_x, tasks), (..., runs_y, tasks) -> (...); Mann-Whitney's U over the number of pairs.
    """
    x, y = (np.where(np.isnan(scores), -np.inf, scores) for scores in (x, y))
    x, y = x[..., :, None, :], y[..., None, :, :]  # (..., runs_x, runs_y, tasks) when compared
    return ((x > y) + 0.5 * (x == y)).mean((-3, -2, -1))


def resample(scores: np.ndarray, repetitions: int, rng: np.random.Generator) -> np.ndarray:
    """Stratified bootstrap samples, (runs, tasks) -> (repetitions, runs, tasks)."""
    runs, tasks = scores.shape
    return scores[rng.integers(runs, size=(repetitions, runs, tasks)), np.arange(tasks)]


def interval(statistic: Statistic, scores: np.ndarray, bounds: tuple[float, float] = (-np.inf, np.inf),
             repetitions: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % t interval of the mean or the IQM of scores (runs, tasks), cut to what a score can be.

    The standard error is the bootstrap's, times sqrt(n / (n - 1)): for the mean of one task that is the textbook's
    s / sqrt(n). Degrees of freedom are Welch's, because tasks spread differently. One run has no spread, two hardly
    any: then the interval is (nan, nan). Runs that all score the same give no width, which is not certainty.
    """
    scores = np.asarray(scores, float)
    if (runs := len(scores)) < 3:
        return float("nan"), float("nan")
    spread = scores.var(0, ddof=1)  # (tasks,)
    if statistic is mean:
        error = np.sqrt(spread.mean() / scores.size)
    else:
        drawn = resample(scores, repetitions, np.random.default_rng(seed))
        error = statistic(drawn).std() * np.sqrt(runs / (runs - 1))
    freedom = (runs - 1) * spread.sum() ** 2 / (spread ** 2).sum() if spread.any() else np.inf
    middle, half = statistic(scores), error * t_quantile(freedom)
    return float(max(middle - half, bounds[0])), float(min(middle + half, bounds[1]))


def t_quantile(freedom: float) -> float:
    """The 0.975 quantile of Student's t, from 2 degrees of freedom on, to 0.4 %."""
    known = {np.inf: 1.960, 60: 2.000, 30: 2.042, 20: 2.086, 15: 2.131, 12: 2.179, 10: 2.228, 9: 2.262, 8: 2.306,
             7: 2.365, 6: 2.447, 5: 2.571, 4: 2.776, 3.5: 2.940, 3: 3.182, 2.75: 3.353, 2.5: 3.575, 2.25: 3.875,
             2: 4.303}
    return float(np.interp(1 / freedom, [1 / f for f in known], list(known.values())))  # nearly straight in 1 / f


def improvement_interval(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """95 % interval of the probability of improvement, (runs_x, tasks), (runs_y, tasks) -> within [0, 1].

    All p that are less than 1.96 standard errors, as they would be at p, from what was seen (Newcombe 2006, "Confidence
    intervals for an effect size measure based on the Mann-Whitney statistic", part 2, method 5). So it has a width also
    where every run of X is above all of Y. (nan, nan) with less than three runs of either.
    """
    (n, tasks), m = x.shape, len(y)
    if min(n, m) < 3:
        return float("nan"), float("nan")
    p = np.linspace(0, 1, 2001)
    error = np.sqrt(p * (1 - p) * (1 + ((n + m) / 2 - 1) * ((1 - p) / (2 - p) + p / (1 + p))) / (n * m * tasks))
    inside = p[np.abs(p - probability_of_improvement(x, y)) <= 1.96 * error + 1e-9]
    return float(inside[0]), float(inside[-1])


def area_under_curve(steps: Sequence[float], values: Sequence[float], until: float | None = None) -> float:
    """Mean height of a curve up to `until` (trapezoids, the last value held): in the unit of `values`."""
    steps, values = np.asarray(steps, float), np.asarray(values, float)
    until = steps[-1] if until is None else until
    inside = steps <= until
    x = np.append(steps[inside], until)
    y = np.append(values[inside], np.interp(until, steps, values))
    return float(np.trapezoid(y, x) / (until - x[0])) if until > x[0] else float(y[0])


def first_reach(steps: Sequence[float], values: Sequence[float], threshold: float) -> float:
    """The first step at which a curve is at `threshold` or above; infinity if it never is."""
    reached = np.asarray(steps, float)[np.asarray(values) >= threshold]
    return float(reached[0]) if len(reached) else float("inf")
