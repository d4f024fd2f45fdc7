"""Load a causal LM from a GGUF package, a hub repository or a path."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lwa_helpers import assets, files, paths
from lwa_helpers.assets import embedded_file
from lwa_helpers.errors import LwaError
from lwa_helpers.models.checkpoint_checks import check_tokenizer, check_weights, incomplete
from lwa_helpers.models.checkpoint_errors import cause, unreadable
from lwa_helpers.models.checkpoint_folder import (
    check_folder,
    check_settings,
    has_tokenizer,
    is_adapter,
    no_tokenizer,
    settings_of,
)
from lwa_helpers.models.gguf_import import GgufFile, is_sealed, seal
from lwa_helpers.models.language_model import ItemTokens, LanguageModel, text_rows
from lwa_helpers.models.load_report import load_report, tensors_in
from lwa_helpers.models.registry import ModelSpec, model_spec
from lwa_helpers.models.vocabulary import without_rowless_tokens

ZEROED_PADDING = {"youtu"}  # transformers sets the padding token's row to zero, after it has read the weights


def load_teacher(name: str | Path) -> LanguageModel:
    """Load a registered model, a local checkpoint directory, an adapter's directory or a .gguf file.

    An adapter (LoRA and others of PEFT) is merged into the base model that its adapter_config.json names, which must
    be a directory, a registered model or in the local Hugging Face cache.

    Args:
        name: A registered name or a path.

    Returns:
        The model, an ordinary causal LM in float32.

    Raises:
        LwaError: If the model is unknown, absent, quantised, incomplete or served by Ollama (which gives no access to
            weights), or if transformers cannot read it without running code that comes with the model.

    Example:
        >>> teacher = load_teacher("smollm2-135m")
        >>> type(teacher.model).__name__, teacher.model.config.num_hidden_layers
        ('LlamaForCausalLM', 30)
    """
    spec = _spec_of(os.path.expanduser(str(name)))
    try:
        lm = _find_and_load(spec)
    except LwaError:
        raise
    except Exception as error:  # what the libraries raise on broken files is open-ended
        raise LwaError(unreadable(spec.name, spec.id, error)) from error
    lm.prompt = spec.prompt or lm.prompt
    return lm


def _spec_of(name: str) -> ModelSpec:
    """Return the entry of a registered name or path, and say of a file that is not a GGUF file what to give instead."""
    try:
        return model_spec(name)
    except (LwaError, OSError) as error:
        path = Path(name)
        if not isinstance(error, LwaError):
            raise LwaError(unreadable(path.stem, name, error)) from error
        if not os.path.isfile(path):  # False too for a name that is too long for a file
            raise
        raise LwaError(f"{path} is a file, and only .gguf files are models: give its directory {path.parent}") from None


def _find_and_load(spec: ModelSpec) -> LanguageModel:
    if spec.backend == "ollama":
        raise LwaError(
            f"model {spec.name!r} is served by Ollama and has no weights to load: use it through BaseRecommender"
        )
    if spec.backend == "huggingface":
        return _load_hub(spec)
    path = embedded_file(spec.id) if spec.backend == "embedded" else Path(spec.id).expanduser()
    if path.suffix == ".gguf" and not path.is_dir():
        if not path.is_file():
            raise LwaError(f"model file {path} does not exist")
        return _load_gguf(spec.name, path)
    if is_adapter(path):
        from lwa_helpers.models.adapters import load_adapter  # peft takes seconds to import

        return load_adapter(spec.name, path, load_teacher)
    settings, weights = check_folder(spec.name, path)
    return _load(spec.name, path, "+".join(assets.cached_sha256(file) for file in weights), settings)


def _load_hub(spec: ModelSpec) -> LanguageModel:
    """Load a hub repository at its pinned revision; without a network, only from the local cache."""
    try:
        settings = settings_of(spec.id, spec.revision)
        check_settings(spec.name, spec.id, settings)
        return _load(spec.name, spec.id, f"{spec.id}@{spec.revision}", settings, revision=spec.revision)
    except OSError as error:
        raise LwaError(
            f"model {spec.name!r} ({spec.id} at {spec.revision}) is neither in the local cache nor downloadable; "
            f"unset HF_HUB_OFFLINE or give a local directory instead. {cause(error)}"
        ) from error


def _load_gguf(name: str, path: Path) -> LanguageModel:
    """Load a .gguf file by way of a safetensors copy, made once under the cache folder and named by its hash."""
    sha256 = assets.cached_sha256(path)
    converted = paths.cache_folder("models") / sha256
    if not is_sealed(converted):
        if is_adapter(path.parent):  # transformers would load that instead
            raise LwaError(f"model file {path} lies beside an adapter_config.json: move it to a folder of its own")
        source = GgufFile(name, path)
        source.check_kind()
        with files.atomic_write(converted) as temporary:
            lm = _load(name, path.parent, sha256, {}, gguf_file=path.name)
            source.check_read(lm.model)
            lm.save(temporary)
            seal(temporary)
    return _load(name, converted, sha256, {})


def _load(name: str, source: str | Path, sha256: str, settings: dict[str, Any], **where: Any) -> LanguageModel:
    """Load tokenizer and weights, and remove from the model what the GGUF reader leaves on it."""
    tokenizer = _tokenizer(name, source, where)
    model = _weights(name, source, settings, where)
    for attribute in ("hf_quantizer", "quantization_method"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    if hasattr(model, "is_quantized"):
        model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    check_tokenizer(name, _shown(source, where), tokenizer, model)
    tokenizer = without_rowless_tokens(tokenizer, text_rows(model))
    return LanguageModel(name, model.eval(), tokenizer, sha256, items=ItemTokens.load(source))


def _tokenizer(name: str, source: str | Path, where: dict[str, Any]) -> PreTrainedTokenizerBase:
    """Load the tokenizer; a folder that transformers finds none in is said to have none only if that is so."""
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, **where)
    except Exception as error:  # the kind depends on the class that transformers guesses
        if isinstance(source, Path) and not where and not has_tokenizer(source):
            raise LwaError(no_tokenizer(name, source)) from error
        raise


def _weights(name: str, source: str | Path, settings: dict[str, Any], where: dict[str, Any]) -> PreTrainedModel:
    """Load the weights in float32, and check that they are whole."""
    options = {"trust_remote_code": False, **where}
    if config := _config_with_valid_padding(source, settings, options):
        options["config"] = config
    if isinstance(source, Path) and "gguf_file" not in where:
        options["use_safetensors"] = True  # the files that the model's hash is of
    with load_report() as report:
        try:
            model, info = _class_of(settings).from_pretrained(
                source, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
        except RuntimeError as error:
            if names := tensors_in(report):
                raise LwaError(incomplete(name, _shown(source, where), names)) from error
            raise
    if getattr(model, "_hf_peft_config_loaded", False):
        raise LwaError(
            f"model {name!r} ({source}) is an adapter: download it with `hf download {source} --local-dir FOLDER`, and "
            "give the folder"
        )
    check_weights(name, _shown(source, where), model, info)
    return model


def _shown(source: str | Path, where: dict[str, Any]) -> str | Path:
    """Return what messages name: the repository, folder or .gguf file."""
    return source / where["gguf_file"] if isinstance(source, Path) and "gguf_file" in where else source


def _class_of(settings: dict[str, Any]) -> Any:
    """Return the class to load a model with: transformers' choice, or the causal LM that config.json names.

    transformers does not know the type that it gives to the language model of some wrappers (Mllama) when saved alone.
    """
    kind, known = settings.get("model_type"), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if kind not in known and kind in CONFIG_MAPPING:
        for name in set(known.values()) & set(settings.get("architectures") or ()):
            if getattr(transformers, name).config_class is CONFIG_MAPPING[kind]:
                return getattr(transformers, name)
    return AutoModelForCausalLM


def _config_with_valid_padding(source: str | Path, settings: dict[str, Any], options: dict[str, Any]) -> Any:
    """Return a config without padding tokens that the embedding has no row for, or None where nothing is to be changed.

    torch refuses to build such an embedding. Padding tokens whose row would be lost are left out too. Which token pads
    never matters: see LanguageModel.pad_id.
    """
    inner = settings.get("text_config")
    holders = [settings, inner] if isinstance(inner, dict) else [settings]
    rows = next((holder["vocab_size"] for holder in reversed(holders) if "vocab_size" in holder), None)
    pads = [holder.get("pad_token_id") for holder in holders]
    fits = not isinstance(rows, int) or all(not isinstance(pad, int) or -rows <= pad < rows for pad in pads)
    if fits and settings.get("model_type") not in ZEROED_PADDING:
        return None
    config = AutoConfig.from_pretrained(source, **options)
    for holder in (config, config.get_text_config(decoder=True)):
        holder.pad_token_id = None
    return config
