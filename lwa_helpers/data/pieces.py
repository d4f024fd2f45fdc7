"""Out of core: reviews are typed, scattered over files by user, then deduplicated and filtered piece by piece."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import polars as pl
import pyarrow as pa

from lwa_helpers.data.reading import REVIEW_FIELDS, Repairs, read_table
from lwa_helpers.data.splits import CLOCK, MILLISECONDS, core_rows, earliest
from lwa_helpers.errors import LwaError

PIECE_BYTES = 1 << 26
COMPRESSION = 4
MOST_PIECES = 256


def core(
    reviews: Path, k: int, own_split: bool, repairs: Repairs, folder: Path
) -> tuple[pl.DataFrame, pl.DataFrame, dict[str, int]]:
    """Return the k-core of a review file, its users, and counts.

    rows: user (the user's first line, int64), parent_asin, rating, timestamp, line and, with own_split, split; ordered
    by (user, timestamp, line). users: user, user_id, of these and more. own_split: every row stays. Memory: one piece,
    the item ids, plus what is left of all once repeated pairs and users with fewer than k rows are gone (no k-core holds
    them).
    """
    counts: Counter[str] = Counter()
    rows, users = [], []
    with TemporaryDirectory(dir=folder) as scratch:
        newest, items = _scatter(reviews, own_split, repairs, counts, Path(scratch))
        for path in sorted(Path(scratch).iterdir()):
            frame = _one_clock(pl.read_ipc_stream(path), newest, repairs)
            path.unlink()
            frame = frame.with_columns(user=pl.col("line").min().over("user_id"))
            counts["users_before_core"] += (frame["line"] == frame["user"]).sum()
            kept = frame if own_split else _without_repeats(frame)
            counts["duplicates"] += frame.height - kept.height
            counts["interactions_before_core"] += kept.height
            kept = kept.filter(pl.len().over("user") >= k)
            users.append(kept.select("user", "user_id").unique("user"))
            rows.append(kept.drop("user_id"))
    counts["items_before_core"] = len(items)
    left = _k_core(pl.concat(rows), k).sort("user", "timestamp", "line")
    return left.with_columns(parent_asin=items.gather(left["item"])).drop("item"), pl.concat(users), dict(counts)


def _without_repeats(frame: pl.DataFrame) -> pl.DataFrame:
    """The earliest row of each (user, item); only pairs that occur twice are sorted."""
    pair = pl.col("user") * 2**32 + pl.col("item")
    again = frame.select(pair.is_duplicated()).to_series()
    return pl.concat([frame.filter(~again), earliest(frame.filter(again))])


def _scatter(
    reviews: Path, own_split: bool, repairs: Repairs, counts: Counter[str], scratch: Path
) -> tuple[int, pl.Series]:
    """Write the typed rows to one file per piece, in file order; return the largest timestamp and the item ids.

    In the files an item is its place among the ids.
    """
    size = reviews.stat().st_size * (COMPRESSION if reviews.suffix in (".gz", ".parquet") else 1)
    pieces = min(MOST_PIECES, 1 + size // PIECE_BYTES)
    fields = {name: known for name, known in REVIEW_FIELDS.items() if own_split or name != "split"}
    newest, writers, items = 0, {}, pl.Categories.random()
    item = pl.col("parent_asin").cast(pl.Categorical(items)).to_physical().alias("item")
    with ExitStack() as stack:
        for block in read_table(reviews, fields, set(fields) - {"rating"}, repairs):
            frame = _typed(block, repairs)
            counts["rows"] += block.height
            counts["usable_rows"] += frame.height
            newest = max(newest, frame["timestamp"].max() or 0)
            for piece, part in _by_user(frame.with_columns(item).drop("parent_asin"), pieces):
                table = part.to_arrow()
                if piece not in writers:
                    file = str(scratch / f"{piece:03}")
                    writers[piece] = stack.enter_context(pa.ipc.new_stream(file, table.schema))
                writers[piece].write_table(table)
    if not counts.pop("usable_rows"):
        raise LwaError(f"{repairs.message()} - no usable row is left: fetch the file again")
    return newest, items.to_series()


def _by_user(frame: pl.DataFrame, pieces: int) -> Iterator[tuple[int, pl.DataFrame]]:
    if pieces == 1:
        yield 0, frame
        return
    piece = (pl.col("user_id").hash() % pieces).alias("piece")
    parts = frame.with_columns(piece).partition_by("piece", as_dict=True, include_key=False)
    yield from ((key[0], part) for key, part in parts.items())


def _typed(block: pl.DataFrame, repairs: Repairs) -> pl.DataFrame:
    """Give the columns their types; what cannot be read is counted, and null or (ids, time) dropped."""
    if "rating" not in block.columns:
        block = block.with_columns(rating=pl.lit(None, pl.Float64))
    texts = [name for name in ("rating", "timestamp") if block.schema[name] == pl.String]
    block = block.with_columns(pl.col(texts).str.strip_chars())
    frame = block.with_columns(
        pl.col("user_id", "parent_asin").cast(pl.String),
        pl.col("rating").cast(pl.Float64, strict=False).fill_nan(None),
        _whole_number(block.schema["timestamp"]),
        given=pl.col("rating").is_not_null(),
    )
    value = pl.col("rating")
    ids = pl.all_horizontal(pl.col("user_id", "parent_asin").fill_null("") != "")
    timed = pl.col("timestamp").is_not_null()
    wrong = {
        "rows_without_ids": ~ids,
        "rows_without_time": ids & ~timed,
        "unreadable_ratings": ids & timed & pl.col("given") & value.is_null(),
        "ratings_out_of_range": ids & timed & ~value.is_between(1, 5),
    }
    bad = frame.filter(pl.any_horizontal(wrong.values()))
    for problem, rows in wrong.items():
        repairs.add(problem, bad.filter(rows)["line"])
    if bad.height:
        frame = frame.filter(ids & timed).with_columns(rating=pl.when(value.is_between(1, 5)).then(value))
    return frame.drop("given")


def _whole_number(dtype: pl.DataType) -> pl.Expr:
    """timestamp as int64: dates become milliseconds, "5.0" is 5, 5.5 is null."""
    time = pl.col("timestamp")
    if dtype.is_temporal():
        return time.cast(pl.Datetime("ms")).cast(pl.Int64)
    if dtype.is_integer():
        return time.cast(pl.Int64, strict=False)
    number = time.cast(pl.Float64, strict=False)
    exact = time.cast(pl.Int64, strict=False)
    return pl.when(number == number.floor()).then(pl.coalesce(exact, number.cast(pl.Int64, strict=False)))


def _one_clock(frame: pl.DataFrame, newest: int, repairs: Repairs) -> pl.DataFrame:
    """Multiply by 1000 what is in seconds, where the file's other timestamps are milliseconds."""
    seconds = pl.col("timestamp").is_between(CLOCK, MILLISECONDS, closed="left")
    if newest < MILLISECONDS:
        return frame
    repairs.add("seconds_to_ms", frame.filter(seconds)["line"])
    time = pl.col("timestamp")
    return frame.with_columns(pl.when(seconds).then(time * 1000).otherwise(time).alias("timestamp"))


def _k_core(rows: pl.DataFrame, k: int) -> pl.DataFrame:
    if not k or rows.is_empty():
        return rows
    first_lines = rows["user"].unique().to_numpy()
    user = np.empty(first_lines.max() + 1, dtype=np.int32)
    user[first_lines] = np.arange(len(first_lines))
    return rows[core_rows(user[rows["user"].to_numpy()], rows["item"].to_numpy(), k)]
