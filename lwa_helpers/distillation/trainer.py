"""Layerwise distillation: cross-entropy, temperature KL, and hidden states matched layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from lwa_helpers.config import LossConfig, read_yaml
from lwa_helpers.distillation.teacher_cache import (
    Signals,
    TeacherSignals,
    TopLogits,
    in_parts,
    signals,
    windows_of,
    with_rest,
)
from lwa_helpers.distillation.weighting import LayerwiseDistillation, get_strategy, mean_one
from lwa_helpers.errors import LwaError
from lwa_helpers.fisher import FisherResult
from lwa_helpers.models.loading import LanguageModel, decoder_layers
from lwa_helpers.paths import TRAINER_OUTPUT
from lwa_helpers.ranking.training import UNEVEN, RankingTrainer, nothing

Said = Callable[[slice], Tensor | TopLogits]
NO_HIDDEN, LABELS = "none", "labels"  # arms without a hidden-state term, and without a teacher at all


def output_losses(student: Signals, teacher: Said | None, temperature: float) -> Tensor:
    """Return the means over positions of the cross-entropy with the targets and of the KL to the teacher (0 without), (2,).

    teacher(rows): what it says at these positions.
    """

    def losses(rows: slice) -> Tensor:
        logits = student.head(student.states[rows])
        kl = kl_divergence(logits, teacher(rows), temperature) if teacher else logits.new_zeros(())
        return torch.stack([F.cross_entropy(logits.float(), student.targets[rows]), kl])

    return in_parts(losses, student)


def layer_map(n_student: int, n_teacher: int) -> list[int]:
    """Return, for student layers 1 … S, the teacher layer (1 … L) at the same relative depth: round(s L / S), at least 1."""
    return [max(1, round(layer * n_teacher / n_student)) for layer in range(1, n_student + 1)]


def matched_layers(n_layers: int, match: str) -> np.ndarray:
    """Return which of the student's layers are matched, (n_layers,) bool.

    all; no_last, no_last_two: without the last one or two; last: it alone; lower, upper: the half next to the input or the
    output; middle: without the first and last quarter. Raises LwaError when none is left, or for an unknown word.
    """
    depth = (np.arange(n_layers) + 0.5) / n_layers
    places = np.arange(n_layers, 0, -1)  # 1 for the last layer
    chosen = {
        "all": places > 0, "no_last": places > 1, "no_last_two": places > 2, "last": places == 1,
        "lower": depth < 0.5, "upper": depth >= 0.5, "middle": abs(depth - 0.5) <= 0.25,
    }
    if match not in chosen:
        raise LwaError(f"match {match!r}: choose one of {', '.join(chosen)}")
    if not chosen[match].any():
        raise LwaError(f"match {match!r} leaves none of the student's {n_layers} layers to be matched")
    return chosen[match]


def hidden_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean of 1 - cos(h_s, h_t) over positions, a scalar: free of each layer's scale. Inputs (P, d)."""
    return 1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1).mean()


def kl_divergence(student: Tensor, teacher: Tensor | TopLogits, temperature: float) -> Tensor:
    """Return tau^2 KL(softmax(t / tau) || softmax(s / tau)), mean over positions, a scalar. Inputs (P, C).

    A teacher's TopLogits, taken at that temperature, has k + 1 classes: its k items, and all others as one.
    Raises LwaError for another number of classes.
    """
    if isinstance(teacher, Tensor) and teacher.shape[-1] != student.shape[-1]:
        raise LwaError(
            f"the student tells {student.shape[-1]} tokens or items apart, its teacher {teacher.shape[-1]}: they must have the same "
            "(where the vocabulary is to be cut, cut the teacher's with trim_vocabulary and build the student from that)"
        )
    log_s = F.log_softmax(student.float() / temperature, dim=-1)
    if isinstance(teacher, TopLogits):
        log_s, log_t = with_rest(log_s, teacher.items), teacher.log_p
    else:
        log_t = F.log_softmax(teacher.float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)


