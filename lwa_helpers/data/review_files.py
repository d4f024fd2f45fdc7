"""Read review and item files in blocks. Broken content is counted, never dropped silently."""

from __future__ import annotations

import gzip
import re
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from lwa_helpers.data.textfiles import text_frames
from lwa_helpers.errors import LwaError

Fields = Mapping[str, tuple[str, ...]]
Resolve = Callable[[Iterable[str]], dict[str, str]]

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
PROBLEMS = {
    "broken_lines": "broken lines, skipped",
    "lines_not_utf8": "lines that are not UTF-8, the unreadable characters replaced",
    "rows_without_ids": "rows without user or item, skipped",
    "rows_without_time": "rows without a whole-number timestamp, skipped",
    "unreadable_ratings": "ratings that are not numbers, set to null",
    "ratings_out_of_range": "ratings outside 1 to 5, set to null",
    "seconds_to_ms": "timestamps in seconds among milliseconds, multiplied by 1000",
    "repeated_metadata": "repeated descriptions of an item, the first one with a title kept",
}
PARQUET_ROWS = 1 << 17
PARQUET_TYPES = (pl.String, pl.Categorical, pl.Enum, pl.Date, pl.Datetime, pl.Null)


@dataclass
class Repairs:
    """What was wrong in one file.

    Attributes:
        file: the file, or None if there is none.
        counts: how often each problem occurred.
        first: the line of each problem's first occurrence (in a parquet file the row), counted from 1.
    """

    file: Path | None
    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, int] = field(default_factory=dict)

    def add(self, problem: str, lines: Iterable[int]) -> None:
        """Count one occurrence of a problem for each line number."""
        for line in lines:
            self.counts[problem] = self.counts.get(problem, 0) + 1
            self.first[problem] = min(line, self.first.get(problem, line))

    def message(self) -> str:
        """Return everything that was repaired in the file as one sentence, or "" if nothing was."""
        found = [f"{n} {PROBLEMS[problem]} (first: line {self.first[problem]})" for problem, n in self.counts.items()]
        return f"{self.file}: {'; '.join(found)}" if found else ""


def warn(message: str) -> None:
    """Show a message as a warning, unless it is empty."""
    if message:
        warnings.warn(message, UserWarning, stacklevel=3)


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

    Text formats give strings, or numbers where a whole block holds numbers; typing is a later step.

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
    parquet = path.suffix == ".parquet"
    rows = 0
    try:
        for frame in (_parquet_frames if parquet else text_frames)(path, _resolver(path, fields, needed), repairs):
            rows += frame.height
            yield frame
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise LwaError(f"{path} is damaged or cut short ({error}): fetch it again") from None
    except pa.ArrowException as error:
        raise LwaError(f"{path} is not a whole parquet file ({error}): fetch it again") from None
    if not rows:
        raise LwaError(f"{repairs.message() or path} - no usable line is left: fetch the file again")


def _resolver(path: Path, fields: Fields, needed: set[str]) -> Resolve:
    """Return a function that maps a file's column names to ours. The first name of a field that the file has wins."""

    def resolve(names: Iterable[str]) -> dict[str, str]:
        columns = list(names)
        found = {name: next((n for n in known if n in columns), None) for name, known in fields.items()}
        missing = [" or ".join(fields[name]) for name in fields if name in needed and not found[name]]
        if missing:
            hint = f" (a csv starts with a line of column names, such as {','.join(fields)})"
            if ".csv" not in path.suffixes:
                hint = "" if columns else " (each line must be one JSON object, in UTF-8)"
            there = ", ".join(columns[:20]) or "none"
            raise LwaError(f"{path} lacks the column {', '.join(missing)}; it has: {there}{hint}")
        return {theirs: ours for ours, theirs in found.items() if theirs}

    return resolve


def _parquet_frames(path: Path, resolve: Resolve, repairs: Repairs) -> Iterator[pl.DataFrame]:
    with pq.ParquetFile(path) as file:
        names, line = resolve(file.schema_arrow.names), 1
        for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=list(names)):
            frame = pl.DataFrame(pl.from_arrow(batch))
            odd = [f"{n} ({t})" for n, t in frame.schema.items() if not (t.is_numeric() or t in PARQUET_TYPES)]
            if odd:
                raise LwaError(
                    f"{path}: {', '.join(odd)} is neither text nor number nor date; convert the column first"
                )
            yield frame.rename(names).with_columns(line=pl.int_range(line, line + frame.height, dtype=pl.Int64))
            line += frame.height
