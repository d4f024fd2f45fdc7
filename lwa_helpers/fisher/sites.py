"""Where decoder layers keep their parameters: one Site per module that owns any; an error names unsupported ones."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from lwa_helpers.errors import LwaError
from lwa_helpers.models.layers import weight_of

SMALLEST_FACTOR = 1e-6  # a scale is divided by its factors only where all of them are larger than this


@dataclass(eq=False)
class Site:
    """A module with parameters inside a decoder layer.

    Attributes:
        layer: The decoder layer, from 0.
        name: The module's path within the layer.
        module: The module.
        kind: "linear" (weight out x in), "conv1d" (weight in x out) or "scale" (y = x_hat * weight + bias, or
            y = x_hat * (1 + weight) + bias).
        unit: The weight at which a "scale" returns x_hat: 1, or 0 for the (1 + weight) form.
        divisible: Whether x_hat is computed from y, by dividing by what it was multiplied with. Computing it from x
            again takes a dozen passes over x.
    """

    layer: int
    name: str
    module: nn.Module
    kind: str
    unit: float = 1.0
    divisible: bool = False

    @property
    def factor(self) -> Tensor:
        """What a "scale" multiplies x_hat by, (d,)."""
        return weight_of(self.module).detach() + (1 - self.unit)

    @property
    def label(self) -> str:
        """The site's name in messages."""
        return f"layer {self.layer}: {self.name} ({type(self.module).__name__})"

    def path(self, parameter: str) -> str:
        """Return the name of one of its parameters in a result's diagonal."""
        return f"{self.layer}.{self.name}.{parameter}"

    @property
    def n_parameters(self) -> int:
        """Number of entries of the parameters that the module itself owns."""
        return sum(p.numel() for p in self.module.parameters(recurse=False))


@dataclass(frozen=True)
class Heads:
    """The attention heads of a projection: equal slices of its input or output.

    Attributes:
        side: "output" of a query, key or value projection, "input" of the one that joins the heads.
        order: Which slice each head is, counted as find_heads counts them.
    """

    side: str
    order: tuple[int, ...]


def find_sites(model: nn.Module, layers: Iterable[nn.Module]) -> list[Site]:
    """Return every module that owns parameters inside a model's decoder layers, in order.

    A module that is of an unsupported kind or shares a parameter with another module raises LwaError, which names it.
    """
    sites = [
        _site(index, name.replace("_orig_mod.", ""), module)  # torch.compile puts this into names
        for index, layer in enumerate(layers)
        for name, module in layer.named_modules(remove_duplicate=False)
        if any(True for _ in module.parameters(recurse=False))
    ]
    _refuse_shared(model, sites)
    return sites


def _site(layer: int, name: str, module: nn.Module) -> Site:
    kind = _linear_kind(module)
    if kind is not None and (weight_of(module).ndim != 2 or not weight_of(module).numel()):
        raise LwaError(
            f"layer {layer}: {name} ({type(module).__name__}) has no whole weight in this process, as under "
            "FullyShardedDataParallel or ZeRO-3: shard the model with torch.distributed.fsdp.fully_shard, or use DDP"
        )
    if kind is not None:
        return Site(layer, name, module, kind)
    unit = _scale_unit(module)
    if unit is None:
        raise LwaError(
            f"layer {layer}: {name or 'the layer itself'} ({type(module).__name__}) owns parameters but is neither a "
            "linear map nor an elementwise scale, so its Fisher information cannot be computed; supported are "
            "nn.Linear, Conv1D, LayerNorm, RMSNorm and other modules of the form normalised(x) * weight + bias"
        )
    site = Site(layer, name, module, "scale", unit)
    site.divisible = _divisible(site)
    return site


