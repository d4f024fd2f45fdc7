"""Intervals and tests for per-user values of a metric, one function per question.

Arguments named a and b, (n,), hold the values of two systems for the same n users, in the same order. Bootstrap
intervals resample users and are percentile intervals: they need about fifty users for whom the values (or a and b)
differ. Arguments that most functions share: seed of the random numbers, level of the confidence interval, number of
resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from lwa_helpers.evaluation.unmeasured import TooFew

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
    """p-values adjusted for the number of comparisons, and which of them are at most alpha."""

    adjusted: np.ndarray
    rejected: np.ndarray


class VarianceComponents(NamedTuple):
    """Mean of a (users x seeds) table and the variance due to users, seeds and their interaction with noise."""

    mean: float
    user: float
    seed: float
    residual: float


class SeedDifference(NamedTuple):
    """Difference of two arms with its interval and p-value, and its standard errors due to users and due to seeds."""

    estimate: float
    low: float
    high: float
    p: float
    user_error: float
    seed_error: float


def mean_interval(values: np.ndarray, *, seed: int, level: float = 0.95, resamples: int = RESAMPLES) -> Interval:
    """Return the mean of one system's values (n,) over users, with a bootstrap interval.

    Raises ValueError for NaN or fewer than two users.
    """
    return _bootstrap((_finite(values, 1),), lambda x, axis: x.mean(axis), seed, level, resamples)


def paired_difference(
    a: np.ndarray, b: np.ndarray, *, seed: int, level: float = 0.95, resamples: int = RESAMPLES
) -> Interval:
    """Return the mean of a - b over the same users, with a paired bootstrap interval.

    Raises ValueError for NaN or unequal shapes.
    """
    a, b = _paired(a, b)
    return mean_interval(a - b, seed=seed, level=level, resamples=resamples)


def ratio_of_means(
    a: np.ndarray, b: np.ndarray, *, seed: int, level: float = 0.95, resamples: int = RESAMPLES
) -> Interval:
    """Return mean(a) / mean(b), e.g. the quality a student keeps, with a paired bootstrap interval.

    A resample in which every b is zero counts as an infinite ratio.

    Raises:
        ValueError: for NaN, unequal shapes or a negative b.
        TooFew: for fewer than five positive b.
    """
    a, b = _paired(a, b)
    if (b < 0).any():
        raise ValueError(f"a ratio needs b >= 0, got {b.min()}")
    if (b > 0).sum() < 5:
        raise TooFew(f"a ratio needs at least 5 users above zero, got {(b > 0).sum()} of {b.size}", Interval)
    return _bootstrap((a, b), _ratio, seed, level, resamples)


def randomization_test(a: np.ndarray, b: np.ndarray, *, seed: int, resamples: int = RESAMPLES - 1) -> Significance:
    """Return the mean of a - b and its p-value by a sign-flip test of H0: the mean is zero.

    Under H0, swapping a user's two values changes nothing. The two-sided p is over all 2^m assignments if they are at
    most `resamples`. Otherwise it is over a random sample that includes the observed assignment ((b + 1) / (m + 1),
    never 0). Sums that agree to 12 digits of sum |a - b| count as equal. Raises ValueError for NaN or unequal shapes.
    """
    a, b = _paired(a, b)
    difference = a - b
    moved = difference[difference != 0]
    if moved.size < 2:
        return Significance(float(difference.mean()), 1.0)
    result = stats.permutation_test(
        (moved / np.abs(moved).sum(),), lambda x, axis: x.sum(axis).round(12), permutation_type="samples",
        vectorized=True, n_resamples=resamples, batch=BATCH, rng=np.random.default_rng(seed),
    )  # fmt: skip
    return Significance(float(difference.mean()), float(result.pvalue))


def contrasts(systems: Mapping[str, np.ndarray], reference: str, *, seed: int) -> pd.DataFrame:
    """Compare every other system with the reference on the same users.

    Raises ValueError for NaN or unequal shapes.

    Args:
        systems: (B,) values of each system, one per user.
        reference: the name of the system to compare with.
        seed: of the random numbers.

    Returns:
        One row per system, with the columns system; difference, low and high of `paired_difference`; effect, the
        Cohen's d of `effect_size` (nan if the difference is the same for all users); p of `randomization_test`; and
        p_holm, which corrects p for the number of rows.
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
    """Adjust m p-values by Holm's step-down correction, which keeps the chance of any false rejection below alpha.

    adjusted_(i) = max_{j <= i} min(1, (m - j + 1) p_(j)), p sorted.

    Args:
        p_values: (m,) p-values.
        alpha: the level of the tests.

    Returns:
        The adjusted p-values, and which of them are at most alpha.

    Raises:
        ValueError: for no values, more than one dimension or values outside [0, 1].
    """
    p = np.asarray(p_values, dtype=float)
    if p.ndim != 1 or not p.size or not np.all((p >= 0) & (p <= 1)):
        raise ValueError("p_values must be a non-empty one-dimensional array of numbers in [0, 1]")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, np.arange(p.size, 0, -1) * p[order]))
    return Holm(adjusted, adjusted <= alpha)


