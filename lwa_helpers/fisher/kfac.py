"""How many directions a layer uses: effective ranks of the Kronecker factors of each linear module's Fisher block."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pandas as pd
import torch
from torch import Tensor, nn

from lwa_helpers.fisher.hooks import Taps
from lwa_helpers.fisher.kernels import wide
from lwa_helpers.fisher.losses import next_token_nll
from lwa_helpers.fisher.measuring import measuring, read, refuse_detached
from lwa_helpers.fisher.sites import Site, find_sites
from lwa_helpers.models.layers import decoder_layers


def kfac_effective_ranks(
    model: nn.Module,
    dataset: Iterable[dict],
    loss: Callable[[nn.Module, dict[str, Tensor]], Tensor] | None = None,
    layers: Iterable[int] | None = None,
) -> pd.DataFrame:
    """Compute effective ranks tr(M)^2 / tr(M^2) of A = sum_t a_t a_t^T and S = sum_t b_t b_t^T of every linear module.

    a are the inputs and b the gradients of the summed NLL at the outputs (Martens & Grosse 2015). The sums run over the
    tokens whose gradient is not zero.

    Args:
        model: The causal LM. It comes back as it was.
        dataset: Batches, as dicts of tensors with input_ids (B, T).
        loss: loss(model, batch) -> (B,), the summed NLL of each row. The default is next_token_nll.
        layers: Only these layers, to save memory: a module takes d_in^2 + d_out^2 numbers. The default is all.

    Returns:
        One row per linear module, with the columns layer, module, input_rank (of A) and gradient_rank (of S): NaN where
        no gradient arrived.
    """
    every, loss = decoder_layers(model), loss or next_token_nll
    chosen = set(range(len(every))) if layers is None else set(layers)
    sites = [site for site in find_sites(model, every) if site.kind != "scale" and site.layer in chosen]
    factors: dict[Site, list[Tensor]] = {}

    def receive(site: Site, calls: list[tuple[Tensor, Tensor]]) -> None:
        for x, gradient in calls:
            b = wide(gradient).flatten(0, -2)
            used = b.any(1)
            sides = wide(x).flatten(0, -2)[used], b[used]
            products = [side.T @ side for side in sides]
            factors[site] = [old + new for old, new in zip(factors[site], products)] if site in factors else products

    with measuring(model) as inner:
        for index, batch in enumerate(read(inner, dataset, loss)):
            with Taps(every, sites, receive) as taps:
                losses = loss(inner, batch)
                taps.backward(losses.sum())
            refuse_detached(bool(taps.arrived), batch, losses, index)
    unreached = [torch.zeros(1, 1)] * 2
    rows = [(site.layer, site.name, *map(_effective_rank, factors.get(site, unreached))) for site in sites]
    return pd.DataFrame(rows, columns=["layer", "module", "input_rank", "gradient_rank"])


def _effective_rank(factor: Tensor) -> float:
    """Return tr(M)^2 / tr(M^2), which lies between 1 and the rank; NaN for a zero matrix."""
    factor = factor.double()
    return float(factor.trace() ** 2 / factor.square().sum())
