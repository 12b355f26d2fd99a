"""Intervals, pass@k and verdicts against hand-worked numbers, scipy and simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from volvelle.core.errors import UserError
from volvelle.core.statistics import (
    Expectation,
    Outcome,
    combine,
    curve_band,
    improvement_interval,
    iqm,
    iqm_interval,
    mean_interval,
    paired,
    pass_at_k,
    pass_at_k_area,
    probability_of_improvement,
    verdict,
    wilson,
)


def close(interval, mean, low, high, n):
    assert (interval.mean, interval.low, interval.high) == pytest.approx((mean, low, high), rel=1e-6)
    assert interval.n == n


# --- intervals --------------------------------------------------------------------------------------------------------


def test_mean_interval_by_hand():
    # 1..5: mean 3, standard error sqrt(2.5 / 5) = 0.70711, t(4) = 2.776445
    close(mean_interval([1, 2, 3, 4, 5]), 3, 3 - 2.776445 * math.sqrt(0.5), 3 + 2.776445 * math.sqrt(0.5), 5)


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_t_intervals_agree_with_scipy(level):
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=7), rng.normal(0.3, 2, size=7)
    want = stats.ttest_rel(a, b).confidence_interval(level)
    close(paired(a, b, level), (a - b).mean(), want.low, want.high, 7)
    want = stats.ttest_1samp(a, 0).confidence_interval(level)
    close(mean_interval(a, level), a.mean(), want.low, want.high, 7)


def test_pairing_takes_the_shared_seed_effect_out():
    rng = np.random.default_rng(2)
    seed_effect = rng.normal(0, 10, size=6)
    i = paired(seed_effect + 1 + rng.normal(0, 0.1, 6), seed_effect)
    assert 0.5 < i.low < 1 < i.high < 1.5


def test_equal_differences_give_a_point():
    i = paired([0.1] * 3, [0.0] * 3)
    assert (i.mean, i.low, i.high, i.n) == (0.1, 0.1, 0.1, 3)


@pytest.mark.parametrize(
    "call, named",
    [
        (lambda: paired([1], [2]), "paired interval: 1 seed gives no interval"),
        (lambda: mean_interval([1]), "mean interval: 1 seed gives no interval"),
        (lambda: paired([1, 2], [1, 2, 3]), "2 seeds against 3"),
        (lambda: paired([1, math.nan], [1, 2]), "first arm: value nan at [1]"),
        (lambda: mean_interval([]), "shape [0]"),
        (lambda: mean_interval([[1, 2]]), "shape [1, 2]"),
        (lambda: mean_interval([1, 2], level=95), "confidence level 95"),
        (lambda: wilson(3, 2), "3 successes in 2 trials"),
        (lambda: wilson(0, 0), "0 successes in 0 trials"),
        (lambda: curve_band([[1, 2]], np.random.default_rng(0)), "curve band: 1 seed"),
        (lambda: iqm(np.ones((5, 2))), "2 tasks; at least 3"),
        (lambda: iqm_interval(np.ones((1, 3)), np.random.default_rng(0)), "interquartile mean: 1 seed"),
        (lambda: probability_of_improvement(np.ones((2, 3)), np.ones((2, 4))), "3 tasks against 4"),
    ],
)
def test_refusals_are_one_line_and_name_the_thing(call, named):
    with pytest.raises(UserError) as e:
        call()
    assert named in str(e.value) and "\n" not in str(e.value)


def test_wilson_by_hand():
    z = stats.norm.ppf(0.975)
    centre, half = (8 + z * z / 2) / (10 + z * z), z / (10 + z * z) * math.sqrt(8 * 2 / 10 + z * z / 4)
    close(wilson(8, 10), 0.8, centre - half, centre + half, 10)
    i = wilson(0, 10)
    assert i.low == 0 and i.high == pytest.approx(z * z / (10 + z * z))
    i = wilson(10, 10)
    assert i.high == 1 and i.low == pytest.approx(10 / (10 + z * z))


# --- coverage by simulation -------------------------------------------------------------------------------------------


def test_paired_t_covers_95_percent_at_five_seeds():
    # 4000 draws, sd of the observed coverage 0.00345; 4 sd either way: a right interval fails 1 in 16,000.
    rng = np.random.default_rng(3)
    inside = 0
    for a, b in rng.normal(size=(4000, 2, 5)):
        i = paired(a + 0.7, b)
        inside += i.low <= 0.7 <= i.high
    assert abs(inside / 4000 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 4000)


def test_percentile_bootstrap_covers_only_83_percent_at_five_seeds():
    # Why verdicts do not use it. 2000 draws: sd 0.0083, so the limits are more than 3.5 sd away from 0.83.
    rng = np.random.default_rng(4)
    _, low, high = curve_band(rng.normal(size=(5, 2000)), rng)
    assert 0.80 < np.mean((low <= 0) & (high >= 0)) < 0.86


def test_no_effect_is_called_reproduced_in_at_most_2_5_percent():
    # Binomial(4000, 0.025): sd 0.00247; 4 sd: false alarm 1 in 30,000 on this side.
    rng = np.random.default_rng(5)
    said = [verdict("a > b on m", {"a": {"m": a}, "b": {"m": b}}).verdict for a, b in rng.normal(size=(4000, 2, 5))]
    assert abs(said.count("reproduced") / 4000 - 0.025) < 0.01
    assert abs(said.count("refuted") / 4000 - 0.025) < 0.01


# --- tasks x seeds ----------------------------------------------------------------------------------------------------


def test_iqm_by_hand():
    # 12 numbers, the lowest and highest three left out: mean of 4..9
    scores = np.random.default_rng(6).permutation(np.arange(1.0, 13)).reshape(4, 3)
    assert iqm(scores) == 6.5
    scores[scores == 12] = 1e9  # an outlier changes nothing
    assert iqm(scores) == 6.5
    # 15 numbers: floor(15 / 4) = 3 left out at each end
    assert iqm(np.arange(15.0).reshape(5, 3) ** 2) == pytest.approx(np.mean(np.arange(3, 12.0) ** 2))


def test_iqm_resamples_inside_tasks_only():
    # No spread over seeds inside any task: the interval is a point, though tasks differ much.
    scores = np.tile([0.0, 1.0, 5.0, 100.0], (5, 1))
    i = iqm_interval(scores, np.random.default_rng(0), resamples=200)
    assert i.low == i.mean == i.high and i.n == 5


def test_iqm_interval_agrees_with_a_loop():
    rng = np.random.default_rng(7)
    scores = rng.normal(size=(6, 1)) + 0.1 * np.arange(4)  # a shared seed effect: drawing whole rows would be wider
    draws = [
        stats.trim_mean(np.concatenate([rng.choice(scores[:, m], 6) for m in range(4)]), 0.25) for _ in range(4000)
    ]
    i = iqm_interval(scores, rng)
    # sd of a simulated 2.5 % quantile is about 0.01 here; drawing whole rows is off by 0.2 and more
    assert (i.low, i.high) == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.06)
    assert i.mean == iqm(scores)


def test_probability_of_improvement_agrees_with_mann_whitney():
    rng = np.random.default_rng(8)
    x, y = rng.integers(0, 4, size=(6, 3)), rng.integers(0, 4, size=(4, 3))
    u = [stats.mannwhitneyu(x[:, m], y[:, m], alternative="greater").statistic / 24 for m in range(3)]
    assert probability_of_improvement(x, y) == pytest.approx(np.mean(u))
    assert probability_of_improvement(x, x) == 0.5
    assert probability_of_improvement(x + 9, y) == 1


def test_improvement_interval():
    rng = np.random.default_rng(9)
    x, y = rng.normal(0.5, 1, size=(5, 3)), rng.normal(0, 1, size=(8, 3))
    i = improvement_interval(x, y, rng)
    draws = []
    for _ in range(3000):
        bx = np.stack([rng.choice(x[:, m], 5) for m in range(3)], 1)
        by = np.stack([rng.choice(y[:, m], 8) for m in range(3)], 1)
        draws.append(probability_of_improvement(bx, by))
    assert i.mean == probability_of_improvement(x, y) and i.n == 5
    assert (i.low, i.high) == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.03)
    sure = improvement_interval(x + 99, y, rng, resamples=50)
    assert (sure.low, sure.high) == pytest.approx((1, 1))


def test_curve_band():
    rng = np.random.default_rng(10)
    curves = np.cumsum(rng.normal(size=(6, 30)), 1)
    mean, low, high = curve_band(curves, rng)
    assert mean == pytest.approx(curves.mean(0)) and (low <= mean).all() and (mean <= high).all()
    want = stats.bootstrap((curves[:, -1],), np.mean, method="percentile", rng=rng).confidence_interval
    assert (low[-1], high[-1]) == pytest.approx((want.low, want.high), abs=0.1 * np.ptp(curves[:, -1]))
    again = curve_band(curves, np.random.default_rng(0)), curve_band(curves, np.random.default_rng(0))
    assert all(np.array_equal(a, b) for a, b in zip(*again))


# --- pass@k -----------------------------------------------------------------------------------------------------------


def test_pass_at_k_by_hand():
    assert pass_at_k(4, 1, 2) == 0.5
    assert pass_at_k(10, 3, 5) == pytest.approx(1 - math.comb(7, 5) / math.comb(10, 5), abs=1e-12)
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3, abs=1e-15)
    curve = pass_at_k(8, np.array([4, 1, 0])[:, None], [1, 2, 4, 8]).mean(0)
    assert curve == pytest.approx([0.2083, 0.3452, 0.4952, 0.6667], abs=5e-5)


def test_pass_at_k_equals_binomials_and_does_not_overflow():
    for n in (1, 2, 7, 30, 60):
        c, k = np.arange(n + 1)[:, None], np.arange(1, n + 1)
        want = [[1 - math.comb(n - i, j) / math.comb(n, j) for j in range(1, n + 1)] for i in range(n + 1)]
        assert np.abs(pass_at_k(n, c, k) - want).max() < 1e-10
    big = pass_at_k(1024, np.arange(1025)[:, None], [1, 2, 512, 1023, 1024])
    assert np.isfinite(big).all() and (np.diff(big, axis=1) >= 0).all()
    assert (big[0] == 0).all() and (big[1:, -1] == 1).all()


def test_pass_at_k_is_unbiased():
    # exact: average over Binomial(n, p) is 1 - (1 - p)^k
    c = np.arange(13)
    for p, k in ((0.1, 4), (0.4, 9), (0.02, 12)):
        assert stats.binom.pmf(c, 12, p) @ pass_at_k(12, c, k) == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


@pytest.mark.parametrize(
    "n, c, k, named", [(3, 1, 4, "n >= k"), (4, 5, 1, "c=5"), (4, 1, 0, "k=0"), (4, 1.5, 2, "whole")]
)
def test_pass_at_k_refusals(n, c, k, named):
    with pytest.raises(UserError, match=named):
        pass_at_k(n, c, k)
    with pytest.raises(UserError, match=named):
        pass_at_k([9, n], [1, c], [1, k])


def test_pass_at_k_area():
    assert pass_at_k_area([1, 2, 4], [0.2, 0.4, 0.8]) == pytest.approx((0.3 + 0.6) / 2)
    assert pass_at_k_area([1, 4], [0.2, 0.8]) == pytest.approx(0.5)  # unequal steps in log2 k weigh by their width
    assert pass_at_k_area([1, 2, 8], [[1, 1, 1], [0, 0, 1]]) == pytest.approx([1, 1 / 3])
    for k, v in (([1], [1]), ([2, 1], [1, 1]), ([0, 1], [1, 1]), ([1, 2], [1, 1, 1])):
        with pytest.raises(UserError, match="area under pass@k"):
            pass_at_k_area(k, v)


# --- verdicts ---------------------------------------------------------------------------------------------------------

NOISE = np.array([-0.02, -0.01, 0, 0.01, 0.02])  # half-width of the t interval 0.0196
VALUES = {
    "a": {"m": 0.5 + NOISE},
    "b": {"m": np.full(5, 0.4)},
    "near": {"m": 0.41 + NOISE},
    "rl-plus_v1.5+kl": {"countdown/pass@1*": np.ones(5)},
    "other": {"countdown/pass@1*": np.zeros(5)},
}


@pytest.mark.parametrize(
    "expectation, want",
    [
        ("a > b on m", "reproduced"),
        ("b > a on m", "refuted"),
        ("a < b on m", "refuted"),
        ("b < a on m", "reproduced"),
        ("near > b on m", "inconclusive"),
        ("near < b on m", "inconclusive"),
        ("a > b + 0.05 on m", "reproduced"),
        ("a > b + 0.09 on m", "inconclusive"),
        ("a > b + 0.15 on m", "refuted"),
        ("near >= b - 0.02 on m", "reproduced"),
        ("b >= a - 0.02 on m", "refuted"),
        ("a >= 0.4 on m", "reproduced"),
        ("a >= 0.9 on m", "refuted"),
        ("a <= .49 on m", "inconclusive"),
        ("a > -1e-1 on m", "reproduced"),
        ("a>b on m", "reproduced"),
        ("rl-plus_v1.5+kl > other on countdown/pass@1*", "reproduced"),
        # equal on every seed: no evidence for >, enough for >=
        ("b > b on m", "inconclusive"),
        ("b < b on m", "inconclusive"),
        ("b >= b on m", "reproduced"),
        ("b <= b on m", "reproduced"),
        ("b >= 0.4 on m", "reproduced"),
        ("b > 0.4 on m", "inconclusive"),
        ("other >= rl-plus_v1.5+kl on countdown/pass@1*", "refuted"),
    ],
)
def test_verdicts(expectation, want):
    assert verdict(expectation, VALUES).verdict == want


def test_outcome_holds_the_difference_and_the_threshold():
    o = verdict("a > b + 0.05 on m", VALUES)
    want = paired(VALUES["a"]["m"], VALUES["b"]["m"])
    assert o.threshold == 0.05 and (o.interval.mean, o.interval.low) == pytest.approx((want.mean, want.low))
    o = verdict("a >= 0.4 on m", VALUES)
    assert o.threshold == 0.4 and o.interval.mean == pytest.approx(0.5)


def test_rounding_does_not_decide_at_the_threshold():
    assert 0.5 - 0.52 < -0.02  # in float64
    assert verdict("x >= y - 0.02 on m", {"x": {"m": [0.5] * 3}, "y": {"m": [0.52] * 3}}).verdict == "reproduced"
    assert verdict("x >= y - 0.02 on m", {"x": {"m": [0.5 - 1e-9] * 3}, "y": {"m": [0.52] * 3}}).verdict == "refuted"


@pytest.mark.parametrize(
    "text",
    [
        "a > b",
        "a = b on m",
        "a b on m",
        "0.9 < a on m",
        "a > 0.9 + 0.1 on m",
        "a > b + c on m",
        "",
        "a >> b on m",
        "a > b on m n",
    ],
)
def test_unreadable_expectations_name_themselves_and_the_form(text):
    with pytest.raises(UserError) as e:
        Expectation.parse(text)
    assert f'"{text}"' in str(e.value) and "arm > arm on metric" in str(e.value)


@pytest.mark.parametrize(
    "expectation, values, named",
    [
        ("x > b on m", VALUES, 'no arm "x"; there are a, b'),
        ("a > b on n", VALUES, 'no metric "n"; it has m'),
        ("a > b+0.05 on m", VALUES, 'no arm "b+0.05"'),
        ("a > b on m", {"a": {"m": [1, 2]}, "b": {"m": [1]}}, "2 seeds against 1"),
        ("a > b on m", {"a": {"m": [1]}, "b": {"m": [1]}}, "1 seed gives no interval"),
        ("a > b on m", {"a": {"m": [1, math.inf]}, "b": {"m": [1, 2]}}, "value inf"),
        ("a > 7 on m", {"a": {"m": [1, 2]}, "7": {"m": [1, 2]}}, '"7" is named like a number'),
    ],
)
def test_verdict_refusals(expectation, values, named):
    with pytest.raises(UserError) as e:
        verdict(expectation, values)
    assert named in str(e.value) and expectation in str(e.value)


def test_combine():
    def outcomes(*names):
        return [Outcome("", v, mean_interval([1, 2]), 0) for v in names]

    assert combine(outcomes("reproduced", "reproduced")) == "reproduced"
    assert combine(outcomes("reproduced", "inconclusive")) == "inconclusive"
    assert combine(outcomes("reproduced", "inconclusive", "refuted")) == "refuted"
    with pytest.raises(UserError, match="no expectations"):
        combine([])
