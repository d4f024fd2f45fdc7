"""Which of a run's numbers are a reference's, which lie within its intervals, and which have changed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from lwa_helpers.errors import LwaError

KINDS = ("identical", "within noise", "changed", "missing", "new")
_MACRO = re.compile(r"\\newcommand\{\\([A-Za-z]+)\}\{(.*)\}$")
_END = re.compile(r"(Low|High)$")
_NUMBER = re.compile(r"[-+]?\d[\d.,]*")


def compare(run: str, reference: str, ignore: str | None = None) -> dict[str, list[dict]]:
    """Sort every number by whether it is the reference's.

    A number is "identical" when it is printed the same, "within noise" when the reference has an interval of it (the
    numbers NAMELow and NAMEHigh) in which it lies, and else "changed". The ends of an interval are judged by their
    estimate, and the sentence of a verdict by its words, because its numbers stand by themselves too. A number is
    "missing" when only the reference has it, and "new" when only the run has it.

    Args:
        run: a results folder, a results.tex or a manifest.json.
        reference: likewise.
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
    found: dict[str, list[dict]] = {kind: [] for kind in KINDS}
    for name in sorted(ours.keys() | theirs.keys()):
        if not (left_out and left_out.search(name)):
            entry = {"name": name, "expected": theirs.get(name), "obtained": ours.get(name)}
            found[_kind(name, ours, theirs)].append(entry)
    return found


def _kind(name: str, ours: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    if name not in ours or name not in theirs:
        return "new" if name in ours else "missing"
    if ours[name] == theirs[name]:
        return "identical"
    if name.endswith("Sentence"):
        return "within noise" if _words(ours[name]) == _words(theirs[name]) else "changed"
    estimate = _END.sub("", name)
    parts = [ours.get(estimate), *(theirs.get(estimate + end) for end in ("Low", "High"))]
    value, low, high = (None if part is None else _value(part) for part in parts)
    inside = value is not None and low is not None and high is not None and low <= value <= high
    return "within noise" if inside else "changed"


def _words(sentence: str) -> str:
    return _NUMBER.sub("", _plain(sentence))


def _plain(text: str) -> str:
    r"""Return a printed value without the marks of LaTeX: "1\,682" is 1682, "$-$0.3" is -0.3."""
    return re.sub(r"\\,|\\%|\$", "", text)


def _value(text: str) -> float | None:
    r"""Return the number in a printed value, such as "1\,682" or "93.2\%"; None when it is words."""
    whole = _NUMBER.fullmatch(_plain(text).strip())
    return float(whole[0].replace(",", "")) if whole else None


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
    for kind in ("changed", "missing", "new", "within noise"):
        lines += [f"  {kind:12} {e['name']}: expected {e['expected']}, obtained {e['obtained']}" for e in found[kind]]
    return "\n".join(lines)


def agrees(found: dict[str, list[dict]]) -> bool:
    """Whether no number has changed and none is missing."""
    return not (found["changed"] or found["missing"])
