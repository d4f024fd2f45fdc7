"""Repeated pairs, k-core and splits: the steps of the Amazon Reviews 2023 benchmarks.

The rules follow Hou et al. (2024), arXiv:2403.03952, and the benchmark scripts that they publish: sort by time, keep
the earliest of repeated (user, item) pairs, apply an iterative k-core filter, then one of two splits.
"""

from __future__ import annotations

import numpy as np
import polars as pl

from lwa_helpers.errors import LwaError

# The cut-off times of the published split by time, in milliseconds: 2021-08-11 00:56:54 and 2022-07-16 20:18:49 UTC.
VALID_FROM = 1628643414042
TEST_FROM = 1658002729837
CLOCK = 10**8  # a smaller largest timestamp, in seconds a day of 1973, is a counter and no clock
MILLISECONDS = 10**11  # from here on a timestamp is in milliseconds: as seconds it would be the year 5138


def earliest(frame: pl.DataFrame) -> pl.DataFrame:
    """Keep the earliest row of each (user, item), ties in the frame's order. The result is ordered by time."""
    ordered = frame.sort("timestamp", maintain_order=True)
    return ordered.unique(["user", "item"], keep="first", maintain_order=True)


def core_rows(users: np.ndarray, items: np.ndarray, k: int) -> np.ndarray:
    """Find the k-core: the largest set of rows in which every user and every item has at least k rows.

    Repeatedly removes users and items with fewer rows. The order of removal does not matter.

    Args:
        users: (n,) user of each row, integers from 0.
        items: (n,) item of each row, integers from 0.
        k: the number of rows that every user and item must have.

    Returns:
        The positions of the rows in the k-core, in ascending order.
    """
    rows = np.arange(len(users))
    while len(rows):
        keep = (np.bincount(users) >= k)[users] & (np.bincount(items) >= k)[items]
        if keep.all():
            break
        rows, users, items = rows[keep], users[keep], items[keep]
    return rows


def last_out() -> pl.Expr:
    """Return the part of each row: a user's last row is test, the one before it valid, the others train.

    The frame must be ordered by (user, time). The only row of a user is test, as in the published datasets.
    """
    later = pl.len().over("user") - 1 - pl.int_range(pl.len()).over("user")
    return pl.when(later == 0).then(pl.lit("test")).when(later == 1).then(pl.lit("valid")).otherwise(pl.lit("train"))


def by_time(valid_from: int = VALID_FROM, test_from: int = TEST_FROM) -> pl.Expr:
    """Return the part of each row by two cut-off times; a row exactly at a cut-off belongs to the later part."""
    time = pl.col("timestamp")
    return (
        pl.when(time >= test_from)
        .then(pl.lit("test"))
        .when(time >= valid_from)
        .then(pl.lit("valid"))
        .otherwise(pl.lit("train"))
    )


def with_part(frame: pl.DataFrame, split: str, name: str) -> pl.DataFrame:
    """Add the column `split` to a frame, or check it if split is "file".

    Timestamps are milliseconds, or seconds if all are below 1e11.

    Args:
        frame: rows with the columns user, timestamp and line, ordered by (user, time).
        split: "last_out", "timestamp" or "file".
        name: the name of the file, for error messages.

    Returns:
        The frame with the column `split`, whose values are train, valid and test.

    Raises:
        LwaError: if split is "timestamp" and the timestamps are not clock times, or if split is "file" and its column
            holds a value other than train, valid and test.
    """
    if split == "last_out":
        return frame.with_columns(split=last_out())
    if split == "timestamp":
        newest = frame.select(pl.max("timestamp")).item() or CLOCK
        if newest < CLOCK:
            raise LwaError(f"{name}: its timestamps are no clock (largest: {newest}); use split='last_out' or 'file'")
        unit = 1 if newest >= MILLISECONDS else 1000
        return frame.with_columns(split=by_time(-(-VALID_FROM // unit), -(-TEST_FROM // unit)))
    strange = frame.filter(~pl.col("split").is_in(["train", "valid", "test"]) | pl.col("split").is_null())
    if strange.height:
        line, value = strange.select("line", "split").row(0)
        raise LwaError(f"{name}: split={value!r} in line {line} (of {strange.height} such): use train, valid, test")
    return frame
