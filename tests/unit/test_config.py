"""Settings: profiles resolve, and every mistake is named."""

import pytest

from lwa_helpers.config import PROFILES, load_config, merge
from lwa_helpers.errors import LwaError


@pytest.mark.parametrize("profile", PROFILES)
def test_profiles_resolve(profile):
    config = load_config(profile)
    assert config.profile == profile and config.distillation.n_layers == 8
    assert {"labels", "none", "uniform", "linear", "fisher"} <= set(config.ablation.strategies)


@pytest.mark.parametrize("profile", ["quick", "paper"])
def test_the_ablation_has_its_arms_and_seeds(profile):
    config = load_config(profile)
    assert len(config.ablation.seeds) >= 2
    assert {"none", "uniform", "linear", "exponential", "schedule", "fisher", "inverse_fisher", "shuffled_fisher"} <= set(
        config.ablation.strategies
    )


def test_overrides_reach_nested_fields_and_leave_the_profile_alone():
    changed = load_config("quick", {"data.name": "All_Beauty", "ablation.loss.beta": 2.5})
    assert changed.data.name == "All_Beauty" and changed.ablation.loss.beta == 2.5
    assert load_config("quick").data.name == "movielens"


@pytest.mark.parametrize(("overrides", "message"), [
    ({"teacher.learning_rat": 1e-4}, "teacher.learning_rat: no such setting"),
    ({"teacher.learning_rate": "1e-4"}, "teacher.learning_rate = '1e-4'"),
    ({"teacher.epochs": -1}, "teacher.epochs = -1"),
    ({"data.k_core": 2.5}, "data.k_core"),
    ({"nowhere.x": 1}, "no section 'nowhere'"),
    ({"ablation.strategies": ["uniform"]}, "ablation.strategies"),
    ({"distillation.steps": [15, 6]}, "end with n_layers = 8"),
    ({"distillation.steps": [15, 15, 8]}, "steps must fall"),
    ({"ablation.loss.match": "some"}, "ablation.loss.match"),
])
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
