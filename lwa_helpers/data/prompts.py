"""A user's history as text: a header, then one title per line."""

from __future__ import annotations

from dataclasses import dataclass

from lwa_helpers.config import read_yaml
from lwa_helpers.errors import LwaError


@dataclass(frozen=True)
class Prompt:
    """A template: the header, then each title followed by the separator.

    A cleaned title is one line, so no title can contain the separator.

    Attributes:
        header: the text before the titles. It must end with the separator: from its last token the model predicts the
            first item of a user without history.
        separator: one or more line breaks.

    Raises:
        LwaError: if the separator is not made of line breaks, or the header does not end with it.
    """

    header: str
    separator: str = "\n"

    def __post_init__(self) -> None:
        if not self.separator or self.separator.strip("\n"):
            raise LwaError(f"the prompt's separator must be made of line breaks, not {self.separator!r}")
        if not self.header.endswith(self.separator):
            raise LwaError(f"configs/prompts.yaml: header {self.header!r} must end with {self.separator!r}")


def load_templates() -> dict[str, Prompt]:
    """Return the templates of configs/prompts.yaml by name; an LwaError names a template with a wrong field."""
    templates = {}
    for name, fields in read_yaml("prompts.yaml").items():
        if not isinstance(fields, dict) or set(fields) - {"header", "separator"} or "header" not in fields:
            raise LwaError(f"configs/prompts.yaml: {name} needs `header` and may have `separator`, nothing else")
        templates[name] = Prompt(**fields)
    return templates


def prompt_for(name: str) -> Prompt:
    """Return the template of a dataset: the one under its own name, else the `amazon` one, which fits any shop."""
    templates = load_templates()
    return templates.get(name, templates["amazon"])
