"""Students from start to finish, and the arms of an ablation: students that differ in one thing only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import kendalltau
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from lwa_helpers.assets import cache_entry
from lwa_helpers.configs.students import AblationConfig, DistillationConfig, LossConfig
from lwa_helpers.data.windows import Window
from lwa_helpers.distillation.ensemble import ensemble_outputs
from lwa_helpers.distillation.student import SCORED, build_student, select_layers
from lwa_helpers.distillation.teacher_cache import TeacherOutputs, weights_hash
from lwa_helpers.distillation.trainer import DistillationTrainer
from lwa_helpers.distillation.weighting import layer_map
from lwa_helpers.errors import LwaError
from lwa_helpers.evaluation.calibration import Calibration, calibrated
from lwa_helpers.evaluation.cross_fit import CrossFitted
from lwa_helpers.evaluation.metrics import ndcg_at_k, top_k
from lwa_helpers.fisher.result import FisherResult
from lwa_helpers.models.language_model import LanguageModel
from lwa_helpers.models.layers import decoder_layers
from lwa_helpers.models.low_rank import low_rank
from lwa_helpers.ranking.head_transfer import carry_head, label_states
from lwa_helpers.ranking.task import RankingTask
from lwa_helpers.ranking.training import train_or_resume, training_arguments, window_loader

Scores = FisherResult | Sequence[float] | np.ndarray | None


@dataclass(frozen=True)
class Distillation:
    """What all students of one teacher, budget and seed share.

    Attributes:
        teacher: a tuned language model with item tokens.
        fisher: Fisher information of the teacher; None if nothing needs it.
        section: settings of the students.
        windows: the windows that a student is trained on.
        seed: of the order of the data, of dropout, and of layers and weights that are drawn at random.
        valid: maps a student to the metric that its best weights are chosen by; needed if section.evaluate_every is
            set.
    """

    teacher: LanguageModel
    fisher: FisherResult | None
    section: AblationConfig | DistillationConfig
    windows: Sequence[Window]
    seed: int
    valid: Callable[[PreTrainedModel], float] | None = None

    @property
    def n_layers(self) -> int:
        """Number of layers of the teacher."""
        return len(decoder_layers(self.teacher.model))

    @cached_property
    def teacher_outputs(self) -> TeacherOutputs:
        """The teacher's outputs on the windows, for students of all depths of the section, from the cache folder."""
        section, layers = self.section, {self.n_layers}
        if section.matches_states:
            layers |= {
                layer for depth in section.depths for layer in layer_map(min(depth, self.n_layers), self.n_layers)
            }
        return TeacherOutputs.cached(
            self.teacher, self.ordered, sorted(layers), section.bf16, section.loss.top_k, section.loss.temperature
        )

    @property
    def ordered(self) -> DataLoader:
        """Batches of the windows in their own order."""
        return window_loader(self.windows, self.section.tokens_per_batch, self.teacher.pad_id, self.seed, shuffle=False)

    def start(self, n_layers: int, scores: Scores = None, selection: str | None = None) -> LanguageModel:
        """Return a student of the teacher's own layers before training, with the head refitted to its states.

        Args:
            n_layers: number of layers of the student. With all layers, the head stays as it is.
            scores: for the selections that need scores (see select_layers); None takes the Fisher information.
            selection: which layers it keeps; None takes the section's.
        """
        scores = self.fisher if scores is None else scores
        selection = selection or self.section.selection
        student = build_student(self.teacher, n_layers, selection, scores=scores, seed=self.seed)
        if n_layers < self.n_layers:
            states = label_states(student.model, self.ordered, self.section.bf16)
            source = torch.from_numpy(
                self.teacher_outputs.hidden[:, self.teacher_outputs.layers.index(self.n_layers)].astype(np.float32)
            )
            carry_head(self.teacher.model.get_output_embeddings().weight, source, student.model, states)
        return student

    def train(
        self,
        student: LanguageModel,
        strategy: str,
        outputs: TeacherOutputs | None = None,
        logs: Path | None = None,
        loss: LossConfig | None = None,
    ) -> DistillationTrainer:
        """Train a student in place under a weighting strategy.

        Args:
            student: the student.
            strategy: name of the weighting strategy.
            outputs: the teacher outputs to learn from; None takes those of the teacher.
            logs: folder for TensorBoard; None writes no such logs.
            loss: the distillation loss; None takes the section's.

        Returns:
            The trainer, after training.

        Raises:
            LwaError: if section.evaluate_every is set and `valid` is missing.
        """
        torch.manual_seed(self.seed)
        section, soft_targets = self.section, outputs or self.teacher_outputs
        loss = loss or section.loss
        loader = window_loader(self.windows, section.tokens_per_batch, student.pad_id, self.seed)
        whole = section.model_copy(update={"epochs": max(1.0, section.epochs)})
        every = section.evaluate_every
        if every and self.valid is None:
            raise LwaError("evaluate_every of students needs a metric: pass valid, which maps a student to it")
        folder = self.checkpoints(student, soft_targets, strategy, loss) if section.save_steps or every else None
        with low_rank(trained_rows(student.model), section.rank):
            trainer = DistillationTrainer(
                soft_targets,
                student,
                self.fisher,
                strategy,
                loss,
                training_arguments(whole, len(loader), self.seed, checkpoints=folder, evaluate_every=every),
                loader=loader,
                head_learning_rate=section.head_learning_rate,
                dropout=section.dropout,
                valid=self.valid,
                patience=section.patience,
                logs=logs,
                strategy_seed=self.seed,
            )
            train_or_resume(trainer, folder) if folder else trainer.train()
        return trainer

    def checkpoints(self, student: LanguageModel, outputs: TeacherOutputs, strategy: str, loss: LossConfig) -> Path:
        """Return the folder of a run's checkpoints.

        Its name is a hash of everything the run depends on, so a run never resumes from another run's checkpoint.

        Args:
            student: the student before training.
            outputs: the teacher outputs that it learns from.
            strategy: name of the weighting strategy.
            loss: the distillation loss.
        """
        scores = self.fisher and self.fisher.per_layer.tolist()
        key = [
            weights_hash(student.model),
            str(outputs.directory),
            scores,
            strategy,
            self.seed,
            loss.model_dump(mode="json"),
            self.section.model_dump(mode="json"),
        ]
        return cache_entry("checkpoints", key)

    def student(self, n_layers: int, logs: Path | None = None) -> tuple[LanguageModel, DistillationTrainer]:
        """Return a student of `n_layers` layers, trained as the section says, and its trainer."""
        assert isinstance(self.section, DistillationConfig)  # an ablation has no strategy of its own
        student = self.start(n_layers)
        return student, self.train(student, self.section.strategy, logs=logs)


