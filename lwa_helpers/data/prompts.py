"""Text of a user: a header, then one title per line."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from lwa_helpers.config import TITLE_LIMIT, read_yaml
from lwa_helpers.errors import LwaError

TAGS = "a|b|br|div|em|font|h[1-6]|hr|i|img|li|p|small|span|strong|sub|sup|table|td|tr|u|ul"
TAG = re.compile(rf"</?(?:{TAGS})\b[^<>]*>", re.IGNORECASE)


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


def clean_title(title: str, limit: int = TITLE_LIMIT) -> str:
    """One line of plain text, at most `limit` characters: the title as `mend_title` gives it."""
    return mend_title(title, limit)[0]


def mend_title(title: str, limit: int = TITLE_LIMIT) -> tuple[str, list[str]]:
    """Return a title as one line of plain text, and what had to be mended in it.

    html_titles: entities resolved, tags taken out. unprintable_titles: control, bidi, zero-width and other format
    characters (Unicode Cc, Cf, Cs, Co, Cn) taken out. shortened_titles: longer than `limit`, ended at the last space
    before it (at the limit itself when there is none in its second half). White space, line breaks included, becomes
    single spaces. Letters garbled by a wrong decoding before publication are left as they are.
    """
    mended = []
    text = TAG.sub(" ", html.unescape(title)) if "&" in title or "<" in title else title
    if text != title:
        mended.append("html_titles")
    plain = " ".join(text.split())
    if not plain.isascii() or not plain.isprintable():
        printable = "".join(c for c in plain if unicodedata.category(c)[0] != "C")
        if printable != plain:
            mended.append("unprintable_titles")
        plain = " ".join(printable.split())
    if len(plain) > limit:
        mended.append("shortened_titles")
        cut = plain.rfind(" ", limit // 2, limit + 1)
        plain = plain[: cut if cut > 0 else limit].rstrip()
    return plain, mended


def distinct_titles(titles: list[str]) -> list[str]:
    """Make titles unique: the first of equal ones stays, later ones get the first free of " (2)", " (3)", …"""
    taken = set(titles)
    seen: set[str] = set()
    distinct = []
    for title in titles:
        name, n = title, 1
        while name in seen or (n > 1 and name in taken):
            n += 1
            name = f"{title} ({n})"
        seen.add(name)
        distinct.append(name)
    return distinct
