"""Titles as one line of text: cleaned, shortened and distinct."""

from __future__ import annotations

import html
import re
import unicodedata
from html.entities import html5

from lwa_helpers.config import TITLE_LIMIT
from lwa_helpers.data.page_script import has_text, is_script, without_script
from lwa_helpers.data.values import is_no_text

TAGS = "a|b|br|div|em|font|h[1-6]|hr|i|img|li|p|small|span|strong|sub|sup|table|td|tr|u|ul"
TAG = re.compile(rf"</?(?:{TAGS})\b[^<>]*>", re.IGNORECASE)
ENTITY = re.compile(r"&(?:#\d{1,8}|#[xX][0-9a-fA-F]{1,7}|[A-Za-z][A-Za-z0-9]{1,31});")
AMPERSAND = re.compile(r"&(?:amp;)+")
LONGEST = 10_000  # characters that are looked at, so that no title takes long
NO_TITLE = ("script_titles", "titles_not_text")


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
        The cleaned title and the names of the repairs. html_titles: entities were resolved; tags, comments, scripts and
        styles removed. unprintable_titles: control, bidi, zero-width and other format characters (Unicode Cc, Cf, Cs,
        Co, Cn) were removed. shortened_titles: the title was longer than `limit` and was cut at the last space before
        it, or at the limit itself if its second half has no space. A title of which no text is left is empty, and
        named alone is the reason: script_titles if it was page script or markup without text, titles_not_text if it was
        a word for a missing value, true, false, a list or an object.
    """
    mended, title = [], title[: LONGEST + 10 * limit]
    resolved = ENTITY.sub(_character, AMPERSAND.sub("&", title)) if "&" in title else title
    text = TAG.sub(" ", without_script(resolved)) if "<" in resolved else resolved
    if text != title:
        mended.append("html_titles")
    plain = " ".join(text.split())
    if is_no_text(plain):
        return "", ["titles_not_text"]
    if is_script(text) or ("<" in resolved and not has_text(text)):
        return "", ["script_titles"]
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


def _character(entity: re.Match[str]) -> str:
    """Return what an entity stands for: nothing for what is no character, the entity itself if HTML has none so named.

    Only whole entities count. HTML also knows some without a semicolon, so that "Pen&notebook" would be "Pen¬ebook".
    """
    name = entity[0][1:]
    if name.startswith("#"):
        return html.unescape(entity[0]).replace("\ufffd", "")
    return html5.get(name, entity[0])


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
