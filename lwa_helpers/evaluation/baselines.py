"""Recommenders without a language model, and how they are tuned. A language model must beat them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import pandas as pd
from scipy import sparse, stats

from lwa_helpers.errors import LwaError
from lwa_helpers.evaluation.cross_fit import CrossFitted
from lwa_helpers.evaluation.metrics import hit_rate_at_k, ndcg_at_k
from lwa_helpers.evaluation.protocol import Baseline, cases, item_index, ranks

if TYPE_CHECKING:
    from lwa_helpers.data.interactions import Interactions

BASELINES = ("popularity", "recent_popularity", "itemknn", "ease", "sasrec", "esasrec")  # with grids in tuned_baselines
EASE_LIMIT = 30_000


class Popularity:
    """The same scores for all users: how often an item occurs in the train part."""

    def fit(self, interactions: Interactions) -> Self:
        """Count the interactions of each item in the train part."""
        self.counts = np.bincount(_columns(interactions), minlength=len(interactions.item_ids)).astype(float)
        return self

    def scores(self, histories: Sequence[Sequence[int]]) -> np.ndarray:
        """Return the counts, repeated for each history, (B, N)."""
        return np.tile(self.counts, (len(histories), 1))


class RecentPopularity(Popularity):
    """Popularity in which older interactions weigh less.

    weight = 2^(-(share of train rows that are newer) / half_life), so the unit of time does not matter. If timestamps
    are only ordinals within a user, they measure the position in the user's history and not the date.

    Args:
        half_life: share of the train rows after which an interaction's weight halves.

    Raises:
        LwaError: if half_life is not positive.
    """

    def __init__(self, half_life: float = 0.05) -> None:
        if not half_life > 0:
            raise LwaError(f"half_life must be positive, a share of the train rows; got {half_life}")
        self.half_life = half_life

    def fit(self, interactions: Interactions) -> Self:
        """Sum the weights of each item's interactions in the train part."""
        age = 1 - stats.rankdata(interactions.train.timestamp) / len(interactions.train)
        weights = 0.5 ** (age / self.half_life)
        self.counts = np.bincount(_columns(interactions), weights, minlength=len(interactions.item_ids))
        return self


class ItemKNN:
    """Score of a candidate: its cosine similarity to the items of the history, summed.

    s_ij = |U_i and U_j| / (sqrt(|U_i| |U_j|) + shrinkage), where U_i are the users of item i, and s_ii = 0.
    Source: Sarwar et al., WWW 2001; Deshpande & Karypis, TOIS 2004.

    Args:
        neighbours: number of most similar items that each candidate keeps.
        shrinkage: added to the denominator.

    Raises:
        LwaError: if neighbours < 1 or shrinkage < 0.
    """

    def __init__(self, neighbours: int = 100, shrinkage: float = 10.0) -> None:
        if not (neighbours >= 1 and shrinkage >= 0):
            raise LwaError(f"ItemKNN needs neighbours >= 1 and shrinkage >= 0; got {neighbours}, {shrinkage}")
        self.neighbours, self.shrinkage = neighbours, shrinkage

    def fit(self, interactions: Interactions) -> Self:
        """Build the sparse (N, N) similarity matrix, in which a column is a candidate."""
        co_occurrence = _gram(interactions)
        root = np.sqrt(co_occurrence.diagonal())
        co_occurrence.setdiag(0)
        co_occurrence.eliminate_zeros()
        pairs = co_occurrence.tocoo()
        pairs.data = pairs.data / (root[pairs.row] * root[pairs.col] + self.shrinkage)
        self.similarity = _keep_largest(pairs.tocsc(), self.neighbours)
        return self

    def scores(self, histories: Sequence[Sequence[int]]) -> np.ndarray:
        """Return the summed similarity to each history, (B, N)."""
        return (_user_rows(histories, self.similarity.shape[0]) @ self.similarity).toarray()


class EASE:
    """Linear item-to-item model with a zero diagonal, in closed form.

    B minimises ||X - X B||^2 + l2 ||B||^2 with diag(B) = 0: with P = (X'X + l2 I)^-1, B_ij = -P_ij / P_jj off the
    diagonal. X (users, N) is the binary train matrix. Source: Steck, WWW 2019.

    Args:
        l2: strength of the regularisation.

    Raises:
        LwaError: if l2 is not positive and finite.
    """

    def __init__(self, l2: float = 250.0) -> None:
        if not 0 < l2 < np.inf:
            raise LwaError(f"EASE needs a finite l2 > 0; got {l2}")
        self.l2 = l2

    def fit(self, interactions: Interactions) -> Self:
        """Compute the weights by inverting a dense (N, N) matrix.

        Returns:
            The fitted model itself.

        Raises:
            LwaError: if there are more than EASE_LIMIT items.
        """
        n = len(interactions.item_ids)
        if n > EASE_LIMIT:
            raise LwaError(f"EASE inverts a dense {n} x {n} matrix; its limit is {EASE_LIMIT} items: leave it out here")
        gram = _gram(interactions).toarray()
        gram[np.diag_indices(n)] += self.l2
        inverse = np.linalg.inv(gram)
        self.weights = -inverse / np.diag(inverse)
        np.fill_diagonal(self.weights, 0.0)
        return self

    def scores(self, histories: Sequence[Sequence[int]]) -> np.ndarray:
        """Return x B for the binary row x of each history, (B, N)."""
        return _user_rows(histories, len(self.weights)) @ self.weights


