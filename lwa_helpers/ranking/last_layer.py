"""Compute the last decoder layer only at the positions whose result is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from lwa_helpers.models.layers import decoder_layers

# Parts of a layer whose result at a position is read by no other position.
OWN = ("mlp", "self_attn.q_proj", "self_attn.o_proj")


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

    def only(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def there(states: Tensor, *more: Tensor) -> Tensor:
            found = None if more else forward(states[rows, columns][None])
            # Bloom's MLP also takes a residual; a mixture of experts also returns its routing.
            if not isinstance(found, Tensor):
                return forward(states, *more)
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
