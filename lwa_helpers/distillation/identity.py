"""What the numbers of tokens and items mean to a model, and whether two models agree on it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn

from lwa_helpers.errors import LwaError
from lwa_helpers.files import sha256_of_text
from lwa_helpers.models.language_model import LanguageModel, text_rows

FILE = "identity.json"


@dataclass(frozen=True)
class Identity:
    """What the numbers of a model's tokens and items mean.

    Attributes:
        name: the model's name in messages.
        tokens: the number of each token that the model has a row for.
        pad: the token used for padding, whose meaning never matters; None if the tokenizer has none.
        items: the item ids of the catalogue in order; None for a model without item tokens.
        first: the token of the first item.
    """

    name: str
    tokens: Mapping[str, int]
    pad: int | None = None
    items: Sequence[str] | None = None
    first: int = 0

    @classmethod
    def of(cls, model: LanguageModel | nn.Module) -> Identity | None:
        """Return the identity of a language model, or None for a model without its tokenizer."""
        if not isinstance(model, LanguageModel):
            return None
        rows = text_rows(model.model)
        tokens = {token: index for token, index in model.tokenizer.get_vocab().items() if index < rows}
        items = model.items
        known = (list(items.ids), items.first) if items else (None, 0)
        return cls(model.name, tokens, model.tokenizer.pad_token_id, *known)

    @property
    def sha256(self) -> str:
        """A hash of all but the name."""
        return sha256_of_text(json.dumps(asdict(self) | {"name": ""}, sort_keys=True))

    def save(self, folder: Path) -> None:
        """Write identity.json to a folder."""
        (folder / FILE).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Identity | None:
        """Return what identity.json in a folder holds, or None if there is no such file."""
        path = folder / FILE
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def check_same_meaning(teacher: Identity | None, student: Identity | None) -> None:
    """Check that tokens and items have the same numbers for teacher and student.

    Tokens that only one of them has do not matter, and neither does the padding token. Where one of them is not known,
    nothing is checked.

    Args:
        teacher: the identity of the teacher.
        student: the identity of the student.

    Raises:
        LwaError: if a number means one thing to the teacher and another to the student.
    """
    if teacher is None or student is None:
        return
    check_same_items(teacher, student)
    if found := _conflict(teacher, student):
        raise LwaError(
            f"teacher {teacher.name!r} and student {student.name!r} have different tokenizers: {found}; "
            "take a teacher with the student's tokenizer, or build the student from this teacher (where the vocabulary "
            "is to be cut, cut the teacher's with trim_vocabulary and build the student from that)"
        )


def check_same_items(one: Identity | None, other: Identity | None) -> None:
    """Check that two models rank the same items in the same order; models without item tokens pass.

    Args:
        one: the identity of a model.
        other: the identity of another.

    Raises:
        LwaError: if their catalogues differ.
    """
    if one is None or other is None or one.items is None or other.items is None:
        return
    if list(one.items) == list(other.items):
        return
    found = f"{len(one.items)} and {len(other.items)} items"
    pairs = enumerate(zip(one.items, other.items))
    if differs := next(((place, pair) for place, pair in pairs if pair[0] != pair[1]), None):
        found = f"item {differs[0]} is {differs[1][0]!r} to the one and {differs[1][1]!r} to the other"
    raise LwaError(f"models {one.name!r} and {other.name!r} rank different catalogues ({found}): tune both on one")


def _conflict(teacher: Identity, student: Identity) -> str | None:
    """Return the first number or token that teacher and student read differently, in words."""
    if teacher.tokens == student.tokens:
        return None
    names = {index: token for token, index in student.tokens.items()}
    for token, index in sorted(teacher.tokens.items(), key=lambda pair: pair[1]):
        if index in (teacher.pad, student.pad):
            continue
        if (other := student.tokens.get(token, index)) != index:
            return f"{token!r} is token {index} to the teacher and {other} to the student"
        if (name := names.get(index, token)) != token:
            return f"token {index} is {token!r} to the teacher and {name!r} to the student"
    return None