class DistillationTrainer(RankingTrainer):
    """transformers.Trainer whose loss is (1-alpha) CE + alpha tau^2 KL(teacher || student) + beta mean_s w_s d(h_s, map(h_t)).

    The mean is over the student layers that loss.match names; `strategy` turns Fisher scores into w (mean 1); "none" leaves
    the hidden-state term out, "labels" the teacher altogether. d is 1 - cosine similarity. Where widths differ, the
    student's states pass through learned projections, which are part of the student while it trains.
    """

    def __init__(
        self, teacher_model: nn.Module | LanguageModel | TeacherSignals, student_model: nn.Module | LanguageModel,
        fisher_weights: FisherResult | np.ndarray | None = None, strategy: str | LayerwiseDistillation = "fisher",
        loss: LossConfig | None = None, args: TrainingArguments | None = None, strategy_seed: int = 0, **trainer,
    ):
        """fisher_weights: scores of the teacher for the strategy, or the (n_layers,) weights themselves. strategy_seed: of a
        strategy that draws its weights.

        A TeacherSignals cache in the teacher's place spares its forward passes. Raises LwaError when weights do not fit.
        """
        student = student_model.model if isinstance(student_model, LanguageModel) else student_model
        teacher = teacher_model.model if isinstance(teacher_model, LanguageModel) else teacher_model
        self.loss_config = loss or LossConfig(**read_yaml("distillation_config.yaml")["loss"])
        if strategy == LABELS:
            self.loss_config = self.loss_config.model_copy(update={"alpha": 0.0, "beta": 0.0})
        self.n_layers = len(decoder_layers(student))
        self.weights = layer_weights(fisher_weights, strategy, self.n_layers, self.loss_config.match, strategy_seed)
        self.teacher, self.parts = teacher, []
        n_teacher = teacher.n_layers if isinstance(teacher, TeacherSignals) else len(decoder_layers(teacher))
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
            self.check_signals(teacher)

    def check_signals(self, cache: TeacherSignals) -> None:
        """Raise LwaError for cached signals that were made for another loss or another student."""
        if cache.top_k and cache.temperature != self.loss_config.temperature:
            raise LwaError(
                f"these teacher signals were cut to {cache.top_k} items or tokens at temperature {cache.temperature}, the loss has "
                f"{self.loss_config.temperature}: compute them again at that temperature, or with top_k=None"
            )
        if self.weights is not None and not set(self.map) <= set(cache.layers):
            raise LwaError(
                f"these teacher signals hold the states after the teacher's layers {cache.layers}; a student of {self.n_layers} "
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
        own, config = self.student_signals(student, inputs), self.loss_config
        if not len(own.states):
            return nothing(own)
        matched = self.weights is not None and config.beta > 0
        said, states = self.teacher_signals(inputs) if config.alpha > 0 or matched else (None, [])
        ce, kl = output_losses(own, said, config.temperature).unbind()
        total, parts = (1 - config.alpha) * ce, {"ce": ce}
        if said:
            parts["kl"] = kl
            total = total + config.alpha * kl
        if matched:
            parts["hidden"] = self.hidden_term(own.hidden, states)
            total = total + config.beta * parts["hidden"]
        if student.training:
            self.parts.append({name: value.detach() for name, value in parts.items()})
        return total

    def student_signals(self, student: nn.Module, inputs: dict[str, Tensor]) -> Signals:
        """Return the student's signals, its states brought to the teacher's width."""
        out = signals(student, inputs, hidden=self.weights is not None)
        if self.projections is not None and out.hidden:
            project = [self.projections[str(place)] for place in range(self.n_layers)]
            out.hidden = [layer(state.to(layer.weight.dtype)) for layer, state in zip(project, out.hidden, strict=True)]
        return out

    @torch.no_grad()
    def teacher_signals(self, inputs: dict[str, Tensor]) -> tuple[Said, list[Tensor]]:
        """Return what the teacher says at given positions, logits (P, N) or TopLogits, and its states at the mapped layers, (P, d)."""
        if isinstance(self.teacher, TeacherSignals):
            layers = self.map if self.weights is not None else []
            said, states = self.teacher.lookup(windows_of(inputs), self.args.device, layers)
            return said.__getitem__, states
        out, loss = signals(self.teacher, inputs, hidden=True), self.loss_config

        @torch.no_grad()
        def say(rows: slice) -> Tensor | TopLogits:
            logits = out.head(out.states[rows])
            cut = loss.top_k and loss.top_k < logits.shape[-1]
            return TopLogits.of(logits, loss.top_k, loss.temperature) if cut else logits

        return say, [out.hidden[layer - 1] for layer in self.map]

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


def layer_weights(
    fisher: FisherResult | np.ndarray | None, strategy: str | LayerwiseDistillation, n_layers: int, match: str = "all",
    seed: int = 0,
) -> np.ndarray | None:
    """Return the (n_layers,) weights with mean 1, 0 on layers that are not matched, or None for "none" and "labels".

    An array is taken as it is, scaled; the strategy must be a known one all the same. The mean over all layers of weight times
    distance is then the mean over the matched ones. Raises LwaError when the number of weights is not n_layers.
    """
    if isinstance(strategy, str) and strategy in (NO_HIDDEN, LABELS):
        return None
    chosen = strategy if isinstance(strategy, LayerwiseDistillation) else get_strategy(strategy, seed)
    given = fisher is not None and not isinstance(fisher, FisherResult)
    weights = mean_one(fisher if given else chosen.calculate_layer_weights(fisher, n_layers))
    if weights.shape != (n_layers,):
        raise LwaError(
            f"{weights.size} layer weights for a student of {n_layers} layers: they must be as many, in one row, "
            f"not of shape {weights.shape}"
        )
    return mean_one(weights * matched_layers(n_layers, match))


def loader_of(batches: Iterable[dict[str, Tensor]]) -> DataLoader:
    """Return a DataLoader that gives these batches, in their order, as often as wanted. Raises LwaError when there is none."""
    kept = list(batches)
    if not kept:
        raise LwaError("train(train_loader) was given no batch: a generator can be read only once")
    return DataLoader(kept, batch_size=None)


def default_arguments() -> TrainingArguments:
    """Settings for a bare DistillationTrainer(...).train(loader)."""
    return TrainingArguments(
        output_dir=str(TRAINER_OUTPUT), learning_rate=1e-4, save_strategy="no", report_to="none", remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(), logging_steps=10, accelerator_config=UNEVEN,
    )
