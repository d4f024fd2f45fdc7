"""What is different about a model only while it trains: where its loss is computed, its dropout, its attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from lwa_helpers.models.layers import backbone

T = TypeVar("T")


def through(wrapped: nn.Module, model: nn.Module, function: Callable[..., T], *args: Any) -> T:
    """Return function(model, *args), computed inside the forward pass of `wrapped`.

    DistributedDataParallel and FSDP gather weights and gradients only for what happens inside their forward pass. FSDP
    either wraps a model or hooks into it.

    Args:
        wrapped: `model` itself, or a wrapper around it.
        model: the model that `function` is called with.
        function: what to compute.
        args: further arguments of `function`.
    """
    own = model.__dict__.get("forward")

    def restore() -> None:
        model.__dict__.pop("forward", None)
        if own is not None:
            model.forward = own

    def redirected(*inputs):
        restore()
        return function(model, *inputs)

    model.forward = redirected
    try:
        return wrapped(*args)
    finally:
        restore()


@contextmanager
def dropout_at_the_ends(model: PreTrainedModel, p: float) -> Iterator[None]:
    """Within this context, apply dropout with probability p to the input embeddings and the final states in training.

    Decoder language models come without dropout, and item histories are few: on MovieLens-100K, a model trained without
    dropout is at its best after a fraction of an epoch.
    """

    def drop_output(_module: nn.Module, _args: tuple, out):
        if isinstance(out, Tensor):
            return F.dropout(out, p, model.training)
        if isinstance(out, tuple):
            return F.dropout(out[0], p, model.training), *out[1:]
        out.last_hidden_state = F.dropout(out.last_hidden_state, p, model.training)
        return out

    ends = (model.get_input_embeddings(), backbone(model)) if p else ()
    handles = [module.register_forward_hook(drop_output) for module in ends]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def eager_attention_on_cpu(model: PreTrainedModel) -> Iterator[None]:
    """Within this context, a model on a CPU computes attention by plain matrix products.

    On a CPU, the backward pass of torch's fused attention is slow in bfloat16. On windows of 32 items, a training step
    of 30 layers with plain products takes 0.89 times as long in bfloat16, and equally long in float32.
    """
    before = model.config._attn_implementation
    if model.device.type == "cpu":
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
