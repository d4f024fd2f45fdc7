"""A causal LM with its tokenizer, and which of its tokens are items."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lwa_helpers.errors import LwaError
from lwa_helpers.models.layers import unwrapped, weight_of, without_runners

ITEMS_FILE = "items.json"


@dataclass(frozen=True)
class ItemTokens:
    """Which tokens of a model are items, and how the model was trained to read a history of them.

    Attributes:
        ids: The catalogue's item ids. Item i is token first + i.
        first: The token of the first item.
        reading: How the model reads a history: as "items" (a token each), as "titles" (text) or as "hybrid" (tokens, of
            which the newest `text_items` are followed by their titles).
        text_items: Number of newest items with a title in the "hybrid" reading.
        history_items: Number of newest items of a history that the model reads.
    """

    ids: Sequence[str]
    first: int = 0
    reading: Literal["items", "hybrid", "titles"] = "items"
    text_items: int = 0
    history_items: int = 50

    @property
    def tokens(self) -> slice:
        """The columns of the logits that belong to items."""
        return slice(self.first, self.first + len(self.ids))

    def save(self, directory: str | Path) -> None:
        """Write items.json."""
        text = json.dumps(asdict(self) | {"ids": list(self.ids)})
        (Path(directory) / ITEMS_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, directory: str | Path) -> ItemTokens | None:
        """Return what items.json holds, or None if there is no such file.

        Args:
            directory: The folder of the checkpoint.

        Raises:
            LwaError: If the file is not what `save` writes.
        """
        path = Path(directory) / ITEMS_FILE
        if not path.is_file():
            return None
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            raise LwaError(f"{path} is not a list of item tokens as lwa writes it: tune the model again") from None


@dataclass
class LanguageModel:
    """A causal LM in float32 on the CPU with its tokenizer.

    Attributes:
        name: The model's name in messages and results.
        model: The causal LM.
        tokenizer: Its tokenizer.
        sha256: What identifies the weights that the model came from.
        prompt: How the model is asked to write: see ModelSpec.
        items: The item tokens at the end of the vocabulary; None for a model of text alone.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sha256: str
    prompt: Literal["chat", "plain"] | None = None
    items: ItemTokens | None = None

    @property
    def pad_id(self) -> int:
        """The token used for padding, one that the model has a row for.

        Its value never matters, because attention is masked there.
        """
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        rows = text_rows(self.model)
        return next(i for i in ids if i is not None and i < rows)

    def save(self, directory: str | Path) -> None:
        """Write a plain transformers checkpoint, without the wrappers of the model; adapters are merged into it.

        Args:
            directory: The folder.
        """
        plain(self.model).save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)
        if self.items:
            self.items.save(directory)


def text_rows(model: nn.Module) -> int:
    """Return how many tokens a model can read and write: the rows that its input embedding and its head both have.

    Mllama's input embedding has more rows than its head, for images.
    """
    inner: Any = unwrapped(model)
    ends = [inner.get_input_embeddings(), inner.get_output_embeddings()]
    return min(len(weight_of(end)) for end in ends if end is not None)


def plain(model: Any) -> Any:
    """Return the transformers model inside wrappers; a model with PEFT adapters is copied and they are merged."""
    model = without_runners(model)
    if not hasattr(model, "peft_config"):
        return model
    from lwa_helpers.models.adapters import merged  # peft takes seconds to import

    return merged(copy.deepcopy(model))
