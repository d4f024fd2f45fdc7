"""Read JSON lines and CSV, plain or gzipped, as frames. Only broken blocks are parsed record by record."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import polars as pl

from lwa_helpers.data.blocks import Block, blocks
from lwa_helpers.data.csv_records import CsvRecords
from lwa_helpers.data.json_lines import JsonLines
from lwa_helpers.data.repairs import Repairs

BLOCK_BYTES = 1 << 23
Check = Callable[[list[str], str], None]


def text_frames(path: Path, wanted: Collection[str], check: Check, repairs: Repairs) -> Iterator[pl.DataFrame]:
    """Read a text file block by block.

    A block that does not parse as a whole is parsed record by record: broken records are skipped and counted.

    Args:
        path: the file.
        wanted: the columns to read, those of them that the file has.
        check: called with the file's columns and what the file must be, once they are all known. It may raise.
        repairs: counts what was wrong in the file.

    Yields:
        A frame of texts, and perhaps numbers, with the wanted columns and the column `line`: the number of each
        record's first line, from 1. A key of JSON lines is a column from the block on in which it has a value.
    """
    table: CsvRecords | JsonLines = CsvRecords(wanted) if ".csv" in path.suffixes else JsonLines(wanted)
    for block in blocks(path, table, BLOCK_BYTES):
        if not table.columns:
            block = table.start(block)
            if isinstance(table, CsvRecords) or not table.columns:
                check(table.columns, table.rule)
        frame = table.parse(block)
        if frame is None:
            frame = _record_by_record(table, block, wanted, repairs)
        else:
            frame = frame.with_columns(line=pl.Series(block.lines(), dtype=pl.Int64))
        table.columns += [name for name in wanted if name not in table.columns and _has_values(frame, name)]
        yield frame.select(name for name in (*wanted, "line") if name in (*table.columns, "line"))
    if table.columns:
        check(table.columns, "")


def _has_values(frame: pl.DataFrame, name: str) -> bool:
    return name in frame.columns and frame[name].null_count() < frame.height


def _record_by_record(
    table: CsvRecords | JsonLines, block: Block, wanted: Collection[str], repairs: Repairs
) -> pl.DataFrame:
    rows: list[tuple[str | int | None, ...]] = []
    broken: list[int] = []
    not_utf8: list[int] = []
    for line, raw in zip(block.lines().tolist(), block.records()):
        text = raw.decode(errors="replace")
        if "\ufffd" in text and text.encode() != raw:
            not_utf8.append(line)
        if not text.strip():
            continue
        record = table.record(text)
        if record is None:
            broken += range(line, line + raw.count(b"\n"))
        else:
            rows.append((*(record.get(name) for name in wanted), line))
    repairs.add("broken_lines", broken)
    repairs.add("lines_not_utf8", not_utf8)
    return pl.DataFrame(rows, dict.fromkeys(wanted, pl.String) | {"line": pl.Int64}, orient="row")
