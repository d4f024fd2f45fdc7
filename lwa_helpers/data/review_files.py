"""Find review and item files and read them in blocks under our names. Broken content is counted, never dropped."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from lwa_helpers.data.repairs import Repairs
from lwa_helpers.data.textfiles import Check, text_frames
from lwa_helpers.data.values import text_of
from lwa_helpers.errors import LwaError

Fields = Mapping[str, tuple[str, ...]]

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz")
REVIEW_FIELDS: Fields = {
    "user_id": ("user_id", "reviewerID"),
    "parent_asin": ("parent_asin", "asin"),
    "rating": ("rating", "overall"),
    "timestamp": ("timestamp", "unixReviewTime"),
    "split": ("split",),
}
ITEM_FIELDS: Fields = {
    "parent_asin": ("parent_asin", "asin"),
    "title": ("title",),
    "store": ("store", "brand"),
    "main_category": ("main_category", "main_cat"),
    "price": ("price",),
}
PARQUET_ROWS = 1 << 17
PLAIN = (pl.String, pl.Categorical, pl.Enum, pl.Date, pl.Datetime, pl.Null)
UNREADABLE = (pl.Binary, pl.Duration, pl.Time, pl.Object)


def find_file(root: Path, category: str, prefix: str = "") -> Path | None:
    """Return root/<prefix><category><suffix>, or None if there is no such file.

    Raises:
        LwaError: if the name cannot be a category's, or several files match.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", category):
        raise LwaError(f"{category!r} is not a category name: use letters, digits, _ and -, for example All_Beauty")
    found = [path for suffix in SUFFIXES if (path := root / f"{prefix}{category}{suffix}").is_file()]
    if len(found) > 1:
        raise LwaError(f"{root} holds {' and '.join(path.name for path in found)}: keep only the one to be read")
    return found[0] if found else None


def read_table(path: Path, fields: Fields, needed: set[str], repairs: Repairs) -> Iterator[pl.DataFrame]:
    """Read a file block by block.

    Text formats give texts, or numbers where a whole block holds numbers; typing is a later step. A row without a value
    under the first name of a field has the value under the next one.

    Args:
        path: the file.
        fields: our column names, each with the names that it has in files.
        needed: those of our names that the file must have.
        repairs: counts what was wrong in the file.

    Yields:
        A frame with the column `line` (int64) and those columns of `fields` that the file has, under our names.

    Raises:
        LwaError: if the file is empty, truncated or unreadable, or lacks a column of `needed` under all its names.
    """
    wanted = [name for names in fields.values() for name in names]
    check = partial(_check_columns, path, fields, needed)
    rows = 0
    try:
        if path.suffix == ".parquet":
            frames = _parquet_frames(path, wanted, check)
        else:
            frames = text_frames(path, wanted, check, repairs)
        for frame in frames:
            rows += frame.height
            yield _under_our_names(frame, fields, needed)
    except gzip.BadGzipFile as error:
        fix = "take .gz off its name if it is plain, or fetch it again"
        raise LwaError(f"{path} is damaged or not gzipped ({error}): {fix}") from None
    except (EOFError, zlib.error) as error:
        raise LwaError(f"{path} is damaged or cut short ({error}): fetch it again") from None
    except pa.ArrowException as error:
        raise LwaError(f"{path} is not a whole parquet file ({error}): fetch it again") from None
    if not rows:
        raise LwaError(repairs.nothing_left("line"))


def _check_columns(path: Path, fields: Fields, needed: set[str], columns: list[str], rule: str) -> None:
    """Raise LwaError unless each needed field is among the columns, and no column of ours is there twice."""
    ours = {name for names in fields.values() for name in names}
    if twice := [name for name in columns if name in ours and columns.count(name) > 1]:
        raise LwaError(f"{path} has several columns named {twice[0]}: keep one of them")
    missing = [" or ".join(names) for name, names in fields.items() if name in needed and not set(names) & set(columns)]
    if missing:
        there = ", ".join(columns[:20]) or "none"
        raise LwaError(f"{path} lacks the column {', '.join(missing)}; it has: {there}{rule and f' ({rule})'}")


def _under_our_names(frame: pl.DataFrame, fields: Fields, needed: Iterable[str]) -> pl.DataFrame:
    """Put the first value of each row in place of the columns that are names of one field. An empty text is none."""
    frame = frame.with_columns(pl.col(pl.String).replace("", None))
    columns = []
    for field, names in fields.items():
        there = [frame[name] for name in names if name in frame.columns]
        if not there and field in needed:
            there = [pl.Series([None] * frame.height, dtype=pl.String)]
        if there:
            columns.append(_first_value(there).alias(field))
    return pl.DataFrame([*columns, frame["line"]])


def _first_value(columns: list[pl.Series]) -> pl.Series:
    """Return the first value of each row that is not null; as text if that takes columns of several types."""
    if len(columns) == 1 or not columns[0].null_count():
        return columns[0]
    if len({column.dtype for column in columns}) > 1:
        columns = [text_of(column) for column in columns]
    return pl.select(pl.coalesce(columns)).to_series()


def _parquet_frames(path: Path, wanted: list[str], check: Check) -> Iterator[pl.DataFrame]:
    with pq.ParquetFile(path) as file:
        check(file.schema_arrow.names, "")
        names, line = [name for name in file.schema_arrow.names if name in wanted], 1
        for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=names):
            frame = pl.DataFrame(pl.from_arrow(batch))
            if bad := [f"{name} ({kind})" for name, kind in frame.schema.items() if kind in UNREADABLE]:
                raise LwaError(
                    f"{path}: {', '.join(bad)} is neither text nor number nor date; convert the column first"
                )
            odd = [one for one in frame if not (one.dtype.is_numeric() or one.dtype in PLAIN)]
            frame = frame.with_columns(_as_json(column) for column in odd)
            yield frame.with_columns(line=pl.int_range(line, line + frame.height, dtype=pl.Int64))
            line += frame.height


def _as_json(column: pl.Series) -> pl.Series:
    """Return a column of lists, structures or truth values as JSON, as it would stand in a file of JSON lines."""
    texts = [None if value is None else json.dumps(value, default=str) for value in column.to_list()]
    return pl.Series(column.name, texts, dtype=pl.String)
