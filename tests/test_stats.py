"""benchmarks/stats.py against rliable, and against numbers one can check by hand."""
import numpy as np
import pytest
from rliable import library, metrics

from benchmarks import stats

RNG = np.random.default_rng(7)
X, Y = RNG.normal(0.6, 0.2, (5, 3)).round(1), RNG.normal(0.5, 0.3, (4, 3)).round(1)  # rounded: ties


@pytest.mark.parametrize("runs", [3, 5, 8])
def test_point_estimates_equal_rliable(runs):
    scores = RNG.normal(size=(runs, 3))
    assert stats.mean(scores) == pytest.approx(metrics.aggregate_mean(scores))
    assert stats.iqm(scores) == pytest.approx(metrics.aggregate_iqm(scores))
    assert stats.probability_of_improvement(X, Y) == pytest.approx(metrics.probability_of_improvement(X, Y))
    assert stats.probability_of_improvement(X, X) == 0.5
    assert stats.probability_of_improvement(X, X * np.nan) == 1.0
    assert stats.probability_of_improvement(X * np.nan, X) == 0.0


@pytest.mark.parametrize("ours, theirs", [(stats.mean, metrics.aggregate_mean), (stats.iqm, metrics.aggregate_iqm)])
def test_intervals_equal_rliable(ours, theirs):
    """Two bootstraps of 20,000 repetitions: their ends differ by sampling error, below a hundredth of a score."""
    np.random.seed(0)  # rliable draws from numpy's global stream
    _, ends = library.get_interval_estimates({"x": X}, lambda s: np.array([theirs(s)]), reps=20_000)
    assert stats.interval(ours, X, repetitions=20_000) == pytest.approx(ends["x"].ravel(), abs=0.01)


def test_interval_of_improvement_equals_rliable():
    np.random.seed(0)
    _, ends = library.get_interval_estimates({"x,y": (X, Y)}, lambda x, y: np.array([
        metrics.probability_of_improvement(x, y)]), reps=2000)
    mine = stats.interval(stats.probability_of_improvement, X, Y, repetitions=20_000)
    assert mine == pytest.approx(ends["x,y"].ravel(), abs=0.03)


def test_strata_are_kept():
    """A task's scores never enter another's column, and a constant task has no spread."""
    scores = np.array([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]])
    drawn = stats.resample(scores, 500, np.random.default_rng(0))
    assert drawn.shape == (500, 3, 2) and set(np.unique(drawn[..., 0])) == {1, 2, 3} and (drawn[..., 1] == 5).all()
    assert stats.interval(stats.mean, scores[:, 1:]) == (5, 5)
    assert np.isnan(stats.interval(stats.mean, scores[:2])).all()  # two runs say next to nothing about spread


def test_curves():
    steps, values = [0, 10, 20, 40], [0.0, 0.4, 0.8, 0.8]
    assert stats.area_under_curve(steps, values) == pytest.approx((2 + 6 + 16) / 40)
    assert stats.area_under_curve(steps, values, until=15) == pytest.approx((2 + 2.5) / 15)  # 0.6 in between
    assert stats.area_under_curve(steps, values, until=60) == pytest.approx((2 + 6 + 16 + 16) / 60)
    assert stats.first_reach(steps, values, 0.8) == 20 and stats.first_reach(steps, values, 0.9) == np.inf
