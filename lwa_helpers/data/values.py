"""One meaning for every value of a file, in whatever format it comes."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

import numpy as np
import polars as pl

# Other programs' words for "no value", as pandas, R, SQL and Python write them into text files.
MISSING = ("null", "NULL", "nan", "NaN", "None", "NA", "N/A", "n/a", "<NA>", "#N/A")
SPELLED = frozenset((*MISSING, "true", "false"))
SURROGATE = re.compile("[\ud800-\udfff]")
LITERAL_NAMES = {"nan": float("nan"), "inf": float("inf")}


def as_text(value: Any) -> str | None:
    """Return a value of a JSON object as the text that means the same in every format; None for null.

    Numbers are written plainly (7.0 is 7), true is "true", and lists and objects are JSON. Halves of characters that
    no text can hold become the character 0.
    """
    if value is None:
        return None
    if isinstance(value, float):
        return np.format_float_positional(value, trim="-")
    return SURROGATE.sub("\0", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def text_of(column: pl.Series) -> pl.Series:
    """Return a column as texts, by the rules of `as_text`."""
    column = column.cast(pl.Float64) if column.dtype.is_decimal() else column
    if not column.dtype.is_float():
        return column.cast(pl.String)
    whole = pl.when(column == column.floor()).then(column.cast(pl.Int64, strict=False).cast(pl.String))
    return pl.select(pl.coalesce(whole, column.cast(pl.String)).alias(column.name)).to_series()


def identifiers(column: pl.Series) -> pl.Series:
    """Return a column of user or item ids as texts.

    An id is text or a number without the white space around it, and 7, 7.0 and "7.0" are "7". Words for a missing
    value, true and false, lists and objects are no ids: they become null.
    """
    text = text_of(column).str.strip_chars()
    if text.str.ends_with(".0").any():
        text = text.str.replace(r"^(-?\d+)\.0$", "$1")
    none = text.is_in(["", *SPELLED]) | text.str.starts_with("[") | text.str.starts_with("{")
    return text.set(none, None) if none.any() else text


def read_numbers(column: pl.Series) -> tuple[pl.Series, pl.Series]:
    """Read a column of numbers, which may be texts.

    Returns:
        The numbers (float64, null where there is none or NaN), and which rows hold something: neither null nor blank.
    """
    if column.dtype == pl.String:
        column = column.str.strip_chars()
        column = column.set(column == "", None)
    return column.cast(pl.Float64, strict=False).fill_nan(None), column.is_not_null()


def is_no_text(text: str) -> bool:
    """Whether a text only spells a missing value, true, false, a list or an object."""
    return text in SPELLED or (text.startswith(("[", "{")) and isinstance(literal(text), (list, dict)))


def literal(text: str) -> Any:
    """Return the value that a text spells in JSON or as a Python literal, as JSON would give it; None for other text.

    The names nan and inf count as numbers in a literal. Nothing is run.
    """
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return _python_value(text)


def _python_value(text: str) -> Any:
    try:
        tree = _Numbers().visit(ast.parse(text.strip(), mode="eval"))
        return json.loads(json.dumps(ast.literal_eval(tree)))
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None


class _Numbers(ast.NodeTransformer):
    """Puts numbers in place of the names nan and inf, as Python prints floats."""

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Constant(LITERAL_NAMES[node.id]) if node.id in LITERAL_NAMES else node
