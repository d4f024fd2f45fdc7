"""Ranks and metrics against hand-worked cases, ir-measures (trec_eval) and properties."""

from __future__ import annotations

import ir_measures
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from ir_measures import RR, Success, nDCG

from lwa_helpers.evaluation.metrics import (
    bias_frame,
    coverage_at_k,
    hit_rate_at_k,
    mrr_at_k,
    ndcg_at_k,
    popularity_at_k,
    rank_of_target,
    top_k,
)

score_matrices = hnp.arrays(
    np.float64,
    st.tuples(st.integers(1, 5), st.integers(1, 9)),
    elements=st.sampled_from([-np.inf, -2.0, -0.5, 0.0, 0.25, 1.0, 7.0, np.inf]),
)


def rank_by_counting(scores, target, left_out=()):
    """The definition, one item at a time."""
    rank = 1
    for item, score in enumerate(scores):
        rank += item != target and item not in left_out and score >= scores[target]
    return rank


def test_rank_counts_ties_against_the_target():
    scores = np.array([[0.1, 0.9, 0.5, 0.5], [3.0, 3.0, 3.0, 3.0], [1.0, 2.0, 3.0, 4.0]])
    rank = rank_of_target(scores, np.array([2, 0, 3]))
    assert rank.tolist() == [3, 4, 1]
    assert rank.dtype == np.int64


@settings(max_examples=80, deadline=None)
@given(score_matrices, st.data())
def test_rank_equals_the_definition_with_items_left_out(scores, data):
    b, n = scores.shape
    target = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=b, max_size=b)))
    seen = data.draw(st.lists(st.lists(st.integers(0, n - 1), max_size=n), min_size=b, max_size=b))
    mask = np.zeros((b, n), bool)
    for row, items in enumerate(seen):
        mask[row, items] = True
    expected = [rank_by_counting(*row) for row in zip(scores, target, seen)]
    assert rank_of_target(scores, target, exclude=seen).tolist() == expected
    assert rank_of_target(scores, target, exclude=mask).tolist() == expected
    assert rank_of_target(scores, target).tolist() == [rank_by_counting(*row) for row in zip(scores, target)]


@settings(max_examples=50, deadline=None)
@given(score_matrices, st.data())
def test_rank_does_not_depend_on_item_order_or_scale(scores, data):
    b, n = scores.shape
    target = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=b, max_size=b)))
    order = np.array(data.draw(st.permutations(range(n))))
    rank = rank_of_target(scores, target)
    assert np.all((rank >= 1) & (rank <= n))
    np.testing.assert_array_equal(rank_of_target(scores[:, order], np.argsort(order)[target]), rank)
    np.testing.assert_array_equal(rank_of_target(2 * scores + 1, target), rank)


def test_rank_keeps_a_target_that_was_seen_and_does_not_change_its_arguments():
    scores, mask = np.array([[3.0, 2.0, 1.0]]), np.array([[True, True, False]])
    assert rank_of_target(scores, np.array([1]), exclude=mask).tolist() == [1]
    assert mask.tolist() == [[True, True, False]]
    assert scores.tolist() == [[3.0, 2.0, 1.0]]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int32, np.uint8])
def test_rank_accepts_any_real_scores(dtype):
    assert rank_of_target(np.array([[1, 3, 2]], dtype), np.array([2])).tolist() == [2]


def test_no_rows_give_no_ranks():
    assert rank_of_target(np.zeros((0, 4)), np.zeros(0, int), exclude=[]).shape == (0,)
    assert ndcg_at_k(np.zeros(0, int), 5).shape == (0,)


@pytest.mark.parametrize(
    ("scores", "target", "exclude", "message"),
    [
        ([[1.0, np.nan]], [0], None, "NaN"),
        ([1.0, 2.0], [0], None, "scores"),
        ([["a", "b"]], [0], None, "scores"),
        ([[1.0, 2.0]], [0, 1], None, "target"),
        ([[1.0, 2.0]], [[0]], None, "target"),
        ([[1.0, 2.0]], [2], None, "target"),
        ([[1.0, 2.0]], [-1], None, "target"),
        ([[1.0, 2.0]], [0.0], None, "target"),
        ([[1.0, 2.0]], [0], [[0], [1]], "exclude"),
        ([[1.0, 2.0]], [0], [[2]], "exclude"),
        ([[1.0, 2.0]], [0], [[True, False]], "exclude"),
        ([[1.0, 2.0]], [0], np.array([True, False]), "exclude"),
    ],
)
def test_rank_refuses_bad_input(scores, target, exclude, message):
    with pytest.raises(ValueError, match=message):
        rank_of_target(np.array(scores), np.array(target), exclude=exclude)


def test_metrics_by_hand():
    rank = np.array([1, 2, 3, 7, 8])
    assert hit_rate_at_k(rank, 3).tolist() == [1, 1, 1, 0, 0]
    np.testing.assert_allclose(ndcg_at_k(rank, 7), [1, 0.6309297536, 0.5, 1 / 3, 0])
    np.testing.assert_allclose(mrr_at_k(rank, 7), [1, 1 / 2, 1 / 3, 1 / 7, 0])
    assert ndcg_at_k(np.array([1, np.inf]), 1000).tolist() == [1, 0]


