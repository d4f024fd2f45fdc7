"""Settings as people type them: 1e-4, No, None or 0,1 become values of the type that the setting's field has."""

from __future__ import annotations

import csv
import difflib
from collections.abc import Callable, Iterator, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from lwa_helpers.config import ExperimentConfig
from lwa_helpers.errors import LwaError

NOTHING = {"", "none", "null", "~"}
BOOLEANS = {
    **dict.fromkeys(("true", "yes", "on", "y", "t", "1"), True),
    **dict.fromkeys(("false", "no", "off", "n", "f", "0"), False),
}
BRACKETS = ("[]", "()")
QUOTES = ('""', "''")


def parse_overrides(assignments: list[str]) -> dict[str, Any]:
    """Read settings given on the command line: ["seed=1", "data.name=No"] becomes {"seed": 1, "data.name": "No"}.

    Args:
        assignments: each KEY=VALUE. The field named by the key decides what its value means (see `value_of`).

    Returns:
        The value of each key.

    Raises:
        LwaError: for an assignment without a key or "=", a key that is given twice, and keys that `typed` refuses.
    """
    overrides: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        key = key.strip()
        if not (key and equals):
            raise LwaError(f"--set {assignment!r}: write it as KEY=VALUE, such as --set data.name=All_Beauty")
        if key in overrides:
            raise LwaError(f"--set {key} is given twice, as {overrides[key]!r} and as {value!r}: keep one of them")
        overrides[key] = value
    return typed(overrides)


def typed(overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    """Read settings that are given as texts; values that are none stay as they are.

    Args:
        overrides: values by dotted name.

    Returns:
        The same, in which every text has become a value of its field's type where it can.

    Raises:
        LwaError: for anything but a mapping, and for a key that names no field, with the names that are closest to it.
    """
    if not isinstance(overrides or {}, Mapping):
        raise LwaError(f"overrides = {overrides!r}: give settings by name, such as {{'data.name': 'All_Beauty'}}")
    return {key: _typed(key, _field_type(str(key)), value) for key, value in (overrides or {}).items()}


def value_of(kind: Any, text: str) -> Any:
    """Return the value that a text stands for in a field of the given type.

    A text field takes the text as it was typed; quotes around all of it are dropped. "None" means none only where the
    field may be none. A list's items are separated by commas, with or without brackets. Numbers may be written as
    Python writes them (1e-4, 1_000, 0x10).

    Args:
        kind: the type, as a field of ExperimentConfig declares it.
        text: what was typed.

    Raises:
        ValueError: if the text is no value of that type.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return value_of(parts[0], text)
    if origin in (Union, UnionType):
        return _first_fit(parts, text)
    if origin is Literal:
        return {str(choice).lower(): choice for choice in parts}.get(_bare(text).lower()) or _refuse(text)
    if origin is list:
        return [value_of(parts[0], item) for item in _items(text)]
    return _READERS.get(kind, _refuse)(_bare(text))


def _typed(key: str, kind: Any, value: Any) -> Any:
    """Return the value of one override; what no value of the type can be made of is left for the validation to name."""
    is_list = get_origin(kind) is list
    if isinstance(value, str):
        if kind is str and not value.strip():
            raise LwaError(f"{key} = {value!r}: no value is given; write {key}=VALUE")
        try:
            value = _items(value) if is_list else value_of(kind, value)
        except ValueError:
            return value
    elif kind is str:
        raise LwaError(
            f"{key} = {value!r}: a text is needed; write it in quotes, for YAML reads No, ~ and 007 otherwise"
        )
    if is_list and isinstance(value, list):
        return [_typed(key, get_args(kind)[0], item) for item in value]
    return value


def _field_type(key: str) -> Any:
    """Return the type of the field with a dotted name. Raises LwaError where there is none, or a whole section."""
    if key == "profile":
        raise LwaError("profile is no setting of a profile: choose it with --profile")
    fields = dict(_fields(ExperimentConfig))
    if key not in fields:
        raise LwaError(_unknown(key, list(fields)))
    return fields[key]


def _fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and the type of each field, the fields of sections included."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _fields(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field.annotation


def _unknown(key: str, names: list[str]) -> str:
    """Say what is wrong with a key that names no field, and which fields it may mean."""
    if inside := [name for name in names if name.startswith(f"{key}.")]:
        return f"{key}: a section, not a setting; name one of its settings: {', '.join(inside)}"
    section, _, field = key.rpartition(".")
    sections = {name.rpartition(".")[0] for name in names}
    wrong = f"no section {section!r}" if section not in sections else "no such setting"
    same = [name for name in names if name.rpartition(".")[2] == field.lower()]
    close = same or difflib.get_close_matches(key.lower().replace("-", "_"), names, n=3, cutoff=0.75)
    known = f"did you mean {' or '.join(close)}?" if close else "lwa_helpers/configs/experiment_config.yaml lists them"
    return f"{key}: {wrong}; {known}"


def _first_fit(kinds: tuple[Any, ...], text: str) -> Any:
    if NoneType in kinds and _bare(text).lower() in NOTHING:
        return None
    for kind in kinds:
        try:
            return value_of(kind, text)
        except ValueError:
            continue
    return _refuse(text)


def _items(text: str) -> list[str]:
    """Split a list as it was typed: [0, 1] or 0,1; a comma between quotes separates nothing."""
    inner = text.strip().replace("\n", ",")
    if inner[:1] in ("[", "(") or inner[-1:] in ("]", ")"):
        inner = inner[1:-1] if inner[0] + inner[-1] in BRACKETS else _refuse(text)
    quote = "'" if "'" in inner and '"' not in inner else '"'
    items = next(csv.reader([inner], skipinitialspace=True, quotechar=quote), [])
    return [item.strip() for item in items if item.strip()]


def _bare(text: str) -> str:
    """Return a text without the space around it, and without quotes if both of its ends are quoted."""
    text = text.strip()
    return text[1:-1] if len(text) > 1 and text[0] + text[-1] in QUOTES else text


def _boolean(text: str) -> bool:
    return BOOLEANS[text.lower()] if text.lower() in BOOLEANS else _refuse(text)


def _whole(text: str) -> int:
    """Read 1000, 1_000, 007, 0x3e8 or 1e3."""
    for read in (int, lambda number: int(number, 0)):
        try:
            return read(text)
        except ValueError:
            continue
    number = float(text)
    return int(number) if number.is_integer() else _refuse(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float(int(text, 0))


def _refuse(text: str) -> Any:
    raise ValueError(f"{text!r} is no value of this type")


_READERS: dict[Any, Callable[[str], Any]] = {bool: _boolean, int: _whole, float: _number, str: str}
