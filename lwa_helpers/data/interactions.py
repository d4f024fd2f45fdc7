"""The common form of all datasets: train, valid and test parts in time order, and a catalogue."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd

from lwa_helpers.config import TITLE_LIMIT
from lwa_helpers.data.titles import clean_title, distinct_titles
from lwa_helpers.errors import LwaError

PARTS = ("train", "valid", "test")
COLUMNS = ("user_id", "parent_asin", "rating", "timestamp")


@dataclass(frozen=True)
class Interactions:
    """A dataset split into train, valid and test, with its items.

    The three parts have the columns user_id and parent_asin (str), rating (float, null where unknown) and timestamp
    (int64, as in the source). A user's rows are in time order.

    Attributes:
        name: the name of the dataset.
        train: the interactions to learn from.
        valid: the interactions to choose settings by.
        test: the interactions to report results on.
        items: the catalogue, with a row for every item that occurs. Columns parent_asin and title (null where there is
            none), and whatever else the source has.
        report: counts of what loading found and repaired.
        title_limit: maximum length of a title, in characters.
        warnings: what loading warned of, one message a file: its name, what was wrong, how often, and where first.

    Raises:
        LwaError: if a column is missing, or an item is listed twice or interacted with but not in `items`.

    Example:
        >>> rows = pd.DataFrame({"user_id": ["ann"], "parent_asin": ["B1"], "rating": [5.0], "timestamp": [1]})
        >>> items = pd.DataFrame({"parent_asin": ["B1"], "title": ["Toy <b>Story</b>"]})
        >>> Interactions("shop", rows, rows[:0], rows, items).titles
        ['Toy Story']
    """

    name: str
    train: pd.DataFrame
    valid: pd.DataFrame
    test: pd.DataFrame
    items: pd.DataFrame
    report: dict[str, int] = field(default_factory=dict)
    title_limit: int = TITLE_LIMIT
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for part in PARTS:
            _require(self.name, part, self.part(part), COLUMNS)
        _require(self.name, "items", self.items, ("parent_asin", "title"))
        if not self.items.parent_asin.is_unique:
            raise LwaError(f"{self.name}: items lists an item twice; keep one row per parent_asin")
        known = pd.Index(self.items.parent_asin)
        for part in PARTS:
            used = self.part(part).parent_asin.unique()
            strangers = used[known.get_indexer(used) < 0]
            if len(strangers):
                raise LwaError(f"{self.name}: {part} holds item {min(strangers)!r}, which items lacks; add its row")

    def part(self, name: str) -> pd.DataFrame:
        """Return the frame of one part.

        Raises:
            LwaError: if the name is not train, valid or test.
        """
        if name not in PARTS:
            raise LwaError(f"there is no part {name!r}: choose one of {', '.join(PARTS)}")
        return getattr(self, name)

    @cached_property
    def item_ids(self) -> list[str]:
        """Item ids in the order of `items`; an id's position is the item's index in every score matrix."""
        return self.items.parent_asin.tolist()

    @cached_property
    def titles(self) -> list[str]:
        """One line of text per item, in the order of `item_ids`; all are different.

        A title is what `mend_title` returns, or "Item <id>" if that is empty (counted as `untitled_items`). If an
        earlier item has the same title, " (2)", " (3)", … is added (counted as `repeated_titles`).
        """
        cleaned = (clean_title(title, self.title_limit) if isinstance(title, str) else "" for title in self.items.title)
        return distinct_titles([text or f"Item {item}" for text, item in zip(cleaned, self.item_ids)])

    @cached_property
    def counts(self) -> np.ndarray:
        """Number of times that each item occurs in the train part, (N,), in the order of `item_ids`."""
        return self.train.parent_asin.value_counts().reindex(self.item_ids, fill_value=0).to_numpy()

    def histories(self, part: str = "test") -> dict[str, list[str]]:
        """Return, for each user of a part, the items of the parts before it, oldest first (empty for a cold user)."""
        users = self.part(part).user_id.unique()
        before = self._by_user(PARTS[: PARTS.index(part)])
        return {user: before.get(user, []) for user in users}

    def targets(self, part: str = "test") -> dict[str, list[str]]:
        """Return, for each user of a part, the items in it, oldest first (one in a leave-one-out split)."""
        self.part(part)
        return self._by_user((part,))

    def with_history(self, part: str) -> pd.DataFrame:
        """Return the rows of a part with the user's history added.

        The new column `history` holds the user's earlier items, oldest first, separated by spaces. Earlier rows of the
        same part count too, as in the files "with history" of Amazon Reviews 2023.
        """
        frame, column = self.part(part), []
        before = self._by_user(PARTS[: PARTS.index(part)])
        for user, item in zip(frame.user_id, frame.parent_asin):
            column.append(" ".join(before.setdefault(user, [])))
            before[user].append(item)
        return frame.assign(history=column)

    def _by_user(self, parts: tuple[str, ...]) -> dict[str, list[str]]:
        sequences: dict[str, list[str]] = {}
        for part in parts:
            frame = self.part(part)
            for user, item in zip(frame.user_id, frame.parent_asin):
                sequences.setdefault(user, []).append(item)
        return sequences

    @cached_property
    def sha256(self) -> str:
        """Hash of the interactions, their order and split, and the catalogue's ids and titles."""
        digest = hashlib.sha256()
        for part in PARTS:
            frame = self.part(part)
            digest.update(f"{part} {len(frame)}\n".encode())
            for column in ("user_id", "parent_asin"):
                digest.update("\n".join(frame[column]).encode())
            digest.update(np.nan_to_num(frame.rating.to_numpy(np.float64), nan=-1.0).tobytes())
            digest.update(frame.timestamp.to_numpy(np.int64).tobytes())
        digest.update(repr(list(zip(self.item_ids, self.items.title.fillna("")))).encode())
        return digest.hexdigest()


def _require(name: str, frame_name: str, frame: pd.DataFrame, columns: tuple[str, ...]) -> None:
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        there = ", ".join(frame.columns)
        raise LwaError(f"{name}: {frame_name} lacks the column {', '.join(missing)}; it has {there}")
