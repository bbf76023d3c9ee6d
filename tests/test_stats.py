"""benchmarks/stats.py against rliable and scipy, and against numbers one can check by hand."""
import numpy as np
import pytest
import scipy.stats
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
def test_bootstrap_equals_rliable(ours, theirs):
    """Two bootstraps of 20,000 repetitions: their percentiles differ by sampling error, below a hundredth of a score."""
    np.random.seed(0)  # rliable draws from numpy's global stream
    _, ends = library.get_interval_estimates({"x": X}, lambda s: np.array([theirs(s)]), reps=20_000)
    drawn = ours(stats.resample(X, 20_000, np.random.default_rng(0)))
    assert np.quantile(drawn, [0.025, 0.975]) == pytest.approx(ends["x"].ravel(), abs=0.01)


def test_interval_of_a_mean_is_the_t_interval():
    for runs in (3, 5, 10, 20):
        scores = RNG.normal(size=(runs, 1))
        theirs = scipy.stats.t.interval(0.95, runs - 1, scores.mean(), scipy.stats.sem(scores[:, 0]))
        assert stats.interval(stats.mean, scores) == pytest.approx(theirs, abs=0.002)
    low, high = stats.interval(stats.mean, np.array([[0.1], [0.9], [0.8]]), bounds=(0, 1))
    assert (low, high) == (0, 1)  # 0.6 plus or minus 1.08
    for freedom in np.geomspace(2, 1000, 50):
        assert stats.t_quantile(freedom) == pytest.approx(scipy.stats.t.ppf(0.975, freedom), rel=0.005)
    welch = scipy.stats.ttest_ind(X[:, 0], X[:, 1], equal_var=False).confidence_interval()  # of a difference
    both = stats.interval(stats.mean, np.stack([X[:, 0], -X[:, 1]], 1))  # of half of it
    assert 2 * np.array(both) == pytest.approx([welch.low, welch.high], rel=0.005)


def test_interval_of_improvement_by_hand():
    """Three runs above three others: p is inside if 1 - p is below 1.96 errors, where p = 1/2 is just so:
    0.25 (1 + 2 (1/3 + 1/3)) / 9 = 0.0648 = 0.2546 ** 2, and 1.96 * 0.2546 = 0.499."""
    x, y = np.array([[4.0], [5.0], [6.0]]), np.array([[1.0], [2.0], [3.0]])
    assert stats.improvement_interval(x, y) == pytest.approx((0.5, 1.0), abs=0.002)
    assert stats.improvement_interval(y, x) == pytest.approx((0.0, 0.5), abs=0.002)
    assert sum(stats.improvement_interval(x, x)) == pytest.approx(1)  # around 1/2
    assert np.isnan(stats.improvement_interval(x[:2], y)).all()


def test_intervals_hold_what_they_say():
    """Over 500 samples of normal runs: 95 of 100, where the bootstrap's percentiles come to 75 with three runs."""
    rng, inside = np.random.default_rng(1), {}
    for runs, tasks in ((3, 1), (5, 1), (3, 4)):
        for _ in range(500):
            x, y = rng.normal(1, 1, (runs, tasks)), rng.normal(0, 1, (runs, tasks))
            ends = {"mean": (stats.interval(stats.mean, x), 1.0), "iqm": (stats.interval(
                stats.iqm, x, repetitions=200), 1.0), "above": (stats.improvement_interval(x, y), 0.7602)}
            for name, ((low, high), true) in ends.items():
                inside.setdefault((name, runs, tasks), []).append(low <= true <= high)
    share = {key: np.mean(held) for key, held in inside.items()}
    assert all(held > 0.91 for held in share.values()), share


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
