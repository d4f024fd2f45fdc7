"""A causal LM with its tokenizer, and which of its tokens are items."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lwa_helpers.errors import LwaError

ITEMS_FILE = "items.json"


@dataclass(frozen=True)
class ItemTokens:
    """Which tokens of a model are items, and how it was taught to read a history of them.

    ids: the catalogue's item ids; item i is token first + i. reading: a history is "items" (a token each), "titles" (text) or
    "hybrid": tokens, the newest `text_items` of them followed by their titles. history_items: how many of the newest it reads.
    """

    ids: Sequence[str]
    first: int = 0
    reading: Literal["items", "hybrid", "titles"] = "items"
    text_items: int = 0
    history_items: int = 50

    @property
    def tokens(self) -> slice:
        """The columns of the logits that are items."""
        return slice(self.first, self.first + len(self.ids))

    def save(self, directory: str | Path) -> None:
        """Write items.json."""
        text = json.dumps(asdict(self) | {"ids": list(self.ids)})
        (Path(directory) / ITEMS_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, directory: str | Path) -> ItemTokens | None:
        """Read items.json; None where there is none. Raises LwaError for a file that is not what `save` writes."""
        path = Path(directory) / ITEMS_FILE
        if not path.is_file():
            return None
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            raise LwaError(f"{path} is not a list of item tokens as lwa writes it: tune the model again") from None


@dataclass
class LanguageModel:
    """A causal LM in float32 on the CPU with its tokenizer; `sha256` names the weights it came from.

    items: the item tokens at the end of its vocabulary; None for a model of text alone.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sha256: str
    prompt: Literal["chat", "plain"] | None = None
    items: ItemTokens | None = None

    @property
    def pad_id(self) -> int:
        """Token used for padding (its value never matters: attention is masked there)."""
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(i for i in ids if i is not None)

    def save(self, directory: str | Path) -> None:
        """Write a plain transformers checkpoint."""
        self.model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)
        if self.items:
            self.items.save(directory)
