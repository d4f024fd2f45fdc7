"""Turn (site, input, output gradient) into per-row traces per layer, module or attention head and into the diagonal."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lwa_helpers.fisher.kernels import (
    by_triton,
    direct_traces,
    gram_is_cheaper,
    pair_gram,
    part_traces,
    triton_kernels,
    wide,
)
from lwa_helpers.fisher.result import Column
from lwa_helpers.fisher.sites import Heads, Site, device_of, linear_size, scale_input
from lwa_helpers.models.layers import weight_of


@dataclass(frozen=True)
class Place:
    """The columns of traces that belong to one site.

    Attributes:
        first: The first column of the weight's parts.
        bias: The first column of the bias's parts.
        n_parts: Number of parts of the weight: its attention heads, or 1.
        side: What the heads slice, "input" or "output"; None without heads.
        order: The slice of each head; None where they are in order.
    """

    first: int
    bias: int
    n_parts: int = 1
    side: str | None = None
    order: tuple[int, ...] | None = None


class TraceCollector:
    """Collect per-row squared gradient norms at one granularity, batch by batch.

    With granularity "parameter", `sums` also holds each parameter's squared gradients, added up over all rows so far.

    Args:
        sites: All sites of the decoder layers: see find_sites.
        n_layers: Number of decoder layers.
        granularity: "layer", "module", "head" or "parameter": see FisherInformationCalculator.
        heads: The heads of attention projections, for the granularity "head": see find_heads.
    """

    def __init__(self, sites: list[Site], n_layers: int, granularity: str, heads: dict[Site, Heads]):
        self.columns: list[Column] = []
        if granularity == "layer":
            counts = [sum(site.n_parameters for site in sites if site.layer == index) for index in range(n_layers)]
            self.columns = [Column(index, "", count) for index, count in enumerate(counts)]
            self._places = {site: Place(site.layer, site.layer) for site in sites}
        else:
            self._places = {site: self._place(site, heads.get(site)) for site in sites}
        self.sums: dict[str, Tensor] = {}
        for site in sites if granularity == "parameter" else ():
            for name, p in site.module.named_parameters(recurse=False):
                dtype = torch.promote_types(p.dtype, torch.float32)
                self.sums[site.path(name)] = torch.zeros(p.shape, dtype=dtype, device=device_of(site.module))

    def _place(self, site: Site, heads: Heads | None) -> Place:
        """Append the columns of a site and return where they are."""
        first = len(self.columns)
        if heads is None:
            self.columns.append(Column(site.layer, site.name, site.n_parameters))
            return Place(first, first)
        side, n_parts = heads.side, len(heads.order)
        bias = getattr(site.module, "bias", None)
        own_bias = 0 if bias is None or side == "input" else bias.numel()
        count = (weight_of(site.module).numel() + own_bias) // n_parts
        self.columns += [Column(site.layer, site.name, count, head) for head in range(n_parts)]
        if bias is not None and side == "input":
            self.columns.append(Column(site.layer, f"{site.name}.bias", bias.numel()))
        order = None if heads.order == tuple(range(n_parts)) else heads.order
        return Place(first, first + n_parts if side == "input" else first, n_parts, side, order)

    def start(self, rows: int, device: torch.device) -> None:
        """Make room for a batch: `traces` (rows, columns), float64."""
        self.traces = torch.zeros(rows, len(self.columns), dtype=torch.float64, device=device)
        self._input_gram: tuple[Tensor, list[Tensor]] | None = None

    def finish(self) -> Tensor:
        """Return the batch's traces and free the working set of the last module."""
        self._input_gram = None
        return self.traces

    def receive(self, site: Site, x: Tensor, gradient: Tensor) -> None:
        """Add what one site contributes to the traces.

        Args:
            site: The site.
            x: The input of its module, (B, ..., d); for a divisible site the output.
            gradient: The gradient at the output of its module, (B, ..., d).
        """
        x = x.to(gradient.device)
        place, bias = self._places[site], getattr(site.module, "bias", None)
        if site.divisible:
            self._vector(site, "weight", place.first, gradient * x, divisor=site.factor)
        elif site.kind == "scale":
            self._vector(site, "weight", place.first, gradient * scale_input(site.module, x, site.unit))
        else:
            traces = self._linear(site, place, x.flatten(1, -2), gradient.flatten(1, -2))
            self._add(place.first, traces, place.order)
        if bias is not None:
            parts = (place.n_parts, place.order) if place.side == "output" else (1, None)
            self._vector(site, "bias", place.bias, gradient, *parts)

    def _vector(
        self,
        site: Site,
        name: str,
        column: int,
        terms: Tensor,
        n_parts: int = 1,
        order: tuple[int, ...] | None = None,
        divisor: Tensor | float = 1.0,
    ) -> None:
        """Add a vector parameter, in n_parts equal slices that go to the columns in `order`.

        The gradient of a row is the sum over tokens of `terms` (B, ..., d), divided by `divisor` (d,).
        """
        squares = (wide(terms).flatten(1, -2).sum(1) / divisor).square()
        self._add(column, squares.double().unflatten(1, (n_parts, -1)).sum(2), order)
        if self.sums:
            self.sums[site.path(name)] += squares.sum(0)

    def _linear(self, site: Site, place: Place, a: Tensor, b: Tensor) -> Tensor:
        """Return a weight matrix's traces (B, n_parts) from its input a (B, T, d_in) and gradient b (B, T, d_out)."""
        sums, on_gpu = self.sums.get(site.path("weight")), by_triton(b)
        known = self._input_gram is not None and _same(self._input_gram[0], a)
        # On a GPU no Gram is shared but only half of each is computed, so one of the two is counted as free there too.
        if place.side or (sums is None and gram_is_cheaper(a.shape[1], *linear_size(site), known or on_gpu)):
            return self._ghost(place, a, b, on_gpu)
        left, right = (b, a.to(b.dtype)) if site.kind == "linear" else (a.to(b.dtype), b)
        if on_gpu and sums is not None:
            return triton_kernels().square_sums(left, right, sums).unsqueeze(1)
        return direct_traces(left, right, sums).unsqueeze(1)

    def _ghost(self, place: Place, a: Tensor, b: Tensor, on_gpu: bool) -> Tensor:
        """Return the traces (B, n_parts) by the token-Gram form; place.side says which side the parts slice."""
        if on_gpu:
            whole, sliced = (b, a.to(b.dtype)) if place.side == "input" else (a.to(b.dtype), b)
            return triton_kernels().ghost_traces(whole, sliced, place.n_parts)
        if place.side == "input":
            return part_traces(pair_gram(b), a.to(b.dtype), place.n_parts)
        return part_traces(self._gram_of_input(a, b.dtype), b, place.n_parts)

    def _gram_of_input(self, a: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """Return the Gram of a, in the precision of the matrix product that read it.

        It is kept for the next call: the query, key and value projections share one, and so do the gate and up ones.
        """
        if self._input_gram is None or not _same(self._input_gram[0], a):
            self._input_gram = None  # frees the old Gram before the new one is computed
            self._input_gram = (a, pair_gram(a.to(dtype)))
        return self._input_gram[1]

    def _add(self, column: int, values: Tensor, order: tuple[int, ...] | None = None) -> None:
        values = values if order is None else values[:, list(order)]
        self.traces[:, column : column + values.shape[1]] += values.to(self.traces.device)


def _same(kept: Tensor, a: Tensor) -> bool:
    """Whether two live tensors read the same memory in the same way."""
    return (
        kept.data_ptr() == a.data_ptr()
        and kept.shape == a.shape
        and kept.stride() == a.stride()
        and kept.dtype == a.dtype
    )
