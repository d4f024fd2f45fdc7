"""K-core of files larger than memory: type the rows, scatter them by user, then deduplicate and filter each piece."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import numpy as np
import polars as pl
import pyarrow as pa

from lwa_helpers.data.repairs import Repairs
from lwa_helpers.data.review_files import REVIEW_FIELDS, read_table
from lwa_helpers.data.splits import CLOCK, MILLISECONDS, core_rows, earliest
from lwa_helpers.data.timestamps import read_times
from lwa_helpers.data.values import identifiers, read_numbers
from lwa_helpers.errors import LwaError

T = TypeVar("T")
PIECE_BYTES = 1 << 26
COMPRESSION = 4
MOST_PIECES = 256


def core(
    reviews: Path, k: int, own_split: bool, repairs: Repairs, folder: Path
) -> tuple[pl.DataFrame, pl.Series, dict[str, int]]:
    """Reduce a review file to its k-core.

    Holds in memory all ids, one piece, and the rows that are left once repeated pairs and users with fewer than k rows
    are gone. No k-core contains such users.

    Args:
        reviews: the review file.
        k: the number of rows that every user and item must have; 0 turns the filter off.
        own_split: whether the file has its own column `split`, in which case repeated pairs stay.
        repairs: counts what was wrong in the file.
        folder: where temporary files go.

    Returns:
        The rows, the user ids in the order of their first lines, and counts. The rows have the columns user (the
        position of its id among the user ids), parent_asin, rating, timestamp, line and, with own_split, split. They
        are ordered by (user, timestamp, line).
    """
    counts: Counter[str] = Counter()
    rows = []
    with TemporaryDirectory(dir=folder) as scratch:
        newest, users, items = _scatter(reviews, own_split, repairs, counts, Path(scratch))
        for path in sorted(Path(scratch).iterdir()):
            frame = _one_clock(pl.read_ipc_stream(path), newest, repairs)
            path.unlink()
            kept = frame if own_split else _without_repeats(frame)
            counts["duplicates"] += frame.height - kept.height
            counts["interactions_before_core"] += kept.height
            user = kept["user"].to_numpy()
            rows.append(kept.filter(np.bincount(user)[user] >= k))
    counts["users_before_core"], counts["items_before_core"] = len(users), len(items)
    left = pl.concat(rows)
    if k:
        left = left[core_rows(left["user"].to_numpy(), left["item"].to_numpy(), k)]
    left = left.sort("user", "timestamp", "line")
    return left.with_columns(parent_asin=items.gather(left["item"])).drop("item"), users, dict(counts)


def _without_repeats(frame: pl.DataFrame) -> pl.DataFrame:
    """Return the earliest row of each (user, item). Only the rows of repeated pairs are sorted by time."""
    pairs = frame.select(pl.col("user").cast(pl.UInt64) * 2**32 + pl.col("item")).to_series()
    ordered = pairs.sort()
    again = pairs.is_in(ordered.filter(ordered == ordered.shift(1)).implode())
    return pl.concat([frame.filter(~again), earliest(frame.filter(again))])


class _Numbers:
    """Numbers ids from 0 in the order of their first occurrence, with one dictionary for the whole file."""

    def __init__(self) -> None:
        self.categories = pl.Categories.random()
        # polars frees a dictionary that nothing uses, hence this series
        self.none = pl.Series([], dtype=pl.Categorical(self.categories))

    def replace(self, frame: pl.DataFrame, column: str, name: str) -> pl.DataFrame:
        """Return the frame with the numbers, called `name`, in place of a column of ids."""
        numbers = frame[column].cast(self.none.dtype).to_physical()  # an expression would not keep the order
        return frame.with_columns(numbers.alias(name)).drop(column)

    def ids(self) -> pl.Series:
        """Return the ids; an id's position is its number."""
        return self.categories.to_series()


