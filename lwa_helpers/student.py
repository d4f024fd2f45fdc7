"""Build a student from a teacher's own decoder layers, with the vocabulary cut to what the texts need."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.initialization import no_init_weights

from lwa_helpers.errors import LwaError
from lwa_helpers.models import LanguageModel, decoder_layers

SELECTIONS = ("first", "last", "first_last", "uniform", "drop_block")


def select_layers(teacher_layers: int, n_layers: int, selection: str | Sequence[int]) -> list[int]:
    """Return the indices, rising, of the teacher layers that the student keeps.

    first: the n lowest; last: the n highest; first_last: half from each end; drop_block: the n-1 lowest and the last;
    uniform: evenly spaced, both ends kept; or the indices themselves. Raises LwaError for anything else.
    """
    if not isinstance(n_layers, int) or not 1 <= n_layers <= teacher_layers:
        raise LwaError(f"n_layers = {n_layers!r}: the teacher has {teacher_layers} layers, choose 1 to {teacher_layers}")
    everything = list(range(teacher_layers))
    if not isinstance(selection, str):
        kept = sorted({int(index) for index in selection})
        if len(kept) != n_layers or not set(kept) <= set(everything):
            raise LwaError(f"selection {list(selection)} must name {n_layers} different layers of 0 to {teacher_layers - 1}")
        return kept
    match selection:
        case "first":
            return everything[:n_layers]
        case "last":
            return everything[teacher_layers - n_layers :]
        case "first_last":
            return everything[: (n_layers + 1) // 2] + everything[teacher_layers - n_layers // 2 :]
        case "drop_block":
            return everything[: n_layers - 1] + everything[-1:]
        case "uniform":
            return sorted(np.linspace(0, teacher_layers - 1, n_layers).round().astype(int).tolist())
    raise LwaError(f"unknown selection {selection!r}: one of {', '.join(SELECTIONS)}, or a list of layer indices")


def build_student(
    teacher: LanguageModel, n_layers: int = 8, selection: str | Sequence[int] = "uniform", texts: Iterable[str] | None = None
) -> LanguageModel:
    """Return a student of `n_layers` of the teacher's own layers; the teacher is left as it is.

    With `texts`, the vocabulary keeps the tokens that these texts need, the byte or character alphabet and the special
    tokens; tokenisation of the texts and the logits of the kept tokens stay the same.
    """
    kept = select_layers(len(decoder_layers(teacher.model)), n_layers, selection)
    student = LanguageModel(f"{teacher.name}-{n_layers}L", _with_layers(teacher.model, kept), teacher.tokenizer, teacher.sha256)
    return student if texts is None else trim_vocabulary(student, texts)


def _with_layers(model, kept: list[int]):
    """Copy a causal LM with only the layers `kept`, renumbered from 0."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [model.config.layer_types[index] for index in kept]
    path = next(name for name, module in model.named_modules() if module is decoder_layers(model)) + "."
    state = {}
    for name, value in model.state_dict().items():
        if name.startswith(path):
            index, rest = name[len(path) :].split(".", 1)
            if int(index) not in kept:
                continue
            name = f"{path}{kept.index(int(index))}.{rest}"
        state[name] = value
    return _filled(type(model), config, state, model)


def _filled(model_class, config, state: dict[str, torch.Tensor], original):
    """Build a model of `config` holding copies of `state`, with the original's dtype, device and generation settings."""
    with no_init_weights():
        student = model_class._from_config(config, dtype=original.dtype).to(original.device)
    student.load_state_dict(state, strict=True)
    student.tie_weights()
    student.generation_config = copy.deepcopy(original.generation_config)
    return student.train(original.training)


