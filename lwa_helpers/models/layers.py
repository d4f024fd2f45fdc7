"""The parts of any causal LM, also inside wrappers: its config, decoder layers and backbone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from lwa_helpers.errors import LwaError

LAYER_COUNTS = ("num_hidden_layers", "num_layers", "decoder_layers")  # of LongCat, whose layers count twice, and BART


def without_runners(model: Any) -> Any:
    """Return the model inside DataParallel, DistributedDataParallel and torch.compile, which run it and add nothing.

    A PEFT model stays one, because it may compute more than its base model.
    """
    while isinstance(inner := _children(model).get("_orig_mod", _children(model).get("module")), nn.Module):
        model = inner
    return model


def _children(model: Any) -> dict[str, Any]:
    return getattr(model, "_modules", {})  # attributes would run the wrapper's own code: a compiled model's len() fails


def unwrapped(model: Any) -> Any:
    """Return the transformers model inside wrappers: those of without_runners, and PEFT."""
    model = without_runners(model)
    return unwrapped(model.get_base_model()) if hasattr(model, "get_base_model") else model


def text_config(model: nn.Module) -> Any:
    """Return the config of the language model itself.

    A multimodal model keeps it inside its own config. The config of a model of text alone is returned as it is.
    """
    return unwrapped(model).config.get_text_config(decoder=True)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the decoder layers of any causal LM or wrapper around one.

    They are the nn.ModuleList of the language model (not of a vision or audio tower) that has as many entries as its
    config has layers. Without such a config, they are the nn.ModuleList of modules of one type that holds the most
    parameters.

    Raises:
        LwaError: If there is no such list.
    """
    model = unwrapped(model)
    counts = layer_counts(text_config(model)) if hasattr(model, "config") else set()
    stacks = [
        module
        for module in _language_model(model).modules()
        if isinstance(module, nn.ModuleList)
        and len(module) > 0
        and any(True for _ in module.parameters())
        and (len(module) in counts if counts else len({type(layer) for layer in module}) == 1)
    ]
    if not stacks:
        wanted = f"{max(counts)} layers, as its config says" if counts else "modules of one type"
        raise LwaError(f"{type(model).__name__} has no list of decoder layers (an nn.ModuleList of {wanted})")
    return max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()))


def layer_counts(config: Any) -> set[int]:
    """Return what the config of a language model may mean by its number of decoder layers."""
    counts = (getattr(config, name, None) for name in LAYER_COUNTS)
    return {count for count in counts if isinstance(count, int)}


def _language_model(model: Any) -> nn.Module:
    """Return the part of a transformers model that decodes text; the whole of any other module."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if not isinstance(decoder, nn.Module) or decoder is model.get_output_embeddings():  # ModernBERT calls its head so
        return model
    return decoder


def backbone(model: nn.Module) -> nn.Module:
    """Return the module that owns the decoder layers: embeddings, layers and final norm, without a head."""
    layers = decoder_layers(model)
    return next(module for module in model.modules() if any(child is layers for child in module.children()))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within this context, the model is in evaluation mode, so that dropout draws no random numbers."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def weight_of(module: nn.Module) -> Tensor:
    """Return the `weight` of a module that has one."""
    weight = module.weight
    assert isinstance(weight, Tensor)  # torch annotates it as a tensor or a submodule
    return weight


def filled(model_class, config, state: dict[str, torch.Tensor], original):
    """Build a model of `config` with `state` copied and the original's dtype, device, mode and generation config."""
    with no_init_weights():
        student = model_class._from_config(config, dtype=original.dtype).to(original.device)
    student.load_state_dict(state, strict=True)
    student.tie_weights()
    student.generation_config = copy.deepcopy(original.generation_config)
    return student.train(original.training)
