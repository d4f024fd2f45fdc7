"""The evaluation cases that every system ranks, and the ranks that a system gives their targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self

import numpy as np

from lwa_helpers.errors import LwaError
from lwa_helpers.evaluation.metrics import rank_of_target, top_k

if TYPE_CHECKING:
    from lwa_helpers.data.interactions import Interactions


class Baseline(Protocol):
    """A recommender without a language model: it learns from the train part and scores the whole catalogue."""

    def fit(self, interactions: Interactions) -> Self:
        """Learn from interactions.train; a method that stops early may look at interactions.valid."""

    def scores(self, histories: Sequence[Sequence[int]]) -> np.ndarray:
        """Return the scores (B, N) of all items, in item_ids order, for B histories of item indices, oldest first."""


class Cases(NamedTuple):
    """B evaluation cases: given histories[b], how high does a system rank targets[b] for user_ids[b]?

    Attributes:
        user_ids: the users.
        histories: item indices, oldest first.
        targets: (B,) indices of the target items.
    """

    user_ids: list[str]
    histories: list[list[int]]
    targets: np.ndarray


def cases(interactions: Interactions, part: str = "test", every_target: bool = False) -> Cases:
    """Make one case per user of a part: the user's first item in it, given all items of the parts before it.

    Args:
        interactions: the dataset.
        part: "train", "valid" or "test".
        every_target: whether to make a case for each of the user's items in the part, whose history then includes the
            earlier ones.

    Returns:
        The cases, user by user.

    Raises:
        LwaError: if the part is empty.
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
    """Rank each case's target in the whole catalogue; ties count against the target.

    Args:
        baseline: a fitted baseline.
        eval_cases: the B cases.
        exclude_seen: whether to leave the items of the history out of the comparison. The target is never left out.
        batch_size: number of cases that are scored at a time.

    Returns:
        The ranks, int64 (B,); 1 is the best.
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
    """Return the k items that a baseline ranks first for each case, (B, k), best first; the options as in `ranks`."""
    parts = []
    for start in range(0, len(eval_cases.targets), batch_size):
        histories = eval_cases.histories[start : start + batch_size]
        parts.append(top_k(baseline.scores(histories), k, histories if exclude_seen else None))
    return np.concatenate(parts)


def shuffled(histories: Sequence[Sequence[int]], seed: int, newest_kept: int = 0) -> list[list[int]]:
    """Return the histories in random order, to see whether a system goes by their order.

    Args:
        histories: item indices, oldest first.
        seed: of the order.
        newest_kept: how many of the newest items stay in their places.
    """
    rng = np.random.default_rng(seed)
    ends = [max(0, len(history) - newest_kept) for history in histories]
    return [[*rng.permutation(history[:end]).tolist(), *history[end:]] for history, end in zip(histories, ends)]


def item_index(interactions: Interactions) -> dict[str, int]:
    """Return the position of each item id in `item_ids`, which is its column in every score matrix."""
    return {item: column for column, item in enumerate(interactions.item_ids)}
