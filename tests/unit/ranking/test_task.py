"""The task on MovieLens: who is asked, with what, and that a model's ranks are those of its scores."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_lm import READINGS, item_lm, language_model, office_task

from lwa_helpers import load_movielens
from lwa_helpers.config import load_config
from lwa_helpers.data.interactions import Interactions
from lwa_helpers.distillation.teacher_tuning import item_model
from lwa_helpers.errors import LwaError
from lwa_helpers.evaluation.baselines import Popularity
from lwa_helpers.evaluation.protocol import ranks
from lwa_helpers.models.layers import decoder_layers
from lwa_helpers.ranking.task import RankingTask

CONFIG = load_config("smoke", {"evaluation.users": 12, "evaluation.bf16": False})


def movielens_model(reading="items"):
    data = load_movielens()
    cut = CONFIG.data.model_copy(update={"reading": reading, "text_items": 2})
    vectors = np.random.default_rng(0).normal(size=(len(data.titles), 6))
    return item_model(language_model(), data, vectors, cut, CONFIG.evaluation, 0)


def task_of(lm, cut=CONFIG.data, evaluation=CONFIG.evaluation):
    return RankingTask(load_movielens(), lm, cut, evaluation, CONFIG.seed)


@pytest.fixture(scope="module", params=READINGS)
def task(request):
    return task_of(movielens_model(request.param))


@pytest.fixture(scope="module")
def items_task():
    return task_of(movielens_model())


def test_the_chosen_users_are_asked_about_their_last_film_after_what_they_saw_before(task):
    truth = task.data.test.set_index("user_id").parent_asin
    before, longest = task.data.histories("test"), CONFIG.evaluation.history_items
    assert len(set(task.eval_cases.user_ids)) == 12
    for user, target, prompt in zip(task.eval_cases.user_ids, task.eval_cases.targets, task.prompts):
        assert task.data.item_ids[target] == truth[user]
        newest = [task.data.item_ids.index(item) for item in before[user]][-longest:]
        if task.lm.items.reading == "titles":
            shown = task.lm.tokenizer.decode(prompt).split("\n")[1:-1]
            assert shown == [task.data.titles[item] for item in newest]
        else:
            assert [token - task.lm.items.first for token in prompt if token >= task.lm.items.first] == newest


def test_every_test_item_of_a_user_is_a_case_where_the_settings_say_so(items_task):
    data, lm = items_task.data, items_task.lm
    user = data.test.user_id.iloc[3]
    first, second = data.test.parent_asin.iloc[3], data.test.parent_asin.iloc[0]
    more = data.test.iloc[[3]].assign(parent_asin=second, timestamp=lambda rows: rows.timestamp + 1)
    longer = replace(data, test=pd.concat([data.test, more], ignore_index=True))
    every = CONFIG.evaluation.model_copy(update={"users": None, "every_target": True})
    asked = RankingTask(longer, lm, CONFIG.data, every, 0).eval_cases
    rows = [row for row, name in enumerate(asked.user_ids) if name == user]
    assert len(asked.targets) == len(data.test) + 1
    assert [data.item_ids[asked.targets[row]] for row in rows] == [first, second]
    assert asked.histories[rows[1]] == [*asked.histories[rows[0]], asked.targets[rows[0]]]
    once = every.model_copy(update={"every_target": False})
    assert len(RankingTask(longer, lm, CONFIG.data, once, 0).eval_cases.targets) == len(data.test)


def test_settings_are_chosen_on_the_validation_part(items_task):
    valid = CONFIG.evaluation.model_copy(update={"users": None, "part": "valid"})
    task = RankingTask(items_task.data, items_task.lm, CONFIG.data, valid, 0)
    targets = {items_task.data.item_ids[target] for target in task.eval_cases.targets}
    assert targets == set(items_task.data.valid.parent_asin)
    of_test = RankingTask(items_task.data, items_task.lm, CONFIG.data, valid, 0, "test")
    assert len(of_test.eval_cases.targets) == len(items_task.data.test)


def test_scores_are_transformers_own_logits_of_the_items_after_each_prompt(task):
    got = task.scores(task.lm.model)
    for row in (0, 5, 11):
        with torch.no_grad():
            want = task.lm.model(torch.tensor([task.prompts[row]])).logits[0, -1, task.lm.items.first :]
        np.testing.assert_allclose(got[row], want.numpy(), atol=1e-4)


def test_a_rank_counts_the_unseen_items_that_score_no_less(task):
    scores = np.round(task.scores(task.lm.model), 2)  # so that there are ties
    for row, rank in enumerate(task.ranks(task.lm.model, scores)):
        target = task.eval_cases.targets[row]
        unseen = [item for item in range(len(scores[row])) if item not in task.eval_cases.histories[row]]
        assert rank == sum(scores[row, item] >= scores[row, target] for item in unseen)
    np.testing.assert_array_equal(task.ranks(task.lm.model), task.ranks(None, task.scores(task.lm.model)))


def test_a_head_that_says_popularity_ranks_as_popularity_does(items_task):
    """Whatever the layers say: one dimension of the states is made constant, and the head reads it alone."""
    lm = movielens_model()
    with torch.no_grad():
        for layer in decoder_layers(lm.model):
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.down_proj.weight[0] = 0
        lm.model.model.embed_tokens.weight[:, 0] = 1000.0  # after the norm it is sqrt(d)
        head = lm.model.lm_head.weight
        head.zero_()
        head[lm.items.tokens, 0] = torch.from_numpy(items_task.log_popularity).float()
    want = ranks(Popularity().fit(items_task.data), items_task.eval_cases)
    np.testing.assert_array_equal(items_task.ranks(lm.model), want)


def test_popularity_answers_where_there_is_nothing_to_read(tmp_path):
    """A user without history, among others, where items are read; a header is something to read."""
    base = office_task(tmp_path / "office")
    new = pd.DataFrame({"user_id": ["new"], "parent_asin": ["i6"], "rating": [np.nan], "timestamp": [99]})
    train = base.data.train[base.data.train.parent_asin != "i2"]
    data = Interactions("office", train, base.data.valid, pd.concat([base.data.test, new]), base.data.items)
    counts = [(train.parent_asin == f"i{item}").sum() for item in range(8)]
    for reading in ("items", "titles"):
        cut = base.cut.model_copy(update={"reading": reading})
        lm = item_model(language_model(), data, np.eye(8), cut, base.evaluation, 0)
        task = RankingTask(data, lm, base.cut, base.evaluation, 0)
        row = task.eval_cases.user_ids.index("new")
        scores = task.scores(lm.model)
        want = np.log((1 + np.array(counts)) / (8 + sum(counts)))
        assert np.allclose(scores[row], want) == (reading == "items") and counts[2] == 0
        assert not np.allclose(scores[row - 1], want) and np.isfinite(scores).all()


def test_a_model_of_other_items_is_refused():
    with pytest.raises(LwaError, match="made for other items than movielens holds: tune it on these"):
        task_of(item_lm())


def test_one_setting_makes_pairs_of_the_same_targets(items_task):
    section = CONFIG.ablation.model_copy(update={"windows_per_user": None, "tokens_per_batch": 4096})
    found = {}
    for examples in ("windows", "pairs"):
        cut = load_config("smoke", {"data.examples": examples}).data
        windows = task_of(items_task.lm, cut).train_windows(section)
        targets = sorted(label for window in windows for label in window.labels if label >= 0)
        found[examples] = targets, len(windows), sum(len(window.input_ids) for window in windows)
    (targets, n_windows, _), (same, n_pairs, _) = found["windows"], found["pairs"]
    assert targets == same and n_windows < n_pairs == len(targets)
    assert CONFIG.data.examples == "windows" and found["pairs"][2] > 2 * found["windows"][2]


def test_the_token_budget_of_the_settings_holds_for_training_and_for_asking():
    lm = movielens_model("titles")

    def longest(max_tokens):
        cut = CONFIG.data.model_copy(update={"max_items": 32, "max_tokens": max_tokens})
        some = task_of(lm, cut, CONFIG.evaluation.model_copy(update={"history_items": 32}))
        section = CONFIG.ablation.model_copy(update={"tokens_per_batch": 4096})
        windows = [window.input_ids for window in some.train_windows(section)]
        return [max(map(len, rows)) for rows in (windows, some.prompts)]

    budget = min(longest(None)) - 1
    assert max(longest(budget)) <= budget


def test_a_window_that_no_batch_would_hold_is_cut_into_two_with_the_same_targets():
    task = task_of(movielens_model("titles"), CONFIG.data.model_copy(update={"max_items": 31, "context_items": 6}))
    every = CONFIG.ablation.model_copy(update={"windows_per_user": None})
    sections = [every.model_copy(update={"tokens_per_batch": n}) for n in (4096, 200)]
    targets = [
        sorted(label for window in task.train_windows(section) for label in window.labels if label >= 0)
        for section in sections
    ]
    assert targets[0] == targets[1] and max(len(w.input_ids) for w in task.train_windows(sections[0])) > 200
    assert max(batch["input_ids"].numel() for batch in task.train_loader(sections[1], seed=0)) <= 200


def test_the_chosen_users_follow_the_seed_and_null_asks_all():
    task = task_of(movielens_model())
    again, other = (RankingTask(task.data, task.lm, task.cut, task.evaluation, task.seed + n) for n in (0, 1))
    assert task.eval_cases.user_ids == again.eval_cases.user_ids != other.eval_cases.user_ids
    every = task_of(task.lm, evaluation=task.evaluation.model_copy(update={"users": None})).eval_cases
    assert len(every.targets) == 943
    place = {user: row for row, user in enumerate(every.user_ids)}
    for user, history, target in zip(*task.eval_cases):
        assert every.histories[place[user]] == history and every.targets[place[user]] == target
