"""Numbers and frames as LaTeX: escaped text, intervals, booktabs tables, and the macros that the paper's text uses."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from lwa_helpers.errors import LwaError

ABSENT = "--"  # stands for a value that was not measured; the table's note says why

ESCAPES = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "×": r"\ensuremath{\times}",
    "≥": r"\ensuremath{\geq}",
    "≤": r"\ensuremath{\leq}",
    "−": r"\ensuremath{-}",
}


def escape(text: str) -> str:
    """Return text for LaTeX: special characters escaped, control characters as spaces, those outside cp1252 as "?"."""
    return "".join(_escape_character(c) for c in " ".join(str(text).split()))


def _escape_character(character: str) -> str:
    if character in ESCAPES:
        return ESCAPES[character]
    if not character.isprintable():
        return " "
    return character if character.encode("cp1252", "ignore") else "?"


def format_number(value: float, spec: str = "{:.3f}") -> str:
    """Return a number in LaTeX, with a true minus sign.

    Args:
        value: the number.
        spec: format string.

    Raises:
        LwaError: if the value is None, NaN, infinite, a bool or a string.
    """
    try:
        finite = not isinstance(value, (bool, str)) and math.isfinite(value)
    except TypeError:
        finite = False
    if not finite:
        raise LwaError(f"{value!r} is not a finite number: the step that measures it failed or has not run")
    return re.sub(r"^-", "$-$", escape(spec.format(value)))


def interval(value: float, low: float, high: float, spec: str = "{:.3f}") -> str:
    """Return `value [low, high]`; an LwaError if a number is missing or `low` exceeds `high`."""
    return f"{format_number(value, spec)} {bounds(low, high, spec)}"


def bounds(low: float, high: float, spec: str = "{:.3f}") -> str:
    """Return `[low, high]`. A missing number is an LwaError.

    Args:
        low: lower bound.
        high: upper bound.
        spec: format string.

    Raises:
        LwaError: if `low` exceeds `high`.
    """
    text = f"[{format_number(low, spec)}, {format_number(high, spec)}]"
    if low > high:
        raise LwaError(f"interval {text} runs backwards")
    return text


def booktabs(
    frame: pd.DataFrame,
    formats: Mapping[str, str],
    best: Mapping[str, str] | None = None,
    headers: Mapping[str, str] | None = None,
) -> str:
    """Return a frame as a booktabs `tabular`.

    Columns in `formats` are numbers; all others are text, which is escaped. A missing value prints as `--`. A column
    that the frame lacks is an LwaError that names it.

    Args:
        frame: the rows of the table.
        formats: format string of each column of numbers. If the frame has columns `<column>_low` and `<column>_high`,
            they are printed as the 95 % interval of `<column>` in small type.
        best: "max" or "min" for each column whose best value is bold.
        headers: heading of each column; the default is its name.
    """
    best, headers = best or {}, headers or {}
    require(frame, [*formats, *best], "table")
    hidden = {f"{column}_{side}" for column in formats for side in ("low", "high")}
    columns = [c for c in frame.columns if c not in hidden]
    cells = pd.DataFrame({c: text_cells(frame[c]) for c in columns})
    for column in formats:
        cells[column] = number_cells(frame, column, formats[column], best.get(column))
    table = cells.rename(columns=lambda c: escape(headers.get(c, c)))
    alignment = "".join("r" if c in formats else "l" for c in columns)
    return table.style.hide(axis="index").to_latex(hrules=True, column_format=alignment)


def text_cells(column: pd.Series) -> list[str]:
    """Return the cells of a column of text, escaped; missing text is `--`."""
    return [ABSENT if pd.isna(value) else escape(value) for value in column]


def number_cells(frame: pd.DataFrame, column: str, spec: str, best: str | None = None) -> list[str]:
    """Return the cells of a column of numbers, with intervals if the frame has them.

    Args:
        frame: the rows of the table.
        column: name of the column. Its interval is in `<column>_low` and `<column>_high`.
        spec: format string.
        best: "max" or "min" to print every value equal to the best in bold.
    """
    values = pd.to_numeric(frame[column])
    target = {"max": values.max(), "min": values.min(), None: None}[best]
    low, high = frame.get(f"{column}_low"), frame.get(f"{column}_high")
    cells = []
    for row, value in enumerate(values):
        text = ABSENT if pd.isna(value) else format_number(value, spec)
        if best and value == target:
            text = rf"\textbf{{{text}}}"
        if low is not None and high is not None and text != ABSENT:
            text += rf" {{\scriptsize {bounds(low.iloc[row], high.iloc[row], spec)}}}"
        cells.append(text)
    return cells


def require(frame: pd.DataFrame, columns: Sequence[str], what: str) -> None:
    """Check that a frame has the columns that are needed, and at least one row.

    Args:
        frame: the frame.
        columns: the columns that it must have.
        what: what needs them, for the error message.

    Raises:
        LwaError: if a column is missing or there are no rows. The message names all missing columns.
    """
    missing = [c for c in columns if c not in frame.columns]
    if missing:
        present = ", ".join(map(str, frame.columns))
        raise LwaError(f"{what}: missing column {', '.join(missing)}; the frame has {present}")
    if frame.empty:
        raise LwaError(f"{what}: the frame has no rows; run the notebook that writes it again")


def results_tex(numbers: Mapping[str, Any], header: str) -> str:
    r"""Return the content of `results.tex`: one `\newcommand` per number, sorted by name, below a comment.

    Args:
        numbers: LaTeX text of each macro, made by `format_number` or `escape`, by the macro's name.
        header: text of the comment, which says what made the numbers.

    Raises:
        LwaError: if a name has anything but letters, or a value is not a string, is empty, has a bare %, # or line
            break, or has unbalanced braces. Each of these would lose or break the text that follows.
    """
    lines = [f"% {line}".rstrip() for line in header.splitlines()]
    for name in sorted(numbers):
        value = numbers[name]
        if not re.fullmatch(r"[A-Za-z]+", name):
            raise LwaError(f"macro name {name!r}: LaTeX allows letters only")
        if not isinstance(value, str) or not value.strip() or not _closed(value):
            raise LwaError(f"macro {name}: {value!r} is not finished LaTeX text; use format_number or escape")
        lines.append(rf"\newcommand{{\{name}}}{{{value}}}")
    return "\n".join(lines) + "\n"


def _closed(value: str) -> bool:
    """Return whether the braces balance and there is no unescaped %, # or line break."""
    bare = re.sub(r"\\.", "", value)
    depth = 0
    for character in bare:
        depth += (character == "{") - (character == "}")
        if depth < 0 or character in "%\n#":
            return False
    return depth == 0


