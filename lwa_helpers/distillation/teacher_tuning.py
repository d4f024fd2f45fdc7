"""Make a teacher: a language model given item tokens, then tuned to name the next item."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainerCallback

from lwa_helpers import files, paths
from lwa_helpers.config import DataConfig, EvaluationConfig, LossConfig, TeacherConfig
from lwa_helpers.data.interactions import Interactions
from lwa_helpers.data.prompts import prompt_for
from lwa_helpers.distillation.ensemble import ensemble_outputs
from lwa_helpers.distillation.recipes import calibrations, trained_rows
from lwa_helpers.distillation.student import build_student
from lwa_helpers.distillation.teacher_cache import TeacherOutputs, batches_hash, weights_hash
from lwa_helpers.distillation.trainer import DistillationTrainer
from lwa_helpers.distillation.weighting import NO_HIDDEN
from lwa_helpers.errors import LwaError
from lwa_helpers.evaluation.cross_fit import CrossFitted
from lwa_helpers.models.item_tokens import title_rows, with_item_tokens
from lwa_helpers.models.language_model import ItemTokens, LanguageModel
from lwa_helpers.models.layers import decoder_layers
from lwa_helpers.models.low_rank import low_rank
from lwa_helpers.ranking.cold_items import with_cold_rows
from lwa_helpers.ranking.head_transfer import carry_head, label_states
from lwa_helpers.ranking.task import RankingTask
from lwa_helpers.ranking.training import RankingTrainer, train_or_resume, training_arguments, window_loader

CARRY_WINDOWS = 300  # windows on which a head is carried from the first layers to all of them
HEAD_SCALE = 0.02  # of the head's first map: scores start small, nothing is ruled out
RIDGE = 1e-2


def item_model(
    full: LanguageModel,
    data: Interactions,
    vectors: np.ndarray,
    cut: DataConfig,
    evaluation: EvaluationConfig,
    seed: int,
) -> LanguageModel:
    """Return a copy of a language model with a token for each item, untuned.

    An item's input row is the mean embedding of its title's tokens plus a linear map of its collaborative vector, fitted so
    that the map alone comes close to the titles; its output row is a random map of the vector. Items without interactions get
    the vector that their title suggests.

    Args:
        vectors: collaborative vectors of the items, (N, k), as SASRec.item_vectors.
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
    """Return a model of the same architecture whose weights, embedding included, are drawn anew: the control without reading."""
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
    """Tune the task's model in place and return the trainer of all its layers: on labels alone, or taught by baselines as well.

    First its item rows are fitted behind its first few layers, which learn with them at a fraction of the cost: there is most
    to learn. Then the head is carried over to all layers (carry_head), and all are trained, on the labels and on what the
    shallow model has made of them. With first_layers: 0 all layers are trained from the start.

    Args:
        valid: what the best weights are chosen by, where section.evaluate_every is set.
        co_teachers: baselines that teach all layers beside the first ones.
        validation: on whom these are weighed, and the scale of their scores is fitted.

    Raises:
        LwaError: for co-teachers without first layers.
    """
    teacher = None
    if 0 < section.first_layers < len(decoder_layers(task.lm.model)):
        teacher = shallow = shallow_model(task, section, seed)
        start_from_shallow(task, shallow, section, seed)
    if co_teachers:
        if teacher is None:
            raise LwaError(
                "teacher.co_teachers teach beside the first layers: set teacher.first_layers, below the number of all"
            )
        teacher = with_co_teachers(task, shallow, section, co_teachers, validation)
    trainer = train(task, task.lm, section, seed, teacher, valid, logs, callbacks)
    write_cold_rows(task.lm, task.data)
    return trainer


def shallow_model(task: RankingTask, section: TeacherConfig, seed: int) -> LanguageModel:
    """Return the task's model without all but its first layers, trained on labels."""
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
    """Return what the shallow model and the co-teachers say on all training windows, averaged."""
    windows = task.train_windows(section)
    ordered = window_loader(windows, section.tokens_per_batch, task.lm.pad_id, 0, shuffle=False)
    own = TeacherOutputs.cached(shallow.model, ordered, [section.first_layers], section.bf16)
    return ensemble_outputs(
        own, windows, co_teachers, task.lm.items.tokens, calibrations(shallow.model, co_teachers, validation)
    )


def start_from_shallow(task: RankingTask, shallow: LanguageModel, section: TeacherConfig, seed: int) -> None:
    """Put the item rows and layers of the shallow model into the task's, in place, and carry its head over to all layers."""
    model = task.lm.model
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(shallow.model.get_input_embeddings().weight)
    for own, fitted in zip(decoder_layers(model), decoder_layers(shallow.model)):
        own.load_state_dict(fitted.state_dict())
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
    """Train a model of the task's tokens on labels, in place; a shallow model, or what several have said, teaches beside them
    with weight first_alpha.

    In a catalogue so large that its softmax is sampled, it does not.
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
    options = {"head_learning_rate": section.head_learning_rate, "dropout": section.dropout, "valid": valid}
    options |= {"loader": loader, "patience": section.patience, "logs": logs, "callbacks": callbacks}
    sampled = proposal(task, section)
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
    """Where a run keeps its checkpoints: named by all that it depends on, so that it never goes on from another's."""
    key = [m.directory.name if isinstance(m, TeacherOutputs) else weights_hash(m.model) for m in models if m]
    key += [batches_hash(loader, ("input_ids", "labels")), section.model_dump(mode="json"), seed]
    return paths.CACHE / "checkpoints" / files.sha256_of_text(json.dumps(key))[:32]


def proposal(task: RankingTask, section: TeacherConfig) -> tuple[Tensor, int] | None:
    """Return what sampled_nll draws tokens from, and how many, where the catalogue is larger than section.softmax_items."""
    items = task.lm.items
    if len(items.ids) <= section.softmax_items:
        return None
    log_q = torch.full((items.tokens.stop,), -torch.inf)
    log_q[items.tokens] = torch.from_numpy(task.log_popularity).float()
    return log_q, section.softmax_items


@torch.no_grad()
def write_cold_rows(lm: LanguageModel, data: Interactions) -> None:
    """Give items without interactions the rows of the head that their titles suggest, in place.

    In training they are never the target, so that the softmax drives their scores down whatever they are.
    """
    rows = lm.model.get_output_embeddings().weight[lm.items.tokens]
    titles = lm.model.get_input_embeddings().weight[lm.items.tokens]
    rows.copy_(torch.from_numpy(with_cold_rows(rows.cpu().numpy(), data.counts, titles.cpu().numpy())))