@pytest.mark.parametrize("k", [1, 3, 5, 10, 20])
def test_metrics_agree_with_trec_eval(k):
    rng = np.random.default_rng(k)
    users, items = 40, 30
    scores = rng.permuted(np.tile(np.arange(items) / items, (users, 1)), axis=1)
    target = rng.integers(items, size=users)
    qrels = [ir_measures.Qrel(str(u), str(t), 1) for u, t in enumerate(target)]
    run = [ir_measures.ScoredDoc(str(u), str(i), scores[u, i]) for u in range(users) for i in range(items)]
    rank = rank_of_target(scores, target)
    for ours, theirs in ((ndcg_at_k, nDCG @ k), (hit_rate_at_k, Success @ k), (mrr_at_k, RR @ k)):
        expected = {int(m.query_id): m.value for m in ir_measures.iter_calc([theirs], qrels, run)}
        np.testing.assert_allclose(ours(rank, k), [expected[u] for u in range(users)])


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(np.int64, st.integers(1, 20), elements=st.integers(1, 60)), st.integers(1, 30))
def test_metrics_are_ordered_and_grow_with_k(rank, k):
    hit, ndcg, mrr = hit_rate_at_k(rank, k), ndcg_at_k(rank, k), mrr_at_k(rank, k)
    assert np.all((mrr >= 0) & (mrr <= ndcg) & (ndcg <= hit) & (hit <= 1))
    for metric in (hit_rate_at_k, ndcg_at_k, mrr_at_k):
        assert np.all(metric(rank, k) <= metric(rank, k + 1))
        assert np.all(metric(rank, k) >= metric(rank + 1, k))


@pytest.mark.parametrize("metric", [hit_rate_at_k, ndcg_at_k, mrr_at_k])
@pytest.mark.parametrize(
    ("rank", "k"),
    [([1], 0), ([1], -3), ([1], 2.0), ([1], None), ([0], 5), ([1, -1], 5), ([1.5], 5), ([np.nan], 5), ([[1]], 5)]
    + [(1, 5), (["1"], 5), ([True], 5)],
)
def test_metrics_refuse_bad_input(metric, rank, k):
    with pytest.raises(ValueError):
        metric(np.array(rank), k)


def test_top_k_by_hand():
    scores = np.array([[0.2, 0.9, 0.9, -np.inf], [4.0, 3.0, 2.0, 1.0]])
    assert top_k(scores, 3).tolist() == [[1, 2, 0], [0, 1, 2]]
    assert top_k(scores, 2, exclude=[[1, 2], [0]]).tolist() == [[0, 3], [1, 2]]
    with pytest.raises(ValueError, match="fewer than 3"):
        top_k(scores, 3, exclude=[[0, 1], []])


@settings(max_examples=50, deadline=None)
@given(score_matrices, st.data())
def test_top_k_holds_every_target_ranked_within_k(scores, data):
    k = data.draw(st.integers(1, scores.shape[1]))
    b, n = scores.shape
    target = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=b, max_size=b)))
    top = top_k(scores, k)
    assert all(len(set(row)) == k for row in top.tolist())
    falling = np.take_along_axis(scores, top, axis=1)
    assert np.all(falling[:, :-1] >= falling[:, 1:])
    assert np.all((top == target[:, None]).any(axis=1) >= (rank_of_target(scores, target) <= k))


def test_coverage_and_popularity_by_hand():
    top = np.array([[0, 1, 2], [0, 3, 4]])
    assert coverage_at_k(top, 10, 1) == 0.1
    assert coverage_at_k(top, 10, 3) == 0.5
    counts = np.array([100, 5, 5, 1])
    np.testing.assert_allclose(popularity_at_k(np.array([[0, 3], [1, 2]]), counts, 1), [0.875, 0.5])
    np.testing.assert_allclose(popularity_at_k(np.array([[0, 3], [1, 2]]), counts, 2), [0.5, 0.5])
    np.testing.assert_allclose(popularity_at_k(np.array([[0, 1, 2, 3]]), counts, 4), [0.5])


def test_bias_frame_holds_both_at_every_k():
    got = bias_frame(np.array([[0, 1, 2], [0, 3, 4]]), np.array([9, 0, 0, 0, 5, 0, 0, 0, 0, 0]), ks=(1, 3))
    # percentiles: item 0 0.95, item 4 0.85, all others 0.4
    assert got.k.tolist() == [1, 3] and got.coverage.tolist() == [0.1, 0.5]
    np.testing.assert_allclose(got.popularity, [0.95, (0.95 + 0.8 + 0.95 + 0.4 + 0.85) / 6])


@pytest.mark.parametrize("top", [[[0, 10]], [[-1, 0]], [[0]], [0, 1], [[0.0, 1.0]]])
def test_list_metrics_refuse_bad_lists(top):
    with pytest.raises(ValueError, match="top"):
        coverage_at_k(np.array(top), 10, 2)
    with pytest.raises(ValueError, match="top"):
        popularity_at_k(np.array(top), np.arange(10), 2)