def macro_name(*words: object) -> str:
    """Return a macro's name, letters only, made of words: "office_2014", "drop_block" -> OfficeTwoZeroOneFourDropBlock.

    Args:
        words: the words. "_", ".", "-", " ", "+" and ">" separate, and digits are spelled.
    """
    digits = dict(enumerate(["Zero", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine"]))
    text = re.sub(r"\d", lambda digit: f" {digits[int(digit[0])]} ", " ".join(map(str, words)))
    return "".join(word[:1].upper() + word[1:] for word in re.split(r"[^A-Za-z]+", text))


def verdict_macros(verdicts: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Return two macros for each verdict recorded by `Run.verdict`, e.g. HOneVerdict and HOneSentence for H1.

    Args:
        verdicts: the outcome and the sentence of each hypothesis. Both are escaped.

    Raises:
        LwaError: if a hypothesis is not one of H1 to H4.
    """
    words = {"H1": "HOne", "H2": "HTwo", "H3": "HThree", "H4": "HFour"}
    if strangers := verdicts.keys() - words.keys():
        raise LwaError(f"hypothesis {', '.join(sorted(strangers))} is unknown: the paper states {', '.join(words)}")
    macros = {}
    for name, verdict in verdicts.items():
        macros[f"{words[name]}Verdict"] = escape(verdict["outcome"])
        macros[f"{words[name]}Sentence"] = escape(verdict["sentence"])
    return macros
