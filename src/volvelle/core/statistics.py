"""What a comparison over seeds may say: intervals, bands, pass@k and verdicts.

Everything is float64 numpy. Axes: S seeds (runs), M tasks, T points of a learning curve, R resamples.

Which interval for what
- one metric, one arm: `mean_interval`; two arms that share their seeds: `paired`. Both are Student-t. With five normal
  differences the t interval covers 95 %, the percentile bootstrap only about 83 % (and calls no effect an effect in
  8 % of the cases on the claimed side, not 2.5 %), so verdicts never use the bootstrap.
- a share of trials: `wilson`.
- many tasks x seeds: `iqm_interval` and `improvement_interval`, a stratified percentile bootstrap (arXiv 2108.13264).
- learning curves: `curve_band`, for the eye.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from volvelle.core.errors import UserError

Floats = NDArray[np.float64]
_SAME_SEEDS = "both arms need the same seeds in the same order"


@dataclass(frozen=True)
class Interval:
    """A point estimate and its confidence interval; `n` counts the seeds (or trials) behind it."""

    mean: float
    low: float
    high: float
    n: int


# --- one number per seed ----------------------------------------------------------------------------------------------


def mean_interval(x: ArrayLike, level: float = 0.95) -> Interval:
    """Student-t interval of the mean of x [S]; S >= 2.

    If every value is the same the interval is that point. Raises UserError on one seed, NaN or infinity.
    """
    return _t_interval("mean interval", _array("mean interval", x, 1), level)


def tail(x: ArrayLike, share: float = 0.1) -> tuple[float, float]:
    """(VaR, CVaR) of x [N]: its `share`-quantile, and the mean of what lies at or below it. For returns, so lower is worse."""
    x = _array("tail", x, 1)
    quantile = float(np.quantile(x, share))
    return quantile, float(x[x <= quantile + 1e-12].mean())


def paired(a: ArrayLike, b: ArrayLike, level: float = 0.95) -> Interval:
    """Student-t interval of the mean of a - b, both [S], entry i of both from the same seed; S >= 2.

    If every difference is the same the interval is that point. Raises UserError on one seed, unequal lengths, NaN or
    infinity.
    """
    a, b = _array("paired interval, first arm", a, 1), _array("paired interval, second arm", b, 1)
    if a.size != b.size:
        raise UserError(f"paired interval: {a.size} seeds against {b.size}; {_SAME_SEEDS}")
    return _t_interval("paired interval", a - b, level)


def wilson(successes: int, trials: int, level: float = 0.95) -> Interval:
    """Wilson score interval of a proportion; `mean` is successes / trials. Trials must be independent."""
    if trials == 0 or not 0 <= successes <= trials:
        form = "at least 1 trial, and from 0 to all of them successful"
        raise UserError(f"wilson interval: {successes} successes in {trials} trials; accepted is {form}")
    bounds = stats.binomtest(int(successes), int(trials)).proportion_ci(_level(level), method="wilson")
    return Interval(successes / trials, float(bounds.low), float(bounds.high), int(trials))


# --- tasks x seeds ----------------------------------------------------------------------------------------------------


def iqm(scores: ArrayLike) -> float:
    """Interquartile mean of scores [S, M]: the mean of the middle half of all S*M numbers (arXiv 2108.13264).

    The lowest and highest floor(S*M/4) numbers are left out. M >= 3: over one or two tasks it would only hide seeds.
    """
    return float(stats.trim_mean(_suite("interquartile mean", scores, 3), 0.25, axis=None))


def iqm_interval(scores: ArrayLike, rng: np.random.Generator, level: float = 0.95, resamples: int = 10_000) -> Interval:
    """`iqm` with a percentile bootstrap interval, seeds drawn with replacement inside each task (stratified).

    Speaks about other seeds on these tasks, not about other tasks. scores [S, M], S >= 2, M >= 3.
    """
    scores = _suite("interquartile mean", scores, 3, 2)
    seeds, tasks = scores.shape
    draws = np.empty(resamples)
    for part in _chunks(resamples, scores.size):
        rows = rng.integers(seeds, size=(len(part), seeds, tasks))
        draws[part] = stats.trim_mean(scores[rows, np.arange(tasks)].reshape(len(part), -1), 0.25, axis=1)
    low, high = _percentiles(draws, level)
    return Interval(iqm(scores), float(low), float(high), seeds)


def probability_of_improvement(x: ArrayLike, y: ArrayLike) -> float:
    """P(a random run of x beats a random run of y), ties one half, averaged over tasks (arXiv 2108.13264).

    x [S, M], y [S', M]; larger is better. Runs are not paired.
    """
    return float(_wins(x, y)[2].mean())


def improvement_interval(
    x: ArrayLike, y: ArrayLike, rng: np.random.Generator, level: float = 0.95, resamples: int = 10_000
) -> Interval:
    """`probability_of_improvement` with a percentile bootstrap, runs of x and of y drawn apart, inside each task.

    x [S, M], y [S', M], both with at least two seeds; `n` is the smaller of S and S'.
    """
    x, y, wins = _wins(x, y, 2)
    (sx, tasks), sy = x.shape, y.shape[0]
    draws = np.empty(resamples)
    for part in _chunks(resamples, (sx + sy) * tasks):
        wx = rng.multinomial(sx, np.full(sx, 1 / sx), size=(len(part), tasks)) / sx  # [R, M, S]
        wy = rng.multinomial(sy, np.full(sy, 1 / sy), size=(len(part), tasks)) / sy
        draws[part] = np.einsum("rms,mst,rmt->r", wx, wins, wy, optimize=True) / tasks
    low, high = _percentiles(draws, level)
    return Interval(float(wins.mean()), float(low), float(high), min(sx, sy))


def curve_band(
    curves: ArrayLike, rng: np.random.Generator, level: float = 0.95, resamples: int = 2000
) -> tuple[Floats, Floats, Floats]:
    """Mean, low and high, each [T], of curves [S, T]: pointwise percentile bootstrap over whole curves; S >= 2.

    For the eye: few seeds make it too narrow (see the module), and it does not hold at all points at once.
    """
    curves = _array("curve band", curves, 2)
    seeds = curves.shape[0]
    _enough("curve band", seeds)
    weights = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds
    low, high = _percentiles(weights @ curves, level)
    return curves.mean(0), low, high


# --- pass@k -----------------------------------------------------------------------------------------------------------


def pass_at_k(n: ArrayLike, c: ArrayLike, k: ArrayLike) -> Floats | float:
    """Chance that at least one of k samples is right, unbiased from c right ones among n (arXiv 2107.03374).

    1 - C(n-c, k) / C(n, k) as the product 1 - prod_{j=n-c+1..n} (1 - k/j), which never overflows. n, c, k broadcast;
    for a curve over problems: `pass_at_k(n, c[:, None], k).mean(0)`. Raises UserError if n < k, k < 1 or c > n.
    """
    n, c, k = np.broadcast_arrays(*(_whole(name, v) for name, v in (("n", n), ("c", c), ("k", k))))
    for wrong, form in (
        (k < 1, "k >= 1"),
        (n < k, "n >= k: draw at least k samples"),
        ((c < 0) | (c > n), "0 <= c <= n"),
    ):
        if wrong.any():
            i = tuple(np.argwhere(wrong)[0])
            raise UserError(f"pass@k: n={n[i]} samples, c={c[i]} correct, k={k[i]}; accepted is {form}")
    miss = np.ones(n.shape)
    for i in range(int(c.max(initial=0))):  # the factor j = k is zero, so n - c < k gives exactly 1
        miss = np.where(i < c, miss * (1 - k / np.maximum(n - i, 1)), miss)
    return (1 - miss)[()]


def pass_at_k_area(k: ArrayLike, values: ArrayLike) -> Floats | float:
    """Area under pass@k over log2 k, divided by its width, so 1 is a perfect curve (trapezoids; arXiv 2509.18851).

    k [K] increasing and >= 1, K >= 2; values [..., K]; returns [...].
    """
    k, values = _array("area under pass@k, k", k, 1), np.asarray(values, np.float64)
    if k.size < 2 or k[0] < 1 or (np.diff(k) <= 0).any() or values.shape[-1:] != k.shape:
        raise UserError(
            f"area under pass@k: k={k.tolist()} with values of shape {list(values.shape)}; "
            "accepted are two or more increasing k >= 1 and one value for each"
        )
    x = np.log2(k)
    return np.trapezoid(values, x, axis=-1)[()] / (x[-1] - x[0])


# --- verdicts ---------------------------------------------------------------------------------------------------------

Verdict = Literal["reproduced", "inconclusive", "refuted"]

FORM = (
    '"arm > arm on metric", "arm >= arm - 0.02 on metric" or "arm < 0.9 on metric" '
    "(with >, >=, < or <=; spaces around + and -)"
)
_NAME, _NUMBER = r"[A-Za-z0-9_.+@/*-]+", r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_EXPECTATION = re.compile(
    rf"\s*(?P<left>{_NAME})\s*(?P<sign>>=|<=|>|<)\s*(?P<right>{_NAME})"
    rf"(?:\s+(?P<shift>[+-])\s+(?P<margin>{_NUMBER}))?\s+on\s+(?P<metric>{_NAME})\s*"
)


@dataclass(frozen=True)
class Expectation:
    """`left comparison right + margin`, on one metric; `right` is None for a constant, which is then the margin."""

    text: str
    left: str
    comparison: str
    right: str | None
    margin: float
    metric: str

    @classmethod
    def parse(cls, text: str) -> "Expectation":
        """Read one expectation; UserError names the text and the accepted form."""
        found = _EXPECTATION.fullmatch(text)
        constant = bool(found and _is_number(found["right"]))
        if not found or _is_number(found["left"]) or (constant and found["margin"]):
            raise UserError(f'expectation "{text}" cannot be read; accepted is {FORM}')
        margin = float(found["right"]) if constant else float((found["shift"] or "") + (found["margin"] or "0"))
        return cls(text, found["left"], found["sign"], None if constant else found["right"], margin, found["metric"])


@dataclass(frozen=True)
class Outcome:
    """What the data say about one expectation.

    `interval` is that of left - right (of left alone against a constant); `threshold` is the value it was held against.
    """

    expectation: str
    verdict: Verdict
    interval: Interval
    threshold: float


def verdict(expectation: str, values: Mapping[str, Mapping[str, ArrayLike]], level: float = 0.95) -> Outcome:
    """Hold one expectation, such as "ngrpo > grpo on pass@1", against values[arm][metric] [S], paired by seed.

    reproduced: the t interval lies on the claimed side of the threshold; refuted: wholly on the other side; else
    inconclusive. So under no effect at most 2.5 % of strict claims come out reproduced. The threshold itself belongs to
    the claimed side of >= and <=, and to neither side of > and <: arms that are equal on every seed (a floor or a
    ceiling of the metric) leave "a > b" inconclusive and reproduce "a >= b". Differences within float64 rounding of
    the threshold count as equal to it. Raises UserError on an unreadable expectation, an unknown arm or metric, one
    seed, unequal seeds, NaN.
    """
    e = Expectation.parse(expectation)
    what = f'expectation "{expectation}"'
    for arm in filter(_is_number, values):
        raise UserError(f'{what}: arm "{arm}" is named like a number; rename it')
    left = _lookup(what, values, e.left, e.metric)
    right = np.zeros_like(left) if e.right is None else _lookup(what, values, e.right, e.metric)
    if left.size != right.size:
        raise UserError(f"{what}: {left.size} seeds against {right.size}; {_SAME_SEEDS}")
    beyond = left - right - e.margin
    rounding = 8 * np.finfo(np.float64).eps * np.maximum(np.maximum(abs(left), abs(right)), abs(e.margin))
    i = _t_interval(what, np.where(abs(beyond) <= rounding, 0.0, beyond), level)
    near, far = (i.low, i.high) if e.comparison[0] == ">" else (-i.high, -i.low)
    holds = near > 0 or (near == 0 and e.comparison[-1] == "=")
    shifted = Interval(i.mean + e.margin, i.low + e.margin, i.high + e.margin, i.n)
    return Outcome(expectation, "reproduced" if holds else "refuted" if far < 0 else "inconclusive", shifted, e.margin)


def combine(outcomes: Iterable[Outcome]) -> Verdict:
    """The verdict of a claim: reproduced if every expectation is, refuted if any is, else inconclusive.

    Demanding all of them needs no correction for their number; "any is refuted" grows with it (2.5 % each).
    """
    verdicts = [o.verdict for o in outcomes]
    if not verdicts:
        raise UserError("verdict: no expectations; a claim needs at least one")
    if "refuted" in verdicts:
        return "refuted"
    return "reproduced" if all(v == "reproduced" for v in verdicts) else "inconclusive"


def _is_number(text: str) -> bool:
    return re.fullmatch(rf"[+-]?{_NUMBER}", text) is not None


# --- checks -----------------------------------------------------------------------------------------------------------


def _t_interval(what: str, x: Floats, level: float) -> Interval:
    _enough(what, x.size)
    mean, half = float(x.mean()), 0.0
    if np.ptp(x) == 0:
        mean = float(x[0])
    else:
        half = float(stats.t.ppf((1 + _level(level)) / 2, x.size - 1) * x.std(ddof=1) / np.sqrt(x.size))
    return Interval(mean, mean - half, mean + half, int(x.size))


def _enough(what: str, seeds: int, least: int = 2) -> None:
    if seeds < least:
        raise UserError(f"{what}: {seeds} seed gives no interval; at least {least} are needed")


def _level(level: float) -> float:
    if not 0 < level < 1:
        raise UserError(f"confidence level {level}; accepted is a number between 0 and 1, such as 0.95")
    return level


def _array(what: str, x: ArrayLike, dims: int) -> Floats:
    x = np.asarray(x, np.float64)
    if x.ndim != dims or 0 in x.shape:
        form = ["[seeds]", "[seeds, points or tasks]"][dims - 1]
        raise UserError(f"{what}: shape {list(x.shape)}; accepted is {form}, not empty")
    if not np.isfinite(x).all():
        i = np.argwhere(~np.isfinite(x))[0].tolist()
        raise UserError(f"{what}: value {x[tuple(i)]} at {i}; only finite numbers are accepted")
    return x


def _suite(what: str, scores: ArrayLike, tasks: int, seeds: int = 1) -> Floats:
    scores = _array(what, scores, 2)
    if scores.shape[1] < tasks:
        raise UserError(f"{what}: {scores.shape[1]} tasks; at least {tasks} are needed (axes [seeds, tasks])")
    if seeds > 1:
        _enough(what, scores.shape[0], seeds)
    return scores


def _wins(x: ArrayLike, y: ArrayLike, seeds: int = 1) -> tuple[Floats, Floats, Floats]:
    """x, y and wins [M, S, S']: 1 where the run of x is better, one half at a tie."""
    what = "probability of improvement"
    x, y = _suite(what, x, 1, seeds), _suite(what, y, 1, seeds)
    if x.shape[1] != y.shape[1]:
        raise UserError(f"{what}: {x.shape[1]} tasks against {y.shape[1]}; both need the same tasks in the same order")
    a, b = x.T[:, :, None], y.T[:, None, :]
    return x, y, (a > b) + 0.5 * (a == b)


def _whole(name: str, v: ArrayLike) -> NDArray[np.int64]:
    v = np.asarray(v)
    if not (np.issubdtype(v.dtype, np.integer) or (np.issubdtype(v.dtype, np.floating) and (v == np.floor(v)).all())):
        raise UserError(f"pass@k: {name} of type {v.dtype} is no count; whole numbers are accepted")
    return v.astype(np.int64)


def _lookup(what: str, values: Mapping[str, Mapping[str, ArrayLike]], arm: str, metric: str) -> Floats:
    if arm not in values:
        raise UserError(f'{what}: no arm "{arm}"; there are {", ".join(sorted(values))}')
    if metric not in values[arm]:
        raise UserError(f'{what}: arm "{arm}" has no metric "{metric}"; it has {", ".join(sorted(values[arm]))}')
    return _array(f"{what}: {arm}", values[arm][metric], 1)


def _percentiles(draws: Floats, level: float) -> Floats:
    tail = (1 - _level(level)) / 2
    return np.quantile(draws, [tail, 1 - tail], axis=0)


def _chunks(resamples: int, width: int) -> Iterable[range]:
    """Ranges that keep about 16 MB of resampled numbers alive at a time."""
    size = max(1, 2_000_000 // width)
    return (range(i, min(i + size, resamples)) for i in range(0, resamples, size))
