"""Items as tokens: a causal LM whose vocabulary ends with one token for each item of a catalogue.

The text of an item's token is its title and a line break, so that a list of titles is a prompt and the next token is a
title. The model stays an ordinary causal LM: its head on these tokens ranks the catalogue, and a checkpoint needs no
code of ours to be loaded, served or exported.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lwa_helpers.errors import LwaError
from lwa_helpers.models.language_model import ItemTokens, LanguageModel, text_rows
from lwa_helpers.models.layers import filled, unwrapped, weight_of
from lwa_helpers.models.vocabulary import (
    BY_LAYER_TABLE,
    holders,
    modality_tokens,
    set_vocabulary,
    trim_vocabulary,
    without_rowless_tokens,
)

ITEM_END = "\n"  # the text of an item's token is its title and this


def with_item_tokens(
    lm: LanguageModel,
    titles: Sequence[str],
    inputs: Tensor,
    outputs: Tensor,
    items: ItemTokens,
    texts: Iterable[str] = (),
) -> LanguageModel:
    """Return a copy of a model whose vocabulary is what `texts` need, then one token for each title.

    Args:
        lm: The model to copy.
        titles: Texts of the item tokens, all different, without the line break that is added.
        inputs: Rows of the items in the input embedding, (N, d).
        outputs: Rows of the items in the head, (N, d). The head's other rows are zero.
        items: What is kept with the model about its items; `first` is set here.
        texts: What the model must still read as text: see trim_vocabulary.

    Raises:
        LwaError: If the tokenizer is not BPE, the head has a bias, or a title is a token already.
    """
    cut = trim_vocabulary(lm, texts)
    model = cut.model
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise LwaError(f"model {lm.name!r} has a head with a bias: item tokens need one without")
    first = text_rows(model)
    tokenizer = with_tokens(cut.tokenizer, titles, first)
    config = _config_with(model.config, first, len(titles))
    state, ends = model.state_dict(), {}
    for name, module in model.named_modules():
        if module is model.get_input_embeddings():
            weight = weight_of(module).detach()
            ends[f"{name}.weight"] = torch.cat([weight[:first], inputs.to(weight), weight[first:]])
        if module is head:
            weight = weight_of(module)
            ends[f"{name}.weight"] = torch.cat([torch.zeros_like(weight), outputs.to(weight)])
        if f"{name}.weight".endswith(BY_LAYER_TABLE):
            weight = weight_of(module).detach()  # items have the row of tokens that have none of their own, the first
            ends[f"{name}.weight"] = torch.cat([weight, weight[:1].expand(len(titles), -1)])
    grown = filled(type(model), config, state | ends, model)
    name = f"{lm.name}-{len(titles)}items"
    return replace(cut, name=name, model=grown, tokenizer=tokenizer, items=replace(items, first=first))


def _config_with(config, first: int, n_items: int):
    """Return a copy of a config with so many more tokens, and with a head of its own."""
    config = copy.deepcopy(config)
    set_vocabulary(config, first + n_items)
    for holder in holders(config):
        holder.tie_word_embeddings = False
    for field, token in modality_tokens(config).items():
        if token >= first:
            setattr(config, field, token + n_items)
    return config


def with_tokens(tokenizer: PreTrainedTokenizerBase, titles: Sequence[str], first: int) -> PreTrainedTokenizerBase:
    """Return a copy of a tokenizer that reads each title and its line break as one token.

    Args:
        tokenizer: The tokenizer to copy.
        titles: The titles, without the line break. Their tokens are first, first + 1, …
        first: The token of the first title.

    Raises:
        LwaError: If a title is a token already, or would not get its number.
    """
    grown = copy.deepcopy(tokenizer)
    if (gap := first - len(grown)) > 0:  # rows of the embedding that no token names
        grown.add_tokens([f"<unused{place}>" for place in range(gap)])
    grown.add_tokens([AddedToken(title + ITEM_END, normalized=False) for title in titles])
    found = grown.convert_tokens_to_ids([title + ITEM_END for title in titles])
    assert isinstance(found, list)  # as it is for a list of tokens
    if wrong := [title for place, title in enumerate(titles) if found[place] != first + place]:
        raise LwaError(f"the title {wrong[0]!r} cannot be a token of its own: the tokenizer has that token already")
    return grown


def title_rows(lm: LanguageModel, titles: Sequence[str]) -> Tensor:
    """Return the mean input embedding of each title's tokens, (N, d)."""
    model: Any = unwrapped(lm.model)
    table = weight_of(model.get_input_embeddings()).detach()
    tokenizer = without_rowless_tokens(lm.tokenizer, len(table))
    rows = tokenizer(list(titles), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return torch.stack([table[torch.tensor(row, device=table.device)].mean(0) for row in rows])