def effect_size(a: np.ndarray, b: np.ndarray, *, level: float = 0.95) -> Interval:
    """Return the paired Cohen's d = mean(a - b) / sd(a - b), with a delta-method interval.

    The interval allows for non-normal differences: Var(d) = (1 - g1 d + (g2 + 2) d^2 / 4) / n, with g1 the skewness and
    g2 the excess kurtosis of a - b.

    Raises:
        ValueError: for NaN or unequal shapes, or if a - b is the same for every user up to rounding (d is undefined).
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
    """Separate the variance of a metric due to users and due to seeds: two-way random effects without replication.

    With MS the mean squares: user = (MS_user - MS_residual) / seeds, seed = (MS_seed - MS_residual) / users, both
    cut at zero; residual = MS_residual. Raises ValueError for fewer than two users or seeds.

    Args:
        values: (users, seeds) values of the metric.

    Returns:
        The mean and the variance components.
    """
    x = _finite(values, 2)
    users, seeds = x.shape
    by_user, by_seed = x.mean(axis=1), x.mean(axis=0)
    noise = ((x - by_user[:, None] - by_seed + x.mean()) ** 2).sum() / ((users - 1) * (seeds - 1))
    user = by_user.var(ddof=1) - noise / seeds
    seed = by_seed.var(ddof=1) - noise / users
    return VarianceComponents(float(x.mean()), max(0.0, float(user)), max(0.0, float(seed)), float(noise))


def difference_over_seeds(a: np.ndarray, b: np.ndarray, *, level: float = 0.95) -> SeedDifference:
    """Estimate the mean of a - b over users and seeds, for two arms trained with the same seeds.

    A column is one seed, which both arms share (initial weights and order of the data), so differences are paired by
    user and by seed. With d = a - b: squared standard error = Var(user means of d) / users + Var(seed means of d) /
    seeds. Both terms contain the noise of single users, so the interval errs on the wide side. It is a t interval with
    Satterthwaite's degrees of freedom; with two seeds whose variance outweighs the users', a 95 % interval covers
    about 87 %.

    Args:
        a: (users, seeds) values of one arm.
        b: (users, seeds) values of the other arm.
        level: of the confidence interval.

    Returns:
        The difference. Equal arms differ by 0 [0, 0], p = 1.

    Raises:
        ValueError: for NaN, unequal shapes, fewer than two users or seeds, or if d is the same throughout and not zero.
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
    """Estimate the mean of a - b for two arms, over users and seeds if there are several seeds, else over users alone.

    Args:
        a: (users, seeds) values of one arm.
        b: (users, seeds) values of the other arm.
        seed: of the bootstrap over users alone.

    Returns:
        `difference_over_seeds` or, for a single seed, `paired_difference`.
    """
    a, b = np.asarray(a), np.asarray(b)
    return difference_over_seeds(a, b) if a.shape[1] > 1 else paired_difference(a[:, 0], b[:, 0], seed=seed)


