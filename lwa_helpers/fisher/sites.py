"""Where the parameters of the decoder layers sit: one Site per module that owns some, or an error naming what is unsupported."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from lwa_helpers.errors import LwaError

OUTPUT_SPLIT = {"q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn"}  # heads are slices of the output
INPUT_SPLIT = {"o_proj", "out_proj", "c_proj"}  # heads are slices of the input
SMALLEST_FACTOR = 1e-6


@dataclass(eq=False)
class Site:
    """A module with parameters inside decoder layer `layer`; `name` is its path within the layer.

    kind "linear" (weight out x in), "conv1d" (weight in x out) or "scale" (y = x_hat * weight, or x_hat * (1 + weight), + bias).
    unit is the weight at which a "scale" returns x_hat: 1, or 0 for the (1 + weight) form. divisible: x_hat is had from y, by
    dividing by what it was multiplied with; to compute it from x again takes a dozen passes over it.
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
        return self.module.weight.detach() + (1 - self.unit)

    @property
    def label(self) -> str:
        return f"layer {self.layer}: {self.name} ({type(self.module).__name__})"

    def path(self, parameter: str) -> str:
        """The name of one of its parameters in a result's diagonal."""
        return f"{self.layer}.{self.name}.{parameter}"

    @property
    def n_parameters(self) -> int:
        return sum(p.numel() for p in self.module.parameters(recurse=False))


def find_sites(model: nn.Module, layers: Sequence[nn.Module]) -> list[Site]:
    """Return every module that owns parameters inside a model's decoder layers, in order.

    Raises LwaError naming the module when it is of an unsupported kind or shares a parameter with another module.
    """
    sites = [
        _site(index, name, module)
        for index, layer in enumerate(layers)
        for name, module in layer.named_modules(remove_duplicate=False)
        if any(True for _ in module.parameters(recurse=False))
    ]
    _refuse_shared(model, sites)
    return sites


def _site(layer: int, name: str, module: nn.Module) -> Site:
    forward = type(module).forward
    if forward is nn.Linear.forward:
        return Site(layer, name, module, "linear")
    if forward is Conv1D.forward:
        return Site(layer, name, module, "conv1d")
    unit = _scale_unit(module)
    if unit is None:
        raise LwaError(
            f"layer {layer}: {name or 'the layer itself'} ({type(module).__name__}) owns parameters but is neither a linear map "
            "nor an elementwise scale, so its Fisher information cannot be computed; supported are nn.Linear, Conv1D, "
            "LayerNorm, RMSNorm and other modules of the form normalised(x) * weight + bias"
        )
    site = Site(layer, name, module, "scale", unit)
    site.divisible = _divisible(site)
    return site


def _divisible(site: Site) -> bool:
    """Whether x_hat is the output divided by what it is multiplied with: no bias, nothing near zero, the whole weight at hand."""
    weight = site.module.weight
    if getattr(site.module, "bias", None) is not None or weight.is_meta or isinstance(weight, DTensor):
        return False
    return bool((site.factor.abs() > SMALLEST_FACTOR).all())


def _scale_unit(module: nn.Module) -> float | None:
    """Test whether module(x) = x_hat(x) * (weight or 1 + weight) + bias; return the weight that gives x_hat, or None."""
    shapes = {name: p.shape for name, p in module.named_parameters()}
    size = shapes.get("weight", ())
    if not set(shapes) <= {"weight", "bias"} or len(size) != 1 or shapes.get("bias", size) != size:
        return None
    generator = torch.Generator().manual_seed(0)
    device = device_of(module)
    x, weight, bias = (torch.randn(*s, generator=generator).to(device) for s in ((2, 3, *size), size, size))
    try:
        at_zero, at_one = (scale_input(module, x, unit) for unit in (0.0, 1.0))
        y = _output(module, x, weight, bias if "bias" in shapes else None)
    except (TypeError, RuntimeError):  # its forward takes something other than one activation
        return None
    slope = at_one - at_zero
    if not torch.allclose(y - (bias if "bias" in shapes else 0), at_zero + slope * weight, rtol=1e-4, atol=1e-4):
        return None
    if not at_zero.any():
        return 1.0
    return 0.0 if torch.allclose(at_zero, slope, rtol=1e-4, atol=1e-4) else None


def scale_input(module: nn.Module, x: Tensor, unit: float) -> Tensor:
    """Return x_hat (shape of x): the module's output with every weight `unit` and bias 0."""
    weight = torch.full(module.weight.shape, unit, dtype=x.dtype, device=x.device)
    return _output(module, x, weight, None if getattr(module, "bias", None) is None else torch.zeros_like(weight))


@torch.no_grad()
def _output(module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What the module's class computes with these parameters, past any hook or wrapper of the module itself."""
    other = copy.copy(module)
    other._parameters = {name: {"weight": weight, "bias": bias}[name] for name in module._parameters}
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


def head_parts(site: Site, layer: nn.Module) -> tuple[str, int] | None:
    """Return ("output" | "input", number of heads) when a site is an attention projection, else None.

    A fused projection has its query, key and value heads in a row. Raises LwaError when the attention module has no head_dim.
    """
    parent, _, leaf = site.name.rpartition(".")
    if "attn" not in parent or leaf not in OUTPUT_SPLIT | INPUT_SPLIT or site.kind == "scale":
        return None
    head_dim = getattr(layer.get_submodule(parent), "head_dim", None)
    d_in, d_out = linear_size(site)
    side, width = ("output", d_out) if leaf in OUTPUT_SPLIT else ("input", d_in)
    if not head_dim or width % head_dim:
        raise LwaError(f"{site.label}: its {side} ({width}) does not split into heads of head_dim {head_dim}")
    return side, width // head_dim


def linear_size(site: Site) -> tuple[int, int]:
    """(d_in, d_out) of a linear site."""
    rows, columns = site.module.weight.shape
    return (columns, rows) if site.kind == "linear" else (rows, columns)


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: where its first parameter lies, or where accelerate brings it when it is offloaded."""
    device = next(module.parameters()).device
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules()) if device.type == "meta" else ()
    return next(
        (torch.device(hook.execution_device) for hook in hooks if getattr(hook, "execution_device", None) is not None),
        device,
    )
