"""Which slices of attention projections are heads, found by what the attention computes, not by names.

The model reads two tokens, and every linear map of its layers returns random numbers. Gradients then tell which of
these numbers reach which slice of the input of the next map. Attention is where the second token depends on the first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lwa_helpers.errors import LwaError
from lwa_helpers.fisher.losses import read_at
from lwa_helpers.fisher.measuring import model_errors, name_of
from lwa_helpers.fisher.sites import Heads, Site, device_of

QUERY, KEY, VALUE = range(3)
SCALE = 0.5  # of the random numbers: no softmax saturates
ROUNDING = 0.02  # share of the largest gradient below which one is rounding: the gradient of a softmax over one token


@dataclass
class Call:
    """A call of a linear map: its input x, (2, d_in), and its random output y, (..., d_out), where gradients end."""

    site: Site
    x: Tensor
    y: Tensor


def find_heads(model: nn.Module, layers: nn.ModuleList, sites: list[Site]) -> dict[Site, Heads]:
    """Find the heads of every attention projection.

    Of a map that holds several kinds of heads, the query heads come first, then the key heads, then the value heads,
    wherever they lie in its weight. A map whose parts belong to no single head (a low-rank one, say) has no entry.

    Args:
        model: The causal LM: see measuring.
        layers: Its decoder layers.
        sites: All sites of the layers.

    Returns:
        The heads of each projection that has some.

    Raises:
        LwaError: If there are none, or if the model cannot read two tokens.
    """
    calls = _run(model, sites)
    found: dict[Site, Heads] = {}
    for index, layer in enumerate(layers):
        of_layer = [call for call in calls if call.site.layer == index]
        for module in reversed(list(layer.modules())):  # inner modules come first
            if _numbers(module) and not any(site.module is part for site in found for part in module.modules()):
                found |= _heads_of(module, of_layer)
    if not found:
        raise LwaError(
            f"no attention heads were found in the decoder layers of {name_of(model)}: none of its modules that tell a "
            'number of heads has linear maps that split into them; use granularity="module"'
        )
    return found


def _run(model: nn.Module, sites: list[Site]) -> list[Call]:
    """Return the calls of all linear maps in a forward pass of two tokens, in order."""
    ids = torch.tensor([[1, 2]], device=device_of(model))
    kept = torch.ones_like(ids[:, 1:], dtype=torch.bool)
    where = "a forward pass of two tokens, which tells its attention heads"
    with _random_outputs(sites) as calls, sdpa_kernel(SDPBackend.MATH), model_errors(model, where):
        read_at(model, {"input_ids": ids}, kept)
    return calls


@contextmanager
def _random_outputs(sites: list[Site]) -> Iterator[list[Call]]:
    calls: list[Call] = []
    generator = torch.Generator().manual_seed(0)

    def random_output(site: Site, args: tuple, output: Tensor) -> Tensor:
        y = torch.randn(output.shape, generator=generator).mul(SCALE).to(output).requires_grad_()
        if args[0].numel() == 2 * args[0].shape[-1]:  # else it does not see one vector a token
            calls.append(Call(site, args[0].reshape(2, -1), y))
        return y.clone()  # no leaf, because Falcon adds to it in place

    handles = [
        site.module.register_forward_hook(lambda _module, args, output, site=site: random_output(site, args, output))
        for site in sites
        if site.kind != "scale"
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _numbers(module: nn.Module) -> dict[str, int]:
    """Return the attributes of a module that tell a number or a size of heads."""
    return {name: n for name, n in vars(module).items() if "head" in name and type(n) is int and n > 0}


def _counts(module: nn.Module, width: int) -> list[int]:
    """Return how many heads a module may have by its attributes, where all of them together are `width` wide."""
    numbers = _numbers(module)
    sizes = sorted(
        (name for name in numbers if re.search("dim|size|^d_", name)), reverse=True
    )  # v_head_dim comes first
    shared = {name for name in numbers if re.search("kv|key|_k_", name)}  # a number of key and value heads
    counts = [numbers[name] for name in numbers if name not in shared.union(sizes)]
    counts += [width // numbers[name] for name in sizes if width % numbers[name] == 0]
    return [n for n in dict.fromkeys(counts) if width % n == 0]


def _heads_of(module: nn.Module, calls: list[Call]) -> dict[Site, Heads]:
    """Return the heads of one attention module's projections; nothing if it is no attention that splits into heads."""
    parts = {id(part) for part in module.modules()}
    own = [place for place, call in enumerate(calls) if id(call.site.module) in parts]
    # The map that joins the heads is the module's own, or the next one after it.
    for place in own + [place + 1 for place in own[-1:] if place + 1 < len(calls)]:
        joint, before = calls[place], [calls[i] for i in own if i < place]
        if not before or not _mixes(joint, before):
            continue
        splits = [(n, *_output_heads(joint, before, n)) for n in _counts(module, joint.x.shape[1])]
        n_heads, outputs, _ = min(splits, key=lambda split: split[2], default=(0, {}, math.inf))
        inputs = {call.site for call in calls[place:] if outputs and torch.equal(call.x, joint.x)}
        return outputs | dict.fromkeys(inputs, Heads("input", tuple(range(n_heads))))
    return {}


