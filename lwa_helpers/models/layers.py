"""The decoder layers of any causal LM, and copies of a model with fewer of them."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from lwa_helpers.errors import LwaError

BY_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")  # lists in a config with an entry for each layer


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the decoder layers of any causal LM or wrapper around one.

    They are the nn.ModuleList of modules of one type that holds the most parameters.

    Raises:
        LwaError: If there is no such list.
    """
    stacks = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        and len(module) > 0
        and len({type(layer) for layer in module}) == 1
        and any(True for _ in module.parameters())
    ]
    if not stacks:
        raise LwaError(
            f"{type(model).__name__} has no list of decoder layers (an nn.ModuleList of modules of one type)"
        )
    return max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()))


def backbone(model: nn.Module) -> nn.Module:
    """Return the module that owns the decoder layers: embeddings, layers and final norm, without a head."""
    layers = decoder_layers(model)
    return next(module for module in model.modules() if any(child is layers for child in module.children()))


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


def without_layer(model: nn.Module, index: int) -> None:
    """Remove one decoder layer from a model, in place."""
    layers = decoder_layers(model)
    del layers[index]
    keep_settings(model.config, [place for place in range(len(layers) + 1) if place != index])


def keep_settings(config, kept: list[int]) -> None:
    """Reduce a config to the layers `kept` and to the settings of these layers, in place."""
    config.num_hidden_layers = len(kept)
    for name in BY_LAYER:
        if values := getattr(config, name, None):
            setattr(config, name, [values[index] for index in kept])


def with_layers(model, kept: list[int]):
    """Return a copy of a causal LM with only the layers `kept`, renumbered from 0."""
    config = copy.deepcopy(model.config)
    keep_settings(config, kept)
    layers = decoder_layers(model)
    path = next(name for name, module in model.named_modules() if module is layers) + "."
    state = {}
    for name, value in model.state_dict().items():
        if name.startswith(path):
            index, rest = name[len(path) :].split(".", 1)
            if int(index) not in kept:
                continue
            name = f"{path}{kept.index(int(index))}.{rest}"
        state[name] = value
    return filled(type(model), config, state, model)
