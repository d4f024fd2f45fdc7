"""User windows: one pass over a user's items in which every item after the first is a target."""

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

    input_ids: header, then the items of the window, oldest first, as the reading has them.
    labels, same length, aligned with input_ids (the model shifts them): an item's token where the item begins, if it is a
    target, -100 elsewhere. Of a model of text alone: the tokens of the target titles.
    items: those of the window in order.
    """

    user_id: str
    input_ids: list[int]
    labels: list[int]
    items: tuple[int, ...] = ()

    def histories(self) -> list[list[int]]:
        """Return the items of the window before each of its targets, for recommenders that read no tokens.

        Raises ValueError for a window that was made without its items.
        """
        targets = sum(label != IGNORE for label in self.labels)
        if targets > len(self.items):
            raise ValueError(f"a window with {targets} targets names {len(self.items)} items: make it with window_of")
        return [list(self.items[:place]) for place in range(len(self.items) - targets, len(self.items))]


def window_of(reading: Reading, user: str, items: Sequence[int], first_target: int) -> Window:
    """Return the window over item indices `items`, of which items[first_target:] are targets.

    Where items have tokens the last item is cut to its first token, which holds its label and is not read.
    """
    by_text = reading.first is None
    shown = [*reading.pieces(items[:-1]), reading.piece(items[-1], 1)]
    if not by_text:
        shown[-1] = shown[-1][:1]
    ids, labels = list(reading.header), [IGNORE] * len(reading.header)
    for place, (item, tokens) in enumerate(zip(items, shown, strict=True)):
        ids += tokens
        target = tokens if by_text else [reading.first + item] + [IGNORE] * (len(tokens) - 1)
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

    A window holds at most max_items items and max_tokens tokens. Windows are cut from the newest item backwards (so the
    newest is full); each but the oldest starts with context_items items that are targets in the window before it (fewer
    where the token budget leaves no room for a target). max_windows_per_user keeps the newest ones.
    part "valid" or "test": only the items of that part are targets, the parts before it serve as context.
    pairs=True: one window per target instead (max_items - 1 items of history, then the next one); the same targets at
    several times the tokens.
    """
    if not 1 <= context_items < max_items:
        raise LwaError(f"context_items must be at least 1 and below max_items, not {context_items} of {max_items}")
    reading.check_budget(max_tokens)
    windows: list[Window] = []
    for user, items, first in _sequences(interactions, part):
        end, mine = len(items), []
        while end > max(first, 1) and len(mine) != max_windows_per_user:
            start = reading.start(items[:end], max_items, max_tokens)
            context = end - start - 1 if pairs else 1 if start == 0 else min(context_items, end - start - 1)
            target = max(start + context, first)
            mine.append(window_of(reading, user, items[start:end], target - start))
            end = target
        windows += reversed(mine)
    return windows


def _sequences(interactions: Interactions, part: str) -> Iterator[tuple[str, list[int], int]]:
    """Yield user, item indices up to the end of the part, and the place where the part begins."""
    index = {item: place for place, item in enumerate(interactions.item_ids)}
    histories = interactions.histories(part)
    for user, targets in interactions.targets(part).items():
        history = histories[user]
        yield user, [index[item] for item in (*history, *targets)], len(history)


def collate(windows: Sequence[Window], pad_id: int) -> dict[str, torch.Tensor]:
    """Pad on the right into a batch of (B, T) int64 tensors: input_ids, attention_mask, and labels as in Window."""
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
    """Batch sampler: batches of at most tokens_per_batch tokens, padding included, of which at most 10 % are padding.

    Windows are grouped by length so that the shortest of a group is at least 0.9 of the longest; each epoch shuffles
    within the groups and the order of all batches, by seed and epoch alone. The number of batches never changes.
    Raises LwaError when a window is longer than tokens_per_batch.
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
