"""The traces of one batch: a forward and a backward pass, or a pair for each row where rows cannot be told apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lwa_helpers.errors import LwaError
from lwa_helpers.fisher.collect import TraceCollector
from lwa_helpers.fisher.hooks import Taps
from lwa_helpers.fisher.losses import Batch, Loss, next_token_nll
from lwa_helpers.fisher.measuring import (
    check_causal,
    is_padded,
    model_errors,
    n_rows,
    one_row,
    refuse_detached,
)
from lwa_helpers.fisher.progress import ranks
from lwa_helpers.fisher.sites import Site, device_of

Around = Callable[[torch.device], AbstractContextManager]


class Passes:
    """Compute the traces of batches, one after the other.

    Most modules see activations whose first axis is the rows. Some models flatten rows and tokens, put the tokens
    first, or send tokens to experts. Their rows are read one at a time: then every activation belongs to that row.

    Attributes:
        reached: The decoder layers at which a gradient has arrived so far.

    Args:
        model: The causal LM: see measuring.
        layers: Its decoder layers.
        sites: All sites of the layers.
        collector: Turns activations and gradients into traces.
        loss: loss(model, batch) -> (B,).
        precision: Returns the context of the forward pass on a device.
        attention: Returns the context of both passes.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[nn.Module],
        sites: list[Site],
        collector: TraceCollector,
        loss: Loss,
        precision: Around,
        attention: Around,
    ):
        self._model, self._layers, self._sites, self._collector = model, list(layers), sites, collector
        self._loss, self._precision, self._attention = loss, precision, attention
        # All processes of a sharded model must make the same passes, whatever batches they have.
        self._sharded = ranks()[1] > 1 and any(isinstance(parameter, DTensor) for parameter in model.parameters())
        self._causal = loss is not next_token_nll  # another loss decides itself what the model reads
        self._plain: set[Site] = set()  # sites that were seen to have the rows on their first axis
        self._watched: set[Site] = set()  # sites without a call, whose parameters autograd watches
        self._by_rows = False
        self.reached: set[int] = set()

    def traces(self, batch: Batch, index: int, idle: bool) -> np.ndarray:
        """Return the traces of a batch, (B, columns).

        Args:
            batch: The batch, on the model's device.
            index: Its number, for messages.
            idle: Whether the passes add nothing to the diagonal.

        Raises:
            LwaError: If the loss has another shape than (B,), is not finite or is detached from the model, or if the
                model is not causal or fails.
        """
        rows = n_rows(batch, index)
        if not self._causal and (self._sharded or is_padded(batch)):
            check_causal(self._model, batch)
            self._causal = True
        if not self._by_rows or rows == 1:
            whole = self._pass(batch, rows, index, 0, idle)
            if whole is not None:
                return whole
            self._by_rows = True
        parts = [self._pass(one_row(batch, row, rows), 1, index, row, idle) for row in range(rows)]
        return np.concatenate([part for part in parts if part is not None])

    def _pass(self, batch: Batch, rows: int, index: int, first: int, idle: bool) -> np.ndarray | None:
        """Return the traces of `rows` rows from number `first` on; None if the rows have to be read one at a time."""
        device = device_of(self._model)
        self._rows = rows
        self._collector.start(rows, device)
        with Taps(self._layers, self._sites, self._receive) as taps, self._attention(device):
            losses = self._forward(batch, index, device)
            _check(losses, rows, index, first)
            new = set(taps.silent) - self._watched
            if not new:
                if (rows > 1 or self._sharded) and not self._rows_first(taps, batch, rows, index, device):
                    return None
                # The factor is 0 in an idle process: its gradients are zero and add nothing to the diagonal's sums.
                with self._errors(f"the backward pass of batch {index}"):
                    taps.backward(losses.sum() * (not idle))
        if new:
            self._watch(new)
            return self._pass(batch, rows, index, first, idle)
        self._check_gradients(taps, batch, losses, index)
        return self._collector.finish().cpu().numpy()

    def _forward(self, batch: Batch, index: int, device: torch.device) -> Tensor:
        with self._errors(f"the forward pass of batch {index}"), self._precision(device):
            return self._loss(self._model, batch)

    def _errors(self, where: str) -> AbstractContextManager:
        """Turn what the model raises into LwaError; what a user's own loss raises stays as it is."""
        return model_errors(self._model, where) if self._loss is next_token_nll else nullcontext()

    def _rows_first(self, taps: Taps, batch: Batch, rows: int, index: int, device: torch.device) -> bool:
        """Whether the first axis of all activations is the rows: one row alone then has a first axis of 1.

        The row is run only where the shapes in the batch leave a doubt, as where there are as many rows as tokens.
        The processes of a sharded model all run it, also those whose batch has one row, which is never in doubt.

        Returns:
            Whether the traces of the rows can be told apart.

        Raises:
            LwaError: If they cannot and the model is sharded: its processes must make the same number of passes.
        """
        doubtful = {site: shapes for site, shapes in taps.shapes.items() if self._doubtful(site, shapes, taps, rows)}
        if not doubtful:
            return True
        odd = next((site for site, shapes in doubtful.items() if any(_flat(shape, rows) for shape in shapes)), None)
        if odd is None:
            alone = taps.shapes_in(lambda: self._forward(one_row(batch, 0, rows), index, device))
            expected = {site: [torch.Size((1, *shape[1:])) for shape in shapes] for site, shapes in doubtful.items()}
            odd = next((site for site, shapes in expected.items() if alone.get(site) != shapes), None)
        if odd is not None and self._sharded and rows > 1:
            raise LwaError(
                f"{odd.label} got an input of shape {tuple(taps.shapes[odd][0])}, whose first axis is not the {rows} "
                "rows, which a sharded model must keep apart: use one process, or batches of one row"
            )
        self._plain |= set(doubtful) if odd is None else set()
        return odd is None or rows == 1

    def _doubtful(self, site: Site, shapes: list[torch.Size], taps: Taps, rows: int) -> bool:
        if site in self._plain:
            return any(_flat(shape, rows) for shape in shapes)
        return self._sharded or not all(_is_plain(shape, taps.tokens, rows) for shape in shapes)

    def _receive(self, site: Site, calls: list[tuple[Tensor, Tensor]]) -> None:
        """Hand the calls of a site's module to the collector, joined along the tokens."""
        calls = [(x, gradient) for x, gradient in calls if x.numel()]  # an expert may have got no token
        if not calls:
            return
        if len(calls) > 1 or _flat(calls[0][0].shape, self._rows):
            sides = ([t.reshape(self._rows, -1, t.shape[-1]) for t in side] for side in zip(*calls))
            x, gradient = (torch.cat(side, 1) if len(side) > 1 else side[0] for side in sides)
        else:
            x, gradient = calls[0]
        with model_errors(self._model, f"the traces of {site.label}"):
            self._collector.receive(site, x, gradient)

    def _watch(self, silent: set[Site]) -> None:
        """Let autograd watch parameters whose module was not called: they may be read without their module."""
        if self._sharded:
            _refuse_unseen(min(silent, key=lambda site: site.label))
        self._watched |= silent
        for parameter in _parameters(silent):
            parameter.requires_grad_(True).grad = None

    def _check_gradients(self, taps: Taps, batch: Batch, losses: Tensor, index: int) -> None:
        """Refuse a pass in which a gradient stayed unseen; a gradient that autograd says is not there is zero."""
        used = [site for site in taps.silent if any(p.grad is not None for p in _parameters([site]))]
        for parameter in _parameters(self._watched):
            parameter.grad = None
        if used:
            _refuse_unseen(used[0])
        refuse_detached(bool(taps.arrived), batch, losses, index)
        self.reached |= {site.layer for site in taps.arrived}


