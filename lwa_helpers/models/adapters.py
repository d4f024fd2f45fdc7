"""Adapters of PEFT, such as LoRA: found in a folder, put on the base model that they name and merged into it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from peft import PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from lwa_helpers import assets
from lwa_helpers.errors import LwaError
from lwa_helpers.models.checkpoint_checks import check_tokenizer
from lwa_helpers.models.checkpoint_errors import cause
from lwa_helpers.models.checkpoint_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, has_tokenizer, is_adapter, json_object
from lwa_helpers.models.language_model import ItemTokens, LanguageModel, text_rows
from lwa_helpers.models.layers import evaluating, unwrapped, weight_of
from lwa_helpers.models.registry import registry
from lwa_helpers.models.vocabulary import holders, without_rowless_tokens

# Starts of the adapter that are drawn at random or need data, and that change the base: no file says what it became.
CHANGED_BASE = ("pissa_niter", "corda", "lora_ga", "loftq")
DERIVED = ".ranknum."  # AdaLoRA's count of what it kept
PREFIX, SAVED = "base_model.model.", ".modules_to_save."


def load_adapter(name: str, folder: Path, load: Callable[[str], LanguageModel]) -> LanguageModel:
    """Load the base model of an adapter and merge the adapter into it.

    Args:
        name: The name of the merged model.
        folder: The adapter's folder, as PEFT's save_pretrained writes it.
        load: Loads a model by name or path.

    Returns:
        The merged model, with the adapter's tokenizer if it has one. Its sha256 names base, weights and settings.

    Raises:
        LwaError: If the base is not there, or the adapter is incomplete or of a kind that cannot be merged.
    """
    settings = json_object(folder / ADAPTER_CONFIG)
    label = f"model {name!r} ({folder}) is {_kind(settings)} adapter"
    weights = _weights_file(label, folder)
    _check_settings(label, settings)
    base = _base(label, folder, settings, load)
    model = _merged(label, base.model, folder)
    tokenizer = base.tokenizer
    if has_tokenizer(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        check_tokenizer(name, folder, tokenizer, model)
        tokenizer = without_rowless_tokens(tokenizer, text_rows(model))
    hashes = [base.sha256, *(assets.cached_sha256(path) for path in (weights, folder / ADAPTER_CONFIG))]
    items = ItemTokens.load(folder) or base.items
    return LanguageModel(name, model, tokenizer, "+".join(hashes), prompt=base.prompt, items=items)


def _kind(settings: dict[str, Any]) -> str:
    """Return the kind of an adapter with its article."""
    kind = str(settings.get("peft_type") or "PEFT").replace("LORA", "LoRA")
    return f"{'an' if kind[0] in 'AEIO' else 'a'} {kind}"


def _weights_file(label: str, folder: Path) -> Path:
    """Return the file of an adapter's weights."""
    found = [folder / file for file in ADAPTER_WEIGHTS if (folder / file).is_file()]
    if not found:
        raise LwaError(f"{label} without weights: there is no {ADAPTER_WEIGHTS[0]} beside {ADAPTER_CONFIG}")
    if whole := sorted(path.name for path in folder.glob("model*.safetensors")):
        raise LwaError(
            f"{label} in the same folder as a whole model ({whole[0]}), and which of the two is meant is unclear: move "
            f"{ADAPTER_CONFIG} and {found[0].name} to a folder of their own, or away"
        )
    return found[0]


def _check_settings(label: str, settings: dict[str, Any]) -> None:
    """Refuse adapters whose loading does not say what they were trained with."""
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGED_BASE):
        raise LwaError(
            f"{label} that changed its base ({start}), which its file does not hold: save it again with PEFT's "
            "path_initial_model_for_weight_conversion, or merge it where it was trained"
        )


