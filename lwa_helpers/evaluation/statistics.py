"""How sure can we be? One function per question, on per-user values of a metric.

Arguments named a, b (n,) hold the values of two systems for the same n users, in the same order. Bootstrap intervals
resample users and are percentile intervals: they need some fifty users for whom the values (or a and b) differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

RESAMPLES = 10_000
BATCH = 500
ROUNDING = 8 * np.finfo(float).eps


class Interval(NamedTuple):
    """An estimate and the two ends of its confidence interval."""

    estimate: float
    low: float
    high: float


class Significance(NamedTuple):
    """An estimate and the two-sided p-value of the hypothesis that its true value is zero."""

    estimate: float
    p: float


class Correlation(NamedTuple):
    """A correlation, its confidence interval and the two-sided p-value of no association."""

    estimate: float
    low: float
    high: float
    p: float


class Holm(NamedTuple):
    """p-values adjusted for the number of comparisons, and which of them stay below alpha."""

    adjusted: np.ndarray
    rejected: np.ndarray


class VarianceComponents(NamedTuple):
    """Mean of a (users x seeds) table and the variance due to users, seeds and their interaction with noise."""

    mean: float
    user: float
    seed: float
    residual: float


class SeedDifference(NamedTuple):
    """Difference of two arms with its interval and p-value; the standard error due to users and to seeds, apart."""

    estimate: float
    low: float
    high: float
    p: float
    user_error: float
    seed_error: float


class Overlap(NamedTuple):
    """Shared part of two top-k sets, what chance would give, and P(at least this overlap by chance)."""

    estimate: float
    chance: float
    p: float


def mean_interval(values: np.ndarray, *, seed: int, level: float = 0.95, resamples: int = RESAMPLES) -> Interval:
    """Mean of one system over users (n,), with a bootstrap interval. ValueError on NaN or fewer than two users."""
    return _bootstrap((_finite(values, 1),), lambda x, axis: x.mean(axis), seed, level, resamples)


def paired_difference(
    a: np.ndarray, b: np.ndarray, *, seed: int, level: float = 0.95, resamples: int = RESAMPLES
) -> Interval:
    """Mean of a - b over the same users, with a paired bootstrap interval. ValueError on NaN or unequal shapes."""
    a, b = _paired(a, b)
    return mean_interval(a - b, seed=seed, level=level, resamples=resamples)


def ratio_of_means(
    a: np.ndarray, b: np.ndarray, *, seed: int, level: float = 0.95, resamples: int = RESAMPLES
) -> Interval:
    """mean(a) / mean(b), e.g. the quality a student keeps, with a paired bootstrap interval.

    A resample in which every b is zero counts as an infinite ratio. ValueError on NaN, unequal shapes, a negative b or
    fewer than five positive ones.
    """
    a, b = _paired(a, b)
    if (b < 0).any() or (b > 0).sum() < 5:
        raise ValueError(f"a ratio needs b >= 0 with at least 5 users above zero, got {(b > 0).sum()} of {b.size}")
    return _bootstrap((a, b), _ratio, seed, level, resamples)


def randomization_test(a: np.ndarray, b: np.ndarray, *, seed: int, resamples: int = RESAMPLES - 1) -> Significance:
    """Is the mean of a - b zero? Sign-flip test: under H0 swapping a user's two values changes nothing.

    Two-sided p over all 2^m assignments when they are at most `resamples`, else over a random sample, with the
    observed one counted in ((b + 1) / (m + 1), never 0). Sums are equal that agree to 12 digits of sum |a - b|.
    ValueError on NaN or unequal shapes.
    """
    a, b = _paired(a, b)
    difference = a - b
    moved = difference[difference != 0]
    if moved.size < 2:
        return Significance(float(difference.mean()), 1.0)
    result = stats.permutation_test(
        (moved / np.abs(moved).sum(),), lambda x, axis: x.sum(axis).round(12), permutation_type="samples", vectorized=True,
        n_resamples=resamples, batch=BATCH, rng=np.random.default_rng(seed),
    )  # fmt: skip
    return Significance(float(difference.mean()), float(result.pvalue))


def contrasts(systems: Mapping[str, np.ndarray], reference: str, *, seed: int) -> pd.DataFrame:
    """Every other system against the reference on the same users, a row each.

    systems: a value (B,) for each user. Columns system; difference, low, high of `paired_difference`; effect, Cohen's d of
    `effect_size` (nan where all users differ alike); p of `randomization_test`; p_holm over the rows. ValueError on NaN or
    unequal shapes.
    """
    rows, base = [], systems[reference]
    for name, values in systems.items():
        if name != reference:
            mean = paired_difference(values, base, seed=seed)
            effect = np.nan if _alike_throughout(values, base) else effect_size(values, base).estimate
            row = {"system": name, "difference": mean.estimate, "low": mean.low, "high": mean.high, "effect": effect}
            rows.append(row | {"p": randomization_test(values, base, seed=seed).p})
    frame = pd.DataFrame(rows, columns=["system", "difference", "low", "high", "effect", "p"])
    return frame.assign(p_holm=holm(frame.p.to_numpy()).adjusted if rows else [])


def holm(p_values: np.ndarray, alpha: float = 0.05) -> Holm:
    """Holm's step-down correction of m p-values: adjusted_(i) = max_{j <= i} min(1, (m - j + 1) p_(j)), p sorted.

    Keeps the chance of any false rejection below alpha. ValueError for values outside [0, 1].
    """
    p = np.asarray(p_values, dtype=float)
    if p.ndim != 1 or not p.size or not np.all((p >= 0) & (p <= 1)):
        raise ValueError("p_values must be a non-empty one-dimensional array of numbers in [0, 1]")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, np.arange(p.size, 0, -1) * p[order]))
    return Holm(adjusted, adjusted <= alpha)


def effect_size(a: np.ndarray, b: np.ndarray, *, level: float = 0.95) -> Interval:
    """Paired Cohen d = mean(a - b) / sd(a - b), with a delta-method interval that allows for non-normal differences.

    Var(d) = (1 - g1 d + (g2 + 2) d^2 / 4) / n, with g1 the skewness and g2 the excess kurtosis of a - b.
    ValueError on NaN, unequal shapes, or where a - b is the same for every user but for rounding (d undefined).
    """
    a, b = _paired(a, b)
    difference = a - b
    if _alike_throughout(a, b):
        raise ValueError("a - b is the same for every user: the effect size is undefined")
    d = difference.mean() / difference.std(ddof=1)
    g1, g2 = stats.skew(difference), stats.kurtosis(difference)
    error = np.sqrt((1 - g1 * d + (g2 + 2) * d**2 / 4) / difference.size)
    half = stats.norm.ppf((1 + level) / 2) * error
    return Interval(float(d), float(d - half), float(d + half))


def variance_components(values: np.ndarray) -> VarianceComponents:
    """Variance of a metric due to users and to seeds, apart: two-way random effects without replication.

    values (users, seeds). With MS the mean squares: user = (MS_user - MS_residual) / seeds, seed = (MS_seed -
    MS_residual) / users, both cut at zero; residual = MS_residual. ValueError for fewer than two users or seeds.
    """
    x = _finite(values, 2)
    users, seeds = x.shape
    by_user, by_seed = x.mean(axis=1), x.mean(axis=0)
    noise = ((x - by_user[:, None] - by_seed + x.mean()) ** 2).sum() / ((users - 1) * (seeds - 1))
    user = by_user.var(ddof=1) - noise / seeds
    seed = by_seed.var(ddof=1) - noise / users
    return VarianceComponents(float(x.mean()), max(0.0, float(user)), max(0.0, float(seed)), float(noise))


def difference_over_seeds(a: np.ndarray, b: np.ndarray, *, level: float = 0.95) -> SeedDifference:
    """Mean of a - b over users and seeds, for two arms trained with the same seeds, allowing for both.

    a, b (users, seeds): a column is one seed, which both arms share (start and order of the data), so differences are
    paired by user and by seed. With d = a - b: squared standard error = Var(user means of d) / users + Var(seed means of
    d) / seeds, the noise of single users counted in both, which errs on the wide side; t interval with Satterthwaite's
    degrees of freedom (with two seeds whose variance outweighs the users', a 95 % interval covers about 87 %). Equal arms
    differ by 0 [0, 0], p = 1. ValueError for NaN, unequal shapes, fewer than two users or seeds, or any other d that is the
    same throughout.
    """
    a, b = _finite(a, 2), _finite(b, 2)
    if a.shape != b.shape:
        raise ValueError(f"the two arms must hold the same users and seeds, got {a.shape} and {b.shape}")
    difference = a - b
    if not difference.any():
        return SeedDifference(0.0, 0.0, 0.0, 1.0, 0.0, 0.0)
    users, seeds = difference.shape
    by_users = difference.mean(axis=1).var(ddof=1) / users
    by_seeds = difference.mean(axis=0).var(ddof=1) / seeds
    square = by_users + by_seeds
    if square == 0:
        raise ValueError("a - b is the same for every user and seed: there is no variance to judge it by")
    degrees = square**2 / (by_users**2 / (users - 1) + by_seeds**2 / (seeds - 1))
    estimate, error = float(difference.mean()), float(np.sqrt(square))
    half = float(stats.t.ppf((1 + level) / 2, degrees)) * error
    p = float(2 * stats.t.sf(abs(estimate) / error, degrees))
    return SeedDifference(
        estimate, estimate - half, estimate + half, p, float(np.sqrt(by_users)), float(np.sqrt(by_seeds))
    )


def difference_of_arms(a: np.ndarray, b: np.ndarray, *, seed: int) -> SeedDifference | Interval:
    """Mean of a - b for two arms (users, seeds): over users and seeds where there are several seeds, else over users alone."""
    a, b = np.asarray(a), np.asarray(b)
    return difference_over_seeds(a, b) if a.shape[1] > 1 else paired_difference(a[:, 0], b[:, 0], seed=seed)


def ratio_of_arms(a: np.ndarray, b: np.ndarray, *, seed: int, level: float = 0.95) -> Interval:
    """mean(a) / mean(b) for two arms (users, seeds): over users and seeds where there are several seeds, else over users alone.

    With several seeds, the interval is that of difference_over_seeds of a and r b, r the ratio, over mean(b) (delta method).
    ValueError on NaN, unequal shapes or a mean(b) that is not above zero.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.ndim == 2 and a.shape[1] == 1:
        return ratio_of_means(a[:, 0], b[:, 0], seed=seed, level=level)
    if not b.mean() > 0:
        raise ValueError(f"a ratio needs mean(b) above zero, got {b.mean()}")
    ratio = float(a.mean() / b.mean())
    error = difference_over_seeds(a, ratio * b, level=level)
    return Interval(ratio, ratio + error.low / float(b.mean()), ratio + error.high / float(b.mean()))


def smallest_detectable_difference(sd: float, n_users: int, *, power: float = 0.8, alpha: float = 0.05) -> float:
    """Smallest true mean difference that a two-sided test on n users finds with the given power.

    (z_{1 - alpha/2} + z_power) sd / sqrt(n), with sd that of the per-user differences (of two independent sets of
    users: sqrt(2) times that of one system). ValueError for sd < 0, n < 2, or power or alpha outside (0, 1).
    """
    if not (sd >= 0 and n_users >= 2 and 0 < power < 1 and 0 < alpha < 1):
        raise ValueError(f"need sd >= 0, n_users >= 2, 0 < power, alpha < 1; got {sd}, {n_users}, {power}, {alpha}")
    return float((stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(power)) * sd / np.sqrt(n_users))


def spearman(
    x: np.ndarray, y: np.ndarray, *, seed: int, level: float = 0.95, resamples: int = RESAMPLES
) -> Correlation:
    """Spearman's rank correlation of two scores of the same layers (n >= 5), with a bootstrap interval over layers.

    Resamples in which one side is constant have no correlation and are left out. ValueError on NaN, unequal shapes,
    n < 5 or a constant side.
    """
    x, y = _varied(x, y)
    indices = np.random.default_rng(seed).integers(x.size, size=(resamples, x.size))
    u, v = (stats.rankdata(side[indices], axis=1) - (x.size + 1) / 2 for side in (x, y))
    scale = np.sqrt((u * u).sum(axis=1) * (v * v).sum(axis=1))
    low, high = np.quantile((u * v).sum(axis=1)[scale > 0] / scale[scale > 0], [(1 - level) / 2, (1 + level) / 2])
    result = stats.spearmanr(x, y)
    return Correlation(float(result.statistic), float(low), float(high), float(result.pvalue))


def kendall_tau(x: np.ndarray, y: np.ndarray) -> Significance:
    """Kendall's tau-b of two scores of the same layers (n >= 5): concordant minus discordant pairs, ties allowed for.

    ValueError as in `spearman`.
    """
    result = stats.kendalltau(*_varied(x, y))
    return Significance(float(result.statistic), float(result.pvalue))


def top_k_overlap(x: np.ndarray, y: np.ndarray, k: int) -> Overlap:
    """Share of the k highest of x that are also among the k highest of y; equal scores in index order.

    By chance the number shared is hypergeometric with mean k^2 / n. ValueError on NaN, unequal shapes or k not in 1..n.
    """
    x, y = _paired(x, y)
    if not 1 <= k <= x.size:
        raise ValueError(f"k must lie in 1..{x.size}, got {k}")
    shared = np.intersect1d(*(np.argsort(-side, kind="stable")[:k] for side in (x, y))).size
    return Overlap(shared / k, k / x.size, float(stats.hypergeom.sf(shared - 1, x.size, k, k)))


def _alike_throughout(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether a - b is the same for every user, but for rounding."""
    return bool(np.ptp(a - b) <= ROUNDING * max(np.abs(a).max(), np.abs(b).max()))


def _ratio(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
    over, under = np.asarray(a.mean(axis)), np.asarray(b.mean(axis))
    return np.divide(over, under, out=np.full(over.shape, np.inf), where=under > 0)


def _bootstrap(data: tuple, statistic, seed: int, level: float, resamples: int) -> Interval:
    with np.errstate(invalid="ignore"):  # scipy also takes the standard deviation, which infinite ratios do not have
        result = stats.bootstrap(
            data, statistic, paired=len(data) > 1, vectorized=True, method="percentile", confidence_level=level,
            n_resamples=resamples, batch=BATCH, rng=np.random.default_rng(seed),
        )  # fmt: skip
    low, high = result.confidence_interval
    return Interval(float(statistic(*data, axis=0)), float(low), float(high))


def _finite(values: np.ndarray, dimensions: int) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    if values.ndim != dimensions or min(values.shape, default=0) < 2 or not np.isfinite(values).all():
        raise ValueError(f"need finite numbers, {dimensions}-dimensional, two or more along each; got {values.shape}")
    return values


def _paired(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = _finite(a, 1), _finite(b, 1)
    if a.shape != b.shape:
        raise ValueError(f"paired values must have equal shapes, got {a.shape} and {b.shape}")
    return a, b


def _varied(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, y = _paired(x, y)
    if x.size < 5 or np.ptp(x) == 0 or np.ptp(y) == 0:
        raise ValueError("a rank correlation needs at least 5 pairs, and neither side constant")
    return x, y
