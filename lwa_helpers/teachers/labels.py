"""Label-scored ranking: a candidate's score is the log-probability that the model answers with its letter."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lwa_helpers.teachers.answers import KINDS, SETTING, question_messages
from lwa_helpers.teachers.readable import readable
from lwa_helpers.teachers.repair import UnreadableAnswer

if TYPE_CHECKING:
    from ollama._types import Logprob

LABELS = "ABCDEFGHIJKLMNOPQRST"
TOP_LOGPROBS = 20  # the most that Ollama reports for a token

TASK = SETTING + (
    "Name the candidate that the user is most likely to choose next. "
    'Answer with JSON only: {"best": "label of that candidate"}.'
)
_BEFORE_LABEL = re.compile(r'"best"\s*:\s*"')


def label_messages(history: Sequence[str], candidates: Sequence[str]) -> list[dict[str, str]]:
    """Return the chat messages that ask for the best candidate's label; titles are cleaned and escaped for JSON."""
    return question_messages(TASK, history, candidates, "label", LABELS)


def label_schema(n: int) -> dict[str, Any]:
    """Return the JSON schema of an answer {"best": one of the first n labels}."""
    best = {"type": "string", "enum": list(LABELS[:n])}
    return {"type": "object", "properties": {"best": best}, "required": ["best"], "additionalProperties": False}


def answer_tokens(tokens: Sequence[Logprob], content: str) -> Sequence[Logprob]:
    """Return the tokens at the end that spell the answer, without the thinking before it.

    Args:
        tokens: all tokens that the model generated.
        content: text of the answer.
    """
    start, left = len(tokens), len(content)
    while start and left > 0:
        start -= 1
        left -= len(tokens[start].token)
    return tokens[start:]


def read_labels(tokens: Sequence[Logprob], n: int, titles: Sequence[str] = ()) -> tuple[list[float], dict[str, int]]:
    """Return log p(label) of each of n candidates, and the number of faults of each kind.

    The probabilities are those at the label's place in the answer, given the tokens before it. The probabilities of
    tokens that name the same label, with or without the closing quote, are added. As a repair, the labels that the
    server did not report (omitted) share a score just below the lowest one that it did. An answer that is not JSON,
    such as one with prose around it, counts as repaired.

    Args:
        tokens: tokens of the answer with their log-probabilities.
        n: number of candidates.
        titles: titles of the question, which are no answer where the text quotes them.

    Raises:
        UnreadableAnswer: if the text has no label, or fewer than half of the labels were reported.
    """
    text = "".join(token.token for token in tokens)
    repaired = not _is_json(text)
    reported = _alternatives(tokens, readable(text, titles) if repaired else text)
    places = {label: place for place, label in enumerate(LABELS[:n])}
    found: dict[int, float] = {}
    for label, log_p in reported:
        place = places.get(label.strip(' "}'))
        if place is not None:
            found[place] = float(np.logaddexp(found.get(place, -np.inf), log_p))
    if 2 * len(found) < n:
        raise UnreadableAnswer(f"log-probabilities of {len(found)} of {n} labels")
    least = float(np.nextafter(min(log_p for _, log_p in reported), -np.inf))
    counts = {"omitted": n - len(found), "repaired": int(repaired)}
    return [found.get(place, least) for place in range(n)], dict.fromkeys(KINDS, 0) | counts


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _alternatives(tokens: Sequence[Logprob], text: str) -> list[tuple[str, float]]:
    """Return what the model could have said at the label's place.

    Args:
        tokens: tokens of the answer.
        text: what they spell, with blanks for what may not be read.

    Returns:
        For each alternative token, its text from the label's place on, and its log-probability.

    Raises:
        UnreadableAnswer: if the text has no label, or the label has no log-probabilities.
    """
    labels = list(_BEFORE_LABEL.finditer(text))
    start = 0
    for token in tokens:
        within = labels[-1].end() - start if labels else -1  # the last match: thinking may quote an answer
        if 0 <= within < len(token.token):
            same = [other for other in token.top_logprobs or () if other.token[:within] == token.token[:within]]
            return [(other.token[within:], other.logprob) for other in same]
        start += len(token.token)
    raise UnreadableAnswer(f"no label with log-probabilities: {text[:80]!r}")
