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
from lwa_helpers.models.layers import unwrapped

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
    return getattr(unwrapped(model), "get_output_embeddings", lambda: None)()


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
    inputs, order = _inputs(model, batch)
    packed = _reordered(kept, order)

    def pack(_head: nn.Module, args: tuple) -> tuple:
        return (args[0][:, :-1][packed][None],)

    head = _head(model)
    if head is None:
        out = (call or model)(**inputs, **options)
        return out.logits[:, :-1][packed], out
    handle = head.register_forward_pre_hook(pack)
    try:
        out = (call or model)(**inputs, **options)
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
        States (P, d) at the P kept positions, the head, and the whole output of the model's forward, with hidden states
        in the order of the batch. For the models above, and where no position is kept, logits (P, V), the identity, and
        the whole output.
    """
    inputs, order = _inputs(model, batch)
    head = _head(model)
    if head is not None and model not in TRANSFORMING and kept.any():
        read = []
        packed = _reordered(kept, order)

        def one(_head: nn.Module, args: tuple) -> tuple:
            read.append(args[0][:, :-1][packed])
            return (read[0][None, :1],)

        handle = head.register_forward_pre_hook(one)
        try:
            out = model.forward(**inputs, **options)
        finally:
            handle.remove()
        if torch.equal(out.logits.float(), head(read[0][None, :1]).float()):
            return read[0], head, _in_batch_order(out, order)
        TRANSFORMING.add(model)
    logits, out = read_at(model, batch, kept, model.forward, **options)
    return logits, nn.Identity(), _in_batch_order(out, order)


def _inputs(model: nn.Module, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor | bool], Tensor | None]:
    """Return the model's arguments, with all padding moved to the right, and the order of the tokens if that moved any.

    Padding on the right changes nothing: the real tokens of a causal model never attend to it and are counted from 0,
    whatever the model knows about masks and positions. So it needs no mask either, and attention without one is faster.

    Args:
        model: The causal LM, perhaps in a wrapper: its own forward tells which arguments there are.
        batch: input_ids (B, T) and perhaps attention_mask (B, T).

    Returns:
        The arguments, and for each new position the old one, (B, T), or None.
    """
    ids, order = batch["input_ids"], None
    mask = batch.get("attention_mask", torch.ones_like(ids))
    if not (mask[:, 1:] <= mask[:, :-1]).all():
        order = mask.bool().int().argsort(dim=1, descending=True, stable=True)
        ids = ids.gather(1, order)
    inputs: dict[str, Tensor | bool] = {"input_ids": ids}
    accepted = inspect.signature(unwrapped(model).forward).parameters
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    if "attention_mask" in accepted or any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        inputs["attention_mask"] = torch.ones_like(mask)
    return inputs, order


def _reordered(kept: Tensor, order: Tensor | None) -> Tensor:
    """Return where the kept labels (B, T-1) are after the tokens were moved; their order stays."""
    if order is None:
        return kept
    return F.pad(kept, (1, 0)).gather(1, order)[:, 1:]


def _in_batch_order(out: Any, order: Tensor | None) -> Any:
    """Move the hidden states (B, T, d) of an output back to where the batch has their tokens."""
    if order is not None and getattr(out, "hidden_states", None) is not None:
        back = order.argsort(dim=1)[..., None]
        out.hidden_states = tuple(state.gather(1, back.expand_as(state)) for state in out.hidden_states)
    return out
