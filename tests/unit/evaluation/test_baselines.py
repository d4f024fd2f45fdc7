"""Baselines against brute force, hand computation, and the published behaviour of the same data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import optimize
from tiny_interactions import decided_by_the_last_but_one, frame, interactions, random_interactions

from lwa_helpers.data.interactions import Interactions
from lwa_helpers.data.movielens import load_movielens
from lwa_helpers.errors import LwaError
from lwa_helpers.evaluation.baselines import EASE, ItemKNN, Popularity, RecentPopularity, tune
from lwa_helpers.evaluation.calibration import fitted_scale
from lwa_helpers.evaluation.metrics import hit_rate_at_k, ndcg_at_k
from lwa_helpers.evaluation.protocol import Cases, cases, ranks, recommended
from lwa_helpers.evaluation.sasrec import SASRec


def train_matrix(data):
    users = sorted(set(data.train.user_id))
    matrix = np.zeros((len(users), len(data.item_ids)))
    for user, item in zip(data.train.user_id, data.train.parent_asin):
        matrix[users.index(user), data.item_ids.index(item)] = 1
    return matrix


@pytest.fixture(scope="module")
def movielens():
    return load_movielens()


def test_cases_hold_everything_before_the_target():
    data = interactions({"b": [3, 1, 2, 0], "a": [0, 1, 2]}, 4)
    assert cases(data, "valid")[:2] == (["b", "a"], [[3, 1], [0]])
    asked = cases(data, "test")
    assert asked.histories == [[3, 1, 2], [0, 1]]
    assert asked.targets.tolist() == [0, 2]


def test_cases_of_a_part_with_several_targets_and_a_cold_user():
    data = interactions({"a": [0, 1]}, 4, held_out=0)
    test = frame([("a", "i2", 9), ("new", "i3", 9), ("a", "i3", 10)])
    data = Interactions("small", data.train, data.valid, test, data.items)
    first, every = cases(data, "test"), cases(data, "test", every_target=True)
    assert (first.user_ids, first.histories, first.targets.tolist()) == (["a", "new"], [[0, 1], []], [2, 3])
    assert every.user_ids == ["a", "a", "new"]
    assert every.histories == [[0, 1], [0, 1, 2], []]
    assert every.targets.tolist() == [2, 3, 3]
    with pytest.raises(LwaError, match="valid part is empty"):
        cases(data, "valid")


def test_ranks_leave_out_seen_items_and_do_not_depend_on_batches():
    data = random_interactions(3)
    model, asked = EASE(5.0).fit(data), cases(data)
    rank = ranks(model, asked)
    np.testing.assert_array_equal(rank, ranks(model, asked, batch_size=7))
    assert np.all(rank <= ranks(model, asked, exclude_seen=False))
    assert np.all(rank <= [len(data.item_ids) - len(set(history)) for history in asked.histories])


def test_recommended_items_are_the_best_unseen_ones():
    data = random_interactions(3)
    asked, model = cases(data), ItemKNN().fit(data)
    got = recommended(model, asked, 3, batch_size=7)
    for user, (history, scores) in enumerate(zip(asked.histories, model.scores(asked.histories))):
        unseen = [item for item in np.argsort(-scores, kind="stable") if item not in history]
        assert got[user].tolist() == unseen[:3]
        assert recommended(model, asked, 1, exclude_seen=False)[user, 0] == scores.argmax()
    hit = (got == asked.targets[:, None]).any(1)
    assert np.all(hit >= (ranks(model, asked) <= 3))


def test_popularity_counts_train_rows_only():
    data = interactions({"a": [0, 1, 2, 3], "b": [0, 2, 3], "c": [0, 1, 3, 2]}, 5)
    assert Popularity().fit(data).scores([[1], []]).tolist() == [[3, 2, 0, 0, 0]] * 2


def test_popularity_on_movielens_has_its_known_quality(movielens):
    asked = cases(movielens, "test")
    rank = ranks(Popularity().fit(movielens), asked)
    assert len(rank) == 943
    assert ndcg_at_k(rank, 10).mean() == pytest.approx(0.0432, abs=5e-5)
    assert hit_rate_at_k(rank, 10).mean() == pytest.approx(0.0838, abs=5e-5)


def test_recent_popularity_halves_with_age():
    data = interactions({"a": [0, 1, 2, 1]}, 4, held_out=0)
    # four rows; newer shares 3/4, 2/4, 1/4, 0, so weights at half_life 1/4 are 1/8, 1/4, 1/2, 1
    np.testing.assert_allclose(RecentPopularity(0.25).fit(data).scores([[]]), [[1 / 8, 1 / 4 + 1, 1 / 2, 0]])


def test_item_knn_by_hand():
    data = interactions({"a": [0, 1, 2], "b": [0, 1], "c": [0, 3], "d": [1]}, 5, held_out=0)

    # users of item 0: abc, 1: abd, 2: a, 3: c, 4: none
    def similarity(shared, n, m):
        return shared / (np.sqrt(n * m) + 2)

    scores = ItemKNN(neighbours=10, shrinkage=2).fit(data).scores([[0], [1, 3], []])
    s01, s02, s03, s12 = similarity(2, 3, 3), similarity(1, 3, 1), similarity(1, 3, 1), similarity(1, 3, 1)
    np.testing.assert_allclose(scores, [[0, s01, s02, s03, 0], [s01 + s03, 0, s12, 0, 0], [0] * 5])


@pytest.mark.parametrize("neighbours", [1, 2, 4, 50])
def test_item_knn_keeps_each_candidates_most_similar_items(neighbours):
    data, shrinkage = random_interactions(0), 3.7
    x = train_matrix(data)
    n = x.shape[1]
    similarity = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            if i != j:
                similarity[i, j] = x[:, i] @ x[:, j] / (np.linalg.norm(x[:, i]) * np.linalg.norm(x[:, j]) + shrinkage)
    for j in range(n):
        kept = sorted(range(n), key=lambda i: (-similarity[i, j], i))[:neighbours]
        similarity[[i for i in range(n) if i not in kept], j] = 0
    history = [2, 5, 0]
    scores = ItemKNN(neighbours, shrinkage).fit(data).scores([history])
    np.testing.assert_allclose(scores[0], similarity[history].sum(axis=0))


@pytest.mark.parametrize(("seed", "l2"), [(0, 1.0), (1, 0.3), (2, 50.0)])
def test_ease_solves_its_constrained_problem(seed, l2):
    data = random_interactions(seed)
    x = train_matrix(data)
    n = x.shape[1]
    weights = EASE(l2).fit(data).scores([[i] for i in range(n)])
    expected = np.zeros((n, n))
    for j in range(n):
        others = [i for i in range(n) if i != j]
        padded = np.vstack([x[:, others], np.sqrt(l2) * np.eye(n - 1)])
        expected[others, j] = optimize.lsq_linear(padded, np.r_[x[:, j], np.zeros(n - 1)], tol=1e-14).x
    np.testing.assert_allclose(weights, expected, atol=1e-8)
    stationary = x.T @ (x @ weights - x) + l2 * weights  # KKT: zero off the diagonal, where B is free
    np.testing.assert_allclose(stationary[~np.eye(n, dtype=bool)], 0, atol=1e-8)
    np.testing.assert_allclose(EASE(l2).fit(data).scores([[0, 4, 4]])[0], weights[0] + weights[4])


def test_item_baselines_beat_popularity_on_movielens(movielens):
    asked = cases(movielens, "test")
    popular, knn, ease = (
        ndcg_at_k(ranks(model.fit(movielens), asked), 10).mean() for model in (Popularity(), ItemKNN(), EASE())
    )
    assert ease > knn > popular * 1.2


def test_sasrec_scores_do_not_depend_on_later_items_or_batch_mates():
    model = SASRec(dim=16, max_length=6, max_epochs=1, dropout=0.0).fit(random_interactions(0))
    items, later = torch.tensor([[9, 1, 2, 3, 4]]), torch.tensor([[9, 1, 2, 7, 8]])
    for training in (False, True):
        change = (model.model.train(training)(items) - model.model(later)).abs().amax(dim=-1)[0]
        assert change[:3].max() < 1e-6
        assert change[3:].min() > 1e-3
    histories = [[1, 2], [], [3, 4, 5, 6, 7]]
    np.testing.assert_allclose(
        model.scores(histories), [model.scores([history])[0] for history in histories], atol=1e-5
    )


def test_sasrec_reads_the_newest_items_only():
    model = SASRec(dim=16, max_length=3, max_epochs=1).fit(random_interactions(0))
    np.testing.assert_array_equal(model.scores([[8, 1, 2, 3]]), model.scores([[1, 2, 3]]))
    assert np.abs(model.scores([[1, 2, 3]]) - model.scores([[2, 1, 3]])).max() > 1e-4


@pytest.mark.parametrize("max_length", [6, 50])
def test_sasrec_learns_a_rule_that_order_alone_reveals(max_length):
    """The next item is decided by the last but one: neither popularity nor the last item nor the set gives it away."""
    data = decided_by_the_last_but_one()
    model = SASRec(dropout=0.0, max_length=max_length, batch_size=8, max_epochs=8).fit(data)
    asked = cases(data, "test")
    right = ranks(model, asked, exclude_seen=False) == 1
    assert right.mean() > 0.95
    assert model.log[-1]["loss"] < model.log[0]["loss"]


def test_sasrec_stops_early_keeps_the_best_epoch_and_repeats_itself():
    data = random_interactions(0)
    state = torch.random.get_rng_state()
    models = [SASRec(dim=8, max_epochs=30, patience=2, seed=1).fit(data) for _ in range(2)]
    assert torch.equal(state, torch.random.get_rng_state())
    np.testing.assert_array_equal(models[0].scores([[1, 2]]), models[1].scores([[1, 2]]))
    curve = [row["valid NDCG@10"] for row in models[0].log]
    best = int(np.argmax(curve))
    assert len(curve) == min(30, best + 3)
    assert ndcg_at_k(ranks(models[0], cases(data, "valid")), 10).mean() == pytest.approx(curve[best])
    assert np.abs(SASRec(dim=8, max_epochs=1, seed=2).fit(data).scores([[1]]) - models[0].scores([[1]])).max() > 1e-3


def test_sasrec_cuts_train_on_every_item_once_an_epoch():
    model = SASRec(max_length=4, batch_size=3)
    sequences = [list(range(start, start + length)) for start, length in ((0, 13), (20, 4), (30, 1), (40, 9))]
    rng = np.random.default_rng(0)
    for _ in range(5):
        pieces = [piece for batch in model._batches(sequences, rng) for piece in batch]
        assert max(map(len, pieces)) <= 4
        assert sorted(item for piece in pieces for item in piece) == sorted(
            item for sequence in sequences for item in sequence
        )
        assert all(np.all(np.diff(piece) == 1) for piece in pieces)


def test_tune_keeps_the_best_on_valid_and_reports_every_setting():
    data = random_interactions(5, users=120)
    grid = {"neighbours": [1, 3, 8], "shrinkage": [0.0, 20.0]}
    best, settings, tried = tune(ItemKNN, grid, data, budget=6)
    assert len(tried) == 6 and set(tried.columns) == {"neighbours", "shrinkage", "NDCG@10", "HR@10", "seconds"}
    valid = cases(data, "valid")
    models = [ItemKNN(n, s).fit(data) for n, s in zip(tried.neighbours, tried.shrinkage)]
    again = [ndcg_at_k(ranks(model, valid), 10).mean() for model in models]
    np.testing.assert_allclose(tried["NDCG@10"], again)
    assert settings == {name: tried[name][int(np.argmax(again))] for name in grid}
    np.testing.assert_array_equal(best.scores([[0, 1]]), ItemKNN(**settings).fit(data).scores([[0, 1]]))


def test_tune_spends_no_more_than_its_budget_and_draws_by_seed():
    data = random_interactions(5)
    grid = {"l2": [float(n) for n in range(1, 30)]}
    draws = [tune(EASE, grid, data, budget=4, seed=seed).tried.l2.tolist() for seed in (0, 0, 1)]
    assert [len(set(draw)) for draw in draws] == [4, 4, 4]
    assert draws[0] == draws[1] != draws[2]
    for wrong in ({"grid": {"l2": []}, "budget": 3}, {"grid": grid, "budget": 0}):
        with pytest.raises(LwaError, match="nothing to tune"):
            tune(EASE, interactions=data, **wrong)


@pytest.mark.parametrize(
    "build",
    [
        lambda: EASE(0),
        lambda: ItemKNN(0),
        lambda: ItemKNN(5, -1),
        lambda: RecentPopularity(0),
        lambda: SASRec(dim=7, heads=2),
        lambda: SASRec(max_length=0),
        lambda: EASE(float("nan")),
        lambda: EASE(float("inf")),
        lambda: ItemKNN(5, float("nan")),
    ],
)
def test_impossible_settings_are_refused(build):
    with pytest.raises(LwaError):
        build()


@pytest.mark.parametrize("model", [Popularity(), RecentPopularity(), ItemKNN(), EASE(), SASRec()])
def test_nothing_to_learn_from_is_an_error(model):
    data = random_interactions(0)
    empty = Interactions("small", data.train.iloc[:0], data.valid, data.test, data.items)
    with pytest.raises(LwaError, match="train part is empty"):
        model.fit(empty)


def test_item_without_interactions_and_empty_history_are_scored():
    data = interactions({"a": [0, 1, 2, 0], "b": [1, 0, 2, 1]}, 4)
    asked = Cases(["x"], [[]], np.array([3]))
    for model in (Popularity(), ItemKNN(), EASE(), SASRec(dim=8, max_epochs=1)):
        scores = model.fit(data).scores([[3], []])
        assert scores.shape == (2, 4) and np.isfinite(scores).all()
        assert 1 <= ranks(model, asked)[0] <= 4


def test_the_fitted_scale_is_the_one_that_scores_were_made_with():
    """Targets drawn from softmax(3 x): the scale of x that is most likely is 3; of x / 3 it is 9."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(4000, 6))
    p = np.exp(3 * scores) / np.exp(3 * scores).sum(1, keepdims=True)
    targets = (rng.random((4000, 1)) > p.cumsum(1)).sum(1)
    assert fitted_scale(scores, targets) == pytest.approx(3, rel=0.05)
    assert fitted_scale(scores / 3, targets) == pytest.approx(3 * fitted_scale(scores, targets), rel=1e-3)
