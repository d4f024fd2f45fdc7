"""Text of a user: a header, then one title per line."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lwa_helpers.config import read_yaml
from lwa_helpers.errors import LwaError


@dataclass(frozen=True)
class Prompt:
    """A template: header + title + separator + title + separator …

    A cleaned title is one line, so no title can hold the separator. Raises LwaError when the header is empty or does
    not end with the separator (the header's last token is where a user without history is asked for the first item).
    """

    header: str
    separator: str = "\n"

    def __post_init__(self) -> None:
        if not self.separator or self.separator.strip("\n"):
            raise LwaError(f"the prompt's separator must be made of line breaks, not {self.separator!r}")
        if not self.header.endswith(self.separator):
            raise LwaError(f"configs/prompts.yaml: header {self.header!r} must end with {self.separator!r}")

    def history_text(self, titles: Iterable[str]) -> str:
        """The whole text of a user who had these titles, oldest first."""
        return self.header + "".join(title + self.separator for title in titles)


def load_templates() -> dict[str, Prompt]:
    """Return the templates of configs/prompts.yaml by name; LwaError names one with a wrong field."""
    templates = {}
    for name, fields in read_yaml("prompts.yaml").items():
        if not isinstance(fields, dict) or set(fields) - {"header", "separator"} or "header" not in fields:
            raise LwaError(f"configs/prompts.yaml: {name} needs `header` and may have `separator`, nothing else")
        templates[name] = Prompt(**fields)
    return templates


def prompt_for(name: str) -> Prompt:
    """The template of a dataset: the one under its own name, else the `amazon` one, which fits any shop."""
    templates = load_templates()
    return templates.get(name, templates["amazon"])
