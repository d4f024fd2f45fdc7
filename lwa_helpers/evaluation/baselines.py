"""Recommenders without a language model, and their tuning: what a language model must beat."""

from __future__ import annotations

import itertools
import time
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

EASE_LIMIT = 30_000


class Popularity:
    """The same scores for everybody: how often an item occurs in the train part."""

    def fit(self, interactions: Interactions) -> Self:
        """Count."""
        self.counts = np.bincount(_columns(interactions), minlength=len(interactions.item_ids)).astype(float)
        return self

    def scores(self, histories: list[list[int]]) -> np.ndarray:
        """Counts, repeated for each history: (B, N)."""
        return np.tile(self.counts, (len(histories), 1))


class RecentPopularity(Popularity):
    """Popularity in which an interaction's weight halves with every `half_life` of the train rows that are newer.

    weight = 2^(-(share of train rows newer than it) / half_life), so the unit of time does not matter. Where timestamp
    is only an ordinal within the user, it measures position in the user's history and not the calendar.
    """

    def __init__(self, half_life: float = 0.05) -> None:
        if not half_life > 0:
            raise LwaError(f"half_life must be positive, a share of the train rows; got {half_life}")
        self.half_life = half_life

    def fit(self, interactions: Interactions) -> Self:
        """Count with weights."""
        age = 1 - stats.rankdata(interactions.train.timestamp) / len(interactions.train)
        weights = 0.5 ** (age / self.half_life)
        self.counts = np.bincount(_columns(interactions), weights, minlength=len(interactions.item_ids))
        return self


class ItemKNN:
    """Sum, over the items of the history, of their cosine similarity to the candidate.

    s_ij = |U_i and U_j| / (sqrt(|U_i| |U_j|) + shrinkage), U_i the users of item i, s_ii = 0; each candidate keeps its
    `neighbours` most similar items. Source: Sarwar et al., WWW 2001; Deshpande & Karypis, TOIS 2004.
    """

    def __init__(self, neighbours: int = 100, shrinkage: float = 10.0) -> None:
        if not (neighbours >= 1 and shrinkage >= 0):
            raise LwaError(f"ItemKNN needs neighbours >= 1 and shrinkage >= 0; got {neighbours}, {shrinkage}")
        self.neighbours, self.shrinkage = neighbours, shrinkage

    def fit(self, interactions: Interactions) -> Self:
        """Build the sparse (N, N) similarity, column = candidate."""
        with_co_teachers = _gram(interactions)
        root = np.sqrt(with_co_teachers.diagonal())
        with_co_teachers.setdiag(0)
        with_co_teachers.eliminate_zeros()
        pairs = with_co_teachers.tocoo()
        pairs.data = pairs.data / (root[pairs.row] * root[pairs.col] + self.shrinkage)
        self.similarity = _keep_largest(pairs.tocsc(), self.neighbours)
        return self

    def scores(self, histories: list[list[int]]) -> np.ndarray:
        """Summed similarity to the history: (B, N)."""
        return (_user_rows(histories, self.similarity.shape[0]) @ self.similarity).toarray()


class EASE:
    """Linear item-to-item model with a zero diagonal, in closed form.

    B minimises ||X - X B||^2 + l2 ||B||^2 with diag(B) = 0: with P = (X'X + l2 I)^-1, B_ij = -P_ij / P_jj off the
    diagonal. X (users, N) is the binary train matrix. Source: Steck, WWW 2019.
    """

    def __init__(self, l2: float = 250.0) -> None:
        if not 0 < l2 < np.inf:
            raise LwaError(f"EASE needs a finite l2 > 0; got {l2}")
        self.l2 = l2

    def fit(self, interactions: Interactions) -> Self:
        """Invert the dense (N, N) matrix; LwaError above EASE_LIMIT items."""
        n = len(interactions.item_ids)
        if n > EASE_LIMIT:
            raise LwaError(f"EASE inverts a dense {n} x {n} matrix; its limit is {EASE_LIMIT} items: leave it out here")
        gram = _gram(interactions).toarray()
        gram[np.diag_indices(n)] += self.l2
        inverse = np.linalg.inv(gram)
        self.weights = -inverse / np.diag(inverse)
        np.fill_diagonal(self.weights, 0.0)
        return self

    def scores(self, histories: list[list[int]]) -> np.ndarray:
        """X B for each history's binary row x: (B, N)."""
        return _user_rows(histories, len(self.weights)) @ self.weights


class Tuned(NamedTuple):
    """The fitted baseline with the best valid NDCG@10, its settings, and every setting tried."""

    best: Baseline
    settings: dict[str, Any]
    tried: pd.DataFrame

    def cross_fitted(self, interactions: Interactions, seed: int) -> CrossFitted:
        """Return it with these settings, fitted on each half of the users apart."""
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

    All combinations where the budget allows, else a random choice of them by seed. `tried` has one row per setting:
    its values, valid NDCG@10 and HR@10, and the seconds it took. Ties go to the one tried first. LwaError for an empty
    grid or budget < 1.
    """
    settings = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    if not settings or budget < 1:
        raise LwaError(f"nothing to tune: {len(settings)} settings, budget {budget}; give each parameter a value")
    if len(settings) > budget:
        chosen = np.random.default_rng(seed).choice(len(settings), budget, replace=False)
        settings = [settings[i] for i in sorted(chosen)]
    eval_cases, rows, best = cases(interactions, "valid"), [], None
    for setting in settings:
        start = time.perf_counter()
        model = baseline(**setting).fit(interactions)
        rank = ranks(model, eval_cases, exclude_seen)
        result = {"NDCG@10": ndcg_at_k(rank, 10).mean(), "HR@10": hit_rate_at_k(rank, 10).mean()}
        rows.append({**setting, **result, "seconds": time.perf_counter() - start})
        if best is None or result["NDCG@10"] > best[0]:
            best = (result["NDCG@10"], model, setting)
    return Tuned(best[1], best[2], pd.DataFrame(rows))


def _columns(interactions: Interactions) -> np.ndarray:
    if interactions.train.empty:
        raise LwaError(f"{interactions.name}: the train part is empty, so there is nothing to learn; change the split")
    return interactions.train.parent_asin.map(item_index(interactions)).to_numpy(np.int64)


def _gram(interactions: Interactions) -> sparse.csr_array:
    """X'X (N, N) of the binary train matrix: how many users two items share; the diagonal counts an item's users."""
    users, columns = pd.factorize(interactions.train.user_id)[0], _columns(interactions)
    shape = (users.max() + 1, len(interactions.item_ids))
    return (binary := _binary(users, columns, shape)).T.tocsr() @ binary


def _user_rows(histories: list[list[int]], n_items: int) -> sparse.csr_array:
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
