"""Statistics of a few runs, after Agarwal et al. 2021, "Deep RL at the Edge of the Statistical Precipice".

Scores are arrays (runs, tasks). A run is one seed; intervals come from the percentile bootstrap that draws runs anew,
with replacement, for each task on its own (stratified): a task is never left out. What `rliable` has too is tested
against it.
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


def interval(statistic: Statistic, *scores: np.ndarray, repetitions: int = 2000, level: float = 0.95,
             seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic of one or more score arrays, each drawn anew by itself.

    One run has no spread, two hardly any: then the interval is (nan, nan) rather than one that looks certain. With few
    runs it is too narrow still.
    """
    if min(len(s) for s in scores) < 3:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    values = statistic(*(resample(np.asarray(s, float), repetitions, rng) for s in scores))
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


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
