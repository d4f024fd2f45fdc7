"""Tiny random models of the real transformers classes, and ragged batches, for the Fisher tests."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lwa_helpers.models.layers import decoder_layers

VOCABULARY = 50
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, COMMON | {"attention_bias": True}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, COMMON),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, COMMON | {"head_dim": 12}),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        COMMON | {"head_dim": 12, "sliding_window": 4, "sliding_window_pattern": 2},
    ),
    "phi3": (Phi3ForCausalLM, Phi3Config, COMMON),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config,
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128},
    ),
}


def build(family: str, seed: int = 0, **changes):
    """A model whose norms and biases are random too, so that a rule that forgets them fails."""
    model_class, config_class, settings = FAMILIES[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**settings | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def layers_of(model):
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def batch(lengths, side="right", masked=False, seed=0):
    """Random rows of the given lengths; with masked, every third label is ignored."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(3, VOCABULARY, (len(lengths), width), generator=generator)
    place = torch.arange(width).expand(len(lengths), width)
    size = torch.tensor(lengths)[:, None]
    mask = (place < size if side == "right" else place >= width - size).long()
    ids = ids * mask
    labels = ids.masked_fill(mask == 0, -100)
    if masked:
        labels[:, ::3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def tiny(config, std=0.2):
    """A model of any architecture in float64; its norms and biases are random too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=std)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def row_gradients(model, rows):
    """For each row alone, without its padding: the gradients of its summed NLL by autograd, one dict for each layer.

    It leaves the model as it was. The model may be in a wrapper: it is called as it is.
    """
    layers = [dict(layer.named_parameters()) for layer in decoder_layers(model)]
    parameters = [p for layer in layers for p in layer.values()]
    flags = [p.requires_grad for p in parameters]
    modes = {module: module.training for module in model.modules()}
    model.eval()
    for parameter in parameters:
        parameter.requires_grad_(True)
    found = []
    for ids, mask in zip(rows["input_ids"], rows["attention_mask"].bool()):
        logits = model(input_ids=ids[mask][None]).logits[0, :-1]
        loss = F.cross_entropy(logits, ids[mask][1:], reduction="sum")
        gradients = iter(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))
        found.append([{name: next(gradients) for name in layer} for layer in layers])
    for parameter, flag in zip(parameters, flags):
        parameter.requires_grad_(flag)
    for module, training in modes.items():
        module.training = training
    return found


def row_traces(model, rows):
    """The traces that row_gradients gives, (rows, layers)."""
    found = row_gradients(model, rows)
    return np.array([[sum(g.square().sum().item() for g in layer.values()) for layer in row] for row in found])