def trim_vocabulary(lm: LanguageModel, texts: Iterable[str]) -> LanguageModel:
    """Return a copy of the model whose vocabulary is what the texts need, old order kept.

    A text of `texts` gets the same tokens as before (renumbered) because each merge that its tokens are made of is kept.
    Raises LwaError for a tokenizer that is not BPE.
    """
    spec = json.loads(lm.tokenizer.backend_tokenizer.to_str())
    if spec["model"]["type"] != "BPE":
        raise LwaError(f"model {lm.name!r}: vocabulary trimming needs a BPE tokenizer, this one is {spec['model']['type']}")
    old_ids = kept_tokens(lm.tokenizer, spec, texts)
    return LanguageModel(f"{lm.name}-{len(old_ids)}V", _with_rows(lm.model, old_ids), _renumbered(lm.tokenizer, spec, old_ids), lm.sha256)


def kept_tokens(tokenizer: PreTrainedTokenizerBase, spec: dict, texts: Iterable[str]) -> list[int]:
    """Return the old ids to keep, rising: special tokens, alphabet, the texts' tokens, and the parts these are merged from."""
    vocabulary = spec["model"]["vocab"]
    parts: dict[str, set[str]] = {}
    for left, right in map(_pair, spec["model"]["merges"]):
        parts.setdefault(left + right, set()).update((left, right))
    names = {index: token for token, index in vocabulary.items()}
    kept = {token["id"] for token in spec["added_tokens"] if token["special"]}
    bytes_ = [token for token in vocabulary if len(token) == 6 and token.startswith("<0x")]
    waiting = bytes_ or [token for token in vocabulary if len(token) == 1]
    waiting += [names[i] for i in {i for row in tokenizer(list(texts))["input_ids"] for i in row} if i in names]
    while waiting:
        token = waiting.pop()
        if vocabulary[token] not in kept:
            kept.add(vocabulary[token])
            waiting.extend(parts.get(token, ()))
    return sorted(kept)


def _pair(merge: str | list[str]) -> tuple[str, str]:
    """A merge rule as its two parts, whichever way the file writes it."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _renumbered(tokenizer: PreTrainedTokenizerBase, spec: dict, old_ids: list[int]) -> PreTrainedTokenizerFast:
    """Rebuild the tokenizer on the kept ids."""
    new_id = {old: new for new, old in enumerate(old_ids)}
    model = spec["model"]
    model["vocab"] = {token: new_id[old] for token, old in model["vocab"].items() if old in new_id}
    model["merges"] = [list(p) for p in map(_pair, model["merges"]) if {*p, "".join(p)} <= model["vocab"].keys()]
    spec["added_tokens"] = [token | {"id": new_id[token["id"]]} for token in spec["added_tokens"] if token["id"] in new_id]
    for token in ((spec.get("post_processor") or {}).get("special_tokens") or {}).values():
        token["ids"] = [new_id[old] for old in token["ids"]]
    rebuilt = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)), model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side, **tokenizer.special_tokens_map,
    )
    rebuilt.chat_template = getattr(tokenizer, "chat_template", None)
    return rebuilt


def _with_rows(model, old_ids: list[int]):
    """Copy a causal LM with only these rows of its embedding and head."""
    config = copy.deepcopy(model.config)
    rows = model.get_input_embeddings().weight.shape[0]
    config.vocab_size = len(old_ids)
    new_id = {old: new for new, old in enumerate(old_ids)}
    generation = copy.deepcopy(model.generation_config) or GenerationConfig()
    for holder in (config, generation):
        for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(holder, field, _mapped(getattr(holder, field, None), new_id))
    heads = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    cut = {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in heads and p.shape[0] == rows}
    index = torch.tensor(old_ids, device=model.device)
    state = {name: value[index] if name in cut else value for name, value in model.state_dict().items()}
    trimmed = _filled(type(model), config, state, model)
    trimmed.generation_config = generation
    return trimmed


def _mapped(value: int | list[int] | None, new_id: dict[int, int]):
    """Renumber a token id, or a list of them; an id that was cut becomes None."""
    if isinstance(value, list):
        return [new_id[old] for old in value if old in new_id] or None
    return new_id.get(value)