def _base(label: str, folder: Path, settings: dict[str, Any], load: Callable[[str], LanguageModel]) -> LanguageModel:
    """Load the model that an adapter names as its base."""
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise LwaError(f"{label} that names no base: write its directory into base_model_name_or_path")
    found = _find(folder, base, settings.get("revision"))
    if found is not None and (loop := _loop(folder, found)):
        raise LwaError(f"{label} of {base}, which is an adapter of {loop} again: name the whole model as its base")
    if found is None:
        raise LwaError(
            f"{label} of {base}, which is neither a directory, a registered model nor in the local Hugging Face cache: "
            f"download it (`hf download {base}`), or write its directory into base_model_name_or_path of "
            f"{folder / ADAPTER_CONFIG}"
        )
    try:
        return load(found)
    except LwaError as error:
        raise LwaError(f"{label} of {base}, which cannot be used: {error}") from error


def _find(folder: Path, base: str, revision: str | None) -> str | None:
    """Return the path or registered name of an adapter's base; paths may be relative to the adapter's folder."""
    for path in (Path(base).expanduser(), folder / base):
        if path.exists():
            return str(path)
    known = registry()
    if base in known:
        return base
    if names := [name for name, spec in known.items() if spec.backend == "huggingface" and spec.id == base]:
        return names[0]
    try:
        return snapshot_download(base, revision=revision, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _loop(folder: Path, base: str) -> Path | None:
    """Return the folder of an adapter whose base leads back to it, or None."""
    seen, place = {folder.resolve()}, Path(base).resolve()
    while is_adapter(place):
        if place in seen:
            return place
        seen.add(place)
        further = _find(place, str(json_object(place / ADAPTER_CONFIG).get("base_model_name_or_path")), None)
        place = Path(further or "").resolve()
    return None


def _merged(label: str, base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Put an adapter on its base and merge it."""
    weights = _without_copies(load_peft_weights(str(folder), device="cpu"))
    config = PeftConfig.from_pretrained(str(folder))
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    if not hasattr(tuner, "merge_and_unload"):
        raise LwaError(f"{label}, which changes no weights and so cannot be merged into its base: give another kind")
    _resize(label, base, weights)
    if not _shares_a_changed_end(base, weights):
        return merged(_wrapped(label, base, config, weights), label)
    model = _wrapped(label, copy.deepcopy(base), config, weights)
    want = _logits(model)
    try:
        return merged(model, label, want)
    except LwaError:  # merged into weights that both ends share, a change of one end reached the other
        _untie(base)
        return merged(_wrapped(label, base, config, weights), label, want)


def _without_copies(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return an adapter's weights with one name for each module that was trained whole.

    PEFT writes three copies of such an embedding if tokens were added to it.
    """
    trained = {key.replace(".modules_to_save.", "."): value for key, value in weights.items() if SAVED in key}
    rest = {key: value for key, value in weights.items() if SAVED not in key and ".original_module." not in key}
    return rest | trained


def _wrapped(label: str, base: PreTrainedModel, config: PeftConfig, weights: dict[str, Tensor]) -> PeftModel:
    """Put an adapter on its base, and check that every tensor of the one has its place in the other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's hints for training; what does not fit is looked at below
        names = base.state_dict().keys()
        model = PeftModel(base, copy.deepcopy(config))
        result: Any = set_peft_model_state_dict(model, dict(weights))
    state = {key: value.data_ptr() for key, value in model.state_dict().items()}
    ours = {key for key in state if ".default" in key and key.removeprefix(PREFIX) not in names}
    read = {state[key] for key in ours.difference(result.missing_keys)}  # some modules share an adapter's weights
    missing = [key for key in result.missing_keys if key in ours and state[key] not in read and DERIVED not in key]
    for names, what in ((missing, "missing"), (result.unexpected_keys, "not in the base")):
        if names:
            shown = ", ".join(sorted(names)[:3])
            raise LwaError(f"{label} that does not fit its base: {len(names)} of its tensors are {what} ({shown})")
    return model.eval()


def _ends(base: PreTrainedModel) -> dict[str, Tensor]:
    """Return the weights of input embedding and head by the names of their modules."""
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    return {name: weight_of(module) for name, module in base.named_modules() if any(module is end for end in ends)}


def _resize(label: str, base: PreTrainedModel, weights: dict[str, Tensor]) -> None:
    """Give the base as many tokens as the adapter was trained with, whose rows the adapter's file must hold."""
    ends, rows = _ends(base), {}
    for name, weight in ends.items():
        for key, value in weights.items():
            whole = key.startswith(f"{PREFIX}{name}.") and key.endswith("weight") and "lora_" not in key
            if whole and value.shape[1:] == weight.shape[1:]:
                rows[name] = len(value)
    if all(count == len(ends[name]) for name, count in rows.items()):
        return
    shared = len({id(weight) for weight in ends.values()}) < len(ends)
    if len(set(rows.values())) > 1 or (len(rows) < len(ends) and not shared):
        held = ", ".join(f"{name} with {count}" for name, count in rows.items())
        raise LwaError(
            f"{label} with another number of tokens than its base, whose rows it does not all hold (only {held}): "
            "save it with save_embedding_layers=True"
        )
    base.resize_token_embeddings(next(iter(rows.values())), mean_resizing=False)


def _shares_a_changed_end(base: PreTrainedModel, weights: dict[str, Tensor]) -> bool:
    """Return whether embedding and head share their weights and an adapter changes one of them or both."""
    ends = _ends(base)
    shared = len({id(weight) for weight in ends.values()}) < len(ends)
    return shared and any(key.startswith(f"{PREFIX}{name}.") for key in weights for name in ends)


def _untie(model: PreTrainedModel) -> None:
    """Give the head weights of its own."""
    head = model.get_output_embeddings()
    _set_tied(model, False)
    head.weight = nn.Parameter(weight_of(head).detach().clone())


def _set_tied(model: PreTrainedModel, tied: bool) -> None:
    for holder in holders(model.config):
        holder.tie_word_embeddings = tied


def merged(model: PeftModel, label: str = "the model is a PEFT model", want: Tensor | None = None) -> PreTrainedModel:
    """Merge the active adapters of a PEFT model into its weights, and check that it computes the same.

    Args:
        model: The model; it is changed.
        label: How an error's message begins.
        want: The logits that the merged model must have on the tokens of `_logits`; by default the model's own.

    Returns:
        The transformers model, all of its parameters trainable.

    Raises:
        LwaError: If the adapters cannot be merged, or the merged model computes something else.
    """
    kinds = ", ".join(sorted({str(getattr(config.peft_type, "value", "")) for config in model.peft_config.values()}))
    if not hasattr(model, "merge_and_unload"):
        raise LwaError(f"{label} of a kind ({kinds}) that is no change of weights, so it cannot be merged into them")
    want, training = _logits(model) if want is None else want, model.training
    try:
        whole = model.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, NotImplementedError, AttributeError) as error:  # as each kind of PEFT's does
        raise LwaError(f"{label} that PEFT cannot merge: {cause(error)}; merge it where it was trained") from error
    left = any(isinstance(module, BaseTunerLayer) for module in whole.modules())
    if left or not torch.allclose(_logits(whole), want, rtol=1e-3, atol=1e-3 * float(want.abs().max())):
        raise LwaError(f"{label} that PEFT does not merge exactly: merge it where it was trained")
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        if attribute in vars(whole):
            delattr(whole, attribute)
    if whole.config.tie_word_embeddings and len({id(weight) for weight in _ends(whole).values()}) > 1:
        _set_tied(whole, False)
    return whole.requires_grad_(True).train(training)


def _logits(model: Any) -> Tensor:
    """Return a model's logits on its first tokens, without dropout."""
    inner: Any = unwrapped(model)
    table = inner.get_input_embeddings()
    ids = torch.arange(min(8, len(weight_of(table))), device=weight_of(table).device)[None]
    with torch.no_grad(), evaluating(model):
        return model(input_ids=ids, use_cache=False).logits
