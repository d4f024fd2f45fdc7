"""Alternatives to Fisher information as a score of layer importance, and the ground truth that all try to predict.

Each function takes (model, batches, loss). batches is an iterable of dicts of tensors, read once. loss(model, batch) ->
(B,) is one number per row, by default the summed next-token NLL. Each function returns a float64 array of one score per
layer, where larger means more important, and leaves the model as it was. Each raises LwaError when it reads batches and
there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lwa_helpers.errors import LwaError
from lwa_helpers.fisher.hooks import backward, hidden_of
from lwa_helpers.fisher.losses import Loss, next_token_nll
from lwa_helpers.fisher.measuring import measuring, name_of, one_row, read, refuse_detached
from lwa_helpers.models.layers import decoder_layers

T = TypeVar("T")


def block_influence(model: nn.Module, batches: Iterable[dict], loss: Loss = next_token_nll) -> np.ndarray:
    """Return BI_l = 1 - mean over real tokens of cos(h_l, h_{l+1}), (L,).

    This is equation 1 of ShortGPT (Men et al. 2024, arXiv:2403.03853).
    """

    def sums(cosines: Tensor, mask: Tensor) -> tuple[np.ndarray, int]:
        return (cosines * mask).sum((1, 2)).cpu().numpy(), int(mask.sum())

    totals, counts = zip(*_by_cosines(model, batches, loss, sums))
    return 1 - np.sum(totals, axis=0) / sum(counts)


def angular_distance(model: nn.Module, batches: Iterable[dict], loss: Loss = next_token_nll) -> np.ndarray:
    """Return arccos(cos(h_l, h_{l+1})) / pi at each row's last real token, averaged over rows, (L,).

    The score is that of Gromov et al. (2024, arXiv:2403.17887).
    """

    def angles(cosines: Tensor, mask: Tensor) -> np.ndarray:
        last = mask.shape[1] - 1 - mask.flip(1).long().argmax(1)  # argmax finds the first real token from the right
        return cosines[:, torch.arange(len(mask)), last].clamp(-1, 1).arccos().cpu().numpy() / np.pi

    return np.concatenate(_by_cosines(model, batches, loss, angles), axis=1).mean(1)


def weight_magnitude(model: nn.Module, batches: Iterable[dict] = (), loss: Loss = next_token_nll) -> np.ndarray:
    """Return the sum of |w| over each layer's parameters, (L,); batches and loss are not used."""
    return np.array(
        [sum(p.detach().double().abs().sum().item() for p in layer.parameters()) for layer in decoder_layers(model)]
    )


def taylor(model: nn.Module, batches: Iterable[dict], loss: Loss = next_token_nll) -> np.ndarray:
    """Return sum_j |w_j g_j| of each layer, (L,), where g is the gradient of the mean row loss over all batches.

    The score is that of LLM-Pruner (Ma et al. 2023, arXiv:2305.11627).
    """
    layers = [list(layer.parameters()) for layer in decoder_layers(model)]
    n = 0
    with measuring(model) as inner:
        inner.zero_grad(set_to_none=True)
        for parameter in (p for layer in layers for p in layer):
            parameter.requires_grad_(True)
        for index, batch in enumerate(read(inner, batches, loss)):
            losses = loss(inner, batch)
            backward(losses.sum())
            n += len(losses)
            reached = losses.requires_grad and any(p.grad is not None for layer in layers for p in layer)
            refuse_detached(reached, batch, losses, index)
        scores = [
            sum((p.detach() * p.grad).double().abs().sum().item() for p in layer if p.grad is not None)
            for layer in layers
        ]
    return np.array(scores) / n


def leave_one_layer_out(model: nn.Module, batches: Iterable[dict], loss: Loss = next_token_nll) -> np.ndarray:
    """Return the measured effect: the mean increase of the row loss when layer l returns its input unchanged, (L,)."""
    return leave_one_layer_out_rows(model, batches, loss).mean(0)