def ratio_of_arms(a: np.ndarray, b: np.ndarray, *, seed: int, level: float = 0.95) -> Interval:
    """Estimate mean(a) / mean(b) for two arms, over users and seeds if there are several seeds, else over users alone.

    With several seeds, the interval is that of `difference_over_seeds` of a and r b, divided by mean(b), where r is the
    ratio (delta method).

    Args:
        a: (users, seeds) values of one arm.
        b: (users, seeds) values of the other arm.
        seed: of the bootstrap over users alone.
        level: of the confidence interval.

    Returns:
        The ratio and its interval.

    Raises:
        ValueError: for NaN or unequal shapes.
        TooFew: for a mean(b) that is not above zero.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.ndim == 2 and a.shape[1] == 1:
        return ratio_of_means(a[:, 0], b[:, 0], seed=seed, level=level)
    if not b.mean() > 0:
        raise TooFew(f"a ratio needs mean(b) above zero, got {b.mean()}", Interval)
    ratio = float(a.mean() / b.mean())
    error = difference_over_seeds(a, ratio * b, level=level)
    return Interval(ratio, ratio + error.low / float(b.mean()), ratio + error.high / float(b.mean()))


def smallest_detectable_difference(sd: float, n_users: int, *, power: float = 0.8, alpha: float = 0.05) -> float:
    """Compute the smallest true mean difference that a two-sided test on n users finds with the given power.

    Args:
        sd: standard deviation of the per-user differences. For two independent sets of users it is sqrt(2) times that
            of one system.
        n_users: the number of users n.
        power: the probability that the test finds the difference.
        alpha: the level of the test.

    Returns:
        (z_{1 - alpha/2} + z_power) sd / sqrt(n).

    Raises:
        ValueError: for sd < 0, n < 2, or power or alpha outside (0, 1).
    """
    if not (sd >= 0 and n_users >= 2 and 0 < power < 1 and 0 < alpha < 1):
        raise ValueError(f"need sd >= 0, n_users >= 2, 0 < power, alpha < 1; got {sd}, {n_users}, {power}, {alpha}")
    return float((stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(power)) * sd / np.sqrt(n_users))


def spearman(
    x: np.ndarray, y: np.ndarray, *, seed: int, level: float = 0.95, resamples: int = RESAMPLES
) -> Correlation:
    """Return Spearman's rank correlation of two scores of the same layers, with a bootstrap interval over layers.

    x and y are (n,), n >= 5. Resamples in which one side is constant have no correlation and are left out. Raises
    ValueError for NaN or unequal shapes, TooFew for n < 5 or a constant side.
    """
    x, y = _varied(x, y)
    indices = np.random.default_rng(seed).integers(x.size, size=(resamples, x.size))
    u, v = (stats.rankdata(side[indices], axis=1) - (x.size + 1) / 2 for side in (x, y))
    scale = np.sqrt((u * u).sum(axis=1) * (v * v).sum(axis=1))
    low, high = np.quantile((u * v).sum(axis=1)[scale > 0] / scale[scale > 0], [(1 - level) / 2, (1 + level) / 2])
    result = stats.spearmanr(x, y)
    return Correlation(float(result.statistic), float(low), float(high), float(result.pvalue))


def _alike_throughout(a: np.ndarray, b: np.ndarray) -> bool:
    """Return whether a - b is the same for every user, up to rounding."""
    return bool(np.ptp(a - b) <= ROUNDING * max(np.abs(a).max(), np.abs(b).max()))


def _ratio(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
    over, under = np.asarray(a.mean(axis)), np.asarray(b.mean(axis))
    return np.divide(over, under, out=np.full(over.shape, np.inf), where=under > 0)


def _bootstrap(
    data: tuple[np.ndarray, ...], statistic: Callable[..., np.ndarray], seed: int, level: float, resamples: int
) -> Interval:
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
        raise TooFew("a rank correlation needs at least 5 pairs, and neither side constant", Correlation)
    return x, y
