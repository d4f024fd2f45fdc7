"""Compute the last decoder layer only at the positions whose result is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lwa_helpers.models.layers import backbone, decoder_layers
from lwa_helpers.ranking.model_checks import difference, evaluating, some_tokens, tolerance

# Parts of a layer whose result at a position is read by no other position.
OWN = ("mlp", "self_attn.q_proj", "self_attn.o_proj")
EXACT: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # what `is_exact` found out


@torch.no_grad()
def is_exact(model: PreTrainedModel) -> bool:
    """Return whether last_layer_at leaves a model's states as they are where they are read.

    It does not where a part mixes positions after all, as the convolutions behind the queries of Kimi Linear do. This
    is measured once for each model, on a few tokens.

    Args:
        model: a causal LM whose head is last (see head_is_last).
    """
    if model not in EXACT:
        body, ids = backbone(model), some_tokens(model, 2)
        rows, columns = torch.tensor([[0, 0, 1], [4, 11, 7]], device=ids.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        with evaluating(body), torch.autocast(ids.device.type, enabled=False):
            whole = body(**inputs).last_hidden_state[rows, columns]
            with last_layer_at(model, rows, columns):
                read = body(**inputs).last_hidden_state[rows, columns]
            EXACT[model] = difference(read, whole) <= tolerance(model)
    return EXACT[model]


@contextmanager
def last_layer_at(model: nn.Module, rows: Tensor, columns: Tensor) -> Iterator[None]:
    """Within this context, compute the last layer's MLP, queries and attention output only at P positions.

    At these positions, the final states equal those of the whole model up to rounding; elsewhere they are meaningless.
    Keys and values are computed everywhere, and so are parts whose names are not in OWN. The context is meant for
    forward passes without gradients.

    Args:
        model: a causal LM.
        rows: the row of each position in the batch, (P,).
        columns: the column of each position, (P,).
    """

    def only(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def there(states: Tensor, *more: Tensor, **named: Tensor) -> Tensor:
            found = None if more or named else forward(states[rows, columns][None])
            # Bloom's MLP also takes a residual; a mixture of experts also returns its routing.
            if not isinstance(found, Tensor):
                return forward(states, *more, **named)
            out = found.new_zeros(*states.shape[:2], found.shape[-1])
            out[rows, columns] = found[0]
            return out

        return there

    parts = [module for name, module in decoder_layers(model)[-1].named_modules() if name in OWN]
    for module in parts:
        module.forward = only(module.forward)
    try:
        yield
    finally:
        for module in parts:
            del module.forward
