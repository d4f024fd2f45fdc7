"""Rows of items without interactions, against regressions that are really fitted again without each item."""

import numpy as np
import pytest
from cold_rows_oracle import brute_force, with_popularity

from lwa_helpers.ranking.cold_items import with_cold_rows


def case(seed, n, width, d, noise):
    """Rows that are a linear map of titles and popularity, with noise; every fourth item is unknown."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 50, n)
    counts[::4] = 0
    titles = rng.normal(1.0, 2.0, (n, width))
    popularity = np.log1p(counts)[:, None]
    rows = titles @ rng.normal(size=(width, d)) + popularity * rng.normal(size=d) + noise * rng.normal(size=(n, d)) + 5
    return rows, counts, titles


CASES = {  # seed, items, width of a title's vector, of a row, noise
    "exact": (0, 20, 3, 4, 0.01),
    "noisy": (1, 20, 3, 4, 3.0),
    "nothing but noise": (2, 24, 5, 2, 50.0),
    "wider than long": (3, 10, 30, 3, 0.5),
    "one column": (4, 13, 1, 1, 1.0),
    "few": (5, 5, 2, 3, 0.1),
}


@pytest.mark.parametrize("name", CASES)
def test_the_penalty_is_the_one_that_fits_without_each_item_choose_and_so_are_the_rows(name):
    rows, counts, titles = case(*CASES[name])
    want, _ = brute_force(rows, counts, with_popularity(titles, counts))
    got = with_cold_rows(rows, counts, titles)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(got[counts > 0], rows[counts > 0])
    assert got is not rows and not np.array_equal(got, rows)


def test_the_cases_need_different_penalties():
    """Else the test above could not tell a wrong choice."""
    cases = [case(*settings) for settings in CASES.values()]
    assert len({brute_force(r, counts, with_popularity(titles, counts))[1] for r, counts, titles in cases}) >= 3


def test_a_new_item_is_not_lent_the_popularity_of_others():
    """Rows are log(1 + count) alone: at count 0 that is nothing, far from the mean of the known items."""
    counts = np.array([0, 3, 9, 30, 100, 0, 250, 1, 60])
    rows = np.log1p(counts)[:, None] * np.array([1.0, -2.0])
    titles = np.random.default_rng(0).normal(size=(9, 2))
    got = with_cold_rows(rows, counts, titles)
    np.testing.assert_allclose(got[[0, 5]], 0, atol=0.1)


@pytest.mark.parametrize("same", [1, 3, 7])
def test_items_that_all_have_the_same_count_are_told_apart_by_their_titles_alone(same):
    """Popularity is then no feature: the rows are those of a fit on titles."""
    rows, counts, titles = case(0, 20, 3, 4, 0.01)
    counts = np.where(counts > 0, same, 0)
    got = with_cold_rows(rows, counts, titles)
    np.testing.assert_allclose(got, brute_force(rows, counts, titles)[0], rtol=1e-3, atol=1e-3)


def test_types_are_kept_and_nothing_is_done_where_nothing_is_missing_or_known():
    rows, counts, titles = case(0, 20, 3, 4, 0.01)
    half = rows.astype(np.float32)
    assert with_cold_rows(half, counts, titles.astype(np.float32)).dtype == np.float32
    assert with_cold_rows(rows, counts + 1, titles) is rows
    two = np.where(np.arange(20) < 2, 3, 0)
    assert with_cold_rows(rows, two, titles) is rows
