"""Layerwise distillation: cross-entropy, temperature KL, and hidden states matched layer by layer."""

from __future__ import annotations

from collections.abc import Iterable
from operator import itemgetter
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import TrainOutput

from lwa_helpers.config import read_yaml
from lwa_helpers.configs.students import LossConfig
from lwa_helpers.distillation.identity import Identity, check_same_meaning
from lwa_helpers.distillation.losses import LogitsAt, hidden_distance, output_losses
from lwa_helpers.distillation.teacher_cache import TeacherOutputs, TopLogits, bare_model, vocabulary_size, windows_of
from lwa_helpers.distillation.weighting import LABELS, LayerwiseDistillation, layer_map, layer_weights
from lwa_helpers.errors import LwaError
from lwa_helpers.fisher.result import FisherResult
from lwa_helpers.models.language_model import LanguageModel
from lwa_helpers.models.layers import decoder_layers, text_config
from lwa_helpers.paths import TRAINER_OUTPUT
from lwa_helpers.ranking.outputs import LabelOutputs, label_outputs
from lwa_helpers.ranking.training import RankingTrainer, zero_loss


class DistillationTrainer(RankingTrainer):
    """transformers.Trainer with the loss of layerwise distillation.

    The loss is (1-alpha) CE + alpha tau^2 KL(teacher || student) + beta mean_s w_s d(h_s, map(h_t)). The mean is over
    the student layers that loss.match names, the weights w have mean 1, and d is 1 - cosine similarity. If the widths
    differ, the student's states pass through learned projections, which are part of the student while it trains.

    A batch is read by both models, so the numbers of tokens and items must mean the same to both. That is checked where
    both come with their tokenizers, as LanguageModels or as outputs of one.

    Args:
        teacher_model: the teacher, or its outputs from the cache, which save its forward passes. It may be wrapped by
            DataParallel, torch.compile or PEFT.
        student_model: the student; it is trained in place. It may be wrapped too; of a PEFT model, the adapter is
            trained.
        fisher_weights: Fisher information of the teacher for the strategy, or the weights themselves, (n_layers,).
        strategy: how Fisher information becomes the weights w. "none" leaves out the hidden-state term, "labels" leaves
            out the teacher altogether.
        loss: settings of the loss; None takes those of distillation_config.yaml.
        args: settings of the training run; None takes default_arguments().
        strategy_seed: seed of a strategy that draws its weights at random.
        trainer: further arguments of RankingTrainer.

    Raises:
        LwaError: if the weights or the cached outputs do not fit the student or the loss, or teacher and student have
            different tokenizers or catalogues.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> size = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 9}
        >>> teacher, student = (LlamaForCausalLM(LlamaConfig(num_hidden_layers=n, **size)) for n in (4, 2))
        >>> trainer = DistillationTrainer(teacher, student, strategy="linear")
        >>> trainer.map, trainer.weights.round(2).tolist()
        ([2, 4], [0.67, 1.33])
    """

    def __init__(
        self,
        teacher_model: LanguageModel | nn.Module | TeacherOutputs,
        student_model: LanguageModel | nn.Module,
        fisher_weights: FisherResult | np.ndarray | None = None,
        strategy: str | LayerwiseDistillation = "fisher",
        loss: LossConfig | None = None,
        args: TrainingArguments | None = None,
        strategy_seed: int = 0,
        **trainer: Any,
    ):
        given = student_model.model if isinstance(student_model, LanguageModel) else student_model
        student = bare_model(given)
        teacher = teacher_model if isinstance(teacher_model, TeacherOutputs) else bare_model(teacher_model)
        self.loss_config = loss or LossConfig(**read_yaml("distillation_config.yaml")["loss"])
        if strategy == LABELS:
            self.loss_config = self.loss_config.model_copy(update={"alpha": 0.0, "beta": 0.0})
        self.n_layers = len(decoder_layers(student))
        self.weights = layer_weights(fisher_weights, strategy, self.n_layers, self.loss_config.match, strategy_seed)
        self.teacher = teacher
        self.parts: list[dict[str, Tensor]] = []  # the loss terms of each batch since the last entry of the log
        self.identities = identity_of(teacher_model), Identity.of(student_model)
        if isinstance(teacher, TeacherOutputs):
            n_teacher, teacher_width, n_classes = teacher.n_layers, teacher.hidden_size, teacher.n_classes
        else:
            n_teacher, teacher_width = len(decoder_layers(teacher)), text_config(teacher).hidden_size
            n_classes = vocabulary_size(teacher)
        if n_classes in (None, vocabulary_size(student)):  # another size is named by the first loss
            self.check_meaning()
        self.map = layer_map(self.n_layers, n_teacher)
        width = text_config(student).hidden_size, teacher_width
        self.projections = None
        if width[0] != width[1]:
            self.projections = nn.ModuleDict({str(place): nn.Linear(*width) for place in range(self.n_layers)})
            student.projections = self.projections
        super().__init__(given, args or default_arguments(), **trainer)
        if self.projections is not None:
            del student.projections  # until it trains
        if isinstance(teacher, nn.Module):
            teacher.to(self.args.device).eval()
        else:
            self.check_outputs(teacher)

    @property
    def matched(self) -> bool:
        """Whether the loss matches hidden states."""
        return self.weights is not None and self.loss_config.beta > 0

    def check_meaning(self) -> None:
        """Check that tokens and items mean the same to teacher and student, if the loss needs the teacher."""
        if self.loss_config.alpha > 0 or self.matched:
            check_same_meaning(*self.identities)

    def check_outputs(self, cache: TeacherOutputs) -> None:
        """Check that cached outputs fit the loss and the student.

        Args:
            cache: the cached outputs.

        Raises:
            LwaError: if they were made for another loss or another student.
        """
        if cache.top_k and cache.temperature != self.loss_config.temperature:
            raise LwaError(
                f"these teacher outputs were cut to {cache.top_k} items or tokens at temperature {cache.temperature}, "
                f"the loss has {self.loss_config.temperature}: "
                "compute them again at that temperature, or with top_k=None"
            )
        if self.weights is not None and not set(self.map) <= set(cache.layers):
            raise LwaError(
                f"these teacher outputs hold the states after the teacher's layers {cache.layers}; "
                f"a student of {self.n_layers} is matched to {self.map}, as layer_map says: "
                "compute them again with those"
            )

    def train(
        self,
        train_loader: Iterable[dict[str, Tensor]] | None = None,
        num_epochs: float | None = None,
        **kwargs: Any,
    ) -> TrainOutput:
        """Train the student.

        Args:
            train_loader: batches to train on, if the trainer has no loader yet or another one. A list or a generator,
                which is read once, is accepted too; each epoch then takes the batches in the order given.
            num_epochs: number of epochs; None leaves the length of the run to the trainer's arguments.
            kwargs: further arguments of Trainer.train.

        Returns:
            What Trainer.train returns.

        Raises:
            LwaError: if there are no batches, or teacher and student have different tokenizers or catalogues.
        """
        self.check_meaning()
        if train_loader is not None:
            is_loader = hasattr(train_loader, "dataset")
            self.loader = cast(DataLoader, train_loader) if is_loader else loader_of(train_loader)
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

    def total(self, student: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
        """Return the loss of a batch, a scalar, and keep its terms for the log while training.

        The teacher is not run if the loss does not need it.
        """
        own, config = self.student_outputs(student, inputs), self.loss_config
        if not len(own.states):
            return zero_loss(own)
        logits_at, states = self.teacher_outputs(inputs) if config.alpha > 0 or self.matched else (None, [])
        ce, kl = output_losses(own, logits_at, config.temperature).unbind()
        total, parts = (1 - config.alpha) * ce, {"ce": ce}
        if logits_at:
            parts["kl"] = kl
            total = total + config.alpha * kl
        if self.matched:
            parts["hidden"] = self.hidden_term(own.hidden, states)
            total = total + config.beta * parts["hidden"]
        if student.training:
            share = torch.as_tensor(self.share, device=total.device)
            self.parts.append({"share": share} | {name: value.detach() for name, value in parts.items()})
        return total

    def student_outputs(self, student: nn.Module, inputs: dict[str, Tensor]) -> LabelOutputs:
        """Return the student's outputs, with its states projected to the teacher's width."""
        out = label_outputs(student, inputs, hidden=self.weights is not None)
        if self.projections is not None and out.hidden:
            project = [cast(nn.Linear, self.projections[str(place)]) for place in range(self.n_layers)]
            out.hidden = [layer(state.to(layer.weight.dtype)) for layer, state in zip(project, out.hidden, strict=True)]
        return out

    @torch.no_grad()
    def teacher_outputs(self, inputs: dict[str, Tensor]) -> tuple[LogitsAt, list[Tensor]]:
        """Return the teacher's outputs for a batch, from the cache or computed.

        Args:
            inputs: the batch.

        Returns:
            A function from a slice of the positions to the logits (P, N) or TopLogits there, and the states after each
            mapped layer, (P, d) each.
        """
        if isinstance(self.teacher, TeacherOutputs):
            layers = self.map if self.weights is not None else []
            logits, states = self.teacher.lookup(windows_of(inputs), self.args.device, layers)
            return logits.__getitem__, states
        out, loss = label_outputs(self.teacher, inputs, hidden=True), self.loss_config

        @torch.no_grad()
        def logits_at(rows: slice) -> Tensor | TopLogits:
            logits = out.head(out.states[rows])
            if loss.top_k and loss.top_k < logits.shape[-1]:
                return TopLogits.of(logits, loss.top_k, loss.temperature)
            return logits

        return logits_at, [out.hidden[layer - 1] for layer in self.map]

    def hidden_term(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        """Return the mean of weight times distance over the student's layers; unmatched layers have weight 0."""
        distances = torch.stack([hidden_distance(s, t) for s, t in zip(student, teacher, strict=True)])
        return (distances * torch.as_tensor(self.weights, dtype=distances.dtype, device=distances.device)).mean()

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Log as Trainer does, together with the means of the loss terms over the steps since the last entry."""
        if "loss" in logs:
            several = self.accelerator.num_processes > 1
            parts = gather_object([dict_on_cpu(part) for part in self.parts]) if several else self.parts
            logs |= means_of(parts) if parts else {}
            self.parts = []
        super().log(logs, *args, **kwargs)


def identity_of(teacher: LanguageModel | nn.Module | TeacherOutputs) -> Identity | None:
    """Return what the numbers of tokens and items mean to a teacher, if it is known."""
    return teacher.identity if isinstance(teacher, TeacherOutputs) else Identity.of(teacher)


def dict_on_cpu(part: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a dict of tensors with all of them on the CPU."""
    return {name: value.cpu() for name, value in part.items()}


def means_of(parts: list[dict[str, Tensor]]) -> dict[str, float]:
    """Return the mean of each loss term over batches, weighted by their "share" of a step."""
    columns = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    share = columns.pop("share")
    return {name: float((share * values).sum() / share.sum()) for name, values in columns.items()}


def loader_of(batches: Iterable[dict[str, Tensor]]) -> DataLoader:
    """Return a DataLoader that gives these batches, in their order, as often as needed.

    Raises:
        LwaError: if there are no batches.
    """
    kept = list(batches)
    if not kept:
        raise LwaError("train(train_loader) was given no batch: a generator can be read only once")
    # A row of this loader is a whole batch, so that several processes can share them.
    return DataLoader(kept, batch_size=1, collate_fn=itemgetter(0))  # type: ignore[arg-type]  # a list has rows


def default_arguments() -> TrainingArguments:
    """Return the settings for DistillationTrainer(...).train(loader) without arguments."""
    return TrainingArguments(
        output_dir=str(TRAINER_OUTPUT),
        learning_rate=1e-4,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=10,
    )
