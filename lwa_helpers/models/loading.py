"""Load a causal LM from a GGUF package, a hub repository or a path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lwa_helpers import assets, files, paths
from lwa_helpers.assets import embedded_file
from lwa_helpers.errors import LwaError
from lwa_helpers.models.language_model import ItemTokens, LanguageModel
from lwa_helpers.models.registry import ModelSpec, model_spec


def load_teacher(name: str | Path) -> LanguageModel:
    """Load a registered model, a local checkpoint directory or a .gguf file.

    Args:
        name: A registered name or a path.

    Returns:
        The model, an ordinary causal LM in float32.

    Raises:
        LwaError: If the model is unknown, absent or served by Ollama (which gives no access to weights), or if
            transformers cannot read it without running code that comes with the model.

    Example:
        >>> teacher = load_teacher("smollm2-135m")
        >>> type(teacher.model).__name__, teacher.model.config.num_hidden_layers
        ('LlamaForCausalLM', 30)
    """
    spec = model_spec(str(name))
    try:
        lm = _find_and_load(spec)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise LwaError(f"model {spec.name!r} ({spec.id}) is not one that transformers can load: {reason}") from error
    lm.prompt = spec.prompt
    return lm


def _find_and_load(spec: ModelSpec) -> LanguageModel:
    if spec.backend == "ollama":
        raise LwaError(
            f"model {spec.name!r} is served by Ollama and has no weights to load: use it through BaseRecommender"
        )
    if spec.backend == "huggingface":
        return _load_hub(spec)
    path = embedded_file(spec.id) if spec.backend == "embedded" else Path(spec.id)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise LwaError(f"model file {path} does not exist")
        return _load_gguf(spec.name, path)
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        raise LwaError(f"model directory {path} holds no .safetensors file: save it with save_pretrained")
    return _load(spec.name, path, "+".join(assets.cached_sha256(file) for file in weights))


def _load_hub(spec: ModelSpec) -> LanguageModel:
    """Load a hub repository at its pinned revision; without a network, only from the local cache."""
    try:
        return _load(spec.name, spec.id, f"{spec.id}@{spec.revision}", revision=spec.revision)
    except OSError as error:
        raise LwaError(
            f"model {spec.name!r} ({spec.id} at {spec.revision}) is neither in the local cache nor downloadable; "
            f"unset HF_HUB_OFFLINE or give a local directory instead. {str(error).splitlines()[0]}"
        ) from error


def _load_gguf(name: str, path: Path) -> LanguageModel:
    """Load a .gguf file by way of a safetensors copy, made once under the cache folder and named by its hash."""
    sha256 = assets.cached_sha256(path)
    converted = paths.cache_folder("models") / sha256
    if not converted.is_dir():
        with files.atomic_write(converted) as temporary:
            _load(name, path.parent, sha256, gguf_file=path.name).save(temporary)
    return _load(name, converted, sha256)


def _load(name: str, source: str | Path, sha256: str, **where: Any) -> LanguageModel:
    """Load tokenizer and weights, and remove from the model what the GGUF reader leaves on it."""
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **where)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, trust_remote_code=False, **where)
    for attribute in ("hf_quantizer", "quantization_method"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    if hasattr(model, "is_quantized"):
        model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return LanguageModel(name, model.eval(), tokenizer, sha256, items=ItemTokens.load(source))
