"""What is often called Fisher information but is not: the squared gradient of a batch's mean loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from torch import Tensor, nn

from lwa_helpers.fisher.hooks import backward
from lwa_helpers.fisher.losses import next_token_nll
from lwa_helpers.fisher.measuring import measuring, read, refuse_detached
from lwa_helpers.models.layers import decoder_layers


def squared_batch_gradient(
    model: nn.Module, dataset: Iterable[dict], loss: Callable[[nn.Module, dict[str, Tensor]], Tensor] | None = None
) -> np.ndarray:
    """Average || d(mean row loss of the batch) / d theta_l ||^2 over batches, for use as a baseline only.

    The rows' gradients cancel inside the square. The value therefore depends on the batch size and shrinks as it grows.
    It estimates no Fisher matrix (Kunstner et al. 2019, arXiv:1905.12558, section 2).

    Args:
        model: The model. It comes back as it was.
        dataset: Batches, as dicts of tensors.
        loss: loss(model, batch) -> (B,), the loss of each row. The default is next_token_nll.

    Returns:
        The mean of each decoder layer, (L,).
    """
    loss = loss or next_token_nll
    parameters = [list(layer.parameters()) for layer in decoder_layers(model)]
    batches = []
    with measuring(model) as inner:
        for parameter in (p for group in parameters for p in group):
            parameter.requires_grad_(True)
        for index, batch in enumerate(read(inner, dataset, loss)):
            model.zero_grad(set_to_none=True)
            losses = loss(inner, batch)
            backward(losses.mean())
            norms = [
                [p.grad.double().square().sum().item() for p in group if p.grad is not None] for group in parameters
            ]
            refuse_detached(any(norms), batch, losses, index)
            batches.append([sum(group) for group in norms])
    return np.mean(batches, axis=0)