def leave_one_layer_out_rows(model: nn.Module, batches: Iterable[dict], loss: Loss = next_token_nll) -> np.ndarray:
    """Return the loss without layer l minus the loss of the whole model for each row, (n, L), for bootstrap intervals.

    The layers before l are not computed again: layer l passes on the input that it had in the whole model.
    """
    layers = list(decoder_layers(model))
    rows = []
    with measuring(model) as inner, torch.no_grad():
        for batch in read(inner, batches, loss):
            with _recorded(inner, layers) as (inputs, outputs):
                whole = loss(inner, batch)
            without = []
            for index in range(len(layers)):
                with _skipped(layers[: index + 1], inputs[index], outputs[index]):
                    without.append(loss(inner, batch))
            rows.append((torch.stack(without, 1) - whole[:, None]).double().cpu().numpy())
    return np.concatenate(rows)


def _by_cosines(model: nn.Module, batches: Iterable[dict], loss: Loss, score: Callable[[Tensor, Tensor], T]) -> list[T]:
    """Compare each layer's input and output at each token.

    Args:
        model: The causal LM.
        batches: The batches.
        loss: What runs the model on a batch.
        score: Called with the cosines (L, B, T), float64, and the mask of real tokens (B, T).

    Returns:
        What `score` returns for each batch.
    """
    layers, found = list(decoder_layers(model)), []
    with measuring(model) as inner, torch.no_grad():
        for batch in read(inner, batches, loss):
            with _recorded(inner, layers) as (inputs, outputs):
                loss(inner, batch)
            mask = batch.get("attention_mask", torch.ones(inputs[0].shape[:2])).bool().to(inputs[0].device)
            if loss is next_token_nll:  # it moves all padding to the right
                mask = mask.sort(dim=1, descending=True).values
            _check_axes(inner, layers, batch, loss, inputs[0].shape, mask)
            hidden = [out[0] if isinstance(out, tuple) else out for out in outputs]
            cosines = [F.cosine_similarity(a.double(), b.double(), dim=-1) for a, b in zip(inputs, hidden)]
            found.append(score(torch.stack(cosines), mask))
    return found


def _check_axes(
    model: nn.Module, layers: list[nn.Module], batch: dict, loss: Loss, shape: torch.Size, mask: Tensor
) -> None:
    """Refuse a model whose hidden states are not (B, T, d); where B is T, one row alone tells."""
    rows = mask.shape[0]
    if shape[:2] == mask.shape and 1 < rows == shape[1]:
        with _recorded(model, layers) as (inputs, _):
            loss(model, one_row(batch, 0, rows))
        shape = torch.Size((rows * inputs[0].shape[0], *inputs[0].shape[1:]))
    if shape[:2] != mask.shape:
        raise LwaError(
            f"{name_of(model)}: the hidden states between its layers have shape {tuple(shape)}, not (rows, tokens, "
            "size), so the tokens cannot be told apart"
        )


@contextmanager
def _recorded(model: nn.Module, layers: list[nn.Module]) -> Iterator[tuple[list[Tensor], list]]:
    """Collect the input hidden state and the output of every layer, in order.

    Yields:
        The inputs and the outputs, filled when the context ends.

    Raises:
        LwaError: If a layer is not called exactly once, or takes no hidden state.
    """
    calls: list[list[tuple]] = [[] for _ in layers]
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def recorder(index: int):
        return lambda _layer, args, kwargs, output: calls[index].append((hidden_of(args, kwargs), output))

    handles = [layer.register_forward_hook(recorder(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        yield inputs, outputs
    finally:
        for handle in handles:
            handle.remove()
    for index, of_layer in enumerate(calls):
        if len(of_layer) != 1 or of_layer[0][0] is None:
            raise LwaError(
                f"{name_of(model)}: decoder layer {index} ran {len(of_layer)} times on hidden states in one pass, "
                "not once, so its influence is undefined"
            )
        inputs.append(of_layer[0][0])
        outputs.append(of_layer[0][1])


@contextmanager
def _skipped(layers: list[nn.Module], hidden: Tensor, output: Any) -> Iterator[None]:
    """Let every one of these layers return `hidden` at once, in the form of `output`."""
    same = (hidden, *output[1:]) if isinstance(output, tuple) else hidden
    before = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.forward = lambda *_args, **_kwargs: same
    try:
        yield
    finally:
        for layer, forward in zip(layers, before):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward
