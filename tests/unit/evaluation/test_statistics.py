"""Intervals by simulated coverage, tests by their behaviour under H0, closed forms by hand and by scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from lwa_helpers.evaluation.statistics import (
    contrasts,
    difference_of_arms,
    difference_over_seeds,
    effect_size,
    holm,
    mean_interval,
    paired_difference,
    randomization_test,
    ratio_of_arms,
    ratio_of_means,
    smallest_detectable_difference,
    spearman,
    variance_components,
)

QUICK = {"seed": 0, "resamples": 400}


def ndcg_like(rng, n):
    """NDCG@10 of two related systems for n users: mostly zeros, as in a real catalogue."""
    a = rng.integers(1, 60, n)
    b = np.where(rng.random(n) < 0.5, a, rng.integers(1, 80, n))
    return tuple(np.where(rank <= 10, 1 / np.log2(1 + rank), 0.0) for rank in (a, b))


def expected_ndcg():
    """Exact means of `ndcg_like`: sum over ranks of probability times gain."""
    gain = (1 / np.log2(1 + np.arange(1, 11))).sum()
    return gain / 60, 0.5 * gain / 60 + 0.5 * gain / 80


def covered(interval, truth):
    return interval.low <= truth <= interval.high


@pytest.mark.parametrize(
    ("function", "truth"),
    [
        (lambda a, b: mean_interval(a, **QUICK), expected_ndcg()[0]),
        (lambda a, b: paired_difference(a, b, **QUICK), expected_ndcg()[0] - expected_ndcg()[1]),
        (lambda a, b: ratio_of_means(b, a, **QUICK), expected_ndcg()[1] / expected_ndcg()[0]),
    ],
)
def test_bootstrap_intervals_cover_the_truth(function, truth):
    draws = 250
    hits = sum(covered(function(*ndcg_like(np.random.default_rng(i), 300)), truth) for i in range(draws))
    assert 0.90 <= hits / draws <= 0.985


def test_bootstrap_agrees_with_normal_theory_and_estimates_are_exact():
    a, b = ndcg_like(np.random.default_rng(1), 5000)
    for interval, values in ((mean_interval(a, seed=3), a), (paired_difference(a, b, seed=3), a - b)):
        half = 1.96 * values.std(ddof=1) / np.sqrt(values.size)
        assert interval.estimate == pytest.approx(values.mean())
        ends = values.mean() - half, values.mean() + half
        np.testing.assert_allclose([interval.low, interval.high], ends, atol=half / 12)
    assert ratio_of_means(a, b, **QUICK).estimate == pytest.approx(a.mean() / b.mean())


def test_bootstrap_follows_its_seed_level_and_pairing():
    a, b = ndcg_like(np.random.default_rng(2), 300)
    assert paired_difference(a, b, **QUICK) == paired_difference(a, b, **QUICK)
    assert paired_difference(a, b, **QUICK) != paired_difference(a, b, seed=1, resamples=400)
    wide, narrow = (mean_interval(a, level=level, **QUICK) for level in (0.99, 0.5))
    assert wide.low < narrow.low < narrow.high < wide.high
    shifted = paired_difference(a + 0.25, a, **QUICK)
    np.testing.assert_allclose(shifted, 0.25)
    same = ratio_of_means(a / 2, a, **QUICK)
    np.testing.assert_allclose(same, 0.5)


def test_ratio_interval_is_open_above_where_the_denominator_may_vanish():
    b = np.r_[np.ones(5), np.zeros(95)]
    a = np.r_[np.zeros(50), np.ones(50)]
    interval = ratio_of_means(a, b, seed=0, level=0.999)
    assert interval.estimate == 10 and interval.high == np.inf and np.isfinite(interval.low)
    with pytest.raises(ValueError, match="at least 5"):
        ratio_of_means(a, np.r_[np.ones(4), np.zeros(96)], seed=0)


def test_randomization_p_is_uniform_when_systems_are_exchangeable():
    p = []
    for i in range(300):
        rng = np.random.default_rng(i)
        a, b = ndcg_like(rng, 80)
        swap = rng.random(80) < 0.5
        p.append(randomization_test(np.where(swap, a, b), np.where(swap, b, a), seed=i, resamples=299).p)
    assert stats.kstest(p, "uniform").pvalue > 1e-3
    assert 0.02 <= np.mean(np.array(p) <= 0.05) <= 0.09


def test_randomization_is_exact_for_few_users_by_enumeration():
    difference = np.array([0.3, -0.1, 0.5, 0.0, 0.2, 0.25, 0.0])
    signs = np.array(np.meshgrid(*[[-1, 1]] * 7)).reshape(7, -1)
    expected = np.mean(np.abs(difference @ signs) >= abs(difference.sum()) - 1e-12)
    result = randomization_test(difference, np.zeros(7), seed=0)
    assert result.p == pytest.approx(expected)
    assert result.estimate == pytest.approx(difference.mean())


@pytest.mark.parametrize("tenths", [[1, 2, -3, 1, 2, -3], [3, 0, 0], [0, -7], [6, -1, -2, -3, 0], [7, 7, -1, 2]])
def test_randomization_counts_sums_as_equal_that_differ_by_rounding_alone(tenths):
    signs = np.array(np.meshgrid(*[[-1, 1]] * len(tenths))).reshape(len(tenths), -1)
    expected = np.mean(np.abs(tenths @ signs) >= abs(sum(tenths)))
    result = randomization_test(np.array(tenths) / 10, np.zeros(len(tenths)), seed=0)
    assert result == pytest.approx((sum(tenths) / 10 / len(tenths), expected))


def test_randomization_agrees_with_the_t_test_on_normal_differences_and_is_never_zero():
    a = np.random.default_rng(0).normal(0.2, 1, 200)
    assert randomization_test(a, np.zeros(200), seed=0).p == pytest.approx(stats.ttest_1samp(a, 0).pvalue, abs=0.004)
    assert 0 < randomization_test(a + 5, np.zeros(200), seed=0, resamples=499).p <= 2 / 500
    assert randomization_test(a, a, seed=0) == (0.0, 1.0)


def test_holm_by_hand():
    result = holm(np.array([0.01, 0.04, 0.03, 0.005]))
    np.testing.assert_allclose(result.adjusted, [0.03, 0.06, 0.06, 0.02])
    assert result.rejected.tolist() == [True, False, False, True]
    assert holm(np.array([0.6, 0.9])).adjusted.tolist() == [1.0, 1.0]


def test_holm_keeps_the_family_wise_error():
    rng = np.random.default_rng(0)
    assert np.mean([holm(rng.random(8)).rejected.any() for _ in range(2000)]) == pytest.approx(0.05, abs=0.015)


@pytest.mark.parametrize("values", [[], [0.5, 1.1], [-0.1], [np.nan], [[0.1]]])
def test_holm_refuses_what_is_not_a_p_value(values):
    with pytest.raises(ValueError, match="p_values"):
        holm(np.array(values))


@pytest.mark.parametrize("draw", [lambda r, n: r.normal(0.8, 1, n), lambda r, n: r.exponential(1, n)])
def test_effect_size_interval_covers_the_truth(draw):
    big = draw(np.random.default_rng(10**6), 2_000_000)
    truth = big.mean() / big.std()
    samples = [draw(np.random.default_rng(i), 400) for i in range(600)]
    assert 0.92 <= np.mean([covered(effect_size(x, np.zeros(400)), truth) for x in samples]) <= 0.975


def test_effect_size_by_hand():
    assert effect_size(np.array([2.0, 4.0, 6.0]), np.array([1.0, 2.0, 3.0])).estimate == pytest.approx(2.0)
    with pytest.raises(ValueError, match="undefined"):
        effect_size(np.ones(5), np.zeros(5))
    x = np.random.default_rng(0).random(50)
    with pytest.raises(ValueError, match="undefined"):
        effect_size(x + 0.1, x)  # the same for every user, but for rounding


def test_variance_components_by_hand():
    # rows 1,3 and 5,11: grand mean 5; MS_user 36, MS_seed 16, MS_residual 4
    result = variance_components(np.array([[1.0, 3.0], [5.0, 11.0]]))
    np.testing.assert_allclose(result, [5.0, 16.0, 6.0, 4.0])


def test_variance_components_find_what_was_put_in():
    rng = np.random.default_rng(0)
    users, seeds, noise = rng.normal(0, 0.3, (2000, 1)), rng.normal(0, 0.1, 300), rng.normal(0, 0.2, (2000, 300))
    result = variance_components(0.5 + users + seeds + noise)
    np.testing.assert_allclose(result[1:], [0.09, 0.01, 0.04], rtol=0.1)


def arm_of_seeds(rng, users, seed_sd, seeds):
    """Users' own values, plus what the arm does to each user, plus seed and noise: (users, seeds)."""
    own = users + rng.normal(0, 0.05, users.shape)
    return own + rng.normal(0, seed_sd, seeds) + rng.normal(0, 0.1, (len(users), seeds))


