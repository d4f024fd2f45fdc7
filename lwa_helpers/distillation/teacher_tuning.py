"""Make a teacher: give a language model item tokens, then tune it to predict the next item."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainerCallback

from lwa_helpers.assets import cache_entry
from lwa_helpers.config import DataConfig, EvaluationConfig, TeacherConfig
from lwa_helpers.configs.students import LossConfig
from lwa_helpers.data.interactions import Interactions
from lwa_helpers.data.prompts import prompt_for
from lwa_helpers.distillation.ensemble import ensemble_outputs
from lwa_helpers.distillation.recipes import calibrations, check_catalogue, trained_rows
from lwa_helpers.distillation.student import build_student
from lwa_helpers.distillation.teacher_cache import TeacherOutputs, batches_hash, weights_hash
from lwa_helpers.distillation.trainer import DistillationTrainer
from lwa_helpers.distillation.weighting import NO_HIDDEN
from lwa_helpers.errors import LwaError
from lwa_helpers.evaluation.cross_fit import CrossFitted
from lwa_helpers.models.item_tokens import title_rows, with_item_tokens
from lwa_helpers.models.language_model import ItemTokens, LanguageModel
from lwa_helpers.models.layers import decoder_layers, weight_of
from lwa_helpers.models.low_rank import low_rank
from lwa_helpers.ranking.cold_items import with_cold_rows
from lwa_helpers.ranking.head_transfer import carry_head, label_states
from lwa_helpers.ranking.task import RankingTask
from lwa_helpers.ranking.training import RankingTrainer, train_or_resume, training_arguments, window_loader

CARRY_WINDOWS = 300  # windows that the map which carries the head over to all layers is fitted on
HEAD_SCALE = 0.02  # standard deviation of the random map that starts the head: with small scores no item is ruled out
RIDGE = 1e-2  # ridge penalty, times the mean square of the collaborative vectors


def item_model(
    full: LanguageModel,
    data: Interactions,
    vectors: np.ndarray,
    cut: DataConfig,
    evaluation: EvaluationConfig,
    seed: int,
) -> LanguageModel:
    """Return a copy of a language model with a token for each item, not tuned yet.

    An item's input row is the mean embedding of its title's tokens plus a linear map of its collaborative vector. The
    map is fitted to predict the mean embeddings. An item's output row is a random linear map of its vector. The vectors
    of items without interactions are predicted from their titles.

    Args:
        full: the language model.
        data: the dataset.
        vectors: collaborative vectors of the items, (N, k), such as SASRec.item_vectors.
        cut: how histories are read.
        evaluation: how many items of a history are read.
        seed: of the random map.
    """
    titles = title_rows(full, data.titles)
    known = torch.from_numpy(with_cold_rows(vectors, data.counts, titles.cpu().numpy())).float().to(titles)
    gram = known.T @ known
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
    inputs = titles + known @ torch.linalg.solve(gram, known.T @ titles)
    generator = torch.Generator().manual_seed(seed)
    outputs = known @ (HEAD_SCALE * torch.randn(known.shape[1], titles.shape[1], generator=generator)).to(known)
    text_items = cut.text_items if cut.reading == "hybrid" else 0
    items = ItemTokens(data.item_ids, 0, cut.reading, text_items, evaluation.history_items)
    prompt = prompt_for(data.name)
    texts = (
        [] if cut.reading == "items" else [prompt.header, *data.titles, *(t + prompt.separator for t in data.titles)]
    )
    return with_item_tokens(full, data.titles, inputs, outputs, items, texts)


def reinitialised(full: LanguageModel, seed: int) -> LanguageModel:
    """Return a model of the same architecture with random weights, a control without pretraining.

    Args:
        full: the language model.
        seed: of the weights, those of the embedding included.
    """
    torch.manual_seed(seed)
    config = copy.deepcopy(full.model.config)
    return replace(full, model=type(full.model)._from_config(config, dtype=full.model.dtype).eval())


def tune(
    task: RankingTask,
    section: TeacherConfig,
    seed: int,
    valid: Callable[[PreTrainedModel], float] | None = None,
    logs: Path | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    co_teachers: Mapping[str, CrossFitted] | None = None,
    validation: RankingTask | None = None,
) -> RankingTrainer:
    """Tune the task's model in place, on labels and, optionally, on the predictions of baselines.

    The first step trains the item rows, which have the most to learn, together with only the first few layers, at a
    fraction of the cost. Then the head is carried over to all layers (see carry_head). The second step trains all
    layers on the labels and on the predictions of the shallow model. With first_layers = 0, the first step is skipped.

    Args:
        task: the dataset and the model.
        section: settings of the teacher.
        seed: of the training runs.
        valid: maps the model to the metric that the best weights are chosen by; needed if section.evaluate_every is
            set.
        logs: folder for TensorBoard; None writes no such logs.
        callbacks: callbacks of the second step.
        co_teachers: baselines that teach in the second step, together with the shallow model.
        validation: the validation cases that weights and score scales of the co-teachers are fitted on; needed if there
            are co-teachers.

    Returns:
        The trainer of the second step.

    Raises:
        LwaError: if there are co-teachers but no first layers or no validation cases of the task's catalogue, or if
            section.evaluate_every is set and `valid` is missing.
    """
    in_two_steps = 0 < section.first_layers < len(decoder_layers(task.lm.model))
    check_before_training(task, section, in_two_steps, valid, co_teachers, validation)
    teacher: LanguageModel | TeacherOutputs | None = None
    if in_two_steps:
        teacher = shallow = shallow_model(task, section, seed)
        start_from_shallow(task, shallow, section, seed)
        if co_teachers and validation:
            teacher = with_co_teachers(task, shallow, section, co_teachers, validation)
    trainer = train(task, task.lm, section, seed, teacher, valid, logs, callbacks)
    write_cold_rows(task.lm, task.data)
    return trainer


def check_before_training(
    task: RankingTask,
    section: TeacherConfig,
    in_two_steps: bool,
    valid: Callable[[PreTrainedModel], float] | None,
    co_teachers: Mapping[str, CrossFitted] | None,
    validation: RankingTask | None,
) -> None:
    """Raise LwaError for what `tune` would find missing only after it has trained for hours."""
    if section.evaluate_every and valid is None:
        raise LwaError("teacher.evaluate_every needs a metric: pass valid, which maps the model to it")
    if not co_teachers:
        return
    if not in_two_steps:
        raise LwaError(
            "teacher.co_teachers teach beside the first layers: set teacher.first_layers, below the number of all"
        )
    if validation is None:
        raise LwaError("teacher.co_teachers are weighted on the validation part: pass validation, a task on it")
    check_catalogue(task.data.item_ids, validation)


def shallow_model(task: RankingTask, section: TeacherConfig, seed: int) -> LanguageModel:
    """Return a model of only the first layers of the task's model, trained on labels."""
    shallow = build_student(task.lm, section.first_layers, "first")
    short = section.model_copy(
        update={
            "epochs": section.first_epochs,
            "learning_rate": section.first_learning_rate,
            "dropout": section.first_dropout,
            "evaluate_every": None,
            "save_steps": None,
        }
    )
    train(task, shallow, short, seed)
    return shallow