def trained_rows(model: PreTrainedModel) -> list[nn.Module]:
    """Return the modules whose rows are trained at low rank: the embedding, and the head if it has its own weights."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    return ends[:1] if ends[0].weight is ends[1].weight else ends


def budget(windows: Sequence[Window], section: AblationConfig | DistillationConfig, seed: int) -> list[Window]:
    """Return the windows that a student is trained on: a random share of them if section.epochs is below 1."""
    n = round(min(1.0, section.epochs) * len(windows))
    chosen = np.sort(np.random.default_rng(seed).choice(len(windows), max(1, n), replace=False))
    return [windows[i] for i in chosen]


def in_steps(
    distillation: Distillation, depths: Sequence[int], selection: str, strategy: str
) -> tuple[LanguageModel, DistillationTrainer]:
    """Distil a student in several steps.

    The student of each step is the teacher of the next step. The steps share the budget: each has an equal part of the
    epochs or, if there are fewer epochs than steps, of the windows.

    Args:
        distillation: what the students share.
        depths: the number of layers of each step's student, falling.
        selection: which layers of its teacher each of them keeps.
        strategy: the weighting of the hidden-state term.

    Returns:
        The student of the last step, and its trainer.
    """
    section = distillation.section
    whole = section.epochs >= len(depths)
    teacher = distillation.teacher
    scores: FisherResult | np.ndarray | None = distillation.fisher
    for place, depth in enumerate(depths):
        step = section.model_copy(
            update={
                "n_layers": depth,
                "selection": selection,
                "epochs": section.epochs / len(depths) if whole else section.epochs,
            }
        )
        mine = distillation.windows if whole else distillation.windows[place :: len(depths)]
        part = replace(distillation, teacher=teacher, section=step, windows=mine)
        student = part.start(depth, scores)
        trainer = part.train(student, strategy)
        if scores is not None and selection in SCORED:
            scores = scores_left(scores, depth, selection, distillation.seed)
        teacher = student
    return student, trainer


def scores_left(scores: FisherResult | np.ndarray, n_layers: int, selection: str, seed: int) -> np.ndarray:
    """Return the scores of the n teacher layers that a student keeps, (n,), from `scores` of all of them."""
    values = scores.per_layer if isinstance(scores, FisherResult) else scores
    return values[select_layers(len(values), n_layers, selection, scores, seed)]


def co_taught_student(
    distillation: Distillation, co_teachers: Mapping[str, CrossFitted], valid: RankingTask
) -> tuple[LanguageModel, dict[str, Calibration]]:
    """Distil a student from an ensemble of the teacher and recommenders without a language model (SASRec, EASE).

    The student is built from the teacher's layers, and is matched to the teacher's states if states are matched.

    Args:
        distillation: what the students share, with a DistillationConfig.
        co_teachers: the recommenders by name.
        valid: the validation cases that the calibration is fitted on.

    Returns:
        The student, and the calibration of the teacher and of each co-teacher on the validation part.

    Raises:
        LwaError: if the validation cases are of another catalogue than the teacher's.
    """
    section, items = distillation.section, distillation.teacher.items
    assert isinstance(section, DistillationConfig)  # an ablation has no strategy of its own
    assert items is not None  # the teacher ranks item tokens
    check_catalogue(items.ids, valid)
    calibration = calibrations(distillation.teacher.model, co_teachers, valid)
    soft_targets = ensemble_outputs(
        distillation.teacher_outputs, distillation.windows, co_teachers, items.tokens, calibration
    )
    student = distillation.start(section.n_layers)
    distillation.train(student, section.strategy, soft_targets)
    return student, calibration


def check_catalogue(items: Sequence[str], validation: RankingTask) -> None:
    """Raise LwaError if validation cases are of another catalogue than `items`, or of another order."""
    if list(items) != list(validation.data.item_ids):
        raise LwaError(
            f"the validation cases are of {validation.data.name} with {len(validation.data.item_ids)} items, the "
            f"teacher ranks {len(items)} others or in another order: take the validation part of the teacher's dataset"
        )


def calibrations(
    model: PreTrainedModel, co_teachers: Mapping[str, CrossFitted], valid: RankingTask
) -> dict[str, Calibration]:
    """Return the calibration of a teacher and of each co-teacher on the validation part; the teacher's scale is 1."""
    eval_cases = valid.eval_cases
    own = Calibration(1.0, float(ndcg_at_k(valid.ranks(model), 10).mean()))
    others = {
        name: calibrated(system.scores(eval_cases.histories, eval_cases.user_ids), eval_cases)
        for name, system in co_teachers.items()
    }
    return {"teacher": own} | others


def agreement(student: np.ndarray, teacher: np.ndarray, seen: Sequence[Sequence[int]], k: int = 10) -> pd.DataFrame:
    """Measure how similarly two models rank the items of each case.

    Args:
        student: scores of the one model, (B, N).
        teacher: scores of the other, (B, N).
        seen: item indices to leave out of each case's top k.
        k: length of the lists that are compared.

    Returns:
        One row per case, with columns overlap (the share of the top k that both models have) and tau (Kendall's tau
        over all items).
    """
    pairs = zip(top_k(student, k, seen), top_k(teacher, k, seen), strict=True)
    return pd.DataFrame(
        {
            "overlap": [len(set(a) & set(b)) / k for a, b in pairs],
            "tau": [kendalltau(a, b).statistic for a, b in zip(student, teacher, strict=True)],
        }
    )
