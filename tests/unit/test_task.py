"""The task on MovieLens: who is asked, with what, and that a model's ranks are those of its scores."""

import numpy as np
import pytest
from tiny_lm import language_model

from lwa_helpers import load_movielens
from lwa_helpers.arms import arm_windows, student_ranker
from lwa_helpers.config import load_config
from lwa_helpers.evaluation import Popularity, ranks
from lwa_helpers.task import RankingTask


@pytest.fixture(scope="module")
def task():
    config = load_config("smoke", {"evaluation.users": 12})
    return RankingTask(load_movielens(), language_model(), config.data, config.evaluation, config.seed), config


def test_the_chosen_users_are_asked_about_their_last_film(task):
    task = task[0]
    truth = task.data.test.set_index("user_id").parent_asin
    assert len(set(task.asked.user_ids)) == 12
    for user, target, window in zip(task.asked.user_ids, task.asked.targets, task.asked_windows):
        assert task.data.item_ids[target] == truth[user] and window.user_id == user and window.item_labels[-1] == target


def test_a_head_without_layers_ranks_by_popularity(task):
    """With vectors of zero only the bias is left, the logarithm of popularity."""
    task = task[0]
    model = task.new_ranker(1)
    model.head.table.data.zero_()
    np.testing.assert_array_equal(task.ranks(model), ranks(Popularity().fit(task.data), task.asked))


def test_students_start_from_the_teachers_layers_and_head(task):
    task, config = task
    teacher = task.new_ranker(4)
    student = student_ranker(teacher, task.lm, config.ablation.model_copy(update={"n_layers": 2}))
    own, theirs = student.causal_lm.model.layers[1].state_dict(), teacher.causal_lm.model.layers[1].state_dict()
    assert all((own[name] == theirs[name]).all() for name in own)
    assert student.head is not teacher.head and (student.head.table == teacher.head.table).all()
    assert not student.causal_lm.get_input_embeddings().weight.requires_grad


def test_a_share_of_an_epoch_is_a_share_of_the_windows(task):
    task, config = task
    windows = task.train_windows(config.ablation)
    part = arm_windows(windows, config.ablation.model_copy(update={"epochs": 0.1}), seed=0)
    assert len(part) == round(0.1 * len(windows)) and len({id(w) for w in part}) == len(part)
    assert arm_windows(windows, config.ablation.model_copy(update={"epochs": 3.0}), seed=0) == windows


def test_one_setting_makes_pairs_of_the_same_targets(task):
    task, config = task
    section = config.ablation.model_copy(update={"windows_per_user": None})
    found = {}
    for examples in ("windows", "pairs"):
        cut = load_config("smoke", {"data.examples": examples}).data
        windows = RankingTask(task.data, task.lm, cut, config.evaluation, config.seed).train_windows(section)
        targets = sorted(label for window in windows for label in window.item_labels if label >= 0)
        found[examples] = targets, len(windows), sum(len(window.input_ids) for window in windows)
    assert found["windows"][0] == found["pairs"][0] and found["windows"][1] < found["pairs"][1] == len(found["pairs"][0])
    assert load_config("smoke").data.examples == "windows" and found["pairs"][2] > 2 * found["windows"][2]


def test_the_token_budget_of_the_settings_holds_for_training_and_for_asking(task):
    task, config = task

    def longest(max_tokens):
        cut = config.data.model_copy(update={"max_titles": 32, "max_tokens": max_tokens})
        some = RankingTask(task.data, task.lm, cut, config.evaluation.model_copy(update={"history_titles": 32}), 0)
        return [max(len(w.input_ids) for w in windows) for windows in (some.train_windows(config.ablation), some.asked_windows)]

    budget = min(longest(None)) - 1
    assert max(longest(budget)) <= budget


def test_a_window_that_no_batch_would_hold_is_cut_into_two_with_the_same_targets(task):
    task, config = task
    whole, cut = (config.ablation.model_copy(update={"windows_per_user": None, "tokens_per_batch": n}) for n in (4096, 200))
    targets = [
        sorted(label for window in task.train_windows(section) for label in window.item_labels if label >= 0)
        for section in (whole, cut)
    ]
    assert targets[0] == targets[1] and max(len(w.input_ids) for w in task.train_windows(whole)) > 200
    assert max(batch["input_ids"].numel() for batch in task.train_loader(cut, seed=0)) <= 200