@pytest.mark.parametrize(("seed_sd", "seeds", "least"), [(0.02, 5, 0.92), (0.0, 3, 0.93), (0.005, 2, 0.92)])
def test_difference_over_seeds_covers_the_truth(seed_sd, seeds, least):
    hits, draws = 0, 500
    for i in range(draws):
        rng = np.random.default_rng(i)
        user = rng.normal(0, 0.2, (200, 1))
        a, b = (arm_of_seeds(rng, mean + user, seed_sd, seeds) for mean in (0.05, 0.03))
        hits += covered(difference_over_seeds(a, b), 0.02)
    assert least <= hits / draws <= 0.997


def test_difference_over_seeds_by_hand():
    # User means 2 and 8, variance 18 over 2 users: 9. Seed means 3 and 7, variance 8 over 2 seeds: 4.
    # Degrees of freedom: 13^2 / (9^2 + 4^2).
    result = difference_over_seeds(np.array([[1.0, 3.0], [5.0, 11.0]]), np.zeros((2, 2)))
    freedom = 169 / 97
    half = stats.t.ppf(0.975, freedom) * np.sqrt(13)
    p = 2 * stats.t.sf(5 / np.sqrt(13), freedom)
    np.testing.assert_allclose(result, [5, 5 - half, 5 + half, p, 3, 2])


