"""User windows: training examples in which every item of a user after the first is a target."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lwa_helpers.data.history_tokens import Reading
from lwa_helpers.data.interactions import Interactions
from lwa_helpers.errors import LwaError

IGNORE = -100
FULLNESS = 0.9


@dataclass(frozen=True)
class Window:
    """One row of a batch.

    Attributes:
        user_id: the user.
        input_ids: the tokens of the header, then those of the window's items, oldest first, as the reading has them.
        labels: one label per token of input_ids, not shifted, since the model shifts them. At the first token of a
            target item: the item's token. Elsewhere: -100. For a model without item tokens: the tokens of the target
            titles.
        items: the item indices of the window, oldest first.
    """

    user_id: str
    input_ids: list[int]
    labels: list[int]
    items: tuple[int, ...] = ()

    def histories(self) -> list[list[int]]:
        """Return the items of the window before each of its targets, for recommenders that read no tokens.

        Raises:
            ValueError: if the window was made without its items.
        """
        targets = sum(label != IGNORE for label in self.labels)
        if targets > len(self.items):
            raise ValueError(f"a window with {targets} targets names {len(self.items)} items: make it with window_of")
        return [list(self.items[:place]) for place in range(len(self.items) - targets, len(self.items))]


def window_of(reading: Reading, user: str, items: Sequence[int], first_target: int) -> Window:
    """Return the window over the item indices `items`, whose targets are items[first_target:].

    If items have tokens, the last item is cut to its first token, which carries its label and is not read.
    """
    first = reading.first
    shown = [*reading.pieces(items[:-1]), reading.piece(items[-1], 1)]
    if first is not None:
        shown[-1] = shown[-1][:1]
    ids, labels = list(reading.header), [IGNORE] * len(reading.header)
    for place, (item, tokens) in enumerate(zip(items, shown, strict=True)):
        ids += tokens
        target = tokens if first is None else [first + item] + [IGNORE] * (len(tokens) - 1)
        labels += target if place >= first_target else [IGNORE] * len(tokens)
    return Window(user, ids, labels, tuple(items))


def user_windows(
    interactions: Interactions,
    reading: Reading,
    max_items: int = 32,
    context_items: int = 8,
    max_windows_per_user: int | None = None,
    part: str = "train",
    max_tokens: int | None = None,
    pairs: bool = False,
) -> list[Window]:
    """Cut each user's items into windows in which every item after the user's first is a target exactly once.

    Windows are cut from the newest item backwards, so the newest window is full. Each window but the oldest starts with
    context_items items that are targets in the window before it, or with fewer if the token budget would leave no room
    for a target.

    Args:
        interactions: the dataset.
        reading: the catalogue as tokens.
        max_items: maximum number of items in a window.
        context_items: number of items that a window shares with the one before it.
        max_windows_per_user: keep only this many of a user's newest windows; None keeps all.
        part: the part whose items are targets. For "valid" and "test", the parts before it serve as context.
        max_tokens: maximum number of tokens in a window; None for no limit.
        pairs: whether to make one window per target instead (max_items - 1 items of history, then the next item). The
            targets are the same, at several times the tokens.

    Returns:
        The windows, user by user, each user's oldest first.

    Raises:
        LwaError: if context_items is below 1 or not below max_items.
    """
    if not 1 <= context_items < max_items:
        raise LwaError(f"context_items must be at least 1 and below max_items, not {context_items} of {max_items}")
    reading.check_budget(max_tokens)
    windows: list[Window] = []
    for user, items, first in _sequences(interactions, part):
        mine: list[Window] = []
        end = len(items)
        while end > max(first, 1) and len(mine) != max_windows_per_user:
            start = reading.start(items[:end], max_items, max_tokens)
            context = end - start - 1 if pairs else 1 if start == 0 else min(context_items, end - start - 1)
            target = max(start + context, first)
            mine.append(window_of(reading, user, items[start:end], target - start))
            end = target
        windows += reversed(mine)
    return windows


def _sequences(interactions: Interactions, part: str) -> Iterator[tuple[str, list[int], int]]:
    """Yield each user, the item indices up to the end of the part, and the position where the part begins."""
    index = {item: place for place, item in enumerate(interactions.item_ids)}
    histories = interactions.histories(part)
    for user, targets in interactions.targets(part).items():
        history = histories[user]
        yield user, [index[item] for item in (*history, *targets)], len(history)


def collate(windows: Sequence[Window], pad_id: int) -> dict[str, torch.Tensor]:
    """Pad windows on the right into a batch of (B, T) int64 tensors: input_ids, attention_mask, labels as in Window."""
    shape = len(windows), max(len(w.input_ids) for w in windows)
    batch = {
        "input_ids": torch.full(shape, pad_id),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, IGNORE),
    }
    for row, window in enumerate(windows):
        n = len(window.input_ids)
        batch["input_ids"][row, :n] = torch.tensor(window.input_ids)
        batch["attention_mask"][row, :n] = 1
        batch["labels"][row, :n] = torch.tensor(window.labels)
    return batch


class LengthBatches:
    """Batch sampler: at most tokens_per_batch tokens per batch, including padding, which is at most 10 % of them.

    Windows are grouped by length, so that the shortest of a group has at least 0.9 times the length of the longest.
    Each epoch shuffles the windows within the groups and the order of all batches; the order depends on seed and epoch
    alone. The number of batches never changes.

    Raises:
        LwaError: if a window is longer than tokens_per_batch.
    """

    def __init__(self, windows: Sequence[Window], tokens_per_batch: int, seed: int = 0) -> None:
        self.lengths = np.array([len(w.input_ids) for w in windows], dtype=np.int64)
        self.tokens_per_batch, self.seed, self.epoch = tokens_per_batch, seed, 0
        if len(windows) and (longest := self.lengths.max()) > tokens_per_batch:
            raise LwaError(f"a window has {longest} tokens, more than tokens_per_batch={tokens_per_batch}; raise it")
        self.groups = self._groups()

    def _groups(self) -> list[np.ndarray]:
        order = np.argsort(-self.lengths, kind="stable")
        ordered = self.lengths[order]
        groups, start = [], 0
        while start < len(order):
            stop = start + np.searchsorted(-ordered[start:], -FULLNESS * ordered[start], side="right")
            groups.append(order[start:stop])
            start = stop
        return groups

    def _rows(self, group: np.ndarray) -> int:
        return self.tokens_per_batch // int(self.lengths[group].max())

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next pass follows."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(-(-len(group) // self._rows(group)) for group in self.groups)

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        batches = []
        for group in self.groups:
            mixed, rows = rng.permutation(group), self._rows(group)
            batches += [mixed[i : i + rows].tolist() for i in range(0, len(mixed), rows)]
        yield from (batches[i] for i in rng.permutation(len(batches)))
