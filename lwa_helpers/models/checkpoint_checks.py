"""What is checked of a model once it is loaded: that its weights are all its own, and that its tokens have rows."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from lwa_helpers.errors import LwaError
from lwa_helpers.models.checkpoint_folder import no_tokenizer
from lwa_helpers.models.layers import weight_of

QUANTISED_NAMES = re.compile(
    r"\.(qweight|qzeros|scales|absmax|SCB|weight_packed|weight_scale\w*|W_q|\w+_blocks|quant_map)$|\.weight\.\w"
)
WRAPPED_NAMES = re.compile(r"^(module|_orig_mod|_fsdp_wrapped_module)\.")
ADAPTER_NAMES = re.compile(r"^base_model\.model\.|\.base_layer\.|\.(lora|ia3|hada|lokr|oft|boft|vera)_")
# Tensors that a causal LM can do without: masks and positions of old checkpoints, other heads, other modalities.
BUFFERS = re.compile(r"(masked_bias|causal_mask|inv_freq|position_ids|\.attn\.bias|\.attention\.bias)$")
OTHER_PARTS = re.compile(
    r"^((model|transformer|language_model|base_model|thinker)\.)*"
    r"(vision|visual|audio|image|img|video|speech|talker|token2wav|code2wav|vq|multi_modal|multimodal|mm_|embed_vision|"
    r"embed_audio|connector|resampler|perceiver|projector|aligner|sam_model|mtp|medusa|eagle|v_head|value_head|score\.|"
    r"classifier|pooler|cls\.|encoder\.)"
)
SHOWN = 3  # tensors that a message names


def check_weights(name: str, where: str | Path, model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Check that a model is causal, has all its tensors from its file, and all tensors that the file holds.

    Args:
        name: The model's name.
        where: Its folder, file or repository.
        model: The model.
        info: What `from_pretrained` tells with `output_loading_info`.

    Raises:
        LwaError: If it is an encoder, or tensors are missing, of another shape or without a place. The message names
            the first of each.
    """
    kind = model.config.model_type
    if getattr(model.config, "is_decoder", None) is False and kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        raise LwaError(
            f"model {name!r} ({where}) is an encoder ({kind}), whose tokens see those that follow: give a causal "
            "language model"
        )
    missing, extra = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    ours = {key for key, _ in model.named_buffers()}
    extra = [key for key in extra if key not in ours and not BUFFERS.search(key)]
    unfit = [key for key in extra if not OTHER_PARTS.search(key)]
    shapes = [
        f"{key} is {tuple(stored)} in the file and {tuple(wanted)} by config.json"
        for key, stored, wanted in sorted(info["mismatched_keys"])
    ]
    untied = sorted(set(model.get_expanded_tied_weights_keys(all_submodels=True)) - set(model.all_tied_weights_keys))
    problems = [
        _listed(missing, "missing"),
        _listed(shapes, "of another shape"),
        _listed(unfit, f"without a place in {type(model).__name__}"),
        _listed(untied, "in the file, although tie_word_embeddings in config.json says that it is the embedding"),
    ]
    if found := "; ".join(filter(None, problems)):
        raise LwaError(f"model {name!r} ({where}): its weights do not fit: {found}. {_fix(missing, extra, info)}")
    if extra:
        warnings.warn(f"model {name!r}: {_listed(extra, 'no part of the language model and left out')}", stacklevel=2)


def incomplete(name: str, where: str | Path, names: list[str]) -> str:
    """Return the message for tensors (merged experts) that cannot be made of those in the file."""
    made = _listed(names, "not to be made of those in the file")
    return f"model {name!r} ({where}): its weights do not fit: {made}. {_fix(names, [], {})}"


def _listed(names: list[str], what: str) -> str:
    """Return "2 tensors are …: a, b", with three dots after the first few, or nothing for no names."""
    if not names:
        return ""
    count = f"{len(names)} tensors are" if len(names) > 1 else "1 tensor is"
    return f"{count} {what}: {', '.join(names[:SHOWN])}{', …' if len(names) > SHOWN else ''}"


def _fix(missing: list[str], extra: list[str], info: dict[str, Any]) -> str:
    """Return what to do about weights that do not fit."""
    if any(WRAPPED_NAMES.search(key) for key in extra):
        return "They were saved from inside a wrapper (DataParallel, torch.compile, FSDP): save the model within it"
    if any(ADAPTER_NAMES.search(key) for key in extra):
        return "They are those of an adapter that was never merged: call merge_and_unload() before save_pretrained()"
    if any(QUANTISED_NAMES.search(key) for key in extra):
        return "They look quantised: give an unquantised checkpoint or a GGUF"
    if missing and not info.get("mismatched_keys"):
        return "Give a causal language model with all its weights, not a base model, classifier or part of one"
    return "Give the config.json that the weights were saved with"


def check_tokenizer(name: str, where: str | Path, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Check that a tokenizer has words and gives no text a token that the model has no row for.

    Args:
        name: The model's name.
        where: Its folder, file or repository.
        tokenizer: The tokenizer.
        model: The model.

    Raises:
        LwaError: If it does not.
    """
    vocabulary, added = tokenizer.get_vocab(), tokenizer.get_added_vocab().keys() | set(tokenizer.all_special_tokens)
    own = vocabulary.keys() - added
    if len(own) < 2:
        raise LwaError(no_tokenizer(name, where))
    rows = len(weight_of(model.get_input_embeddings()))
    if over := [token for token in own if vocabulary[token] >= rows]:
        raise LwaError(
            f"model {name!r} ({where}) has {rows} rows of token embeddings, and its tokenizer has {len(vocabulary)} "
            f"tokens ({over[0]!r} is {vocabulary[over[0]]}): give the tokenizer that the model was trained with"
        )
    unknown = tokenizer.unk_token_id
    written = tokenizer("")["input_ids"]  # what stands at the ends of every text
    written += tokenizer("\ue000")["input_ids"] if unknown is not None and unknown >= rows else []
    if rowless := [index for index in written if index >= rows]:
        token = tokenizer.convert_ids_to_tokens(rowless[0])
        raise LwaError(
            f"model {name!r} ({where}) has {rows} rows of token embeddings, and its tokenizer writes {token!r}, token "
            f"{rowless[0]}, into texts: give the one that it was trained with"
        )
