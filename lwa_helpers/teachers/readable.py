"""What of an answer's text may be read: neither the model's thinking nor the titles that it quotes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from lwa_helpers.data.titles import clean_title

_NAME = r"(?:\w+:)?(?:think|thinking|thoughts?|reason|reasoning|reflect|reflection|analysis|scratchpad|rationale)"
_HEADER = r"<\|channel\|>\s*"  # of a part of an answer in the form of gpt-oss
OPENING = rf"<\|?(?:begin_of_|start_)?{_NAME}(?:\s[^<>]*)?\|?>|\[THINK\]|◁think▷|{_HEADER}(?:analysis|commentary)"
CLOSING = rf"</{_NAME}\s*>|<\|(?:/|end_(?:of_)?){_NAME}\|>|\[/THINK\]|◁/think▷|{_HEADER}final"
_TAG = re.compile(rf"(?P<closing>{CLOSING})|{OPENING}", re.IGNORECASE)

_SYNTAX = re.compile(r"\[.*\]|\{.*\}|<.*>|◁|\"\s*:\s*\"", re.DOTALL)  # what a title must hold to be taken for an answer
_BRACKETS = str.maketrans({sign: chr(0xE000 + i) for i, sign in enumerate("[]{}<>◁▷")})  # which no clean title holds
_QUOTES_TOO = _BRACKETS | {ord('"'): chr(0xE00F)}
_BACK = {ord(disguise): sign for sign, disguise in _QUOTES_TOO.items()}


def readable(text: str, titles: Iterable[str] = ()) -> str:
    """Return an answer of the same length with blanks for its thinking, and without syntax in the titles it quotes.

    Brackets, and quotation marks that stand unescaped, become other characters in a title, so that no title is taken
    for an answer or for thinking. `as_title` turns them back.

    Args:
        text: the answer.
        titles: the titles of the question.
    """
    return _without_thinking(_disguised(text, titles))


def as_title(text: str) -> str:
    """Return a string of a readable answer as the cleaned title that it may be."""
    return clean_title(text.translate(_BACK))


def _disguised(text: str, titles: Iterable[str]) -> str:
    forms = {form for title in titles for form in (title, clean_title(title)) if _SYNTAX.search(form)}
    for title in sorted(forms, key=len, reverse=True):  # a title may hold another one
        escaped = json.dumps(title, ensure_ascii=False)[1:-1]
        for form in (escaped, escaped.replace("<", "\\u003c")):
            text = text.replace(form, form.translate(_BRACKETS))
        text = text.replace(title, title.translate(_QUOTES_TOO))
    return text


def _without_thinking(text: str) -> str:
    """Return a text with blanks for what tags say is thinking.

    Thinking that is never closed goes on to the end. A closing tag alone closes what the prompt has opened.
    """
    shown, end, opened = "", 0, None
    for tag in _TAG.finditer(text):
        if not tag["closing"]:
            opened = tag.start() if opened is None else opened
            continue
        start = end if opened is None else opened
        shown += text[end:start] + " " * (tag.end() - start)
        end, opened = tag.end(), None
    start = len(text) if opened is None else opened
    return shown + text[end:start] + " " * (len(text) - start)
