"""Alternatives to Fisher information as a score of layer importance, and the ground truth that all try to predict.

Each function takes (model, batches, loss). batches is an iterable of dicts of tensors, read once. loss(model, batch) ->
(B,) is one number per row, by default the summed next-token NLL. Each function returns a float64 array of one score per
layer, where larger means more important, and leaves the model as it was. Each raises LwaError when it reads batches and
there is none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lwa_helpers.errors import LwaError
from lwa_helpers.fisher.hooks import restored
from lwa_helpers.fisher.losses import Loss, next_token_nll
from lwa_helpers.models.layers import decoder_layers


def block_influence(model: nn.Module, batches: Iterable[dict], loss: Loss = next_token_nll) -> np.ndarray:
    """Return BI_l = 1 - mean over real tokens of cos(h_l, h_{l+1}), (L,).

    This is equation 1 of ShortGPT (Men et al. 2024, arXiv:2403.03853).
    """
    sums: np.ndarray = np.zeros(())
    count = 0
    for cosines, mask in _layer_cosines(model, batches, loss):
        sums = sums + (cosines * mask).sum((1, 2)).cpu().numpy()
        count += int(mask.sum())
    return 1 - sums / count


def angular_distance(model: nn.Module, batches: Iterable[dict], loss: Loss = next_token_nll) -> np.ndarray:
    """Return arccos(cos(h_l, h_{l+1})) / pi at each row's last real token, averaged over rows, (L,).

    The score is that of Gromov et al. (2024, arXiv:2403.17887).
    """
    rows = []
    for cosines, mask in _layer_cosines(model, batches, loss):
        last = mask.shape[1] - 1 - mask.flip(1).long().argmax(1)  # argmax finds the first real token from the right
        rows.append(cosines[:, torch.arange(len(mask)), last].clamp(-1, 1).arccos().cpu().numpy() / np.pi)
    return np.concatenate(rows, axis=1).mean(1)


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
    with restored(model), torch.enable_grad():
        model.requires_grad_(False).zero_grad(set_to_none=True)
        for parameter in (p for layer in layers for p in layer):
            parameter.requires_grad_(True)
        for batch in _on_device(model, batches):
            losses = loss(model, batch)
            losses.sum().backward()
            n += len(losses)
        scores = [
            sum((p.detach() * p.grad).double().abs().sum().item() for p in layer if p.grad is not None)
            for layer in layers
        ]
    return np.array(scores) / n


def leave_one_layer_out(model: nn.Module, batches: Iterable[dict], loss: Loss = next_token_nll) -> np.ndarray:
    """Return the measured effect: the mean increase of the row loss when layer l returns its input unchanged, (L,)."""
    return leave_one_layer_out_rows(model, batches, loss).mean(0)


@torch.no_grad()
def leave_one_layer_out_rows(model: nn.Module, batches: Iterable[dict], loss: Loss = next_token_nll) -> np.ndarray:
    """Return the loss without layer l minus the loss of the whole model for each row, (n, L), for bootstrap intervals.

    The layers before l are not computed again: layer l passes on the input that it had in the whole model.
    """
    layers = list(decoder_layers(model))
    rows = []
    with restored(model):
        for batch in _on_device(model, batches):
            with _recorded(layers) as (inputs, outputs):
                whole = loss(model, batch)
            without = []
            for index in range(len(layers)):
                with _skipped(layers[: index + 1], inputs[index], tuple_output=isinstance(outputs[index], tuple)):
                    without.append(loss(model, batch))
            rows.append((torch.stack(without, 1) - whole[:, None]).double().cpu().numpy())
    return np.concatenate(rows)


def _on_device(model: nn.Module, batches: Iterable[dict]) -> Iterator[dict[str, Tensor]]:
    """Yield the batches on the model's device.

    Yields:
        Batches, as dicts of tensors.

    Raises:
        LwaError: If there is no batch.
    """
    device, batch = next(model.parameters()).device, None
    for batch in batches:
        yield {name: value.to(device) for name, value in batch.items()}
    if batch is None:
        raise LwaError("the dataset gave no batch: a generator can be read only once")


@torch.no_grad()
def _layer_cosines(model: nn.Module, batches: Iterable[dict], loss: Loss) -> Iterator[tuple[Tensor, Tensor]]:
    """Compare each layer's input and output at each token.

    Yields:
        For each batch the cosines (L, B, T), float64, and the mask of real tokens (B, T).
    """
    layers = list(decoder_layers(model))
    with restored(model):
        for batch in _on_device(model, batches):
            with _recorded(layers) as (inputs, outputs):
                loss(model, batch)
            hidden = [out[0] if isinstance(out, tuple) else out for out in outputs]
            cosines = torch.stack([F.cosine_similarity(a.double(), b.double(), dim=-1) for a, b in zip(inputs, hidden)])
            yield cosines, batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()


@contextmanager
def _recorded(layers: list[nn.Module]) -> Iterator[tuple[list[Tensor], list]]:
    """Collect the input hidden state and the output of every layer, in order."""
    inputs, outputs = [], []

    def record(_layer: nn.Module, args: tuple, kwargs: dict, output) -> None:
        inputs.append(args[0] if args else kwargs["hidden_states"])
        outputs.append(output)

    handles = [layer.register_forward_hook(record, with_kwargs=True) for layer in layers]
    try:
        yield inputs, outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _skipped(layers: list[nn.Module], hidden: Tensor, tuple_output: bool) -> Iterator[None]:
    """Let every one of these layers return `hidden` at once."""
    before = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.forward = lambda *_args, **_kwargs: (hidden,) if tuple_output else hidden
    try:
        yield
    finally:
        for layer, forward in zip(layers, before):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward
