"""User windows: one pass over a user's titles in which every title after the first is a target."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from lwa_helpers.data.interactions import Interactions
from lwa_helpers.data.prompts import Prompt
from lwa_helpers.errors import LwaError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
FULLNESS = 0.9


@dataclass(frozen=True)
class Window:
    """One row of a batch.

    input_ids: the header's tokens, then each title's, oldest first; a title's last token is its separator.
    item_labels, same length: at a title's last token the index of the next item, -100 elsewhere and on context.
    items: those of the window in order, shown or asked for.
    """

    user_id: str
    input_ids: list[int]
    item_labels: list[int]
    items: tuple[int, ...] = ()

    def histories(self) -> list[list[int]]:
        """The items of the window before each of its targets, for recommenders that read no text.

        Raises ValueError for a window that was made without its items.
        """
        targets = sum(label != IGNORE for label in self.item_labels)
        if targets > len(self.items):
            raise ValueError(f"a window with {targets} targets names {len(self.items)} items: make it with Encoded.window")
        return [list(self.items[:place]) for place in range(len(self.items) - targets, len(self.items))]


def encode(tokenizer: PreTrainedTokenizerBase, header: str, lines: Sequence[str]) -> tuple[list[int], list[list[int]]]:
    """Token ids of the header, after the beginning-of-text token where the tokenizer puts one, and of each line alone.

    Special tokens are neither added to a line nor recognised inside it.
    """
    first, *rows = tokenizer([header, *lines], add_special_tokens=False, split_special_tokens=True)["input_ids"]
    begin = [tokenizer.bos_token_id]
    return (begin if tokenizer("")["input_ids"][:1] == begin else []) + first, rows


def check_items(histories: Iterable[Iterable[int]], n_items: int) -> None:
    """Raise ValueError for an item index that is not one of the catalogue's n_items."""
    for history in histories:
        if wrong := [item for item in history if not 0 <= item < n_items]:
            raise ValueError(f"item {wrong[0]} is outside the catalogue: indices are 0 to {n_items - 1}")


@dataclass(frozen=True)
class Encoded:
    """Token ids of the header and of every title of a catalogue, each tokenised once and alone."""

    header: list[int]
    titles: list[list[int]]
    index: dict[str, int]

    @classmethod
    def of(
        cls, interactions: Interactions, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, max_tokens: int | None
    ) -> Encoded:
        """Tokenise by `encode`.

        Raises LwaError when max_tokens does not hold the header and the two longest titles, which keeps every window
        whole: no title is ever cut.
        """
        header, titles = encode(tokenizer, prompt.header, [title + prompt.separator for title in interactions.titles])
        needed = len(header) + sum(sorted(map(len, titles), reverse=True)[:2])
        if max_tokens is not None and max_tokens < needed:
            raise LwaError(
                f"{interactions.name}: {max_tokens} tokens cannot hold the header and the two longest titles; "
                f"set max_tokens and tokens_per_batch to at least {needed}"
            )
        return cls(header, titles, {item: i for i, item in enumerate(interactions.item_ids)})

    def window(self, user: str, items: Sequence[int], first_target: int, last_text: bool = True) -> Window:
        """The window over item indices `items`, of which items[first_target:] are targets."""
        ids, labels = list(self.header), [IGNORE] * len(self.header)
        shown = items if last_text else items[:-1]
        for place, item in enumerate(shown, start=1):
            tokens = self.titles[item]
            ids += tokens
            target = items[place] if first_target <= place < len(items) else IGNORE
            labels += [IGNORE] * (len(tokens) - 1) + [target]
        if first_target == 0:
            labels[len(self.header) - 1] = items[0]
        return Window(user, ids, labels, tuple(items))

    def start(self, items: Sequence[int], end: int, max_titles: int, max_tokens: int | None) -> int:
        """First place s such that items[s:end] keeps to both budgets, whole titles only."""
        start, used = end, len(self.header)
        while start > max(0, end - max_titles):
            used += len(self.titles[items[start - 1]])
            if max_tokens is not None and used > max_tokens:
                break
            start -= 1
        return start


