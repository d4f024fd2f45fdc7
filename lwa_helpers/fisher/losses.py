"""The default loss: next-token negative log-likelihood, summed per row, with logits only where there is a label."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lwa_helpers.errors import LwaError
from lwa_helpers.fisher.kernels import wide

IGNORED = -100
CHUNK = 64  # positions whose logits are looked at together: they stay in the cache
TRANSFORMING: WeakSet[nn.Module] = WeakSet()  # models seen to say something else than their head does


def next_token_nll(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Summed -log p(label_t | tokens before t) of each row: (B,), float32 or better.

    labels (B, T) are aligned with input_ids and shifted here; -100 is ignored. A label counts only where its token and the
    one before it are both real by attention_mask, so that a padded row (on either side) gives what it gives alone.
    Raises LwaError when the batch lacks input_ids or labels.
    """
    kept = counted(batch)
    logits, _ = read_at(model, batch, kept)
    nll = _TokenNLL.apply(logits, batch["labels"][:, 1:][kept])
    rows = kept.nonzero(as_tuple=True)[0]
    return torch.zeros(len(kept), dtype=nll.dtype, device=nll.device).index_add(0, rows, nll)


def _sample(model: nn.Module, batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """The batch with every label that counts drawn from the model, given the data's tokens before it."""
    kept = counted(batch)
    logits, _ = read_at(model, batch, kept)
    drawn = torch.multinomial(wide(logits).softmax(-1), 1, generator=generator).squeeze(1)
    labels = batch["labels"].clone()
    labels[:, 1:][kept] = drawn
    return {**batch, "labels": labels}


next_token_nll.sample = _sample


class _TokenNLL(torch.autograd.Function):
    """-log softmax(logits)[label]: logits (P, V), labels (P,) -> (P,), float32 or better.

    Keeps the logits as they are, not their log-softmax.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(logits, labels)
        parts = zip(logits.split(CHUNK), labels.split(CHUNK))
        return torch.cat([F.cross_entropy(wide(part), target, reduction="none") for part, target in parts])

    @staticmethod
    def backward(ctx, gradient: Tensor):
        logits, labels = ctx.saved_tensors
        out = torch.empty_like(logits)
        for part, target, scale, into in zip(*(t.split(CHUNK) for t in (logits, labels, gradient, out))):
            residual = wide(part).softmax(-1)
            residual[torch.arange(len(target), device=target.device), target] -= 1
            torch.mul(residual, scale[:, None], out=into)
        return out, None


def counted(batch: dict[str, Tensor]) -> Tensor:
    """Where labels[:, 1:] count: bool (B, T-1)."""
    missing = {"input_ids", "labels"} - set(batch)
    if missing:
        raise LwaError(
            f"a batch for the default loss needs {' and '.join(sorted(missing))}; it has {', '.join(sorted(batch))}"
        )
    if batch["labels"].shape != batch["input_ids"].shape:
        raise LwaError(f"labels have shape {tuple(batch['labels'].shape)}, input_ids {tuple(batch['input_ids'].shape)}")
    kept = batch["labels"][:, 1:] != IGNORED
    if "attention_mask" in batch:
        real = batch["attention_mask"].bool()
        kept = kept & real[:, 1:] & real[:, :-1]
    return kept


def _head(model: nn.Module) -> nn.Module | None:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def read_at(
    model: nn.Module, batch: dict[str, Tensor], kept: Tensor, call: Callable | None = None, **options: bool
) -> tuple[Tensor, Any]:
    """Logits (P, V) of the P kept positions, and all else that `call`, by default the model, returns with `options`.

    The head sees only those positions, whatever the model does with its output.
    """

    def pack(_head: nn.Module, args: tuple) -> tuple:
        return (args[0][:, :-1][kept][None],)

    head = _head(model)
    if head is None:
        out = (call or model)(**_inputs(model, batch), **options)
        return out.logits[:, :-1][kept], out
    handle = head.register_forward_pre_hook(pack)
    try:
        out = (call or model)(**_inputs(model, batch), **options)
        return out.logits.flatten(0, 1), out
    finally:
        handle.remove()


def states_at(
    model: nn.Module, batch: dict[str, Tensor], kept: Tensor, **options: bool
) -> tuple[Tensor, Callable, Any]:
    """States (P, d) that the head reads at the P kept positions, the head, and all else that the model's forward returns.

    So that logits need not exist all at once. Of a model without a head of its own, or that transforms what its head says
    (Gemma 2 caps it, Granite scales it; one position tells), the logits (P, V) and the identity.
    """
    head = _head(model)
    if head is not None and model not in TRANSFORMING and kept.any():
        read = []

        def one(_head: nn.Module, args: tuple) -> tuple:
            read.append(args[0][:, :-1][kept])
            return (read[0][None, :1],)

        handle = head.register_forward_pre_hook(one)
        try:
            out = model.forward(**_inputs(model, batch), **options)
        finally:
            handle.remove()
        if torch.equal(out.logits.float(), head(read[0][None, :1]).float()):
            return read[0], head, out
        TRANSFORMING.add(model)
    logits, out = read_at(model, batch, kept, model.forward, **options)
    return logits, nn.Identity(), out


def _inputs(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor | bool]:
    """Model arguments: positions count real tokens only, so that left padding changes nothing.

    Padding on the right needs no mask: a causal model's real tokens never look at it, and attention without a mask is faster.
    """
    accepted = inspect.signature(model.forward).parameters
    inputs: dict[str, Tensor | bool] = {"input_ids": batch["input_ids"]}
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    on_the_right = bool((mask[:, 1:] <= mask[:, :-1]).all())
    inputs["attention_mask"] = torch.ones_like(mask) if on_the_right else mask
    if "position_ids" in accepted and not on_the_right:
        inputs["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)
    return inputs
