"""What data and teacher are too small for is said before anything is trained."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from lwa_helpers.config import load_config
from lwa_helpers.data.interactions import Interactions
from lwa_helpers.errors import LwaError
from lwa_helpers.evaluation.baselines import BASELINES
from lwa_helpers.evaluation.calibration import Calibration, ensemble
from lwa_helpers.evaluation.metrics import KS, top_k
from lwa_helpers.evaluation.sizes import Sizes, check_sizes, cuts, fitting_ks, refusals, sizes_of
from lwa_helpers.evaluation.statistics import Correlation, Interval, ratio_of_means, spearman
from lwa_helpers.evaluation.tuned_baselines import grids
from lwa_helpers.evaluation.unmeasured import measured

ENOUGH = Sizes(items=1682, unseen=900, layers=30, train_users=943, windows=943, valid_cases=943, test_cases=943)
SMALL = {"ablation.n_layers": 1, "distillation.n_layers": 1}


def shop(users: int = 6, items: int = 8, length: int = 5) -> Interactions:
    """Users who each buy `length` items in a row, from their own place in the catalogue; the last two are held out."""
    rows = [(f"u{u}", f"i{(u + step) % items}", 5.0, step) for u in range(users) for step in range(length)]
    frame = pd.DataFrame(rows, columns=["user_id", "parent_asin", "rating", "timestamp"])
    parts = (
        frame[frame.timestamp < length - 2],
        frame[frame.timestamp == length - 2],
        frame[frame.timestamp > length - 2],
    )
    catalogue = pd.DataFrame({"parent_asin": [f"i{n}" for n in range(items)], "title": "x"})
    return Interactions("shop", *(part.reset_index(drop=True) for part in parts), catalogue)


def test_what_there_is_is_counted() -> None:
    expected = Sizes(items=8, unseen=4, layers=2, train_users=6, windows=6, valid_cases=6, test_cases=6)
    assert sizes_of(shop(), layers=2, windows=6, every_target=False) == expected


@pytest.mark.parametrize("profile", ["smoke", "quick", "paper"])
def test_the_default_data_and_teacher_fit_every_profile(profile: str) -> None:
    assert refusals(ENOUGH, load_config(profile)) == cuts(ENOUGH, load_config(profile)) == []


def test_what_is_cut_is_said_with_the_number() -> None:
    told = check_sizes(shop(), 2, 6, load_config("smoke", SMALL | {"evaluation.users": None}))
    assert told == [
        "distillation.valid_users = 40 is cut to 6: there are no more validation cases",
        "distillation.timing_users = 8 is cut to 6: there are no more test cases",
        "fisher.n_examples = 8 is cut to 6: there are no more training windows",
        "lists of 20 recommendations are cut to 3: a user has only 4 to choose from",
        "comparison.n_candidates = 10: lists are shorter, or users are left out",
        "distillation.frontier: no student of 2 layers, for the teacher has 2",
        "teacher.first_layers = 2: no first step of tuning, for the teacher has 2 layers",
        "no correlation over layers (H2): the teacher has 2, and 5 are needed",
    ]


@pytest.mark.parametrize(
    ("changed", "overrides", "message"),
    [
        ({"layers": 6}, {}, "ablation.n_layers = 8: the teacher has 6 layers; --set ablation.n_layers=3"),
        ({"layers": 6}, {}, "distillation.n_layers = 8: the teacher has 6 layers"),
        ({"layers": 20}, {"distillation.steps": [24, 8]}, "distillation.steps = 24: the teacher has 20 layers"),
        ({"layers": 1}, SMALL, "the teacher has 1 layer, so no student can have fewer"),
        ({"test_cases": 4}, {}, "4 test cases: an interval needs 5"),
        ({}, {"evaluation.users": 3}, "3 test cases"),
        ({"windows": 0, "train_users": 0}, {}, "0 users have two or more items to train on"),
        ({"train_users": 1}, {}, "1 users have two or more"),
        ({"unseen": 0}, {}, "has seen the whole catalogue"),
        ({}, {"teacher.co_teachers": ["ease"], "teacher.first_layers": 0}, "must be 1 to 29"),
        ({}, {"ablation.seeds": [0, 1, 0]}, "ablation.seeds names 0 2 times"),
        ({}, {"ablation.levels": ["uniform", "fisher"]}, "ablation.levels lacks labels"),
        ({}, {"evaluation.baselines": ["eease"]}, "no baseline 'eease'; there are popularity"),
        ({}, {"distillation.co_teachers": ["bert"]}, "distillation.co_teachers: no baseline 'bert'"),
        ({"items": 30_001}, {}, "ease takes at most 30,000 items, and there are 30,001"),
    ],
)
def test_what_cannot_be_met_is_refused(changed: dict, overrides: dict, message: str) -> None:
    (line, *_) = [
        line for line in refusals(ENOUGH._replace(**changed), load_config("smoke", overrides)) if message in line
    ]
    assert line


def test_all_refusals_come_in_one_message() -> None:
    with pytest.raises(LwaError) as caught:
        check_sizes(shop(users=4), 2, 4, load_config("smoke"))
    message = str(caught.value)
    assert "shop and smollm2-135m do not fit the settings" in message and message.count("\n  ") == 3


def test_a_part_without_rows_is_refused() -> None:
    whole = shop()
    nobody = Interactions("shop", whole.train, whole.valid, whole.test[:0], whole.items)
    with pytest.raises(LwaError, match="the test part is empty"):
        check_sizes(nobody, 30, 6, load_config("smoke"))


def test_lists_are_as_long_as_the_user_who_has_seen_most_can_fill() -> None:
    assert fitting_ks(8, [[0, 1], [2]]) == [1, 3, 5]  # 6 and 7 are left
    assert fitting_ks(30, [[0] * 9, []]) == list(KS)  # a repeated item is one item
    assert fitting_ks(3, [[0, 1]]) == [1]
    scores, seen = np.random.default_rng(0).random((24, 8)), [[0, 1]] * 24
    assert top_k(scores, fitting_ks(8, seen)[-1], seen).shape == (24, 5)
    with pytest.raises(LwaError, match="k = 20, but some row has fewer than 20 items"):
        top_k(scores, 20, seen)


def test_what_is_too_little_for_a_statistic_is_nan() -> None:
    nan = np.nan
    few, none = np.array([1.0, 0, 0, 0, 0, 0]), np.array([0.0, 0, 0, 0, 0, 1])
    np.testing.assert_equal(measured(ratio_of_means, few, none, seed=0), Interval(nan, nan, nan))
    np.testing.assert_equal(measured(spearman, few[:3], none[3:], seed=0), Correlation(nan, nan, nan, nan))
    values = np.arange(1.0, 9)
    assert measured(ratio_of_means, values, 2 * values, seed=0) == Interval(0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="finite"):
        measured(spearman, np.array([nan] * 9), np.arange(9.0), seed=0)


def test_the_names_of_the_baselines_are_those_with_grids() -> None:
    assert tuple(grids(load_config("smoke").evaluation, 0)) == BASELINES


def test_recommenders_that_hit_nothing_on_the_valid_part_count_alike() -> None:
    scores = {"a": np.log([[0.5, 0.5]]), "b": np.log([[0.9, 0.1]])}
    for own, other, expected in ((0.0, 0.0, [0.7, 0.3]), (0.0, 0.2, [0.9, 0.1]), (0.3, 0.1, [0.6, 0.4])):
        found = ensemble(scores, {"a": Calibration(1.0, own), "b": Calibration(1.0, other)})
        np.testing.assert_allclose(found, [expected])
