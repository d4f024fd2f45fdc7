"""A model made ready for measuring and left as it was, and the batches that it reads."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from lwa_helpers.errors import LwaError, one_line
from lwa_helpers.fisher.losses import IGNORED, Batch, Loss, next_token_nll, read_at
from lwa_helpers.fisher.sites import device_of
from lwa_helpers.models.layers import decoder_layers, unwrapped, without_runners


@contextmanager
def measuring(model: nn.Module) -> Iterator[nn.Module]:
    """Make a model ready for gradients by hooks: evaluation mode, gradients on, nothing compiled.

    The surrounding torch.no_grad() and torch.inference_mode() do not count. Afterwards the model is as it was.

    Args:
        model: The causal LM, perhaps in a wrapper.

    Yields:
        The model that computes (see without_runners), without a parameter that requires a gradient.

    Raises:
        LwaError: If parameters were made in torch.inference_mode(), or if an adapter adds tokens to the prompt.
    """
    inner = without_runners(model)
    _refuse(inner)
    with torch.inference_mode(False), torch.enable_grad(), _eager(), restored(model):
        yield inner.requires_grad_(False)


def _refuse(model: nn.Module) -> None:
    made = next((name for name, parameter in model.named_parameters() if parameter.is_inference()), None)
    if made is not None:
        raise LwaError(
            f"{name_of(model)}: {made} was made inside torch.inference_mode(), so no gradient can pass through it; "
            "make the model outside of it"
        )
    adapter = getattr(model, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):
        raise LwaError(
            f"{name_of(model)} has an adapter of virtual tokens ({type(adapter).__name__}), whose effect no decoder "
            "layer holds; use LoRA, or pass model.get_base_model()"
        )


def name_of(model: nn.Module) -> str:
    """Return the architecture's name for messages."""
    return type(unwrapped(model)).__name__


def _eager() -> AbstractContextManager:
    """Run compiled modules as they were written, because compiled code does not run the hooks that come later."""
    if "torch._dynamo" not in sys.modules:  # then nothing is compiled, and the import would take seconds
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


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


@contextmanager
def model_errors(model: nn.Module, where: str) -> Iterator[None]:
    """Turn whatever a model's own code raises into one LwaError that names the architecture.

    Running out of memory stays what it is: those who search for the largest batch wait for it.

    Args:
        model: The model that runs inside.
        where: What it does, for the message: "the forward pass of batch 3".

    Raises:
        LwaError: If the model raises anything else.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, LwaError | torch.OutOfMemoryError):
            raise
        raise LwaError(f"{name_of(model)} fails in {where}: {type(error).__name__}: {one_line(error)[:300]}") from error


def read(model: nn.Module, dataset: Iterable[Batch], loss: Loss) -> Iterator[Batch]:
    """Yield the batches on the model's device.

    Yields:
        Batches, as dicts of tensors.

    Raises:
        LwaError: If there is no batch, one is no dict of tensors, or the model is not causal although rows are padded.
    """
    device, batch, checked = device_of(model), None, loss is not next_token_nll
    for index, batch in enumerate(dataset):
        batch = moved(batch, device, index)
        if not checked and is_padded(batch):
            check_causal(model, batch)
            checked = True
        yield batch
    if batch is None:
        raise LwaError("the dataset gave no batch: a generator can be read only once")


def moved(batch: Batch, device: torch.device, index: int) -> Batch:
    """Return a batch on a device, as tensors that autograd may keep.

    Raises:
        LwaError: If the batch is no dict of tensors.
    """
    n_rows(batch, index)
    return {name: _ordinary(value.to(device)) for name, value in batch.items()}


def _ordinary(value: Tensor) -> Tensor:
    """Return the values of a tensor made inside torch.inference_mode() as a tensor that autograd may keep."""
    return value.clone() if value.is_inference() else value.detach()


def n_rows(batch: Batch, index: int) -> int:
    """Return how many rows batch number `index` has.

    Raises:
        LwaError: If the batch is no dict of tensors.
    """
    if not isinstance(batch, Mapping) or not batch:
        raise LwaError(f"batch {index} is {type(batch).__name__}, not a dict of tensors")
    odd = next((name for name, value in batch.items() if not isinstance(value, Tensor)), None)
    if odd is not None:
        raise LwaError(
            f"batch {index}: {odd} is {type(batch[odd]).__name__}, not a tensor; leave it out, or make it one "
            "(return_tensors='pt')"
        )
    first = next(iter(batch.values()))
    if first.ndim == 0:
        raise LwaError(f"batch {index}: {next(iter(batch))} is a scalar; the first axis of a tensor is the rows")
    return len(first)


def one_row(batch: Batch, row: int, rows: int) -> Batch:
    """Return one row of a batch of `rows` rows; what does not come by row stays whole."""
    by_row = {name for name, value in batch.items() if value.ndim and len(value) == rows}
    return {name: value[row : row + 1] if name in by_row else value for name, value in batch.items()}


def refuse_detached(reached: bool, batch: Batch, losses: Tensor, index: int) -> None:
    """Refuse a backward pass that reached no decoder layer: that is a mistake, and would read as zero.

    A loss of zero where no label counts is none.

    Args:
        reached: Whether a gradient arrived in some decoder layer.
        batch: The batch.
        losses: Its loss, (B,).
        index: Its number.

    Raises:
        LwaError: If nothing was reached and some label counts.
    """
    unlabelled = "labels" in batch and bool((batch["labels"] == IGNORED).all()) and not losses.any()
    if not reached and not unlabelled:
        raise LwaError(
            f"no gradient of the loss of batch {index} reaches a decoder layer: the loss is a constant, or was "
            "computed under torch.no_grad() or from detached values. Where a batch has nothing to learn, return a "
            "zero that depends on the model, such as 0 * logits.sum((1, 2))"
        )


def is_padded(batch: Batch) -> bool:
    """Whether the mask of a batch says that some token is padding."""
    mask = batch.get("attention_mask")
    return mask is not None and not bool(mask.all())


@torch.no_grad()
def check_causal(model: nn.Module, batch: Batch) -> None:
    """Refuse a model whose prediction at a token depends on later tokens, because padding would then count.

    A model whose attention says that it is causal is believed. Of others, two short rows are read.

    Args:
        model: The causal LM, in evaluation mode.
        batch: input_ids (B, T) and attention_mask (B, T).

    Raises:
        LwaError: If the prediction changes with the last token of a row, or if the model fails.
    """
    parts = (part for layer in decoder_layers(model) for part in layer.modules())
    flags = [part.is_causal for part in parts if isinstance(getattr(part, "is_causal", None), bool)]
    if flags and all(flags):
        return
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    row = int(real.sum(1).argmax())
    ids = batch["input_ids"][row][real[row]][:8].repeat(2, 1)
    ids[1, -1] = (ids[0, -1] == 0).long()
    with model_errors(model, "a forward pass of two short rows"):
        kept = torch.ones_like(ids[:, 1:], dtype=torch.bool)
        one, other = read_at(model, {"input_ids": ids}, kept)[0].double().chunk(2)
    if len(one) and (one - other).abs().max() > 0.01 * one.abs().max():
        raise LwaError(
            f"{name_of(model)} is not causal: what it predicts at a token depends on later tokens, padding among them; "
            "set is_decoder=True in the config of an encoder, or give rows of one length"
        )