def _mixes(joint: Call, before: list[Call]) -> bool:
    """Whether the second token of a map's input depends on the first token of an earlier map's output."""
    return any(gradient[0].any() for gradient in _gradients(joint.x[1], before))


def _gradients(x: Tensor, before: list[Call]) -> list[Tensor]:
    """Return the gradient of a random combination of x by the outputs of earlier maps, (2, d_out) each."""
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
    outputs = [call.y for call in before]
    if not x.requires_grad:
        return [torch.zeros_like(y).reshape(-1, y.shape[-1]) for y in outputs]
    found = torch.autograd.grad((x * weights).sum(), outputs, retain_graph=True, materialize_grads=True)
    return [gradient.reshape(-1, gradient.shape[-1]) for gradient in found]


def _output_heads(joint: Call, before: list[Call], n_heads: int) -> tuple[dict[Site, Heads], float]:
    """Find the heads in the outputs of the maps before the one that joins n_heads heads.

    Returns:
        The heads of each map that has some, and how few heads a number of its output reaches: 1 where each query has
        its own. Nothing and infinity if every number reaches all heads: then these are no heads.
    """
    slices = joint.x.unflatten(1, (n_heads, -1)).unbind(1)  # (2, head size) each
    by_token = [[_gradients(part[token], before) for part in slices] for token in (0, 1)]
    largest = max(float(gradient.abs().max()) for gradients in by_token[0] for gradient in gradients)
    found: dict[Site, Heads] = {}
    fewest = n_heads
    for index, call in enumerate(before):
        first, second = (torch.stack([gradients[index] for gradients in token]) for token in by_token)  # (n, 2, d_out)
        reached = (first.any(1) | second.any(1)).T  # (d_out, n)
        kind = torch.where(second[:, 0].any(0), KEY, QUERY)
        kind[first[:, 0].abs().amax(0) > ROUNDING * largest] = VALUE
        numbers = [(int(k), tuple(heads.nonzero().flatten().tolist())) for k, heads in zip(kind, reached)]
        if order := _order(numbers, slices[0].shape[1]):
            found[call.site] = Heads("output", order)
            fewest = min(fewest, *(len(heads) for _, heads in numbers))
    return (found, fewest) if found and (fewest < n_heads or n_heads == 1) else ({}, math.inf)


def _order(numbers: list[tuple[int, tuple[int, ...]]], size: int) -> tuple[int, ...]:
    """Return which equal slice of an output is which head; nothing if the output does not split into heads.

    Args:
        numbers: The kind of each number of the output, and the heads that it reaches.
        size: The size of a head where the heads are joined.
    """
    if not all(heads for _, heads in numbers):
        return ()
    for known in (numbers, [(QUERY, heads) for _, heads in numbers]):  # keys and values may differ in size
        runs = [(key, len(list(group))) for key, group in groupby(known)]
        if len(runs) == 1 and len(numbers) % size == 0:  # one head, or a norm over all heads lets each reach all
            runs = [(runs[0][0], size)] * (len(numbers) // size)
        if len({length for _, length in runs}) == 1:
            return tuple(sorted(range(len(runs)), key=lambda place: (runs[place][0][0], runs[place][0][1][0], place)))
    return ()
