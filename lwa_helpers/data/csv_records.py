"""Comma-separated values by RFC 4180: a record ends at a line break outside quotes; text in quotes is never data."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import ClassVar

import numpy as np
import polars as pl

from lwa_helpers.data.blocks import BREAK, Block, places
from lwa_helpers.data.splits import MILLISECONDS

HEADERLESS = ("user_id", "parent_asin", "rating", "timestamp")
NUMBERS: dict[str, type[pl.DataType]] = {
    "rating": pl.Float64,
    "overall": pl.Float64,
    "timestamp": pl.Int64,
    "unixReviewTime": pl.Int64,
}
SEPARATOR, QUOTE, RETURN = b',"\r'
BESIDE_QUOTE = np.isin(np.arange(256), (SEPARATOR, BREAK, QUOTE))
STAND_IN = "\x01"
# A quote opens a value at its start alone. What follows the closing quote is wrong, but ends where a value ends.
VALUE = rb'(?:"(?:[^"]++|"")*+"[^,\n]*+|[^",\n][^,\n]*+|)'
RECORD = re.compile(VALUE + rb"(?:," + VALUE + rb")*+\n")
ONE_VALUE = re.compile(r'(?:"((?:[^"]++|"")*+)"|([^",][^,]*+|))(?:,|\Z)')


class CsvRecords:
    """The format of one file.

    A file without a header has the four columns of the Amazon 2023 scripts and is recognised by their form.

    Attributes:
        columns: the names in the header.
    """

    rule: ClassVar = f"a csv has commas and starts with a line of column names, such as {','.join(HEADERLESS)}"
    refused: ClassVar[Mapping[re.Pattern[bytes], str]] = {}
    unclosed: ClassVar = (
        'a quote opens in it and never closes: write "" for a quote in a quoted value; '
        "if the file was cut short, fetch it again"
    )

    def __init__(self, wanted: Collection[str]) -> None:
        self.wanted = wanted
        self.columns: list[str] = []

    def start(self, block: Block) -> Block:
        """Read the column names. Return the block without them."""
        names = values(next(block.records()).decode(errors="replace"))
        if any("\r" in name for name in names):
            return block  # lines end in carriage returns alone: no column is known
        if len(names) == 4 and names[3].isdecimal() and int(names[3]) >= MILLISECONDS:
            self.columns = list(HEADERLESS)
            return block
        self.columns = [name.strip() for name in names]
        return block.without_first()

    def split(self, data: bytes) -> np.ndarray:
        """Return the position after each record of a text that begins with a record."""
        if b'"' not in data:
            return places(data, BREAK) + 1
        return np.flatnonzero(_outside(data, BREAK)) + 1 if _well_formed(data) else _ends_one_by_one(data)

    def parse(self, block: Block) -> pl.DataFrame | None:
        """Return the wanted columns, or None if a record is broken or blank. Numbers are typed if all can be read."""
        text = block.text
        if not self._complete(block) or (b"\r" in text and b"\r," in text):
            return None  # polars drops a carriage return at the end of any value
        # polars looks for line breaks to share the work among threads, so another character stands in for inner ones.
        inner = block.breaks > len(block.ends)
        if inner and STAND_IN.encode() in text:
            return None
        text = _without_inner_breaks(block) if inner else text
        for types in (NUMBERS, {}):
            frame = self._polars(text, types)
            if frame is not None and frame.height == len(block.ends):
                breaks = pl.col(pl.String).str.replace_all(STAND_IN, "\n", literal=True)
                return frame.with_columns(breaks) if inner else frame
        return None

    def _complete(self, block: Block) -> bool:
        """Whether the quotes are well-formed and there are as many separators as the records need together."""
        text, needed = block.text, (len(self.columns) - 1) * len(block.ends)
        if b'"' not in text:
            return text.count(b",") == needed
        return _well_formed(text) and np.count_nonzero(_outside(text, SEPARATOR)) == needed

    def _polars(self, text: bytes, types: dict[str, type[pl.DataType]]) -> pl.DataFrame | None:
        """Parse with polars, which fails if a record has too many values."""
        schema = {str(place): types.get(name, pl.String) for place, name in enumerate(self.columns)}
        try:
            frame = pl.read_csv(text, has_header=False, schema=schema, raise_if_empty=False)
        except pl.exceptions.PolarsError:
            return None
        wanted = {str(place): name for place, name in enumerate(self.columns) if name in self.wanted}
        return frame.select(list(wanted)).rename(wanted)

    def record(self, text: str) -> dict[str, str | None] | None:
        """Return the values of one record by column, or None unless it has one value for each column."""
        found = values(text)
        if len(found) != len(self.columns):
            return None
        return {name: value or None for name, value in zip(self.columns, found)}


def values(text: str) -> list[str]:
    """Return the values of one record; none if its quotes are not those of RFC 4180.

    A carriage return alone is a character like any other: pandas and the csv module write it so. The csv module does
    not read it.
    """
    found, start, text = [], 0, text.removesuffix("\n").removesuffix("\r")
    while match := ONE_VALUE.match(text, start):
        quoted, plain = match.groups()
        found.append(plain if quoted is None else quoted.replace('""', '"'))
        start = match.end()
        if not match[0].endswith(","):
            return found
    return []


def _outside(text: bytes, byte: int) -> np.ndarray:
    """Return where a byte stands outside quotes, as a mask: after an even number of quotes."""
    characters = np.frombuffer(text, np.uint8)
    return (characters == byte) & (np.cumsum(characters == QUOTE, dtype=np.uint8) % 2 == 0)


def _well_formed(text: bytes) -> bool:
    """Whether each quote opens a value, closes one, or is one of two that stand for a quote inside a value."""
    # Then every second quote opens: it follows a separator, a line break or the quote that it doubles. The others
    # close: a separator, a line break or another quote follows.
    quotes = places(text, QUOTE)
    around = np.frombuffer(b"\n" + text + b"\n\n", np.uint8)
    before, after = quotes[::2], quotes[1::2] + 2
    after += (around[after] == RETURN) & (around[after + 1] == BREAK)
    return bool(BESIDE_QUOTE[around[before]].all() and BESIDE_QUOTE[around[after]].all())


def _ends_one_by_one(text: bytes) -> np.ndarray:
    ends, end = [], 0
    while found := RECORD.match(text, end):
        end = found.end()
        ends.append(end)
    return np.array(ends, dtype=np.int64)


def _without_inner_breaks(block: Block) -> bytes:
    """Return the text with STAND_IN in place of the line breaks that end no record."""
    text = np.frombuffer(block.text, np.uint8).copy()
    inner = text == BREAK
    inner[block.ends - 1] = False
    text[inner] = ord(STAND_IN)
    return text.tobytes()
