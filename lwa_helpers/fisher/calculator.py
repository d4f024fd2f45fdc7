"""The Fisher information of a causal LM's decoder layers, read off one forward and one (lighter) backward pass per batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lwa_helpers.errors import LwaError
from lwa_helpers.fisher.collect import TraceCollector
from lwa_helpers.fisher.convergence import SMALLEST, split_half_spearman
from lwa_helpers.fisher.hooks import Taps, restored
from lwa_helpers.fisher.losses import next_token_nll
from lwa_helpers.fisher.result import FisherResult
from lwa_helpers.fisher.sites import Site, find_sites
from lwa_helpers.models import decoder_layers

Batch = dict[str, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]
CHECK_GROWTH = 1.25  # the stopping rule is looked at again after a quarter more examples


@dataclass
class FisherInformationCalculator:
    """F_l = mean over examples of || d(summed NLL of the example) / d theta_l ||^2, theta_l = every parameter of layer l.

    An example is one row of a batch. All parameters of a decoder layer count, trainable or frozen; embeddings, final norm and
    heads do not. The model runs in evaluation mode (no dropout, no checkpointing by transformers) and comes back as it was.

    estimator: "empirical" takes the labels of the data; "sampled" draws them from the model (the Fisher; loss.sample is used).
    granularity: "layer", "module", "head" (attention projections split by head) or "parameter" (the diagonal as well).
    autocast: run the forward pass under torch.autocast with this type. seed: of the sampled labels.
    stop_at: end once the split-half Spearman of the layers' order reaches this value (0.95 is customary), and print the number
    of examples that it took.
    """

    estimator: Literal["empirical", "sampled"] = "empirical"
    granularity: Literal["layer", "module", "head", "parameter"] = "layer"
    seed: int = 0
    autocast: torch.dtype | None = None
    stop_at: float | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        allowed = {"estimator": ("empirical", "sampled"), "granularity": ("layer", "module", "head", "parameter")}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise LwaError(f"{name} {getattr(self, name)!r}: use one of {', '.join(values)}")

    def calculate(self, model: nn.Module, dataset: Iterable[Batch], loss: Loss | None = None) -> FisherResult:
        """Read the batches once and return the result.

        dataset: dicts of tensors whose first axis is the rows. loss(model, batch) -> (B,) summed NLL of each row; the default
        is next_token_nll. loss.sample(model, batch, generator) -> batch with labels drawn is needed for "sampled" only.
        Raises LwaError for an unsupported module, a loss of another shape or not finite, and an empty dataset.
        """
        if not isinstance(model, nn.Module):
            raise LwaError(f"calculate() needs a torch module, not {type(model).__name__}; of a loaded teacher pass .model")
        loss = loss or next_token_nll
        if self.estimator == "sampled" and not hasattr(loss, "sample"):
            raise LwaError('estimator "sampled" needs loss.sample(model, batch, generator) -> batch with labels drawn')
        sites = find_sites(model)
        collector = TraceCollector(sites, decoder_layers(model), self.granularity)
        with restored(model), torch.enable_grad():
            model.requires_grad_(False)
            traces = self._read(model, dataset, loss, sites, collector)
        return self._result(traces, collector)

    def _read(self, model, dataset, loss, sites: list[Site], collector: TraceCollector) -> np.ndarray:
        device = next(model.parameters()).device
        traces: list[np.ndarray] = []
        next_check = SMALLEST
        for index, batch in enumerate(tqdm(dataset, desc="Fisher", unit="batch", disable=not self.progress)):
            batch = _on_device(batch, index, device)
            if self.estimator == "sampled":
                generator = torch.Generator(device).manual_seed(self.seed * 1_000_003 + index)
                with torch.no_grad(), self._precision(device):
                    batch = loss.sample(model, batch, generator)
            traces.append(self._one_batch(model, batch, loss, sites, collector, index))
            n = sum(map(len, traces))
            if self.stop_at is not None and n >= next_check:
                next_check = CHECK_GROWTH * n
                if self._converged(collector, np.concatenate(traces)):
                    break
        if not traces:
            raise LwaError("the dataset gave no batch: a generator can be read only once")
        return np.concatenate(traces)

    def _one_batch(self, model, batch: Batch, loss, sites, collector: TraceCollector, index: int) -> np.ndarray:
        rows = len(next(iter(batch.values())))
        device = next(model.parameters()).device
        collector.start(rows, device)
        with Taps(model, sites, collector.receive, rows) as taps:
            with self._precision(device):
                losses = loss(model, batch)
            if losses.shape != (rows,):
                raise LwaError(f"the loss gave shape {tuple(losses.shape)} for batch {index}; it must be ({rows},), one per row")
            if not losses.isfinite().all():
                raise LwaError(f"the loss of batch {index} is not finite in row {int((~losses.isfinite()).nonzero()[0])}")
            taps.backward(losses.sum())
        return collector.finish().cpu().numpy()

    def _converged(self, collector: TraceCollector, traces: np.ndarray) -> bool:
        rho = split_half_spearman(FisherResult(traces, collector.columns, self.estimator, self.granularity).per_example)
        if rho < self.stop_at:
            return False
        print(f"split-half Spearman {rho:.3f} >= {self.stop_at} after {len(traces)} examples")
        return True

    def _result(self, traces: np.ndarray, collector: TraceCollector) -> FisherResult:
        result = FisherResult(traces, collector.columns, self.estimator, self.granularity)
        if self.granularity == "parameter":
            weighted = []
            for site, sums in collector.square_sums.items():
                means = {name: total / len(traces) for name, total in sums.items()}
                parameters = dict(site.module.named_parameters(recurse=False))
                weighted.append(sum(float((means[name].double() * p.detach().double() ** 2).sum()) for name, p in parameters.items()))
                result.diagonal |= {f"{site.layer}.{site.name}.{name}": mean for name, mean in means.items()}
            result.weighted = np.array(weighted)
        return result

    def _precision(self, device: torch.device):
        """Autocast as asked for; without it, whatever surrounds the call."""
        if self.autocast is None:
            return torch.autocast(device.type, enabled=torch.is_autocast_enabled(device.type))
        return torch.autocast(device.type, self.autocast)


def _on_device(batch: Mapping[str, Tensor], index: int, device: torch.device) -> Batch:
    if not isinstance(batch, Mapping) or not batch:
        raise LwaError(f"batch {index} is {type(batch).__name__}, not a dict of tensors")
    return {name: value.to(device) for name, value in batch.items()}
