"""Fisher information of a causal LM's decoder layers, from one forward and one (lighter) backward pass per batch."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from lwa_helpers.errors import LwaError
from lwa_helpers.fisher.collect import TraceCollector
from lwa_helpers.fisher.convergence import SMALLEST, split_half_spearman
from lwa_helpers.fisher.heads import find_heads
from lwa_helpers.fisher.hooks import Float32Attention
from lwa_helpers.fisher.losses import Batch, Loss, next_token_nll
from lwa_helpers.fisher.measuring import measuring, moved, n_rows
from lwa_helpers.fisher.passes import Passes
from lwa_helpers.fisher.progress import (
    TracesByBatch,
    collect_sums,
    forget,
    load_progress,
    merge,
    ranks,
    save_progress,
    share_sums,
)
from lwa_helpers.fisher.result import FisherResult
from lwa_helpers.fisher.sites import Site, device_of, find_sites
from lwa_helpers.models.layers import decoder_layers

CHECK_GROWTH = 1.25  # the stopping rule is checked again after a quarter more examples

LOG = logging.getLogger(__name__)


@dataclass
class FisherInformationCalculator:
    """Compute F_l = mean over examples of || d(summed NLL of the example) / d theta_l ||^2 for each decoder layer l.

    An example is one row of a batch. theta_l is every parameter of layer l, trainable or frozen, of the base model and
    of LoRA adapters. Embeddings, the final norm and heads do not count. The model runs in evaluation mode (no dropout,
    no checkpointing by transformers) and comes back as it was. Of torch.compile, DataParallel and
    DistributedDataParallel the model inside is measured, as it was written. A surrounding torch.no_grad() or
    torch.inference_mode() does not count.

    Several processes (torchrun, accelerate) share the batches: each of them gets the whole dataset and computes its
    part. All return the result of a single process, up to rounding. They check stop_at only after a turn, in which each
    process computes one batch.

    Attributes:
        estimator: "empirical" takes the labels from the data. "sampled" draws them from the model by loss.sample, which
            gives the Fisher information proper.
        granularity: "layer", "module", "head" (attention projections split by head: see find_heads) or "parameter"
            (adds the diagonal).
        seed: Seed of the sampled labels.
        autocast: Type with which the forward pass runs under torch.autocast.
        stop_at: Stop once the split-half Spearman of the layers' order reaches this value (0.95 is customary), and
            log the number of examples that it took.
        checkpoint: File that keeps the work done so far and is deleted at the end. A run that finds the file resumes
            there and gives the identical result. The file is refused when the model, the loss or the data have changed.
        checkpoint_every: Number of batches after which the checkpoint is written again.
        progress: Whether to show a progress bar.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> size = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=9, num_hidden_layers=3, **size))
        >>> batch = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([[1, 2, 3]])}
        >>> FisherInformationCalculator().calculate(model, [batch]).per_layer.shape
        (3,)
    """

    estimator: Literal["empirical", "sampled"] = "empirical"
    granularity: Literal["layer", "module", "head", "parameter"] = "layer"
    seed: int = 0
    autocast: torch.dtype | None = None
    stop_at: float | None = None
    checkpoint: str | Path | None = None
    checkpoint_every: int = 64
    progress: bool = False

    def __post_init__(self) -> None:
        allowed = {"estimator": ("empirical", "sampled"), "granularity": ("layer", "module", "head", "parameter")}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise LwaError(f"{name} {getattr(self, name)!r}: use one of {', '.join(values)}")

    def calculate(self, model: nn.Module, dataset: Iterable[Batch], loss: Loss | None = None) -> FisherResult:
        """Read the batches once and compute the Fisher information.

        Args:
            model: The causal LM.
            dataset: Batches, as dicts of tensors whose first axis is the rows.
            loss: loss(model, batch) -> (B,), the summed NLL of each row. The default is next_token_nll. The estimator
                "sampled" also needs loss.sample(model, batch, generator) -> batch with labels drawn.

        Returns:
            The traces of every example and, with granularity "parameter", the diagonal.

        Raises:
            LwaError: If `model` is no torch module, holds an unsupported module or was made in torch.inference_mode(),
                if the loss has another shape, is not finite or is detached from the model, if the estimator "sampled"
                finds no loss.sample, if no attention heads are found for the granularity "head", or if the dataset is
                empty.
        """
        if not isinstance(model, nn.Module):
            raise LwaError(
                f"calculate() needs a torch module, not {type(model).__name__}; of a loaded teacher pass .model"
            )
        loss = loss or next_token_nll
        if self.estimator == "sampled" and not hasattr(loss, "sample"):
            raise LwaError('estimator "sampled" needs loss.sample(model, batch, generator) -> batch with labels drawn')
        layers = decoder_layers(model)
        sites = find_sites(model, layers)
        with measuring(model) as inner:
            heads = find_heads(inner, layers, sites) if self.granularity == "head" else {}
            collector = TraceCollector(sites, len(layers), self.granularity, heads)
            passes = Passes(inner, layers, sites, collector, loss, self._precision, partial(self._attention, inner))
            traces = self._read(inner, dataset, loss, passes, collector)
        if self.checkpoint is not None:
            forget(self.checkpoint)
        self._warn_of_silence(traces, collector, passes.reached)
        return self._result(traces, sites, collector)

    def _read(
        self,
        model: nn.Module,
        dataset: Iterable[Batch],
        loss: Loss,
        passes: Passes,
        collector: TraceCollector,
    ) -> np.ndarray:
        """Compute the traces of all rows; process number i modulo the number of processes computes batch i.

        Returns:
            Traces (n, columns), in the order of the dataset.

        Raises:
            LwaError: If the dataset is empty.
        """
        one_batch = partial(self._one_batch, model, loss, passes)
        rank, size = ranks()
        batches = enumerate(tqdm(dataset, desc="Fisher", unit="batch", disable=not self.progress or rank > 0))
        found = self._resume(batches, one_batch, collector)
        seen, saved = sum(map(len, found.values())), len(found)
        next_check = _check_after(seen)
        while turn := list(islice(batches, size)):
            # When the last turn has fewer batches than processes, the others are idle. They repeat the last batch,
            # because a sharded model needs all processes in every pass.
            index, batch = turn[min(rank, len(turn) - 1)]
            idle = rank >= len(turn)
            traces = one_batch(batch, index, idle)
            found |= {} if idle else {index: traces}
            seen += sum(n_rows(batch, index) for index, batch in turn)
            if self.checkpoint is not None and turn[-1][0] + 1 - saved >= self.checkpoint_every:
                saved, found = turn[-1][0] + 1, merge(found)
                self._keep(self.checkpoint, found, collector)
            if self.stop_at is not None and seen >= next_check:
                next_check, found = _check_after(seen), merge(found)
                if self._converged(self.stop_at, collector, np.concatenate(list(found.values()))):
                    break
        found = merge(found)
        if not found:
            raise LwaError("the dataset gave no batch: a generator can be read only once")
        share_sums(collector.sums.values())
        return np.concatenate(list(found.values()))

    def _one_batch(
        self,
        model: nn.Module,
        loss: Any,  # a Loss; for the estimator "sampled", one with loss.sample
        passes: Passes,
        batch: Batch,
        index: int,
        idle: bool = False,
    ) -> np.ndarray:
        """Return the traces of a batch, (rows, columns); an idle pass adds nothing to the diagonal."""
        device = device_of(model)
        batch = moved(batch, device, index)
        if self.estimator == "sampled":
            # A generator for each batch, so that its labels do not depend on which process draws them. The factor keeps
            # the generators of different seeds apart for the first million batches.
            generator = torch.Generator(device).manual_seed(self.seed * 1_000_003 + index)
            with torch.no_grad(), self._precision(device):
                batch = loss.sample(model, batch, generator)
        return passes.traces(batch, index, idle)

    def _resume(
        self, batches: Iterator[tuple[int, Batch]], one_batch: Callable[..., np.ndarray], collector: TraceCollector
    ) -> TracesByBatch:
        """Skip the batches that the checkpoint holds, if there is one, and recompute the last of them as a check."""
        if self.checkpoint is None or not Path(self.checkpoint).exists():
            return {}
        found, sums = load_progress(self.checkpoint, self._fingerprint(collector))
        passed = deque(islice(batches, len(found)), maxlen=1)
        again = one_batch(passed[0][1], passed[0][0], idle=False) if passed else None
        kept = found[len(found) - 1]
        if (
            again is None
            or passed[0][0] != len(found) - 1
            or again.shape != kept.shape
            or not np.allclose(again, kept, rtol=0.01)
        ):
            raise LwaError(
                f"{self.checkpoint} holds the traces of another model, loss or dataset: delete it, or name another file"
            )
        for name, total in collector.sums.items():  # overwrites what the check added; process 0 holds the sums of all
            total.copy_(sums[name] if ranks()[0] == 0 else torch.zeros_like(total))
        return found

    def _keep(self, path: str | Path, found: TracesByBatch, collector: TraceCollector) -> None:
        collect_sums(collector.sums.values())
        if ranks()[0] == 0:
            save_progress(path, self._fingerprint(collector), found, collector.sums)

    def _fingerprint(self, collector: TraceCollector) -> dict:
        settings = {
            "estimator": self.estimator,
            "granularity": self.granularity,
            "seed": self.seed,
            "autocast": str(self.autocast),
        }
        return settings | {"columns": [asdict(column) for column in collector.columns]}

    def _converged(self, stop_at: float, collector: TraceCollector, traces: np.ndarray) -> bool:
        rho = split_half_spearman(FisherResult(traces, collector.columns, self.estimator, self.granularity).per_example)
        if rho < stop_at:
            return False
        if ranks()[0] == 0:
            LOG.info("split-half Spearman %.3f >= %g after %d examples", rho, stop_at, len(traces))
        return True

    def _warn_of_silence(self, traces: np.ndarray, collector: TraceCollector, reached: set[int]) -> None:
        """Say that a layer's zeros mean that the loss does not depend on it."""
        per_layer = FisherResult(traces, collector.columns, self.estimator, self.granularity).per_layer
        silent = [str(layer) for layer in np.flatnonzero(per_layer == 0) if layer not in reached]
        if silent and ranks()[0] == 0:
            LOG.warning("no example's loss depends on decoder layer %s: its trace is zero", ", ".join(silent))

    def _result(self, traces: np.ndarray, sites: list[Site], collector: TraceCollector) -> FisherResult:
        result = FisherResult(traces, collector.columns, self.estimator, self.granularity)
        if self.granularity == "parameter":
            result.diagonal = {path: total / len(traces) for path, total in collector.sums.items()}
            result.weighted = np.array([_fisher_weight2(site, result.diagonal) for site in sites])
        return result

    def _attention(self, model: nn.Module, device: torch.device) -> AbstractContextManager:
        """Return Float32Attention where something is in bfloat16, else an empty context.

        Float32Attention inspects every call of torch, which takes 1 % of a pass.
        """
        cast = self.autocast is not None or torch.is_autocast_enabled(device.type)
        if cast or any(p.dtype == torch.bfloat16 for p in model.parameters()):
            return Float32Attention()
        return nullcontext()

    def _precision(self, device: torch.device) -> torch.autocast:
        """Return autocast with the type asked for; without one, the autocast that surrounds the call."""
        if self.autocast is None:
            return torch.autocast(device.type, enabled=torch.is_autocast_enabled(device.type))
        return torch.autocast(device.type, self.autocast)


def _check_after(seen: int) -> float:
    """Return how many examples must be seen before the next check of the stopping rule.

    The checks come at the same numbers of examples whether a run was interrupted or not.
    """
    check: float = SMALLEST
    while check <= seen:
        check *= CHECK_GROWTH
    return check


def _fisher_weight2(site: Site, diagonal: dict[str, Tensor]) -> float:
    """Return sum_j F_jj w_j^2 over a site's parameters."""
    with align_module_device(site.module):  # brings back what accelerate has offloaded
        parameters = site.module.named_parameters(recurse=False)
        return sum(float((diagonal[site.path(name)].double() * _whole(p) ** 2).sum()) for name, p in parameters)


def _whole(parameter: nn.Parameter) -> Tensor:
    """Return a parameter in float64, gathered from all processes when it is sharded."""
    values = parameter.detach()
    return (values.full_tensor() if isinstance(values, DTensor) else values).double()
