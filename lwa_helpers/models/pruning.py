"""Copies of a causal LM with fewer decoder layers, each checked against the whole model without the other layers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lwa_helpers.errors import LwaError, one_line
from lwa_helpers.models.language_model import plain
from lwa_helpers.models.layers import LAYER_COUNTS, decoder_layers, evaluating, filled

LAYER_INDICES = (
    "mlp_only_layers",
    "hybrid_layer_ids",
    "cross_attention_layers",
    "moe_layers",
)  # lists of layer indices
FIRST_LAYERS = ("first_k_dense_replace", "num_dense_layers")  # how many of the first layers differ from the rest
LAST_LAYERS = ("num_kv_shared_layers",)  # how many of the last layers differ from the rest
PROBE_TOKENS = 12
TOLERANCE = 1e-3  # times the largest logit: the same operations on the same weights agree far better


def with_layers(model: nn.Module, kept: Sequence[int]) -> nn.Module:
    """Return a copy of a causal LM with only the layers `kept`, renumbered from 0.

    The copy computes what the whole model computes when the other layers pass their input on. This is checked once, on
    a few tokens. Adapters of a PEFT model are merged into the copy.

    Args:
        model: The causal LM.
        kept: The layers' indices, in rising order.

    Raises:
        LwaError: If no config of this architecture describes the copy, or the copy computes something else.
    """
    model = plain(model)
    try:
        pruned = _copied(model, kept)
        problem = _different_setting(model, pruned, kept) or _different_logits(model, pruned, kept)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        # The layers of this architecture differ in a way that its config cannot say for any other set of layers.
        problem = one_line(error)[:200]
    if problem:
        raise LwaError(
            f"{type(model).__name__} cannot be cut to its layers {list(kept)}: what a layer computes depends on its "
            f"index ({problem}); choose other layers, or a model whose layers do not depend on their index"
        )
    return pruned


def _copied(model: Any, kept: Sequence[int]) -> nn.Module:
    config = copy.deepcopy(model.config)
    layers = decoder_layers(model)
    _keep_settings(config.get_text_config(decoder=True), len(layers), kept)
    paths = [f"{name}." for name, module in model.named_modules(remove_duplicate=False) if module is layers]
    state = {}
    for name, value in model.state_dict().items():
        path = next((path for path in paths if name.startswith(path)), None)
        if path is not None:
            index, rest = name[len(path) :].split(".", 1)
            if int(index) not in kept:
                continue
            name = f"{path}{kept.index(int(index))}.{rest}"
        state[name] = value
    return filled(type(model), config, state, model)


def _keep_settings(config: Any, whole: int, kept: Sequence[int]) -> None:
    """Reduce a config of `whole` layers to the layers `kept`, in place.

    These are their number, and every setting that goes by a layer's index.
    """
    _make_periods_explicit(config, whole)
    for name, value in list(vars(config).items()):
        if name in LAYER_INDICES and isinstance(value, (list, tuple)):
            new: Any = [kept.index(index) for index in value if index in kept]
        elif name in FIRST_LAYERS and isinstance(value, int):
            new = sum(index < value for index in kept)
        elif name in LAST_LAYERS and isinstance(value, int):
            new = sum(index >= whole - value for index in kept)
        elif isinstance(value, (list, tuple)) and len(value) == whole and "token" not in name:
            new = type(value)(value[index] for index in kept)
        else:
            continue
        setattr(config, name, new)
    for name in LAYER_COUNTS:
        if getattr(config, name, None) == whole:
            setattr(config, name, len(kept))
    if hasattr(config, "attention_types"):  # GPT-Neo says twice which layer attends how
        config.attention_types = [[list(config.attention_layers), 1]]


def _make_periods_explicit(config: Any, n_layers: int) -> None:
    """Turn `every n-th layer is sparse` into the list of layers that are not, in place."""
    step = getattr(config, "decoder_sparse_step", 1)
    if step > 1:
        dense = {index for index in range(n_layers) if (index + 1) % step}
        config.mlp_only_layers = sorted(dense | set(config.mlp_only_layers or ()))
        config.decoder_sparse_step = 1


def _different_setting(model: nn.Module, pruned: nn.Module, kept: Sequence[int]) -> str:
    """Return the first setting in which a layer of the copy differs from its original, or ""."""
    whole = decoder_layers(model)
    for place, (index, layer) in enumerate(zip(kept, decoder_layers(pruned), strict=True)):
        for (name, old), (_, new) in zip(whole[index].named_modules(), layer.named_modules(), strict=True):
            for setting, value in _settings(old).items():
                other = _settings(new).get(setting)
                if value != other and (value, other) != (index, place):
                    return f"{type(old).__name__}.{setting} of layer {index} is {value}, in the copy {other}"
            if dict(_shapes(old)) != dict(_shapes(new)) or not _equal(
                dict(old.named_buffers()), dict(new.named_buffers())
            ):
                return f"the tensors of {name or 'layer'} differ"
    return ""


def _settings(module: nn.Module) -> dict[str, Any]:
    """Return a module's own plain values that its forward pass may read, such as a window."""
    plain = (bool, int, float, str, tuple, type(None))
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, plain) and name not in ("training", "gradient_checkpointing") and name[0] != "_"
    }


def _shapes(module: nn.Module) -> Iterator[tuple[str, torch.Size]]:
    return ((name, parameter.shape) for name, parameter in module.named_parameters())


def _equal(old: dict[str, Tensor], new: dict[str, Tensor]) -> bool:
    return old.keys() == new.keys() and all(torch.equal(value, new[name]) for name, value in old.items())


@torch.no_grad()
def _different_logits(model: Any, pruned: Any, kept: Sequence[int]) -> str:
    """Return by how much the logits of the copy differ from those of the model without the other layers, or ""."""
    tokens = _probe(model)
    with evaluating(model), evaluating(pruned):
        with _skipping(decoder_layers(model), set(kept)):
            expected = model(input_ids=tokens, use_cache=False).logits.float()
        error = float(
            (pruned(input_ids=tokens).logits.float() - expected).abs().max()
        )  # with the cache that it will have
    largest = float(expected.abs().max())
    return (
        ""
        if error <= TOLERANCE * largest
        else f"a logit of the copy is off by {error:.2g}, the largest is {largest:.2g}"
    )


def _probe(model: Any) -> Tensor:
    """Return one row of ordinary tokens, (1, T), the same for each model of a vocabulary."""
    special = {value for name, value in vars(model.config).items() if "token" in name and isinstance(value, int)}
    rows = model.get_input_embeddings().weight.shape[0]
    drawn = torch.randperm(min(rows, 4096), generator=torch.Generator().manual_seed(0)).tolist()
    ordinary = [token for token in drawn if token not in special][:PROBE_TOKENS]
    return torch.tensor([ordinary], device=model.device)


@contextmanager
def _skipping(layers: nn.ModuleList, kept: set[int]) -> Iterator[None]:
    """Let all layers but `kept` return their input unchanged."""
    hooks = [
        layer.register_forward_hook(_pass_on, with_kwargs=True)
        for index, layer in enumerate(layers)
        if index not in kept
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _pass_on(_: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    states = args[0] if args else kwargs["hidden_states"]
    return (states, *output[1:]) if isinstance(output, tuple) else states
