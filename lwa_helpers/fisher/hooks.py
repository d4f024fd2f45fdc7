"""Read each site's input and output gradient during a pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lwa_helpers.fisher.kernels import wide
from lwa_helpers.fisher.sites import Site

Receive = Callable[[Site, list[tuple[Tensor, Tensor]]], None]


class Float32Attention(TorchFunctionMode):
    """A context in which attention that would run in bfloat16 on a CPU runs in float32; its result is bfloat16 again.

    Float32 is more exact, and on rows of a hundred tokens its backward pass takes less than half the time.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or not _in_bfloat16(args[0] if args else kwargs["query"]):
            return func(*args, **kwargs)
        args, kwargs = [_wide(x) for x in args], {name: _wide(x) for name, x in kwargs.items()}
        with torch.autocast("cpu", enabled=False):
            return func(*args, **kwargs).bfloat16()


def _in_bfloat16(query: Tensor) -> bool:
    """Whether attention of this query would run in bfloat16 on a CPU, by its own type or by autocast."""
    cast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return query.device.type == "cpu" and (cast or query.dtype == torch.bfloat16)


def _wide(x: object) -> object:
    return wide(x) if isinstance(x, Tensor) else x


class _Tap(torch.autograd.Function):
    """The identity on y, whose backward pass hands (x, dL/dy) to `receive`.

    Autograd keeps x as it keeps any saved tensor, also under checkpointing.
    """

    @staticmethod
    def forward(ctx, y: Tensor, x: Tensor, receive: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.receive = receive
        ctx.mark_dirty(y)  # returns y itself, not a view of it: Falcon adds to what its linear maps return, in place
        return y

    @staticmethod
    def backward(ctx, gradient: Tensor):
        ctx.receive(ctx.saved_tensors[0], gradient)
        return gradient, None, None


def backward(total: Tensor) -> None:
    """Run the backward pass of a scalar; a constant has none."""
    if total.requires_grad:
        total.backward()


class Taps:
    """Call receive(site, calls) once per site and backward pass, where calls are the pairs (x, dL/dy) of its module.

    A module that is used several times has several pairs. A divisible site passes its output y in place of x, because
    the next module keeps y anyway. Use this as a context around `total = loss(...).sum()` and `taps.backward(total)`.

    Attributes:
        shapes: The shapes of what each site's module was called with in the forward pass, (..., d) each.
        tokens: The shape of the hidden states that came to a decoder layer, (B, T, d) in most models.
        arrived: The sites at which a gradient arrived.

    Args:
        layers: The decoder layers.
        sites: The sites to read.
        receive: Called as receive(site, calls).
    """

    def __init__(self, layers: Iterable[nn.Module], sites: list[Site], receive: Receive):
        self._layers, self._sites, self._receive = list(layers), sites, receive
        self.shapes: defaultdict[Site, list[torch.Size]] = defaultdict(list)
        self.tokens: torch.Size | None = None
        self.arrived: set[Site] = set()
        self._waiting: defaultdict[Site, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self._in_backward = False

    def __enter__(self) -> Self:
        self._handles = [layer.register_forward_pre_hook(self._start, with_kwargs=True) for layer in self._layers]
        for site in self._sites:  # before the hooks of others, which may change what the module returns
            hook = self._tap(site)
            self._handles.append(site.module.register_forward_hook(hook, prepend=True, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    @property
    def silent(self) -> list[Site]:
        """The sites whose modules were not called in the forward pass."""
        return [site for site in self._sites if site not in self.shapes]

    def shapes_in(self, call: Callable[[], object]) -> dict[Site, list[torch.Size]]:
        """Return the shapes that another forward pass gives, which leaves no trace in this one."""
        kept, self.shapes = (self.shapes, self.tokens), defaultdict(list)
        with torch.no_grad():
            call()
        found, (self.shapes, self.tokens) = self.shapes, kept
        return found

    def backward(self, total: Tensor) -> None:
        """Run the backward pass of the summed loss, a scalar, and deliver what is left."""
        self._in_backward = True
        backward(total)
        for site in list(self._waiting):
            self._deliver(site)

    def _start(self, _layer: nn.Module, args: tuple, kwargs: dict):
        """Make a decoder layer's input require a gradient where nothing before it does, as no parameter does."""
        hidden = hidden_of(args, kwargs)
        if hidden is None:
            return None
        self.tokens = self.tokens or hidden.shape
        if hidden.requires_grad or not torch.is_grad_enabled():
            return None
        start = hidden.detach().requires_grad_()
        return (
            tuple(start if x is hidden else x for x in args),
            {name: start if x is hidden else x for name, x in kwargs.items()},
        )

    def _tap(self, site: Site):
        def hook(_module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
            given = args[0] if args else next(iter(kwargs.values()))
            x = output if site.divisible else given
            if not self._in_backward:
                self.shapes[site].append(x.shape)
            if not torch.is_grad_enabled() or (given.requires_grad and not output.requires_grad):  # it detaches
                return None
            if not output.requires_grad:  # nothing before it does: its own parameters would start the gradient
                output = output.detach().requires_grad_().clone()  # no leaf, which nothing may change in place
            return _Tap.apply(output, x, lambda a, b: self._arrive(site, a, b))

        return hook

    def _arrive(self, site: Site, x: Tensor, gradient: Tensor) -> None:
        self._waiting[site].append((x, gradient))
        if len(self._waiting[site]) == len(self.shapes[site]):
            self._deliver(site)

    def _deliver(self, site: Site) -> None:
        calls = self._waiting.pop(site)
        self.arrived.add(site)
        with torch.autocast(calls[0][1].device.type, enabled=False):
            self._receive(site, calls)


def hidden_of(args: tuple, kwargs: dict) -> Tensor | None:
    """Return the hidden states that a decoder layer was called with: its first argument of real numbers."""
    return next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()), None)