def with_co_teachers(
    task: RankingTask,
    shallow: LanguageModel,
    section: TeacherConfig,
    co_teachers: Mapping[str, CrossFitted],
    validation: RankingTask,
) -> TeacherOutputs:
    """Return the outputs of the shallow model and the co-teachers on all training windows, averaged."""
    assert task.lm.items is not None  # the shallow model predicts item tokens
    windows = task.train_windows(section)
    ordered = window_loader(windows, section.tokens_per_batch, task.lm.pad_id, 0, shuffle=False)  # seed unused
    own = TeacherOutputs.cached(shallow, ordered, [section.first_layers], section.bf16)
    return ensemble_outputs(
        own, windows, co_teachers, task.lm.items.tokens, calibrations(shallow.model, co_teachers, validation)
    )


def start_from_shallow(task: RankingTask, shallow: LanguageModel, section: TeacherConfig, seed: int) -> None:
    """Copy the embedding and the layers of the shallow model into the task's model, and carry its head over."""
    model = task.lm.model
    own, fitted = (weight_of(each.get_input_embeddings()) for each in (model, shallow.model))
    with torch.no_grad():
        own.copy_(fitted)
    for layer, trained in zip(decoder_layers(model), decoder_layers(shallow.model)):
        layer.load_state_dict(trained.state_dict())
    windows = task.train_windows(section)
    drawn = np.random.default_rng(seed).permutation(len(windows))[:CARRY_WINDOWS]
    batches = window_loader([windows[i] for i in drawn], section.tokens_per_batch, task.lm.pad_id, seed, shuffle=False)
    source, states = (label_states(m, batches, section.bf16) for m in (shallow.model, model))
    carry_head(shallow.model.get_output_embeddings().weight, source, model, states)


