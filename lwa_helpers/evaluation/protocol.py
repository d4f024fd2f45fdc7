"""Who is asked for what: the test cases that every system ranks, and the ranks that a system gives them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol, Self

import numpy as np

from lwa_helpers.errors import LwaError
from lwa_helpers.evaluation.metrics import rank_of_target, top_k

if TYPE_CHECKING:
    from lwa_helpers.data.interactions import Interactions


class Baseline(Protocol):
    """A recommender without a language model: learns from the train part, scores the whole catalogue."""

    def fit(self, interactions: Interactions) -> Self:
        """Learn from interactions.train; a method that stops early may look at interactions.valid."""

    def scores(self, histories: list[list[int]]) -> np.ndarray:
        """Score (B, N) of every item, in item_ids order, for B histories of item indices, oldest first."""


class Cases(NamedTuple):
    """B questions: given histories[b] (item indices, oldest first) of user_ids[b], where does targets[b] stand?"""

    user_ids: list[str]
    histories: list[list[int]]
    targets: np.ndarray


def cases(interactions: Interactions, part: str = "test", every_target: bool = False) -> Cases:
    """One case per user of a part: the user's first item in it, given all items of the parts before.

    every_target: one case for each of the user's items in the part, its history then including the earlier ones.
    Raises LwaError when the part is empty.
    """
    index = item_index(interactions)
    histories, targets = interactions.histories(part), interactions.targets(part)
    if not histories:
        raise LwaError(f"{interactions.name}: the {part} part is empty, so there is nothing to rank; change the split")
    found = []
    for user, before in histories.items():
        items = [index[item] for item in [*before, *targets[user]]]
        stop = len(items) if every_target else len(before) + 1
        found += [(user, items[:place], items[place]) for place in range(len(before), stop)]
    users, seen, wanted = map(list, zip(*found, strict=True))
    return Cases(users, seen, np.array(wanted))


def ranks(baseline: Baseline, eval_cases: Cases, exclude_seen: bool = True, batch_size: int = 256) -> np.ndarray:
    """Rank (B,) of each case's target in the whole catalogue, ties against the target.

    exclude_seen leaves the items of the history out of the comparison (the target never).
    """
    parts = []
    for start in range(0, len(eval_cases.targets), batch_size):
        part = slice(start, start + batch_size)
        seen = eval_cases.histories[part] if exclude_seen else None
        parts.append(
            rank_of_target(baseline.scores(eval_cases.histories[part]), eval_cases.targets[part], exclude=seen)
        )
    return np.concatenate(parts)


def recommended(
    baseline: Baseline, eval_cases: Cases, k: int, exclude_seen: bool = True, batch_size: int = 256
) -> np.ndarray:
    """Items (B, k) that a baseline puts first for each case, best first; the history's own left out as in `ranks`."""
    parts = []
    for start in range(0, len(eval_cases.targets), batch_size):
        histories = eval_cases.histories[start : start + batch_size]
        parts.append(top_k(baseline.scores(histories), k, histories if exclude_seen else None))
    return np.concatenate(parts)


def item_index(interactions: Interactions) -> dict[str, int]:
    """Position of each item id in `item_ids`, the column it has in every score matrix."""
    return {item: column for column, item in enumerate(interactions.item_ids)}
