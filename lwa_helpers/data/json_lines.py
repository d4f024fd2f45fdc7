"""One JSON object per line, or one Python dictionary as in the item files of 2014. A key may come first on any line."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from itertools import islice
from typing import Any, ClassVar

import numpy as np
import polars as pl

from lwa_helpers.data.blocks import BREAK, Block, places
from lwa_helpers.data.values import as_text, literal

SAMPLE = 1000
PYTHON = re.compile(r"\s*\{\s*u?'")


class JsonLines:
    """The format of one file.

    Attributes:
        columns: the keys of the first thousand objects. Reading adds the wanted keys that have their first value later.
    """

    rule: ClassVar = "each line must be one JSON object, in UTF-8"
    refused: ClassVar[Mapping[re.Pattern[bytes], str]] = {
        re.compile(rb"\s*\[\s*(?:\{|\Z)"): "is one array: write one object a line, with `jq -c '.[]'`, or in pandas "
        "with to_json(orient='records', lines=True)",
        re.compile(rb"\s*\{\s*\n"): "has objects over many lines: write one object a line, with `jq -c .`",
    }
    unclosed: ClassVar = rule

    def __init__(self, wanted: Collection[str]) -> None:
        self.wanted = list(wanted)
        self.columns: list[str] = []

    def start(self, block: Block) -> Block:
        """Read the keys of the first objects. Return the block as it is, for there is no header."""
        records = filter(None, (self.record(line.decode(errors="replace")) for line in block.records()))
        self.columns = list(dict.fromkeys(key for record in islice(records, SAMPLE) for key in record))
        return block

    def split(self, data: bytes) -> np.ndarray:
        """Return the position after each line."""
        return places(data, BREAK) + 1

    def parse(self, block: Block) -> pl.DataFrame | None:
        """Return the wanted keys as texts, or None if a line is broken or blank."""
        try:
            frame = pl.read_ndjson(block.text, schema=dict.fromkeys(self.wanted, pl.String))
        except pl.exceptions.PolarsError:
            return None
        return frame if frame.height == len(block.ends) else None

    def record(self, text: str) -> dict[str, Any] | None:
        """Return the object on one line, its wanted values as texts; None if there is no object."""
        try:
            value = json.loads(text, strict=False)
        except (ValueError, RecursionError):
            value = literal(text) if PYTHON.match(text) else None
        if not isinstance(value, dict):
            return None
        return value | {name: as_text(value[name]) for name in self.wanted if name in value}
