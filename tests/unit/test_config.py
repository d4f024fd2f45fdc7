"""Settings: profiles resolve, and every mistake is named."""

import pytest

from lwa_helpers.config import PROFILES, load_config, merge
from lwa_helpers.errors import LwaError


@pytest.mark.parametrize("profile", PROFILES)
def test_profiles_resolve(profile):
    config = load_config(profile)
    assert config.profile == profile and config.distillation.n_layers == 8
    assert {"labels", "none", "uniform", "linear", "fisher"} <= set(config.ablation.strategies)


ARMS = {"none", "uniform", "linear", "fisher", "shuffled_fisher"}


@pytest.mark.parametrize(
    ("profile", "arms"),
    [
        ("quick", ARMS),
        ("paper", ARMS | {"exponential", "schedule", "inverse_fisher"}),
    ],
)
def test_the_ablation_has_its_arms_and_seeds(profile, arms):
    config = load_config(profile)
    assert len(config.ablation.seeds) >= 2 and arms <= set(config.ablation.strategies)


def test_depths_are_those_of_the_student_and_the_frontier_once_each_deepest_first():
    changed = load_config("smoke", {"distillation.frontier": [2, 15, 8, 15], "ablation.n_layers": 5})
    assert changed.distillation.depths == [15, 8, 2] and changed.ablation.depths == [5]


@pytest.mark.parametrize(
    ("overrides", "distillation", "ablation"),
    [
        ({}, False, True),
        ({"distillation.strategy": "fisher"}, True, True),
        ({"ablation.loss.beta": 0.0}, False, False),
        ({"distillation.strategy": "uniform", "distillation.loss.beta": 0.0}, False, True),
        ({"distillation.strategy": "labels", "ablation.levels": ["none", "labels"]}, False, False),
    ],
)
def test_states_are_matched_where_an_arm_weighs_them(overrides, distillation, ablation):
    config = load_config("smoke", overrides)
    assert (config.distillation.matches_states, config.ablation.matches_states) == (distillation, ablation)


def test_overrides_reach_nested_fields_and_leave_the_profile_alone():
    changed = load_config("quick", {"data.name": "All_Beauty", "ablation.loss.beta": 2.5})
    assert changed.data.name == "All_Beauty" and changed.ablation.loss.beta == 2.5
    assert load_config("quick").data.name == "movielens"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"teacher.learning_rat": 1e-4}, "teacher.learning_rat: no such setting"),
        ({"teacher.learning_rate": "1e-4"}, "teacher.learning_rate = '1e-4'"),
        ({"teacher.epochs": -1}, "teacher.epochs = -1"),
        ({"data.k_core": 2.5}, "data.k_core"),
        ({"nowhere.x": 1}, "no section 'nowhere'"),
        ({"ablation.levels": ["uniform"]}, "ablation.levels"),
        ({"distillation.steps": [15, 6]}, "end with n_layers = 8"),
        ({"distillation.steps": [15, 15, 8]}, "steps must fall"),
        ({"ablation.loss.match": "some"}, "ablation.loss.match"),
        ({"data.reading": "words"}, "data.reading = 'words'"),
        ({"data.max_items": 1}, "data.max_items = 1"),
        ({"data.max_titles": 9}, "data.max_titles: no such setting"),
        ({"teacher.dropout": 1.0}, "teacher.dropout = 1.0"),
        ({"teacher.rank": 0}, "teacher.rank = 0"),
        ({"teacher.first_layers": -1}, "teacher.first_layers = -1"),
        ({"teacher.evaluate_every": 0.0}, "teacher.evaluate_every = 0.0"),
        ({"distillation.frontier": [0]}, "distillation.frontier.0 = 0"),
        ({"evaluation.sasrec_dims": []}, "evaluation.sasrec_dims"),
    ],
)
def test_mistakes_are_named(overrides, message):
    with pytest.raises(LwaError, match=message):
        load_config("smoke", overrides)


def test_unknown_profile_lists_the_known():
    with pytest.raises(LwaError, match="smoke, quick, paper"):
        load_config("fast")


def test_merge_changes_neither_argument():
    base, change = {"a": {"b": 1, "c": [1]}}, {"a": {"b": 2}}
    assert merge(base, change) == {"a": {"b": 2, "c": [1]}}
    assert base == {"a": {"b": 1, "c": [1]}} and change == {"a": {"b": 2}}
