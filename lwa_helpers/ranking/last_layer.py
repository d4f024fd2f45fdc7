"""The last decoder layer, computed only where its result is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from lwa_helpers.models.layers import decoder_layers

OWN = (
    "mlp",
    "self_attn.q_proj",
    "self_attn.o_proj",
)  # parts of a layer whose result at a position no other position reads


@contextmanager
def last_layer_at(model: nn.Module, rows: Tensor, columns: Tensor) -> Iterator[None]:
    """Within it, the last layer's MLP, queries and attention output are computed at the P positions (rows, columns) alone.

    The final states there are those of the whole model, to rounding; elsewhere they mean nothing. Keys and values are computed
    everywhere, as are parts that go by other names. For forward passes without gradients.
    """

    def only(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def there(states: Tensor, *more: Tensor) -> Tensor:
            found = None if more else forward(states[rows, columns][None])
            if not isinstance(
                found, Tensor
            ):  # Bloom's MLP takes a residual too; a mixture of experts also says whom it chose
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
