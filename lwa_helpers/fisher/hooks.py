"""Read each site's input and output gradient during a pass, and leave the model as it was."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lwa_helpers.errors import LwaError
from lwa_helpers.fisher.kernels import wide
from lwa_helpers.fisher.sites import Site

Receive = Callable[[Site, Tensor, Tensor], None]


@contextmanager
def restored(model: nn.Module) -> Iterator[nn.Module]:
    """Put a model into evaluation mode (dropout off); afterwards restore all modes, requires_grad and gradients."""
    modes = {module: module.training for module in model.modules()}
    flags = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    try:
        yield model.eval()
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, (requires_grad, grad) in flags.items():
            parameter.requires_grad_(requires_grad).grad = grad


class Float32Attention(TorchFunctionMode):
    """A context in which attention that would run in bfloat16 on a CPU runs in float32; its result is bfloat16 again.

    Float32 is more exact, and on rows of a hundred tokens its backward pass takes less than half the time.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or not _in_bfloat16(args[0]):
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
        return y.view_as(y)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        ctx.receive(ctx.saved_tensors[0], gradient)
        return gradient, None, None


class Taps:
    """Call receive(site, x, dL/dy) once per site and backward pass.

    The calls of a module that is used several times are joined along the tokens. A divisible site passes its output y
    in place of x, because the next module keeps y anyway. x and dL/dy are (B, tokens, d). Use this as a context around
    `total = loss(...).sum()` and `taps.backward(total)`.

    Args:
        first_layer: The first decoder layer.
        sites: The sites to read.
        receive: Called as receive(site, x, dL/dy).
        batch_size: Number of rows of the batch, B.
    """

    def __init__(self, first_layer: nn.Module, sites: list[Site], receive: Receive, batch_size: int):
        self._first_layer = first_layer
        self._sites, self._receive, self._batch_size = sites, receive, batch_size
        self._calls: Counter[Site] = Counter()
        self._arrived: defaultdict[Site, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self._in_backward = False

    def __enter__(self) -> Self:
        self._handles = [self._first_layer.register_forward_pre_hook(_start_gradients, with_kwargs=True)]
        for site in self._sites:
            self._handles.append(site.module.register_forward_hook(self._tap(site), with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def backward(self, total: Tensor) -> None:
        """Run the backward pass and deliver what is left.

        Args:
            total: The summed loss, a scalar.

        Raises:
            LwaError: If a site's module was never called.
        """
        silent = [site.label for site in self._sites if not self._calls[site]]
        if silent:
            raise LwaError(f"{silent[0]} took no part in the forward pass as a module, so its gradient cannot be seen")
        self._in_backward = True
        if total.requires_grad:
            total.backward()
        for site in list(self._arrived):
            self._deliver(site)

    def _tap(self, site: Site):
        def hook(_module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
            if not self._in_backward:
                self._calls[site] += 1
            if not (torch.is_grad_enabled() and output.requires_grad):
                return None
            x = output if site.divisible else args[0] if args else next(iter(kwargs.values()))
            return _Tap.apply(output, x, lambda a, b: self._arrive(site, a, b))

        return hook

    def _arrive(self, site: Site, x: Tensor, gradient: Tensor) -> None:
        if x.ndim < 3 or len(x) != self._batch_size:
            raise LwaError(
                f"{site.label} got an input of shape {tuple(x.shape)}; "
                f"its first axis must be the {self._batch_size} rows"
            )
        self._arrived[site].append((x, gradient))
        if len(self._arrived[site]) == self._calls[site]:
            self._deliver(site)

    def _deliver(self, site: Site) -> None:
        calls = self._arrived.pop(site)
        with torch.autocast(calls[0][1].device.type, enabled=False):
            if len(calls) == 1:
                self._receive(site, *calls[0])
            else:
                rows = self._batch_size
                self._receive(
                    site, *(torch.cat([t.reshape(rows, -1, t.shape[-1]) for t in side], 1) for side in zip(*calls))
                )


def _start_gradients(_layer: nn.Module, args: tuple, kwargs: dict):
    """Make the first decoder layer's input require a gradient, because no parameter does."""
    if not torch.is_grad_enabled():
        return None
    if args:
        return (args[0].detach().requires_grad_(), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": kwargs["hidden_states"].detach().requires_grad_()}
