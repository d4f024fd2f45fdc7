"""Read JSON lines and CSV, plain or gzipped, one record per line. Only broken blocks are parsed line by line."""

from __future__ import annotations

import ast
import codecs
import csv
import gzip
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from lwa_helpers.data.splits import MILLISECONDS

BLOCK_BYTES = 1 << 23
NUMBERS: dict[str, type[pl.DataType]] = {"rating": pl.Float64, "timestamp": pl.Int64}


def text_frames(path: Path, resolve: Callable[..., dict[str, str]], repairs: Any) -> Iterator[pl.DataFrame]:
    """Read a text file block by block.

    A block that does not parse as a whole is parsed line by line: broken lines are skipped and counted in `repairs`.

    Args:
        path: the file.
        resolve: maps the file's column names to new ones, and so chooses the columns.
        repairs: counts what was wrong in the file.

    Yields:
        A frame of strings, and perhaps numbers, with the chosen columns under their new names and the column `line`
        (counted from 1).
    """
    table: JsonLines | CsvLines | None = None
    names: dict[str, str] = {}
    for first, lines, block in _blocks(path):
        if table is None:
            table = (CsvLines if ".csv" in path.suffixes else JsonLines)(block)
            names = resolve(table.columns)
            if table.header_bytes:
                first, lines, block = first + 1, lines - 1, block[table.header_bytes :]
        frame = table.parse(block, names)
        if frame is None or frame.height != lines:
            frame = _line_by_line(table, first, block, names, repairs)
        else:
            frame = frame.with_columns(line=pl.int_range(first, first + lines, dtype=pl.Int64))
        yield frame.rename(names)


def _blocks(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yield blocks of whole lines, of BLOCK_BYTES or more.

    Yields:
        The number of the first line (from 1), the number of lines, and the lines, each ending in a line break.
    """
    with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
        first, block = 1, file.read(len(codecs.BOM_UTF8)).removeprefix(codecs.BOM_UTF8)
        while block := block + file.read(BLOCK_BYTES) + file.readline():
            if not block.endswith(b"\n"):
                block += b"\n"
            lines = block.count(b"\n")
            yield first, lines, block
            first, block = first + lines, b""


def _line_by_line(
    table: JsonLines | CsvLines, first: int, block: bytes, names: Iterable[str], repairs: Any
) -> pl.DataFrame:
    rows, broken, not_utf8 = [], [], []
    for line, raw in enumerate(block.split(b"\n")[:-1], start=first):
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            text = raw.decode(errors="replace")
            not_utf8.append(line)
        record = table.record(text) if text.strip() else {}
        if record is None:
            broken.append(line)
        elif record:
            rows.append((*(_as_text(record.get(name)) for name in names), line))
    repairs.add("broken_lines", broken)
    repairs.add("lines_not_utf8", not_utf8)
    return pl.DataFrame(rows, dict.fromkeys(names, pl.String) | {"line": pl.Int64}, orient="row")


def _as_text(value: Any) -> str | None:
    if value is None:
        return None
    return (value if isinstance(value, str) else json.dumps(value)).encode(errors="replace").decode()


class JsonLines:
    """One object per line. The columns are the keys of the first thousand objects."""

    header_bytes = 0

    def __init__(self, block: bytes) -> None:
        lines = block.split(b"\n", 1000)[:1000]
        records = filter(None, (self.record(line.decode(errors="replace")) for line in lines))
        self.columns = list(dict.fromkeys(key for record in records for key in record))

    def parse(self, block: bytes, names: Mapping[str, str]) -> pl.DataFrame | None:
        """Return the whole block, or None if it has a broken line."""
        try:
            return pl.read_ndjson(block, schema=dict.fromkeys(names, pl.String))
        except pl.exceptions.PolarsError:
            return None

    def record(self, text: str) -> dict[str, Any] | None:
        """Parse one line.

        Returns:
            The object, or None if the line is not one in JSON or, as in the item files of 2014, in Python's notation.
        """
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = _python_value(text) if text.startswith("{'") else None
        return value if isinstance(value, dict) else None


def _python_value(text: str) -> Any:
    """Return the plain value that a Python literal spells, as JSON would give it; None for anything else."""
    try:
        return json.loads(json.dumps(ast.literal_eval(text)))
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None


class CsvLines:
    """Comma-separated values.

    A file without a header has the four columns of the Amazon 2023 scripts and is recognised by their form.
    """

    def __init__(self, block: bytes) -> None:
        line = block[: block.index(b"\n") + 1]
        self.columns = self._fields(line.decode(errors="replace"))
        self.header_bytes = len(line)
        if len(self.columns) == 4 and self.columns[3].isdigit() and int(self.columns[3]) >= MILLISECONDS:
            self.columns, self.header_bytes = ["user_id", "parent_asin", "rating", "timestamp"], 0

    @staticmethod
    def _fields(text: str) -> list[str]:
        """Return the values of one line; none if it is not a whole record (an open quote, a line break inside)."""
        try:
            return next(csv.reader([text.rstrip("\r\n")], strict=True), [])
        except csv.Error:
            return []

    def parse(self, block: bytes, names: Mapping[str, str]) -> pl.DataFrame | None:
        """Return the whole block, with numbers if all can be read, or None if it has a broken line."""
        for types in (NUMBERS, {}):
            schema = {column: types.get(names.get(column, ""), pl.String) for column in self.columns}
            try:
                frame = pl.read_csv(block, has_header=False, schema=schema, raise_if_empty=False)
            except pl.exceptions.PolarsError:
                continue
            return frame.select(list(names))
        return None

    def record(self, text: str) -> dict[str, str | None] | None:
        """Return the values of one line by column, or None unless it has one value for each column."""
        values = self._fields(text)
        if len(values) != len(self.columns):
            return None
        return {name: value or None for name, value in zip(self.columns, values)}