def test_equal_arms_differ_by_nothing_over_seeds_as_over_users():
    a = np.random.default_rng(0).random((20, 3))
    assert difference_over_seeds(a, a) == (0, 0, 0, 1, 0, 0)
    assert difference_over_seeds(a, a)[:3] == paired_difference(a[:, 0], a[:, 0], seed=0)
    assert difference_over_seeds(a, a).p == randomization_test(a[:, 0], a[:, 0], seed=0).p
    with pytest.raises(ValueError, match="no variance"):
        difference_over_seeds(np.ones((5, 2)), np.zeros((5, 2)))


def test_difference_over_seeds_does_not_see_what_both_arms_share():
    """Users and seeds that move both arms alike leave the interval as it is."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(0.1, 0.1, (50, 3)), rng.normal(0.0, 0.1, (50, 3))
    shared = rng.normal(0, 1, (50, 1)) + rng.normal(0, 1, (1, 3))
    np.testing.assert_allclose(difference_over_seeds(a + shared, b + shared), difference_over_seeds(a, b), atol=1e-12)


def test_difference_of_arms_asks_for_what_the_seeds_allow():
    a, b = np.random.default_rng(0).random((2, 30, 3))
    assert difference_of_arms(a, b, seed=0) == difference_over_seeds(a, b)
    assert difference_of_arms(a[:, :1], b[:, :1], seed=0) == paired_difference(a[:, 0], b[:, 0], seed=0)


def test_difference_over_seeds_is_wider_than_users_alone_and_consistent_with_the_t_test():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.1, 0.1, (300, 4)), rng.normal(0.0, 0.1, (300, 4))
    still = difference_over_seeds(a - a.mean(axis=0) + 0.1, b - b.mean(axis=0))
    assert still.seed_error == pytest.approx(0, abs=1e-12)
    plain = stats.ttest_rel((a - a.mean(axis=0) + 0.1).mean(axis=1), (b - b.mean(axis=0)).mean(axis=1))
    np.testing.assert_allclose([still.low, still.high], plain.confidence_interval())
    assert still.p == pytest.approx(plain.pvalue)
    moved = difference_over_seeds(a + np.array([-0.1, 0, 0, 0.1]), b)
    assert moved.seed_error > 0.03 and moved.high - moved.low > still.high - still.low
    assert moved.estimate == pytest.approx(a.mean() - b.mean())


@pytest.mark.parametrize(("a", "b"), [((5, 1), (5, 1)), ((5, 2), (5, 3)), ((5, 2), (4, 2)), ((5,), (5,))])
def test_difference_over_seeds_refuses_tables_it_cannot_judge(a, b):
    with pytest.raises(ValueError):
        difference_over_seeds(np.random.default_rng(0).random(a), np.random.default_rng(1).random(b))


def test_ratio_of_arms_by_hand():
    """Of the table above to fives: differences -4, -2, 0, 6 have user means -3 and 3, seed means -2 and 2."""
    a, b = np.array([[1.0, 3.0], [5.0, 11.0]]), np.full((2, 2), 5.0)
    half = stats.t.ppf(0.975, 169 / 97) * np.sqrt(13) / 5
    np.testing.assert_allclose(ratio_of_arms(a, b, seed=0), [1, 1 - half, 1 + half])
    np.testing.assert_allclose(ratio_of_arms(3 * a, b, seed=0), [3, 3 - 3 * half, 3 + 3 * half])  # all in one unit
    narrow = stats.t.ppf(0.75, 169 / 97) * np.sqrt(13) / 5
    np.testing.assert_allclose(ratio_of_arms(a, b, seed=0, level=0.5), [1, 1 - narrow, 1 + narrow])


@pytest.mark.parametrize(("seed_sd", "seeds", "least"), [(0.02, 5, 0.92), (0.005, 3, 0.92)])
def test_ratio_of_arms_covers_the_truth(seed_sd, seeds, least):
    """Users differ far more than arms do, and have the same place in both."""
    hits, draws = 0, 400
    for i in range(draws):
        rng = np.random.default_rng(i)
        user = rng.gamma(1.0, 0.2, (200, 1))
        a, b = (arm_of_seeds(rng, scale * user, seed_sd, seeds) for scale in (0.9, 1.0))
        hits += covered(ratio_of_arms(a, b, seed=0), 0.9)
    assert least <= hits / draws <= 0.997


def test_ratio_of_arms_asks_for_what_the_seeds_allow():
    a, b = np.random.default_rng(0).random((2, 30, 3))
    assert ratio_of_arms(a[:, :1], b[:, :1], seed=3) == ratio_of_means(a[:, 0], b[:, 0], seed=3)
    assert ratio_of_arms(a[:, :1], b[:, :1], seed=3, level=0.5) == ratio_of_means(a[:, 0], b[:, 0], seed=3, level=0.5)
    assert ratio_of_arms(a, b, seed=0) == ratio_of_arms(a, b, seed=1)
    assert ratio_of_arms(a, b, seed=0).estimate == pytest.approx(a.mean() / b.mean())
    assert ratio_of_arms(a, a, seed=0) == (1, 1, 1)
    for wrong in ((a, b[:, :2]), (a, -b), (a, b * np.nan), (a[:, 0], b[:, 0])):
        with pytest.raises(ValueError):
            ratio_of_arms(*wrong, seed=0)


def test_smallest_detectable_difference_is_found_with_the_stated_power():
    size = smallest_detectable_difference(0.3, 400)
    assert size == pytest.approx(2.8016 * 0.3 / 20, rel=1e-4)
    rng = np.random.default_rng(0)
    found = stats.ttest_1samp(rng.normal(size, 0.3, (4000, 400)), 0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.025)
    with pytest.raises(ValueError):
        smallest_detectable_difference(0.3, 1)


def test_spearman_agrees_with_scipy_and_covers_the_truth():
    r, hits, draws = 0.6, 0, 200
    for i in range(draws):
        rng = np.random.default_rng(i)
        x = rng.normal(size=30)
        y = r * x + np.sqrt(1 - r * r) * rng.normal(size=30)
        result = spearman(x, np.round(y, 1), **QUICK)
        expected = stats.spearmanr(x, np.round(y, 1))
        assert (result.estimate, result.p) == pytest.approx((expected.statistic, expected.pvalue))
        hits += covered(result, 6 / np.pi * np.arcsin(r / 2))
    assert 0.91 <= hits / draws <= 0.995


def test_spearman_bootstrap_matches_scipys():
    rng = np.random.default_rng(5)
    x = rng.normal(size=25)
    y = x + rng.normal(size=25)
    ours = spearman(x, y, seed=0, resamples=4000)
    scipys = stats.bootstrap(
        (x, y), lambda u, v: stats.spearmanr(u, v).statistic, paired=True, vectorized=False, method="percentile",
        n_resamples=1500, rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    np.testing.assert_allclose([ours.low, ours.high], scipys, atol=0.03)


@pytest.mark.parametrize("x", [[1, 2, 3, 4], [1, 1, 1, 1, 1], [1, 2, 3, 4, np.nan]])
def test_a_rank_correlation_refuses_too_little(x):
    with pytest.raises(ValueError):
        spearman(np.array(x, float), np.arange(len(x)), seed=0)


@pytest.mark.parametrize(
    ("a", "b"), [([1.0, 2], [1.0]), ([np.nan, 1], [1.0, 2]), ([[1.0, 2]], [[1.0, 2]]), ([1.0], [1.0])]
)
@pytest.mark.parametrize(
    "function",
    [lambda a, b: paired_difference(a, b, seed=0), lambda a, b: randomization_test(a, b, seed=0), effect_size],
)
def test_paired_questions_refuse_unpaired_values(function, a, b):
    with pytest.raises(ValueError):
        function(np.array(a), np.array(b))


def test_contrasts_hand_worked():
    """Four users: all 16 sign flips are counted by hand."""
    base = np.array([0.0, 0.5, 1.0, 0.25])
    systems = {
        "better": base + [0.1, 0.2, 0.3, 0.4],
        "base": base,
        "mixed": base + [0.3, -0.1, 0.0, 0.0],
        "same": base.copy(),
    }
    frame = contrasts(systems, "base", seed=0).set_index("system")
    assert list(frame.index) == ["better", "mixed", "same"]
    assert frame.difference.tolist() == pytest.approx([0.25, 0.05, 0.0])
    assert frame.effect["better"] == pytest.approx(0.25 / np.std([0.1, 0.2, 0.3, 0.4], ddof=1)) and np.isnan(
        frame.effect["same"]
    )
    assert frame.p.tolist() == pytest.approx([2 / 16, 1.0, 1.0]) and frame.p_holm.tolist() == pytest.approx(
        [3 * 2 / 16, 1.0, 1.0]
    )
    low, high = paired_difference(systems["mixed"], base, seed=0)[1:]
    assert (frame.low["mixed"], frame.high["mixed"]) == (low, high)
    assert contrasts({"base": base}, "base", seed=0).empty
    with pytest.raises(ValueError):
        contrasts({"base": base, "short": base[:3]}, "base", seed=0)
