"""Cut a model's vocabulary to what given texts need: rows of embedding and head, and the tokens of the tokenizer."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Container, Iterable
from dataclasses import replace

import torch
from tokenizers import Tokenizer
from transformers import GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lwa_helpers.errors import LwaError, one_line
from lwa_helpers.models.language_model import LanguageModel, plain, text_rows
from lwa_helpers.models.layers import filled

BY_LAYER_TABLE = "embed_tokens_per_layer.weight"  # Gemma 3n and 4 read each token in a table for the layers, too
MODALITY_TOKEN = re.compile(r"(?!bos|eos|pad)\w+_token_(id|index)")
WORDS = "words_kept"  # setting of a cut tokenizer: the words that it cuts into the same tokens as the original


def trim_vocabulary(lm: LanguageModel, texts: Iterable[str]) -> LanguageModel:
    """Return a copy of the model whose vocabulary is what the texts need.

    The kept tokens stay in their order and their logits are the same. A text of `texts` gets the same tokens as before
    (renumbered), because each merge that its tokens are made of is kept. The byte or character alphabet and the special
    tokens stay, so any text can be read and written exactly. A text with another word may be cut into smaller tokens
    than before, on which the model is worse; check_covered refuses such a text. All item tokens stay.

    Args:
        lm: The model to copy.
        texts: The texts that the model must read as before.

    Raises:
        LwaError: If the tokenizer is not BPE, other tensors of the model go by the vocabulary, or `texts` is one text
            instead of several.
    """
    if isinstance(texts, str):
        raise LwaError(f"texts must be a list of texts, not the one text {texts[:40]!r}: put it in brackets")
    texts = list(texts)
    model, rows, items = plain(lm.model), text_rows(lm.model), lm.items
    full = without_rowless_tokens(lm.tokenizer, rows)
    spec = _bpe(lm.name, full)
    # Gemma 3's tokenizer has one token more than the embedding has rows.
    kept = {index for index in kept_tokens(full, spec, texts) if index < rows}
    kept |= {index for index in modality_tokens(model.config).values() if 0 <= index < rows}
    old_ids = sorted(kept | set(range(items.first, items.first + len(items.ids))) if items else kept)
    tokenizer = _renumbered(full, spec, old_ids)
    tokenizer.init_kwargs[WORDS] = sorted({word for text in texts for word in words(full, text)})
    items = replace(items, first=old_ids.index(items.first)) if items else None
    return replace(
        lm, name=f"{lm.name}-{len(old_ids)}V", model=_with_rows(model, old_ids), tokenizer=tokenizer, items=items
    )


def _bpe(name: str, tokenizer: PreTrainedTokenizerBase) -> dict:
    """Return what the tokenizers library writes of a BPE tokenizer.

    Raises:
        LwaError: If the tokenizer is of another kind.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)  # tokenizers written in Python have none
    spec = json.loads(backend.to_str()) if backend else {"model": {"type": type(tokenizer).__name__}}
    if spec["model"]["type"] != "BPE":
        raise LwaError(
            f"model {name!r}: vocabulary trimming needs a BPE tokenizer, this one is {spec['model']['type']}"
        )
    return spec


def without_rowless_tokens(tokenizer: PreTrainedTokenizerBase, rows: int) -> PreTrainedTokenizerBase:
    """Return a tokenizer that reads no text as an added token that the model has no row for.

    Special tokens are not read in texts, so a tokenizer whose only rowless tokens are special is returned as it is.

    Args:
        tokenizer: The tokenizer.
        rows: Number of tokens that the model has rows for.
    """
    added, backend = tokenizer.added_tokens_decoder, getattr(tokenizer, "backend_tokenizer", None)
    if not backend or not any(index >= rows and not token.special for index, token in added.items()):
        return tokenizer
    spec = json.loads(backend.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["id"] < rows]
    return _rebuilt(tokenizer, spec, range(rows))


