"""The prompt that asks a local model: its own chat template, mended where that refuses or drops a message."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product
from typing import Any

from transformers import PreTrainedTokenizerBase

from lwa_helpers.errors import LwaError

TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
Messages = Sequence[dict[str, Any]]


def plain_prompt(messages: Messages) -> str:
    """Return the contents of messages as paragraphs, for a model without a chat template."""
    return "".join(f"{message['content']}\n\n" for message in messages)


def chat_prompt(tokenizer: PreTrainedTokenizerBase, messages: Messages, name: str) -> str:
    """Return a chat by the tokenizer's template, up to where the answer begins.

    Some templates refuse a system message (Gemma 1 and 2, Mistral 0.1), drop it without a word, take contents only as
    lists of parts, or need tokens that the tokenizer lacks. The first of these chats that comes out whole is used: the
    messages as they are, with empty texts for missing tokens, with contents as lists of parts; then all of these again
    with the system's text before the user's in one message.

    Args:
        tokenizer: the tokenizer, which has a chat template.
        messages: a system message and a user message.
        name: the model, for error messages.

    Raises:
        LwaError: if no chat comes out whole.
    """
    problem: Exception | str = "it drops the question"
    for asked, given in product(_forms(messages), ({}, _fillers(tokenizer))):
        try:
            text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True, **given)
        except Exception as error:  # a template is a program of the model's author, which may raise anything
            problem = problem if isinstance(problem, Exception) else error
            continue
        if _holds(str(text), messages):
            return str(text)
    cause = problem if isinstance(problem, Exception) else None
    reason = (str(problem).splitlines() or [type(problem).__name__])[0]
    raise LwaError(
        f"model {name!r}: its chat template cannot ask the question ({reason}): "
        "give it an entry with `prompt: plain` in model_config.yaml, or a tokenizer with another template"
    ) from cause


def _holds(text: str, messages: Messages) -> bool:
    """Return whether a text holds the contents of messages, and none as Python would print a list of parts."""
    whole = _letters(text)
    return all(_letters(message["content"]) in whole for message in messages) and "{'type': 'text'" not in text


def _forms(messages: Messages) -> list[Messages]:
    """Return the messages in the forms that templates know, the usual one first."""
    together = [{"role": "user", "content": "\n\n".join(message["content"] for message in messages)}]
    return [form for chat in (messages, together) for form in (chat, _in_parts(chat))]


def _in_parts(messages: Messages) -> Messages:
    return [message | {"content": [{"type": "text", "text": message["content"]}]} for message in messages]


def _fillers(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return empty values for what a template may take for granted."""
    missing = {token: "" for token in TOKENS if getattr(tokenizer, token, None) is None}
    return {"tools": [], "documents": [], **missing}


def _letters(text: str) -> str:
    """Return the letters and digits of a text, which templates leave alone where they strip or escape."""
    return re.sub(r"\W+", "", text)
