"""A ranking in an answer that is not the JSON asked for: found where it is unambiguous, else refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence, Set
from typing import Any

import yaml

from lwa_helpers.data.titles import clean_title
from lwa_helpers.teachers.readable import as_title, readable

LONGEST = 50_000  # characters beside the thinking; no answer to a question of ours is that long
DEEPEST = 5  # objects or strings around a ranking
_JSON = json.JSONDecoder(strict=False)  # which allows line breaks in strings
_FENCE = re.compile(r"^\s*(?:```|~~~)[^\n{\[]*|(?:```|~~~)\s*$")
_START = re.compile(r"\{(?=\s*[\"'\w])|\[(?=\s*[\"'\w{#])")
_LOOSE = re.compile(r"\{\s*[\"']?ranking[\"']?\s*:\s*\[[^][{}]*\]\s*,?\s*\}|\[[^][{}]*\]", re.IGNORECASE)
_END_OF_LINE = re.compile(r"[ \t.`*}]*(?:\n|\Z)")
_NUMBER = re.compile(r"(?:(?:candidate|number|item)\s*)?#?\s*(\d{1,9})\.?", re.IGNORECASE)
_NUMBERED = re.compile(r"#?(\d{1,9})\s*[.:)-]\s*(.+)")
_NUMBERS = re.compile(r"\s*#?\d{1,9}(?:\s*,\s*#?\d{1,9})+\s*")


class UnreadableAnswer(ValueError):
    """The text holds no ranking, or names no candidate."""


def find_ranking(text: str, n: int, candidates: Sequence[str] = (), history: Sequence[str] = ()) -> list[int]:
    """Return the numbers of the candidates that an answer names, best first, where it is not the JSON asked for.

    These are found:

    * JSON in a fence, after thinking or amid prose; a list in single quotes or with a comma at its end; a ranking
      inside further objects, or as JSON in a string; a list alone, which amid prose must end a line and name each
      candidate once.
    * Candidates written as "2", 2.0, "#2", "candidate 2", {"number": 2}, or by a title that one candidate alone has.

    Of several objects the last one that names a candidate counts, since a model that gives several has thought again.
    A list alone counts only if there is no object. Thinking and quoted titles are not searched.

    Args:
        text: the answer.
        n: number of candidates.
        candidates: their titles, or none where they are not known.
        history: the titles that the user chose.

    Returns:
        The numbers as they stand there; what names no candidate is 0.

    Raises:
        UnreadableAnswer: if there is no ranking, it names no candidate, or it can be read in two ways.
    """
    shown = re.sub(" {9,}", " ", readable(text, [*candidates, *history]))
    if len(shown) > LONGEST:
        raise UnreadableAnswer(f"{len(shown)} characters long: {text[:80]!r}")
    titles = [clean_title(title) for title in candidates]
    quoted = {*titles, *candidates, *history, *map(clean_title, history)}
    problem = 'not of the form {"ranking": [integers]}'
    for entries, certain in _lists(text, shown, quoted):
        try:
            numbers = [_number(entry, titles, n) for entry in entries]
        except UnreadableAnswer as error:
            problem = str(error)
            continue
        if any(1 <= number <= n for number in numbers) if certain else sorted(numbers) == list(range(1, n + 1)):
            return numbers
        problem = f"names none of the {n} candidates" if certain else problem
    raise UnreadableAnswer(f"{problem}: {text[:80]!r}")


def _lists(text: str, shown: str, quoted: Set[str]) -> Iterator[tuple[list[Any], bool]]:
    """Yield the lists that may be the ranking, the likeliest first, and whether they are without doubt meant as one.

    Args:
        text: the answer.
        shown: the part of it that may be searched.
        quoted: titles, which are no JSON in a string.
    """
    for whole in (text, _FENCE.sub("", shown)):
        value = _decoded(whole)
        if value is not None:
            entries = _entries(value, quoted)
            yield from [] if entries is None else [(entries, True)]
            return
    found = list(_amid(shown))[::-1]
    for kind in (dict, list):
        for value in found:
            entries = _entries(value, quoted) if isinstance(value, kind) else None
            if entries is not None:
                yield entries, kind is dict


def _amid(text: str) -> Iterator[Any]:
    """Yield the objects, and the lists that end a line, that stand in a text and not inside another one of them."""
    at = 0
    while start := _START.search(text, at):
        value, at = _value_at(text, start.start())
        if isinstance(value, dict) or (isinstance(value, list) and _END_OF_LINE.match(text, at)):
            yield value


def _value_at(text: str, start: int) -> tuple[Any, int]:
    """Return the object or list that begins at a bracket and its end; None and the next character if there is none."""
    try:
        return _JSON.raw_decode(text, start)
    except RecursionError:
        return None, len(text)
    except ValueError:
        loose = _LOOSE.match(text, start)
    try:
        return (yaml.safe_load(loose[0]), loose.end()) if loose else (None, start + 1)
    except (yaml.YAMLError, ValueError):
        return None, start + 1


def _decoded(text: str) -> Any:
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None


def _entries(value: Any, quoted: Set[str], depth: int = 0) -> list[Any] | None:
    """Return the list that a value holds under "ranking", or is; None if it holds none, or several."""
    if isinstance(value, str) and as_title(value) not in quoted:
        value = value.split(",") if _NUMBERS.fullmatch(value) else _decoded(value)
    if depth > DEEPEST or not isinstance(value, (dict, list)):
        return None
    if isinstance(value, list):
        inside = value[0] if len(value) == 1 else None
        nested = isinstance(inside, list) or (isinstance(inside, dict) and "ranking" in _by_name(inside))
        return _entries(inside, quoted, depth + 1) if nested else value
    if "ranking" in _by_name(value):
        return _entries(_by_name(value)["ranking"], quoted, depth + 1)
    found = [_entries(inner, quoted, depth + 1) for inner in value.values() if isinstance(inner, dict)]
    found = [entries for entries in found if entries is not None]
    return found[0] if len(found) == 1 else None


def _by_name(value: dict[Any, Any]) -> dict[str, Any]:
    return {str(key).strip().lower(): inner for key, inner in value.items()}


def _number(entry: Any, titles: Sequence[str], n: int) -> int:
    """Return the number of the candidate that an entry of a list names, 0 if it is a text that names none.

    Raises:
        UnreadableAnswer: if the entry names two candidates, or is of a kind that names none.
    """
    if isinstance(entry, dict):
        fields = _by_name(entry)
        named = {_number(fields[key], titles, n) for key in ("number", "candidate", "id", "title") if key in fields}
        found = named - {0} or named
        if len(found) == 1:
            return found.pop()
    elif isinstance(entry, str):
        return _named(as_title(entry), titles, n)
    elif type(entry) is int or (isinstance(entry, float) and entry.is_integer()):
        return int(entry)
    raise UnreadableAnswer(f"{str(entry)[:40]!r} is not the number of one candidate")


def _named(text: str, titles: Sequence[str], n: int) -> int:
    """Return the number of the candidate that a text names by its title, its number or both; 0 if it names none.

    Raises:
        UnreadableAnswer: if the text names two candidates: two have this title, or number and title contradict.
    """
    numbers = {place for place, title in enumerate(titles, start=1) if title == text}
    if alone := _NUMBER.fullmatch(text):
        numbers |= {int(alone[1])} & set(range(1, n + 1))
    elif (both := _NUMBERED.fullmatch(text)) and not numbers:
        numbers = {place for place, title in enumerate(titles, start=1) if title == both[2]}
        numbers |= {int(both[1])} if numbers else set()
    if len(numbers) > 1:
        raise UnreadableAnswer(f"{text[:40]!r} names more than one candidate")
    return numbers.pop() if numbers else 0