def _scatter(
    reviews: Path, own_split: bool, repairs: Repairs, counts: Counter[str], scratch: Path
) -> tuple[int, pl.Series, pl.Series]:
    """Write the typed rows to one file per piece, in file order.

    The files hold numbers in place of user and item ids: the positions among the returned ids.

    Args:
        reviews: the review file.
        own_split: whether to read the column `split`.
        repairs: counts what was wrong in the file.
        counts: gets the number of rows.
        scratch: the folder for the pieces.

    Returns:
        The largest timestamp, the user ids and the item ids, both in the order of their first lines.

    Raises:
        LwaError: if no row is usable.
    """
    size = reviews.stat().st_size * (COMPRESSION if reviews.suffix in (".gz", ".parquet") else 1)
    pieces = min(MOST_PIECES, 1 + size // PIECE_BYTES)
    fields = {name: known for name, known in REVIEW_FIELDS.items() if own_split or name != "split"}
    blocks = read_table(reviews, fields, set(fields) - {"rating"}, repairs)
    users, items, newest, writers = _Numbers(), _Numbers(), 0, {}
    frames = ((len(block), items.replace(_typed(block, repairs), "parent_asin", "item")) for block in blocks)
    with ExitStack() as stack:
        for rows, frame in _ahead(frames):
            counts["rows"] += rows
            counts["usable_rows"] += len(frame)
            newest = max(newest, frame.select(pl.max("timestamp")).item() or 0)
            for piece, part in _by_user(users.replace(frame, "user_id", "user"), pieces):
                table = part.to_arrow()
                if piece not in writers:
                    file = str(scratch / f"{piece:03}")
                    writers[piece] = stack.enter_context(pa.ipc.new_stream(file, table.schema))
                writers[piece].write_table(table)
    if not counts.pop("usable_rows"):
        raise LwaError(repairs.nothing_left("row"))
    return newest, users.ids(), items.ids()


def _ahead(results: Iterator[T]) -> Iterator[T]:
    """Yield the same results, computing the next one in a thread while the caller uses the last one."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, results, None)
        while (result := coming.result()) is not None:
            coming = thread.submit(next, results, None)
            yield result


def _by_user(frame: pl.DataFrame, pieces: int) -> Iterator[tuple[int, pl.DataFrame]]:
    if pieces == 1:
        yield 0, frame
        return
    parts = frame.with_columns(piece=pl.col("user") % pieces).partition_by("piece", as_dict=True, include_key=False)
    yield from ((key[0], part) for key, part in parts.items())


def _typed(block: pl.DataFrame, repairs: Repairs) -> pl.DataFrame:
    """Type the columns and count bad values: rows without id or time are dropped, bad ratings become null."""
    users, items = identifiers(block["user_id"]), identifiers(block["parent_asin"])
    times, odd_times = read_times(block["timestamp"])
    given = block["rating"] if "rating" in block.columns else pl.Series([None] * block.height, dtype=pl.Float64)
    rating, rated = read_numbers(given)
    ids, timed, in_range = users.is_not_null() & items.is_not_null(), times.is_not_null(), rating.is_between(1, 5)
    wrong = {
        "rows_without_ids": ~ids,
        "rows_without_time": ids & ~timed & ~odd_times["times_out_of_range"],
        **{problem: ids & rows for problem, rows in odd_times.items()},
        "unreadable_ratings": ids & timed & rated & rating.is_null(),
        "ratings_out_of_range": ids & timed & ~in_range,
    }
    for problem, rows in wrong.items():
        repairs.add(problem, block["line"].filter(rows))
    rating = rating.set(~in_range, None)
    typed = pl.DataFrame([users, items, rating.alias("rating"), times.alias("timestamp")])
    return typed.with_columns(block.select(pl.col("^split$"), "line")).filter(ids & timed)


def _one_clock(frame: pl.DataFrame, newest: int, repairs: Repairs) -> pl.DataFrame:
    """Multiply timestamps in seconds by 1000 if the file's other timestamps are in milliseconds."""
    seconds = pl.col("timestamp").is_between(CLOCK, MILLISECONDS, closed="left")
    if newest < MILLISECONDS:
        return frame
    repairs.add("seconds_to_ms", frame.filter(seconds)["line"])
    time = pl.col("timestamp")
    return frame.with_columns(pl.when(seconds).then(time * 1000).otherwise(time).alias("timestamp"))