class Tuned(NamedTuple):
    """The fitted baseline with the best valid NDCG@10, its settings, and all settings tried."""

    best: Baseline
    settings: dict[str, Any]
    tried: pd.DataFrame

    def cross_fitted(self, interactions: Interactions, seed: int) -> CrossFitted:
        """Return the baseline with these settings, cross-fitted on two halves of the users."""
        return CrossFitted.of(lambda part: type(self.best)(**self.settings).fit(part), interactions, seed)


def tune(
    baseline: type[Baseline],
    grid: dict[str, list],
    interactions: Interactions,
    budget: int,
    *,
    seed: int = 0,
    exclude_seen: bool = True,
) -> Tuned:
    """Fit `baseline(**setting)` for at most `budget` settings of the grid and keep the best on the valid part.

    Args:
        baseline: the class of the baseline.
        grid: the values to try of each parameter.
        interactions: the dataset.
        budget: maximum number of settings. If the grid has more combinations, a random choice of them is tried.
        seed: of the random choice.
        exclude_seen: whether the items of the history are left out of the ranking.

    Returns:
        The baseline with the highest valid NDCG@10; ties go to the one tried first. `tried` has one row per setting:
        its values, valid NDCG@10 and HR@10, and the seconds it took.

    Raises:
        LwaError: if the grid is empty or budget < 1.
    """
    settings = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    if not settings or budget < 1:
        raise LwaError(f"nothing to tune: {len(settings)} settings, budget {budget}; give each parameter a value")
    if len(settings) > budget:
        chosen = np.random.default_rng(seed).choice(len(settings), budget, replace=False)
        settings = [settings[i] for i in sorted(chosen)]
    eval_cases, rows = cases(interactions, "valid"), []
    best: tuple[float, Baseline, dict[str, Any]] | None = None
    for setting in settings:
        start = time.perf_counter()
        model = baseline(**setting).fit(interactions)
        rank = ranks(model, eval_cases, exclude_seen)
        result = {"NDCG@10": ndcg_at_k(rank, 10).mean(), "HR@10": hit_rate_at_k(rank, 10).mean()}
        rows.append({**setting, **result, "seconds": time.perf_counter() - start})
        if best is None or result["NDCG@10"] > best[0]:
            best = (result["NDCG@10"], model, setting)
    assert best is not None  # at least one setting was tried
    return Tuned(best[1], best[2], pd.DataFrame(rows))


def _columns(interactions: Interactions) -> np.ndarray:
    if interactions.train.empty:
        raise LwaError(f"{interactions.name}: the train part is empty, so there is nothing to learn; change the split")
    return interactions.train.parent_asin.map(item_index(interactions)).to_numpy(np.int64)


def _gram(interactions: Interactions) -> sparse.csr_array:
    """Return X'X (N, N) of the binary train matrix: the users that two items share, an item's users on the diagonal."""
    users, columns = pd.factorize(interactions.train.user_id)[0], _columns(interactions)
    shape = (users.max() + 1, len(interactions.item_ids))
    return (binary := _binary(users, columns, shape)).T.tocsr() @ binary


def _user_rows(histories: Sequence[Sequence[int]], n_items: int) -> sparse.csr_array:
    rows = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
    columns = np.fromiter(itertools.chain.from_iterable(histories), np.int64)
    return _binary(rows, columns, (len(histories), n_items))


def _binary(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> sparse.csr_array:
    matrix = sparse.coo_array((np.ones(len(rows)), (rows, columns)), shape=shape).tocsr()
    matrix.data[:] = 1.0
    return matrix


def _keep_largest(matrix: sparse.csc_array, k: int) -> sparse.csr_array:
    """Keep the k largest entries of each column."""
    for start, stop in itertools.pairwise(matrix.indptr):
        column = matrix.data[start:stop]
        if len(column) > k:
            column[np.argsort(-column, kind="stable")[k:]] = 0.0
    matrix.eliminate_zeros()
    return matrix.tocsr()