def _check(losses: Tensor, rows: int, index: int, first: int) -> None:
    shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
    if shape != (rows,):
        raise LwaError(f"the loss gave shape {shape} for batch {index}; it must be ({rows},), one per row")
    if not losses.isfinite().all():
        odd = first + int((~losses.isfinite()).nonzero()[0])
        raise LwaError(f"the loss of batch {index} is not finite in row {odd}")


def _refuse_unseen(site: Site) -> NoReturn:
    raise LwaError(f"{site.label} took no part in the forward pass as a module, so its gradient cannot be seen")


def _parameters(sites: Iterable[Site]) -> list[nn.Parameter]:
    return [parameter for site in sites for parameter in site.module.parameters(recurse=False)]


def _flat(shape: torch.Size, rows: int) -> bool:
    """Whether an activation cannot be (B, ..., d)."""
    return len(shape) < 3 or shape[0] != rows


def _is_plain(shape: torch.Size, tokens: torch.Size | None, rows: int) -> bool:
    """Whether an activation is (B, T, ..., d) or (B, ..., T, ..., d) beyond doubt."""
    if tokens is None or not rows == tokens[0] != tokens[1] or _flat(shape, rows):
        return False
    return shape[1] == tokens[1] or (tokens[1] in shape[1:-1] and rows not in shape[1:-1])
