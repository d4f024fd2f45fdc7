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

Batch = dict[str, Tensor]  # tensors whose first axis is the rows
Loss = Callable[[nn.Module, Batch], Tensor]  # the summed NLL of each row, (B,)

IGNORED = -100
CHUNK = 64  # positions whose logits are processed together, few enough to stay in the cache
TRANSFORMING: WeakSet[nn.Module] = WeakSet()  # models that were seen to change what their head returns


def next_token_nll(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Compute -log p(label_t | tokens before t), summed over each row.

    A label counts only where attention_mask says that its token and the one before it are both real. A row padded on
    either side therefore gives the same as without padding. A batch that lacks input_ids or labels raises LwaError.

    Args:
        model: The causal LM.
        batch: input_ids (B, T), labels (B, T) and, if any token is padding, attention_mask (B, T). Labels are aligned
            with input_ids and shifted here; the label -100 is ignored.

    Returns:
        The sums, (B,), float32 or better.
    """
    kept = counted(batch)
    logits, _ = read_at(model, batch, kept)
    nll = _TokenNLL.apply(logits, batch["labels"][:, 1:][kept])
    rows = kept.nonzero(as_tuple=True)[0]
    return torch.zeros(len(kept), dtype=nll.dtype, device=nll.device).index_add(0, rows, nll)


def _sample(model: nn.Module, batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Return the batch with every label that counts drawn from the model, given the data's tokens before it."""
    kept = counted(batch)
    logits, _ = read_at(model, batch, kept)
    drawn = torch.multinomial(wide(logits).softmax(-1), 1, generator=generator).squeeze(1)
    labels = batch["labels"].clone()
    labels[:, 1:][kept] = drawn
    return {**batch, "labels": labels}


next_token_nll.sample = _sample  # type: ignore[attr-defined]  # mypy does not let a function have attributes


class _TokenNLL(torch.autograd.Function):
    """Compute -log softmax(logits)[label] from logits (P, V) and labels (P,): (P,), float32 or better.

    It keeps the logits as they are for the backward pass, not their log-softmax.
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
    """Find the labels that count.

    Args:
        batch: input_ids (B, T), labels (B, T) and perhaps attention_mask (B, T).

    Returns:
        Whether each of labels[:, 1:] counts, bool (B, T-1).

    Raises:
        LwaError: If input_ids or labels are missing or have different shapes.
    """
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
    return getattr(model, "get_output_embeddings", lambda: None)()


def read_at(
    model: nn.Module, batch: dict[str, Tensor], kept: Tensor, call: Callable | None = None, **options: bool
) -> tuple[Tensor, Any]:
    """Compute logits at the kept positions only.

    The head sees only these positions. What the model does with its head's output is unchanged.

    Args:
        model: The causal LM.
        batch: The batch: see next_token_nll.
        kept: The positions whose logits are wanted, bool (B, T-1).
        call: What to call in place of the model, with the same arguments.
        **options: More arguments of the call.

    Returns:
        Logits (P, V) of the P kept positions, and the whole output of the call.
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
    """Compute the states that the head reads at the kept positions, so that not all logits need to exist at once.

    Some models have no head of their own, and some change what their head returns (Gemma 2 caps it, Granite scales it;
    one position is enough to tell). For these models the logits take the place of the states.

    Args:
        model: The causal LM.
        batch: The batch: see next_token_nll.
        kept: The positions whose states are wanted, bool (B, T-1).
        **options: More arguments of the model's forward.

    Returns:
        States (P, d) at the P kept positions, the head, and the whole output of the model's forward. For the models
        above, and where no position is kept, logits (P, V), the identity, and the whole output.
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
    """Return the model's arguments, with positions that count real tokens only, so that left padding changes nothing.

    Padding on the right needs no mask: the real tokens of a causal model never attend to it, and attention without a
    mask is faster.
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