def _linear_kind(module: nn.Module) -> str | None:
    """Return "linear" or "conv1d" for a module that is such a map of its weight and bias, None for another.

    A subclass of nn.Linear with a forward pass of its own is judged by what it computes.
    """
    known = {nn.Linear.forward: "linear", Conv1D.forward: "conv1d"}.get(type(module).forward)
    if known is not None or not isinstance(module, nn.Linear) or not module.weight.is_floating_point():
        return known
    x, weight, bias = _random(module, (2, 3, 5), (4, 5), (4,))
    try:
        y = _output(module, x, weight, bias)
        same = torch.allclose(y, F.linear(x, weight, None if module.bias is None else bias), rtol=1e-4, atol=1e-4)
    except Exception:  # whatever its forward wants, it is no plain map of one activation, and find_sites says so
        return None
    return "linear" if same else None


def _random(module: nn.Module, *shapes: Sequence[int]) -> list[Tensor]:
    """Return random tensors on the device where a module computes, the same at each call."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).to(device_of(module)) for shape in shapes]


def _divisible(site: Site) -> bool:
    """Whether x_hat is y / factor: there is no bias, no factor is near zero, and the whole weight is present."""
    weight = weight_of(site.module)
    if getattr(site.module, "bias", None) is not None or weight.is_meta or isinstance(weight, DTensor):
        return False
    return bool((site.factor.abs() > SMALLEST_FACTOR).all())


def _scale_unit(module: nn.Module) -> float | None:
    """Test whether module(x) is x_hat(x) * weight + bias or x_hat(x) * (1 + weight) + bias.

    Returns:
        The weight that gives x_hat: 1 or 0. None for a module of another form.
    """
    shapes = {name: p.shape for name, p in module.named_parameters()}
    size = shapes.get("weight", ())
    if not set(shapes) <= {"weight", "bias"} or len(size) != 1 or shapes.get("bias", size) != size:
        return None
    x, weight, bias = _random(module, (2, 3, *size), size, size)
    try:
        at_zero, at_one = (scale_input(module, x, unit) for unit in (0.0, 1.0))
        y = _output(module, x, weight, bias)
        slope = at_one - at_zero
    except Exception:  # its forward takes or gives something other than one activation, and find_sites says so
        return None
    if not torch.allclose(y - (bias if "bias" in shapes else 0), at_zero + slope * weight, rtol=1e-4, atol=1e-4):
        return None
    if not at_zero.any():
        return 1.0
    return 0.0 if torch.allclose(at_zero, slope, rtol=1e-4, atol=1e-4) else None


def scale_input(module: nn.Module, x: Tensor, unit: float) -> Tensor:
    """Return x_hat (the shape of x): the module's output when every weight is `unit` and the bias is 0."""
    weight = torch.full(weight_of(module).shape, unit, dtype=x.dtype, device=x.device)
    return _output(module, x, weight, torch.zeros_like(weight))


@torch.no_grad()
def _output(module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return what the module's class computes with these parameters, without any hook or wrapper of the module."""
    other = copy.copy(module)
    values: dict[str, Any] = {"weight": weight, "bias": bias}  # a forward pass reads plain tensors like parameters
    own = module._parameters
    other._parameters = {name: None if own[name] is None else values[name] for name in own}
    return type(module).forward(other, x)


def _refuse_shared(model: nn.Module, sites: list[Site]) -> None:
    owner: dict[int, str] = {}
    for site in sites:
        for parameter in site.module.parameters(recurse=False):
            if id(parameter) in owner:
                raise LwaError(
                    f"{site.label} shares a parameter with {owner[id(parameter)]}: a layer's own Fisher is undefined"
                )
            owner[id(parameter)] = site.label
    modules = {id(site.module) for site in sites}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if id(module) not in modules and id(parameter) in owner:
                raise LwaError(f"{owner[id(parameter)]} shares a parameter with {name}, outside the decoder layers")


def linear_size(site: Site) -> tuple[int, int]:
    """Return (d_in, d_out) of a linear site."""
    rows, columns = weight_of(site.module).shape
    return (columns, rows) if site.kind == "linear" else (rows, columns)


def device_of(module: nn.Module) -> torch.device:
    """Return the device where a module computes.

    This is the device of its first parameter, or the one to which accelerate brings an offloaded parameter.
    """
    device = next(module.parameters()).device
    if device.type != "meta":
        return device
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    places = (getattr(hook, "execution_device", None) for hook in hooks)
    return next((torch.device(place) for place in places if place is not None), device)