def words(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """Return the pieces into which a BPE tokenizer cuts a text before it merges; no token crosses their borders."""
    raw = tokenizer.backend_tokenizer
    text = raw.normalizer.normalize_str(text) if raw.normalizer else text
    return [word for word, _ in raw.pre_tokenizer.pre_tokenize_str(text)] if raw.pre_tokenizer else [text]


def check_covered(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> None:
    """Check that a tokenizer with a cut vocabulary was cut for these texts; any other tokenizer passes.

    Args:
        tokenizer: The tokenizer.
        texts: The texts.

    Raises:
        LwaError: If a text has a word that the cut vocabulary was not made for. The message names the first such text.
    """
    if WORDS not in tokenizer.init_kwargs:
        return
    kept = set(tokenizer.init_kwargs[WORDS])
    for text in texts:
        if new := [word for word in words(tokenizer, text) if word not in kept]:
            raise LwaError(
                f"the text {text!r} is outside the model's cut vocabulary "
                f"({new[0]!r} was not in the texts it was cut to): "
                "use the model with an uncut vocabulary, or cut it again with this text among them"
            )


def kept_tokens(tokenizer: PreTrainedTokenizerBase, spec: dict, texts: Iterable[str]) -> list[int]:
    """Return the old ids to keep, in rising order.

    They are the special tokens, the alphabet, the texts' tokens, and the parts from which these are merged. The texts
    are tokenized twice, once with special tokens recognised and once with special tokens spelt out.
    """
    vocabulary = spec["model"]["vocab"]
    parts: dict[str, set[str]] = {}
    for left, right in map(_pair, spec["model"]["merges"]):
        parts.setdefault(left + right, set()).update((left, right))
    names = {index: token for token, index in vocabulary.items()}
    kept = {token["id"] for token in spec["added_tokens"] if token["special"]}
    kept.update(vocabulary[token] for token in tokenizer.all_special_tokens if token in vocabulary)
    bytes_ = [token for token in vocabulary if len(token) == 6 and token.startswith("<0x")]  # "<0x00>" to "<0xFF>"
    waiting = bytes_ or [token for token in vocabulary if len(token) == 1]
    used = _used(tokenizer, list(texts))
    kept.update(used - names.keys())
    waiting += [names[i] for i in used & names.keys()]
    while waiting:
        token = waiting.pop()
        if vocabulary[token] not in kept:
            kept.add(vocabulary[token])
            waiting.extend(parts.get(token, ()))
    return sorted(kept)


def _used(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> set[int]:
    """Return the ids of all tokens of the texts, with special tokens recognised and with special tokens spelt out."""
    ways = [tokenizer(texts, split_special_tokens=spelt)["input_ids"] for spelt in (False, True)] if texts else []
    return {index for rows in ways for row in rows for index in row}


def _pair(merge: str | list[str]) -> tuple[str, str]:
    """Return the two parts of a merge rule, whichever way the file writes it."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _renumbered(tokenizer: PreTrainedTokenizerBase, spec: dict, old_ids: list[int]) -> PreTrainedTokenizerFast:
    """Rebuild the tokenizer on the kept ids."""
    new_id = {old: new for new, old in enumerate(old_ids)}
    model = spec["model"]
    model["vocab"] = {token: new_id[old] for token, old in model["vocab"].items() if old in new_id}
    model["merges"] = [list(p) for p in map(_pair, model["merges"]) if {*p, "".join(p)} <= model["vocab"].keys()]
    spec["added_tokens"] = [
        token | {"id": new_id[token["id"]]} for token in spec["added_tokens"] if token["id"] in new_id
    ]
    post = spec.get("post_processor") or {}
    for part in (post, *post.get("processors", ())):
        for name, token in (part.get("special_tokens") or {}).items():
            if not new_id.keys() >= set(token["ids"]):
                raise LwaError(f"the tokenizer writes {name!r} into every text, and the model has no row for it")
            token["ids"] = [new_id[old] for old in token["ids"]]
        for end in ("sep", "cls"):  # of RoBERTa's, each a token with its number
            if end in part:
                part[end][1] = new_id[part[end][1]]
    return _rebuilt(tokenizer, spec, new_id)


def _rebuilt(tokenizer: PreTrainedTokenizerBase, spec: dict, kept: Container[int]) -> PreTrainedTokenizerFast:
    """Make a tokenizer of a spec, with the settings of another, of whose special tokens only those kept are named."""
    special = tokenizer.special_tokens_map
    ids = {kind: tokenizer.convert_tokens_to_ids(token) for kind, token in special.items()}
    rebuilt = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)),
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
        **{kind: token for kind, token in special.items() if ids[kind] in kept},
    )
    rebuilt.chat_template = getattr(tokenizer, "chat_template", None)
    return rebuilt


def _with_rows(model, old_ids: list[int]):
    """Return a copy of a causal LM with only these rows of its embedding and head.

    The rows of an embedding after those that the head has too (Mllama's, for images) stay at its end.

    Raises:
        LwaError: If other tensors of the model go by the vocabulary.
    """
    config, rows = copy.deepcopy(model.config), text_rows(model)
    set_vocabulary(config, len(old_ids))
    new_id = {old: new for new, old in enumerate(old_ids)}
    generation = copy.deepcopy(model.generation_config) or GenerationConfig()
    for holder in (*holders(config), generation):
        for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(holder, field, _mapped(getattr(holder, field, None), new_id))
    for field, old in modality_tokens(config).items():
        setattr(config, field, new_id[old] if old < rows else old - rows + len(old_ids))
    ends = {id(p) for end in (model.get_input_embeddings(), model.get_output_embeddings()) for p in end.parameters()}
    state = model.state_dict()
    for name, p in model.named_parameters(remove_duplicate=False):
        if id(p) in ends and p.shape[0] >= rows:
            state[name] = state[name][torch.tensor([*old_ids, *range(rows, p.shape[0])], device=p.device)]
        elif name.endswith(BY_LAYER_TABLE):
            # A token beyond the table has its first row.
            state[name] = state[name][torch.tensor([i if i < p.shape[0] else 0 for i in old_ids], device=p.device)]
    try:
        trimmed = filled(type(model), config, state, model)
    except RuntimeError as error:  # torch lists the tensors whose shape goes by the vocabulary, too
        raise LwaError(f"the vocabulary of {type(model).__name__} cannot be cut: {one_line(error)[:200]}") from error
    trimmed.generation_config = generation
    return trimmed


def holders(config) -> list:
    """Return what holds the settings of text: a config, and the text config inside that of several modalities."""
    inner = config.get_text_config(decoder=True)
    return [config] if inner is config else [config, inner]


def set_vocabulary(config, size: int) -> None:
    """Write the number of tokens into a config, wherever a config of text or of several modalities has it."""
    for holder in holders(config):
        for field in ("vocab_size", "vocab_size_per_layer_input"):
            if getattr(holder, field, None) is not None:
                setattr(holder, field, size)


def modality_tokens(config) -> dict[str, int]:
    """Return the tokens that stand for images and sound in a config of several modalities, by field."""
    if len(holders(config)) == 1:
        return {}
    fields = {field: value for field, value in config.to_dict().items() if MODALITY_TOKEN.fullmatch(field)}
    return {field: value for field, value in fields.items() if isinstance(value, int)}


def _mapped(value: int | list[int] | None, new_id: dict[int, int]) -> int | list[int] | None:
    """Renumber a token id or a list of them; an id that was cut becomes None."""
    if isinstance(value, list):
        return [new_id[old] for old in value if old in new_id] or None
    return None if value is None else new_id.get(value)
