"""Read a text file, plain or gzipped, in blocks of whole records, so that memory does not grow with the file."""

from __future__ import annotations

import codecs
import gzip
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, ClassVar, Protocol

import numpy as np

from lwa_helpers.errors import LwaError

RECORD_BYTES = 1 << 26
BREAK = ord("\n")
NOT_TEXT = {
    b"\x1f\x8b": "is gzipped: let its name end in .gz",
    b"PK\x03\x04": "is a zip archive or a spreadsheet: unpack it, or save it as csv",
    b"PAR1": "is a parquet file: let its name end in .parquet",
    codecs.BOM_UTF16_LE: "is in UTF-16: save it in UTF-8",
    codecs.BOM_UTF16_BE: "is in UTF-16: save it in UTF-8",
}


class Records(Protocol):
    """What reading in blocks must know of a format.

    Attributes:
        rule: what the file must be.
        refused: beginnings of files that break the rule, each with the fix.
        unclosed: what is wrong with a record that does not end.
    """

    rule: ClassVar[str]
    refused: ClassVar[Mapping[re.Pattern[bytes], str]]
    unclosed: ClassVar[str]

    def split(self, data: bytes) -> np.ndarray:
        """Return the position after each whole record of a text that begins with a record."""


@dataclass(frozen=True)
class Block:
    """Whole records.

    Attributes:
        text: the records, each with its line break.
        ends: (n,) the position after each record.
        first: the number of the first line, from 1.
        breaks: the number of line breaks; more than records if some have line breaks inside.
    """

    text: bytes
    ends: np.ndarray
    first: int
    breaks: int

    def records(self) -> Iterator[bytes]:
        """Yield each record with its line break."""
        start = 0
        for end in self.ends.tolist():
            yield self.text[start:end]
            start = end

    def lines(self) -> np.ndarray:
        """Return the number of each record's first line, (n,)."""
        if self.breaks == len(self.ends):
            return np.arange(self.first, self.first + len(self.ends))
        starts = np.concatenate(([0], self.ends))[:-1]
        return self.first + np.searchsorted(places(self.text, BREAK), starts)

    def without_first(self) -> Block:
        """Return the block without its first record."""
        cut = int(self.ends[0])
        breaks = self.text.count(b"\n", 0, cut)
        return Block(self.text[cut:], self.ends[1:] - cut, self.first + breaks, self.breaks - breaks)


def places(text: bytes, byte: int) -> np.ndarray:
    """Return the positions of a byte."""
    return np.flatnonzero(np.frombuffer(text, np.uint8) == byte)


def blocks(path: Path, table: Records, size: int) -> Iterator[Block]:
    """Read a file block by block.

    Args:
        path: the file.
        table: its format.
        size: about how many bytes a block has.

    Yields:
        The blocks, in order; together they hold every byte but a byte order mark. The last record gets a line break if
        it has none.

    Raises:
        LwaError: if the file is not of the format, or a record does not end or is longer than RECORD_BYTES.
    """
    with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
        text, first = _some_lines(file, size).removeprefix(codecs.BOM_UTF8), 1
        _check_head(text, path, table)
        while text:
            more = _some_lines(file, size)
            whole = text if more or text.endswith(b"\n") else text + b"\n"
            ends = table.split(whole)
            cut = int(ends[-1]) if len(ends) else 0
            breaks = whole.count(b"\n", 0, cut)
            if cut:
                yield Block(whole[:cut], ends, first, breaks)
            first += breaks
            rest = whole[cut:]
            if rest and (not more or len(rest) > RECORD_BYTES):
                longer = f" within {RECORD_BYTES >> 20} MiB" if more else ""
                raise LwaError(f"{path}: the record of line {first} does not end{longer}: {table.unclosed}")
            text = rest + more


def _some_lines(file: BinaryIO | gzip.GzipFile, size: int) -> bytes:
    """Read to the end of a line, which most often ends a record, so that little is copied."""
    return file.read(size) + file.readline(RECORD_BYTES)


def _check_head(text: bytes, path: Path, table: Records) -> None:
    wrong = [fix for magic, fix in NOT_TEXT.items() if text.startswith(magic)]
    wrong += [fix for pattern, fix in table.refused.items() if pattern.match(text)]
    if wrong:
        raise LwaError(f"{path} {wrong[0]} ({table.rule})")