def user_windows(
    interactions: Interactions,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    max_titles: int = 32,
    context_titles: int = 8,
    max_windows_per_user: int | None = None,
    part: str = "train",
    max_tokens: int | None = None,
    last_text: bool = True,
    pairs: bool = False,
) -> list[Window]:
    """Cut each user's titles into windows in which every title after the user's first is a target exactly once.

    A window holds at most max_titles titles and max_tokens tokens. Windows are cut from the newest title backwards (so
    the newest is full); each but the oldest starts with context_titles titles that are targets in the window before
    it (fewer where the token budget leaves no room for a target). max_windows_per_user keeps the newest ones.
    part "valid" or "test": only the titles of that part are targets, the parts before it serve as context.
    last_text=False leaves out the text of a window's last title, which the item head does not read (the title head
    does): the same targets in fewer tokens. pairs=True: one window per target instead (max_titles - 1 titles of
    history, then the next title); the same targets at several times the tokens.
    """
    if not 1 <= context_titles < max_titles:
        raise LwaError(f"context_titles must be at least 1 and below max_titles, not {context_titles} of {max_titles}")
    encoded = Encoded.of(interactions, tokenizer, prompt, max_tokens)
    windows: list[Window] = []
    for user, items, first in _sequences(interactions, part, encoded.index):
        end, mine = len(items), []
        while end > max(first, 1) and len(mine) != max_windows_per_user:
            start = encoded.start(items, end, max_titles, max_tokens)
            context = end - start - 1 if pairs else 1 if start == 0 else min(context_titles, end - start - 1)
            target = max(start + context, first)
            mine.append(encoded.window(user, items[start:end], target - start, last_text))
            end = target
        windows += reversed(mine)
    return windows


def _sequences(
    interactions: Interactions, part: str, index: dict[str, int]
) -> Iterator[tuple[str, list[int], int]]:
    """Yield user, item indices up to the end of the part, and the place where the part begins."""
    histories = interactions.histories(part)
    for user, targets in interactions.targets(part).items():
        history = histories[user]
        yield user, [index[item] for item in (*history, *targets)], len(history)


def evaluation_windows(
    interactions: Interactions,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    part: str = "test",
    max_titles: int = 32,
    max_tokens: int | None = None,
    every_target: bool = False,
) -> list[Window]:
    """One window per user: the newest max_titles titles before the target, and the target's index at the last token.

    The target is the user's first item in the part; every_target gives each of the user's items in the part a window,
    its history then including the earlier ones. A user without history gets the header alone.
    """
    encoded = Encoded.of(interactions, tokenizer, prompt, max_tokens)
    windows = []
    for user, items, first in _sequences(interactions, part, encoded.index):
        for target in range(first, len(items) if every_target else first + 1):
            start = encoded.start(items, target, max_titles, max_tokens)
            windows.append(encoded.window(user, items[start : target + 1], target - start, last_text=False))
    return windows


def collate(windows: Sequence[Window], pad_id: int) -> dict[str, torch.Tensor]:
    """Pad on the right into a batch of (B, T) int64 tensors.

    input_ids, attention_mask, item_labels as in Window; labels: equal to input_ids on the tokens of target titles, -100
    elsewhere (the HF convention, shifted inside the model). The targets of a window are its last titles, so these are
    the tokens after its first item label.
    """
    shape = len(windows), max(len(w.input_ids) for w in windows)
    batch = {
        "input_ids": torch.full(shape, pad_id),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, IGNORE),
        "item_labels": torch.full(shape, IGNORE),
    }
    for row, window in enumerate(windows):
        n = len(window.input_ids)
        first = next((i for i, label in enumerate(window.item_labels) if label != IGNORE), n)
        batch["input_ids"][row, :n] = torch.tensor(window.input_ids)
        batch["attention_mask"][row, :n] = 1
        batch["labels"][row, first + 1 : n] = torch.tensor(window.input_ids[first + 1 :], dtype=torch.long)
        batch["item_labels"][row, :n] = torch.tensor(window.item_labels)
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
