"""What is found out about a model before it is read: what its wrappers compute, and how many positions it has."""

from __future__ import annotations

from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lwa_helpers.errors import LwaError
from lwa_helpers.models.layers import backbone, evaluating, text_config, unwrapped, without_runners

TOLERANCE = 1e-3  # relative difference that rounding may make in float32; SmolLM2-135M has 2e-6
LOW_TOLERANCE = 0.2  # the same in bfloat16 and float16, also inside autocast; SmolLM2-135M has 0.05
HEAD_IS_LAST: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # what `head_is_last` found out


def plain_model(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside DataParallel, torch.compile and PEFT wrappers.

    Adapters inside the layers (LoRA) are part of it.

    Args:
        model: a causal LM, or a wrapper around one.

    Raises:
        LwaError: If a PEFT wrapper computes something outside the layers, such as the prompt of prompt tuning.
    """
    inner = cast(PreTrainedModel, unwrapped(model))
    adapter = _peft_model(model)
    if adapter is not None and not _computes_the_same(adapter, inner):
        kinds = ", ".join(str(getattr(c.peft_type, "value", c.peft_type)) for c in adapter.peft_config.values())
        raise LwaError(
            f"{type(inner).__name__} is wrapped by PEFT ({kinds}), which computes something outside its layers: "
            "use the model without it, or an adapter inside the layers such as LoRA"
        )
    return inner


def _peft_model(model: nn.Module):
    """Return the PEFT model that is `model` or inside its other wrappers, or None."""
    inner = without_runners(model)
    return inner if hasattr(inner, "peft_config") else None


@torch.no_grad()
def _computes_the_same(wrapper: nn.Module, inner: PreTrainedModel) -> bool:
    """Return whether a wrapper and the model inside give the same logits for a few tokens."""
    ids = some_tokens(inner, 1)
    with evaluating(wrapper):
        try:
            got = wrapper(input_ids=ids).logits
        except (TypeError, ValueError, KeyError, AttributeError):  # it needs more than tokens
            return False
        want = inner(input_ids=ids).logits
    return got.shape == want.shape and difference(got, want) <= tolerance(inner)


@torch.no_grad()
def head_is_last(model: PreTrainedModel) -> bool:
    """Return whether a model's logits are what its head returns for the states of its backbone.

    Gemma 2 caps its logits, Cohere scales them, and BERT's layers do not run on token ids alone. This is measured once
    for each model, on a few tokens.
    """
    if model not in HEAD_IS_LAST:
        ids = some_tokens(model, 1)
        with evaluating(model), torch.autocast(ids.device.type, enabled=False):
            logits = model(input_ids=ids, use_cache=False).logits
            try:
                own = model.get_output_embeddings()(backbone(model)(input_ids=ids, use_cache=False).last_hidden_state)
            except TypeError:  # from the backbone's arguments
                own = torch.full_like(logits, torch.inf)
            HEAD_IS_LAST[model] = difference(own, logits) <= tolerance(model)
    return HEAD_IS_LAST[model]


def some_tokens(model: PreTrainedModel, rows: int, length: int = 12) -> Tensor:
    """Return a few token ids that the model has, (rows, length)."""
    size = model.get_input_embeddings().weight.shape[0]
    return (torch.arange(1, rows * length + 1, device=model.device) % size).view(rows, length)


def difference(got: Tensor, want: Tensor) -> float:
    """Return the length of got - want, divided by the length of `want` after its mean was taken off."""
    got, want = got.double(), want.double()
    return float((got - want).norm() / (want - want.mean(-1, keepdim=True)).norm().clamp_min(1e-12))


def tolerance(model: PreTrainedModel) -> float:
    """Return the largest `difference` that rounding explains in the precision that the model computes in."""
    exact = model.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(model.device.type)
    return TOLERANCE if exact else LOW_TOLERANCE


def check_positions(model: nn.Module, n_tokens: int) -> None:
    """Check that a model whose positions are rows of a table has a row for each token.

    Args:
        model: a causal LM.
        n_tokens: number of tokens of the longest row that it is to read.

    Raises:
        LwaError: If it has fewer positions. Rotary positions and biases by distance have no such limit.
    """
    limit = getattr(text_config(model), "max_position_embeddings", None)
    if limit and n_tokens > limit and _has_table(cast(PreTrainedModel, unwrapped(model)), limit):
        raise LwaError(
            f"{type(unwrapped(model)).__name__} has positions for {limit} tokens and is to read {n_tokens}: "
            "give shorter histories (settings data.max_tokens, data.max_items, evaluation.history_items)"
        )


def _has_table(model: PreTrainedModel, limit: int) -> bool:
    """Return whether an embedding or a buffer has a row for each of `limit` positions; OPT's has two more."""
    words = model.get_input_embeddings()
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding) and m is not words]
    tables += [buffer for buffer in model.buffers() if buffer.ndim > 1]
    return any(limit <= table.shape[0] <= limit + 2 for table in tables)
