"""How far a run's numbers are from a reference's."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

from lwa_helpers.errors import LwaError

_MACRO = re.compile(r"\\newcommand\{\\([A-Za-z]+)\}\{(.*)\}$")


def compare(run: str, reference: str, tolerance: float = 0.05, ignore: str | None = None) -> dict[str, list[dict]]:
    """Sort every number into identical, within, changed, missing (not in the run) or new (not in the reference).

    Args:
        run: a results folder, a results.tex or a manifest.json.
        reference: likewise.
        tolerance: relative. A number is within it when |a - b| <= tolerance * |b|, where b is the reference's, and
            identical when it is printed the same.
        ignore: a regular expression; names that it matches are left out (wall times, for example).

    Returns:
        For each kind its numbers, each with its name and as expected and obtained.

    Raises:
        LwaError: when a file is absent or holds no numbers, or `ignore` is no regular expression.
    """
    try:
        left_out = re.compile(ignore) if ignore else None
    except re.error as error:
        raise LwaError(f"--ignore {ignore!r} is no regular expression ({error}); try 'Seconds|Speedup'") from None
    ours, theirs = read_numbers(Path(run)), read_numbers(Path(reference))
    found: dict[str, list[dict]] = {kind: [] for kind in ("identical", "within", "changed", "missing", "new")}
    for name in sorted(ours.keys() | theirs.keys()):
        if not (left_out and left_out.search(name)):
            obtained, expected = ours.get(name), theirs.get(name)
            entry = {"name": name, "expected": expected, "obtained": obtained}
            found[_kind(obtained, expected, tolerance)].append(entry)
    return found


def _kind(obtained: str | None, expected: str | None, tolerance: float) -> str:
    if obtained is None or expected is None:
        return "missing" if obtained is None else "new"
    if obtained == expected:
        return "identical"
    a, b = _value(obtained), _value(expected)
    return "within" if a is not None and b is not None and abs(a - b) <= tolerance * abs(b) else "changed"


def _value(text: str) -> float | None:
    r"""The number in a printed value, such as "1\,682" or "93.2\%"; None when it is words."""
    plain = re.sub(r"\\,|,|\\%|\s", "", text)
    try:
        return float(plain) if math.isfinite(float(plain)) else None
    except ValueError:
        return None


def read_numbers(path: Path) -> dict[str, str]:
    """Numbers as printed, by name, from a results folder, a results.tex or a manifest.json."""
    if path.is_dir():
        path = path / "results.tex"
    if not path.is_file():
        raise LwaError(f"{path} does not exist: give a results folder, a results.tex or a manifest.json")
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix == ".json":
        try:
            numbers = {name: number["text"] for name, number in json.loads(text)["numbers"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise LwaError(f"{path} is not a manifest with numbers") from None
    else:
        numbers = {match[1]: match[2] for line in text.splitlines() if (match := _MACRO.match(line))}
    if not numbers:
        raise LwaError(f"{path} holds no numbers")
    return numbers


def report(found: dict[str, list[dict]]) -> str:
    """One line of counts, then one line for each number that is not identical."""
    lines = [", ".join(f"{len(entries)} {kind}" for kind, entries in found.items())]
    for kind in ("changed", "missing", "new", "within"):
        lines += [f"  {kind:8} {e['name']}: expected {e['expected']}, obtained {e['obtained']}" for e in found[kind]]
    return "\n".join(lines)


def agrees(found: dict[str, list[dict]]) -> bool:
    """Whether no number changed beyond the tolerance and none is missing."""
    return not (found["changed"] or found["missing"])
