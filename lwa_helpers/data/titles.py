"""Titles as one line of text: cleaned, shortened and distinct."""

from __future__ import annotations

import html
import re
import unicodedata

from lwa_helpers.config import TITLE_LIMIT

TAGS = "a|b|br|div|em|font|h[1-6]|hr|i|img|li|p|small|span|strong|sub|sup|table|td|tr|u|ul"
TAG = re.compile(rf"</?(?:{TAGS})\b[^<>]*>", re.IGNORECASE)


def clean_title(title: str, limit: int = TITLE_LIMIT) -> str:
    """Return a title as `mend_title` cleans it: one line of plain text, at most `limit` characters."""
    return mend_title(title, limit)[0]


def mend_title(title: str, limit: int = TITLE_LIMIT) -> tuple[str, list[str]]:
    """Clean a title to one line of plain text.

    White space, including line breaks, becomes single spaces. Letters that a wrong decoding garbled before publication
    stay as they are.

    Args:
        title: the title as the source has it.
        limit: maximum length, in characters.

    Returns:
        The cleaned title and the names of the repairs. html_titles: entities were resolved, tags removed.
        unprintable_titles: control, bidi, zero-width and other format characters (Unicode Cc, Cf, Cs, Co, Cn) were
        removed. shortened_titles: the title was longer than `limit` and was cut at the last space before it, or at the
        limit itself if its second half has no space.
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
    """Return unique titles: the first of equal ones stays, later ones get the first free of " (2)", " (3)", …."""
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
