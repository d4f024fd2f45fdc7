"""Layerwise distillation: cross-entropy, temperature KL, and hidden states matched layer by layer."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from lwa_helpers.config import LossConfig, read_yaml
from lwa_helpers.distillation.losses import LogitsAt, hidden_distance, output_losses
from lwa_helpers.distillation.teacher_cache import TeacherOutputs, TopLogits, windows_of
from lwa_helpers.distillation.weighting import LABELS, LayerwiseDistillation, layer_map, layer_weights
from lwa_helpers.errors import LwaError
from lwa_helpers.fisher.result import FisherResult
from lwa_helpers.models.language_model import LanguageModel
from lwa_helpers.models.layers import decoder_layers
from lwa_helpers.paths import TRAINER_OUTPUT
from lwa_helpers.ranking.outputs import LabelOutputs, label_outputs
from lwa_helpers.ranking.training import UNEVEN, RankingTrainer, zero_loss


class DistillationTrainer(RankingTrainer):
    """transformers.Trainer whose loss is (1-alpha) CE + alpha tau^2 KL(teacher || student) + beta mean_s w_s d(h_s, map(h_t)).

    The mean is over the student layers that loss.match names; `strategy` turns Fisher scores into w (mean 1); "none" leaves
    the hidden-state term out, "labels" the teacher altogether. d is 1 - cosine similarity. Where widths differ, the
    student's states pass through learned projections, which are part of the student while it trains.
    """

    def __init__(
        self,
        teacher_model: nn.Module | LanguageModel | TeacherOutputs,
        student_model: nn.Module | LanguageModel,
        fisher_weights: FisherResult | np.ndarray | None = None,
        strategy: str | LayerwiseDistillation = "fisher",
        loss: LossConfig | None = None,
        args: TrainingArguments | None = None,
        strategy_seed: int = 0,
        **trainer,
    ):
        """fisher_weights: scores of the teacher for the strategy, or the (n_layers,) weights themselves. strategy_seed: of a
        strategy that draws its weights.

        A TeacherOutputs cache in the teacher's place spares its forward passes. Raises LwaError when weights do not fit.
        """
        student = student_model.model if isinstance(student_model, LanguageModel) else student_model
        teacher = teacher_model.model if isinstance(teacher_model, LanguageModel) else teacher_model
        self.loss_config = loss or LossConfig(**read_yaml("distillation_config.yaml")["loss"])
        if strategy == LABELS:
            self.loss_config = self.loss_config.model_copy(update={"alpha": 0.0, "beta": 0.0})
        self.n_layers = len(decoder_layers(student))
        self.weights = layer_weights(fisher_weights, strategy, self.n_layers, self.loss_config.match, strategy_seed)
        self.teacher, self.parts = teacher, []
        n_teacher = teacher.n_layers if isinstance(teacher, TeacherOutputs) else len(decoder_layers(teacher))
        self.map = layer_map(self.n_layers, n_teacher)
        width = student.config.hidden_size, teacher.config.hidden_size
        self.projections = None
        if width[0] != width[1]:
            self.projections = nn.ModuleDict({str(place): nn.Linear(*width) for place in range(self.n_layers)})
            student.projections = self.projections
        super().__init__(student, args or default_arguments(), **trainer)
        if self.projections is not None:
            del student.projections  # until it trains
        if isinstance(teacher, nn.Module):
            teacher.to(self.args.device).eval()
        else:
            self.check_outputs(teacher)

    def check_outputs(self, cache: TeacherOutputs) -> None:
        """Raise LwaError for cached outputs that were made for another loss or another student."""
        if cache.top_k and cache.temperature != self.loss_config.temperature:
            raise LwaError(
                f"these teacher outputs were cut to {cache.top_k} items or tokens at temperature {cache.temperature}, the loss has "
                f"{self.loss_config.temperature}: compute them again at that temperature, or with top_k=None"
            )
        if self.weights is not None and not set(self.map) <= set(cache.layers):
            raise LwaError(
                f"these teacher outputs hold the states after the teacher's layers {cache.layers}; a student of {self.n_layers} "
                f"is matched to {self.map}, as layer_map says: compute them again with those"
            )

    def train(self, train_loader: Iterable[dict[str, Tensor]] | None = None, num_epochs: float | None = None, **kwargs):
        """Train on `train_loader`, if given, for `num_epochs`, if given; returns what Trainer.train returns.

        A list or generator of batches, which is read once, will do: each epoch then takes them in the order given.
        """
        if train_loader is not None:
            self.loader = train_loader if hasattr(train_loader, "dataset") else loader_of(train_loader)
            self.train_dataset = self.loader.dataset
        if self.loader is None:
            raise LwaError("DistillationTrainer has no data: pass train(train_loader) a DataLoader of batches")
        if num_epochs is not None:
            self.args.max_steps, self.args.num_train_epochs = -1, num_epochs
        if self.projections is None:
            return super().train(**kwargs)
        self.model.projections = self.projections
        try:
            return super().train(**kwargs)
        finally:
            del self.model.projections  # the student is saved without them

    def total(self, student: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Return the loss of a batch, a scalar; its terms are noted for the log while training.

        A teacher that the loss does not need is not asked.
        """
        own, config = self.student_outputs(student, inputs), self.loss_config
        if not len(own.states):
            return zero_loss(own)
        matched = self.weights is not None and config.beta > 0
        logits_at, states = self.teacher_outputs(inputs) if config.alpha > 0 or matched else (None, [])
        ce, kl = output_losses(own, logits_at, config.temperature).unbind()
        total, parts = (1 - config.alpha) * ce, {"ce": ce}
        if logits_at:
            parts["kl"] = kl
            total = total + config.alpha * kl
        if matched:
            parts["hidden"] = self.hidden_term(own.hidden, states)
            total = total + config.beta * parts["hidden"]
        if student.training:
            self.parts.append({name: value.detach() for name, value in parts.items()})
        return total

    def student_outputs(self, student: nn.Module, inputs: dict[str, Tensor]) -> LabelOutputs:
        """Return the student's outputs, its states brought to the teacher's width."""
        out = label_outputs(student, inputs, hidden=self.weights is not None)
        if self.projections is not None and out.hidden:
            project = [self.projections[str(place)] for place in range(self.n_layers)]
            out.hidden = [layer(state.to(layer.weight.dtype)) for layer, state in zip(project, out.hidden, strict=True)]
        return out

    @torch.no_grad()
    def teacher_outputs(self, inputs: dict[str, Tensor]) -> tuple[LogitsAt, list[Tensor]]:
        """Return what the teacher says at given positions, logits (P, N) or TopLogits, and its states at the mapped layers, (P, d)."""
        if isinstance(self.teacher, TeacherOutputs):
            layers = self.map if self.weights is not None else []
            logits_at, states = self.teacher.lookup(windows_of(inputs), self.args.device, layers)
            return logits_at.__getitem__, states
        out, loss = label_outputs(self.teacher, inputs, hidden=True), self.loss_config

        @torch.no_grad()
        def logits_at(rows: slice) -> Tensor | TopLogits:
            logits = out.head(out.states[rows])
            cut = loss.top_k and loss.top_k < logits.shape[-1]
            return TopLogits.of(logits, loss.top_k, loss.temperature) if cut else logits

        return logits_at, [out.hidden[layer - 1] for layer in self.map]

    def hidden_term(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        """Return the mean over the student's layers of weight times distance; a layer that is not matched has weight 0."""
        distances = torch.stack([hidden_distance(s, t) for s, t in zip(student, teacher, strict=True)])
        return (distances * torch.as_tensor(self.weights, dtype=distances.dtype, device=distances.device)).mean()

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Add the means of the loss terms since the last entry."""
        if "loss" in logs and self.parts:
            logs |= {name: float(torch.stack([part[name] for part in self.parts]).mean()) for name in self.parts[0]}
            self.parts = []
        super().log(logs, *args, **kwargs)


def loader_of(batches: Iterable[dict[str, Tensor]]) -> DataLoader:
    """Return a DataLoader that gives these batches, in their order, as often as wanted. Raises LwaError when there is none."""
    kept = list(batches)
    if not kept:
        raise LwaError("train(train_loader) was given no batch: a generator can be read only once")
    return DataLoader(kept, batch_size=None)


def default_arguments() -> TrainingArguments:
    """Settings for a bare DistillationTrainer(...).train(loader)."""
    return TrainingArguments(
        output_dir=str(TRAINER_OUTPUT),
        learning_rate=1e-4,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=10,
        accelerator_config=UNEVEN,
    )
