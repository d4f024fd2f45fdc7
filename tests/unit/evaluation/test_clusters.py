"""Cases of one user count together: against the cluster bootstrap, done by hand."""

from __future__ import annotations

import numpy as np
import pytest

from lwa_helpers.evaluation.clusters import by_user
from lwa_helpers.evaluation.statistics import mean_interval

pytestmark = pytest.mark.unit


def test_one_case_per_user_is_left_as_it_is():
    values = np.array([[0.1, 0.2], [0.3, 0.7], [0.0, 1.0]])
    assert by_user(values, ["b", "a", "c"]) is values


@pytest.mark.parametrize("shape", [(200,), (200, 3)])
def test_the_mean_is_that_of_the_cases(shape):
    rng = np.random.default_rng(0)
    values, users = rng.random(shape), rng.integers(0, 40, shape[0])
    assert by_user(values, users).mean(0) == pytest.approx(values.mean(0))
    assert len(by_user(values, users)) == len(set(users))


def test_by_hand():
    # ann: 2 cases, sum 1; bob: 1 case, sum 1; m = 2/3, U/N = 2/3: 2/3 + (1 - 4/3) 2/3 and 2/3 + (1 - 2/3) 2/3
    assert by_user(np.array([1.0, 0.0, 1.0]), ["ann", "ann", "bob"]) == pytest.approx([4 / 9, 8 / 9])


def test_the_interval_is_that_of_a_bootstrap_of_whole_users():
    rng = np.random.default_rng(1)
    users = np.repeat(np.arange(80), rng.integers(1, 12, 80))
    taste = rng.normal(size=80)
    values = np.clip(0.5 + 0.3 * taste[users] + 0.05 * rng.normal(size=len(users)), 0, 1)
    found = mean_interval(by_user(values, users), seed=0)
    rows = [np.flatnonzero(users == user) for user in range(80)]
    drawn = [values[np.concatenate([rows[u] for u in rng.integers(0, 80, 80)])].mean() for _ in range(3000)]
    assert [found.low, found.high] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.008)
    alone = mean_interval(values, seed=0)
    assert found.high - found.low > 2 * (alone.high - alone.low)