def train(
    task: RankingTask,
    lm: LanguageModel,
    section: TeacherConfig,
    seed: int,
    teacher: LanguageModel | TeacherOutputs | None = None,
    valid: Callable[[PreTrainedModel], float] | None = None,
    logs: Path | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> RankingTrainer:
    """Train a model with the task's tokens in place, on labels and, optionally, on a teacher's predictions.

    Args:
        task: the task.
        lm: the model to train.
        section: settings of the teacher. The teacher's predictions have the weight section.first_alpha.
        seed: of the training run.
        teacher: a shallow model, or the outputs of several. It is not used if the catalogue is so large that its
            softmax is sampled.
        valid: maps the model to the metric that the best weights are chosen by.
        logs: folder for TensorBoard; None writes no such logs.
        callbacks: further callbacks.

    Returns:
        The trainer, after training.
    """
    torch.manual_seed(seed)
    loader = task.train_loader(section, seed)
    lm.model.requires_grad_(not section.frozen_layers)
    for module in trained_rows(lm.model):
        module.requires_grad_(True)
    folder = checkpoints([lm, teacher], loader, section, seed) if section.save_steps or section.evaluate_every else None
    arguments = training_arguments(
        section, len(loader), seed, checkpoints=folder, evaluate_every=section.evaluate_every
    )
    options: dict[str, Any] = {"head_learning_rate": section.head_learning_rate, "dropout": section.dropout}
    options |= {"valid": valid, "loader": loader, "patience": section.patience, "logs": logs, "callbacks": callbacks}
    sampled = proposal(task, section)
    trainer: RankingTrainer
    with low_rank(trained_rows(lm.model), section.rank):
        if teacher and not sampled:
            loss = LossConfig(alpha=section.first_alpha, temperature=1.0, beta=0.0)
            trainer = DistillationTrainer(teacher, lm, None, NO_HIDDEN, loss, arguments, **options)
        else:
            trainer = RankingTrainer(lm.model, arguments, sampled=sampled, **options)
        train_or_resume(trainer, folder) if folder else trainer.train()
    return trainer


def checkpoints(
    models: Sequence[LanguageModel | TeacherOutputs | None], loader: DataLoader, section: TeacherConfig, seed: int
) -> Path:
    """Return the folder of a run's checkpoints.

    Its name is a hash of everything the run depends on, so a run never resumes from another run's checkpoint.

    Args:
        models: the model before training, and the teacher, if there is one.
        loader: the batches.
        section: settings of the teacher.
        seed: of the training run.
    """
    key: list[Any] = [m.directory.name if isinstance(m, TeacherOutputs) else weights_hash(m.model) for m in models if m]
    key += [batches_hash(loader, ("input_ids", "labels")), section.model_dump(mode="json"), seed]
    return cache_entry("checkpoints", key)


def proposal(task: RankingTask, section: TeacherConfig) -> tuple[Tensor, int] | None:
    """Return log q and n of sampled_nll, or None if the catalogue has at most section.softmax_items items."""
    items = task.lm.items
    assert items is not None  # the tuned model predicts item tokens
    if len(items.ids) <= section.softmax_items:
        return None
    log_q = torch.full((items.tokens.stop,), -torch.inf)
    log_q[items.tokens] = torch.from_numpy(task.log_popularity).float()
    return log_q, section.softmax_items


@torch.no_grad()
def write_cold_rows(lm: LanguageModel, data: Interactions) -> None:
    """Replace, in place, the head's rows of items without interactions by predictions from their titles.

    These items are never a target in training, so the softmax lowers their scores whatever the items are.
    """
    assert lm.items is not None  # the tuned model has item tokens
    rows = lm.model.get_output_embeddings().weight[lm.items.tokens]
    titles = weight_of(lm.model.get_input_embeddings())[lm.items.tokens]
    rows.copy_(torch.from_numpy(with_cold_rows(rows.cpu().numpy(), data.counts, titles.cpu().numpy())))
