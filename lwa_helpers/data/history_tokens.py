"""A user's history as a language model reads it: one token per item, titles as text, or both."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lwa_helpers.data.prompts import Prompt
from lwa_helpers.errors import LwaError
from lwa_helpers.models.vocabulary import check_covered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lwa_helpers.models.language_model import LanguageModel


def encode(tokenizer: PreTrainedTokenizerBase, header: str, lines: Sequence[str]) -> tuple[list[int], list[list[int]]]:
    """Tokenise a header and each line separately.

    Special tokens are neither added to a line nor recognised inside it.

    Args:
        tokenizer: the tokenizer of the model.
        header: the text before the lines.
        lines: the texts of the items.

    Returns:
        The token ids of the header and those of each line. The header starts with the beginning-of-text token if the
        tokenizer adds one.
    """
    first, *rows = tokenizer([header, *lines], add_special_tokens=False, split_special_tokens=True)["input_ids"]
    begin = [tokenizer.bos_token_id]
    return (begin if tokenizer("")["input_ids"][:1] == begin else []) + first, rows


def check_items(histories: Iterable[Iterable[int]], n_items: int) -> None:
    """Raise ValueError for an item index outside a catalogue of n_items items."""
    for history in histories:
        if wrong := [item for item in history if not 0 <= item < n_items]:
            raise ValueError(f"item {wrong[0]} is outside the catalogue: indices are 0 to {n_items - 1}")


@dataclass(frozen=True)
class Reading:
    """A catalogue as tokens, tokenised once.

    Attributes:
        kind: what an item of a history becomes. "items": its own token. "titles": its title and line break as text.
            "hybrid": its token, followed by its title if it is one of the newest `text_items`.
        header: the tokens before every history, so that a list of titles is a whole prompt; empty for "items".
        lines: the tokens of each title and its line break; empty for "items".
        first: the token of item 0; the token of item i is first + i. None for a model without item tokens.
        text_items: the number of newest items that "hybrid" adds titles to.
    """

    kind: Literal["items", "hybrid", "titles"]
    header: list[int]
    lines: list[list[int]]
    first: int | None
    text_items: int = 0

    @classmethod
    def of(cls, titles: Sequence[str], lm: LanguageModel, prompt: Prompt) -> Reading:
        """Tokenise a catalogue as a model reads it: by its item tokens if it has any, else by titles.

        Raises LwaError for a title outside the model's trimmed vocabulary.

        Args:
            titles: the titles of the items; in the order of the model's item tokens if it has any.
            lm: the model.
            prompt: the template, which supplies the header and the separator.

        Returns:
            The catalogue as tokens.
        """
        items = lm.items
        if items is None:
            texts = [prompt.header, *(title + prompt.separator for title in titles)]
            check_covered(lm.tokenizer, texts)
            return cls("titles", *encode(lm.tokenizer, texts[0], texts[1:]), None)
        if items.reading == "items":
            return cls("items", [], [[]] * len(titles), items.first)
        # A title with its line break would be read as the item's own token, so the line break is encoded apart.
        texts = [prompt.header.removesuffix(prompt.separator), *titles, prompt.separator]
        check_covered(lm.tokenizer, texts)
        header, (*lines, end) = encode(lm.tokenizer, texts[0], texts[1:])
        return cls(items.reading, header + end, [line + end for line in lines], items.first, items.text_items)

    def piece(self, item: int, age: int) -> list[int]:
        """Return the tokens of an item in a history; age 1 is the newest item. Titles are never cut."""
        if self.kind == "titles":
            return self.lines[item]
        assert self.first is not None  # only a catalogue read as titles lacks item tokens
        return [self.first + item, *(self.lines[item] if age <= self.text_items else ())]

    def pieces(self, history: Sequence[int]) -> list[list[int]]:
        """Return the tokens of each item of a history, oldest first."""
        return [self.piece(item, age) for item, age in zip(history, range(len(history), 0, -1))]

    def start(self, history: Sequence[int], max_items: int, max_tokens: int | None) -> int:
        """Return the smallest s such that history[s:] fits both budgets; items are never split."""
        start, used = len(history), len(self.header)
        while start > max(0, len(history) - max_items):
            used += len(self.piece(history[start - 1], len(history) - start + 1))
            if max_tokens is not None and used > max_tokens:
                break
            start -= 1
        return start

    def prompt(self, history: Sequence[int], max_items: int | None = None, max_tokens: int | None = None) -> list[int]:
        """Build the prompt after which the model predicts the next item.

        Raises ValueError for an item outside the catalogue.

        Args:
            history: item indices, oldest first.
            max_items: maximum number of items in the prompt; None for no limit.
            max_tokens: maximum number of tokens in the prompt; None for no limit.

        Returns:
            The tokens of the header and of the newest items that fit both budgets.
        """
        check_items([history], len(self.lines))
        newest = history[self.start(history, max_items or len(history), max_tokens) :]
        return self.header + [token for piece in self.pieces(newest) for token in piece]

    def check_budget(self, max_tokens: int | None) -> None:
        """Raise LwaError unless max_tokens holds the header and the two longest items, so that no item need be cut."""
        longest = sorted((len(self.piece(item, 1)) for item in range(len(self.lines))), reverse=True)[:2]
        if max_tokens is not None and max_tokens < (needed := len(self.header) + sum(longest)):
            raise LwaError(
                f"{max_tokens} tokens cannot hold the header and the two longest titles; "
                f"set max_tokens and tokens_per_batch to at least {needed}"
            )
