"""Repeats, k-core and splits: the steps of the Amazon Reviews 2023 benchmarks.

Rules after Hou et al. (2024), arXiv:2403.03952, and the benchmark scripts they publish: sort by time, keep the earliest
of repeated (user, item) pairs, iterative k-core, then one of two splits.
"""

from __future__ import annotations

import numpy as np
import polars as pl

from lwa_helpers.errors import LwaError

VALID_FROM = 1628643414042
TEST_FROM = 1658002729837
CLOCK = 10**8
MILLISECONDS = 10**11


def earliest(frame: pl.DataFrame) -> pl.DataFrame:
    """Keep the earliest row of each (user, item), ties in the frame's order; the result is ordered by time."""
    ordered = frame.sort("timestamp", maintain_order=True)
    return ordered.unique(["user", "item"], keep="first", maintain_order=True)


def core_rows(users: np.ndarray, items: np.ndarray, k: int) -> np.ndarray:
    """Positions of the k-core: the largest set of rows in which every user and every item has at least k of them.

    users, items: (n,) codes, integers from 0. Repeated removal of what has fewer; the order of removal does not matter.
    """
    rows = np.arange(len(users))
    while len(rows):
        keep = (np.bincount(users) >= k)[users] & (np.bincount(items) >= k)[items]
        if keep.all():
            break
        rows, users, items = rows[keep], users[keep], items[keep]
    return rows


def last_out() -> pl.Expr:
    """Name of the part of each row: a user's last row is test, the last but one valid, the others train.

    The frame's rows stand in order of (user, time); a user with a single row has it in test, as in the published sets.
    """
    later = pl.len().over("user") - 1 - pl.int_range(pl.len()).over("user")
    return pl.when(later == 0).then(pl.lit("test")).when(later == 1).then(pl.lit("valid")).otherwise(pl.lit("train"))


def by_time(valid_from: int = VALID_FROM, test_from: int = TEST_FROM) -> pl.Expr:
    """Name of the part of each row by two moments of time; a row at a moment itself falls in the later part."""
    time = pl.col("timestamp")
    return (
        pl.when(time >= test_from)
        .then(pl.lit("test"))
        .when(time >= valid_from)
        .then(pl.lit("valid"))
        .otherwise(pl.lit("train"))
    )


def with_part(frame: pl.DataFrame, split: str, name: str) -> pl.DataFrame:
    """Return the frame with the column `split`: computed, or for "file" checked.

    Timestamps are milliseconds, or seconds where all are below 1e11. Raises LwaError when split="timestamp" meets
    timestamps that are no clock, or split="file" a value other than train, valid, test.
    """
    if split == "last_out":
        return frame.with_columns(split=last_out())
    if split == "timestamp":
        newest = frame["timestamp"].max() or CLOCK
        if newest < CLOCK:
            raise LwaError(f"{name}: its timestamps are no clock (largest: {newest}); use split='last_out' or 'file'")
        unit = 1 if newest >= MILLISECONDS else 1000
        return frame.with_columns(split=by_time(-(-VALID_FROM // unit), -(-TEST_FROM // unit)))
    strange = frame.filter(~pl.col("split").is_in(["train", "valid", "test"]) | pl.col("split").is_null())
    if strange.height:
        line, value = strange.select("line", "split").row(0)
        raise LwaError(f"{name}: split={value!r} in line {line} (of {strange.height} such): use train, valid, test")
    return frame
