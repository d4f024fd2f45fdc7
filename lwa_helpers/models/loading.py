"""Loading a causal LM from a GGUF package, a hub repository or a path, and finding its layers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lwa_helpers import paths
from lwa_helpers.assets import embedded_file
from lwa_helpers.errors import LwaError
from lwa_helpers.models.registry import ModelSpec, model_spec

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


def load_teacher(name: str | Path) -> LanguageModel:
    """Load a registered model, a local checkpoint directory or a .gguf file as an ordinary float32 causal LM.

    Raises LwaError when the model is unknown, absent, served by Ollama (which shows no weights), or nothing that transformers
    reads without running code that comes with the model.
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
        raise LwaError(f"model {spec.name!r} is served by Ollama and has no weights to load: use it through BaseRecommender")
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
    return _load(spec.name, path, "+".join(paths.cached_sha256(file) for file in weights))


def _load_hub(spec: ModelSpec) -> LanguageModel:
    """Load a hub repository at its pinned revision; offline, only what is in the local cache."""
    try:
        return _load(spec.name, spec.id, f"{spec.id}@{spec.revision}", revision=spec.revision)
    except OSError as error:
        raise LwaError(
            f"model {spec.name!r} ({spec.id} at {spec.revision}) is neither in the local cache nor downloadable; "
            f"unset HF_HUB_OFFLINE or give a local directory instead. {str(error).splitlines()[0]}"
        ) from error


def _load_gguf(name: str, path: Path) -> LanguageModel:
    """Load a .gguf file through its conversion to safetensors, made once under the cache folder and named by its hash."""
    sha256 = paths.cached_sha256(path)
    converted = paths.CACHE / "models" / sha256
    if not converted.is_dir():
        with paths.atomic_write(converted) as temporary:
            _load(name, path.parent, sha256, gguf_file=path.name).save(temporary)
    return _load(name, converted, sha256)


def _load(name: str, source: str | Path, sha256: str, **where: Any) -> LanguageModel:
    """Load tokenizer and weights, and free the model of what the GGUF reader leaves on it."""
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


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the stack of decoder layers of any causal LM or wrapper around one: its longest list of like modules.

    Raises LwaError when there is none.
    """
    stacks = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) > 0 and len({type(layer) for layer in module}) == 1
        and any(True for _ in module.parameters())
    ]
    if not stacks:
        raise LwaError(f"{type(model).__name__} has no list of decoder layers (an nn.ModuleList of modules of one type)")
    return max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()))


def backbone(model: nn.Module) -> nn.Module:
    """Return the module that owns the decoder layers: embeddings, layers and final norm, without a head."""
    layers = decoder_layers(model)
    return next(module for module in model.modules() if any(child is layers for child in module.children()))
