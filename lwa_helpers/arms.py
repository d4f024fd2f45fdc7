"""Students from start to finish, and the arms of an ablation: students that differ in one thing and share all else."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import kendalltau
from torch.utils.data import DataLoader

from lwa_helpers import paths
from lwa_helpers.config import AblationConfig, DistillationConfig, TeacherConfig
from lwa_helpers.data.windows import Window
from lwa_helpers.distillation import DistillationTrainer, layer_map
from lwa_helpers.errors import LwaError
from lwa_helpers.evaluation import Baseline, calibrated, ndcg_at_k, top_k
from lwa_helpers.fisher import FisherResult
from lwa_helpers.fused_signals import fused_signals
from lwa_helpers.models import LanguageModel, decoder_layers
from lwa_helpers.ranking import ItemRankingModel, spread
from lwa_helpers.signals import TeacherSignals, weights_hash
from lwa_helpers.student import SCORED, build_student, select_layers
from lwa_helpers.task import RankingTask
from lwa_helpers.tuning import train_or_go_on, training_arguments, window_loader
from lwa_helpers.warmup import fit_head

Section = AblationConfig | DistillationConfig
Scores = FisherResult | Sequence[float] | None


def student_ranker(
    teacher: ItemRankingModel, lm: LanguageModel, section: Section, scores: Scores = None, seed: int = 0
) -> ItemRankingModel:
    """Return a student of the teacher's own tuned layers with a copy of its item head; its token embedding is frozen."""
    tuned = LanguageModel(lm.name, teacher.causal_lm, lm.tokenizer, lm.sha256)
    student = build_student(tuned, section.n_layers, section.selection, scores=scores, seed=seed).model
    student.get_input_embeddings().requires_grad_(False)
    return ItemRankingModel(student, copy.deepcopy(teacher.head), section.next_items)


def fitted_student(
    teacher: ItemRankingModel, signals: TeacherSignals, lm: LanguageModel, section: Section, head: TeacherConfig,
    loader: DataLoader, seed: int, scores: Scores = None,
) -> ItemRankingModel:
    """Return a student whose item head has moved from the teacher's states to its own, its layers still the teacher's.

    The teacher's head is carried over in standardised coordinates (W <- W * std of the teacher's states, b <- b + E W mean),
    then fitted on the student's standardised states as the teacher's own head was.
    """
    student = student_ranker(teacher, lm, section, scores, seed).to(next(teacher.parameters()).device)
    states = torch.from_numpy(signals.hidden[:, -1].astype(np.float32)).to(student.head.bias.device)
    with torch.no_grad():
        student.head.bias += student.head.table @ student.head.project(states.mean(0))
        student.head.project.weight *= spread(states)
    fit_head(student, loader, head, seed)
    return student


def arm_windows(windows: Sequence[Window], section: Section, seed: int) -> list[Window]:
    """Return the windows that a budget of section.epochs passes over: a drawn share of them when it is below one."""
    n = round(min(1.0, section.epochs) * len(windows))
    chosen = np.sort(np.random.default_rng(seed).choice(len(windows), max(1, n), replace=False))
    return [windows[i] for i in chosen]


def teacher_signals(
    teacher: ItemRankingModel, windows: Sequence[Window], section: Section, lm: LanguageModel, seed: int
) -> TeacherSignals:
    """Return what the teacher says on the windows of a section's students of all depths, from the cache folder if it is there."""
    ordered = window_loader(windows, section.tokens_per_batch, lm.pad_id, seed, shuffle=False)
    layers = sorted({layer for depth in section.depths for layer in layer_map(depth, len(decoder_layers(teacher)))})
    return TeacherSignals.cached(teacher, ordered, layers, section.bf16, section.loss.top_k, section.loss.temperature)


def distil(
    start: ItemRankingModel, signals: TeacherSignals, windows: Sequence[Window], fisher: FisherResult, strategy: str,
    section: Section, pad_id: int, seed: int, logs: Path | None = None,
) -> DistillationTrainer:
    """Train the student `start` in place on the section's budget; the seed sets the order of the data. Returns the trainer."""
    torch.manual_seed(seed)
    loader = window_loader(windows, section.tokens_per_batch, pad_id, seed)
    whole = section.model_copy(update={"epochs": max(1.0, section.epochs)})
    folder = checkpoint_folder(start, signals, fisher, strategy, section, seed) if section.save_steps else None
    trainer = DistillationTrainer(
        signals, start, fisher, strategy, section.loss, training_arguments(whole, len(loader), seed, checkpoints=folder),
        loader=loader, head_learning_rate=section.head_learning_rate, logs=logs,
    )
    train_or_go_on(trainer, folder) if folder else trainer.train()
    return trainer


def checkpoint_folder(
    start: ItemRankingModel, signals: TeacherSignals, fisher: FisherResult, strategy: str, section: Section, seed: int
) -> Path:
    """Where a run keeps its checkpoints: named by all that it depends on, so that it never goes on from another's."""
    key = [weights_hash(start), str(signals.directory), fisher.per_layer.tolist(), strategy, seed]
    key.append(section.model_dump(mode="json"))
    return paths.CACHE / "checkpoints" / paths.sha256_of_text(json.dumps(key))[:32]


def distilled_student(
    teacher: ItemRankingModel, lm: LanguageModel, section: DistillationConfig, head: TeacherConfig, windows: Sequence[Window],
    fisher: FisherResult, seed: int, logs: Path | None = None,
) -> tuple[ItemRankingModel, DistillationTrainer]:
    """Return the student of a section and the trainer of its last step.

    With section.steps the student of each depth, once distilled, is the teacher of the next. The steps share the budget:
    each has its part of the epochs or, where these are too few, of the windows.
    """
    depths = section.steps or [section.n_layers]
    parts = len(depths)
    whole = section.epochs >= parts
    scores: Scores = fisher
    for place, depth in enumerate(depths):
        step = section.model_copy(update={"n_layers": depth, "epochs": section.epochs / parts if whole else section.epochs})
        mine = windows if whole else windows[place::parts]
        signals = teacher_signals(teacher, mine, step, lm, seed)
        ordered = window_loader(mine, section.tokens_per_batch, lm.pad_id, seed, shuffle=False)
        student = fitted_student(teacher, signals, lm, step, head, ordered, seed, scores)
        board = logs if place == parts - 1 else None
        trainer = distil(student, signals, mine, fisher, section.strategy, step, lm.pad_id, seed, board)
        if step.selection in SCORED:
            scores = scores_left(scores, step, seed)
        teacher = student
    return student, trainer


def frontier(
    teacher: ItemRankingModel, lm: LanguageModel, section: DistillationConfig, head: TeacherConfig, windows: Sequence[Window],
    fisher: FisherResult, seed: int,
) -> dict[int, ItemRankingModel]:
    """Return, by depth, students like a section's own of the other depths that section.frontier names and the teacher exceeds:
    each made in one step of the same windows, while the teacher reads these once for all."""
    n_teacher = len(decoder_layers(teacher))
    depths = [depth for depth in section.depths if depth != section.n_layers and depth < n_teacher]
    cuts = {depth: section.model_copy(update={"n_layers": depth, "frontier": section.depths, "steps": []}) for depth in depths}
    return {depth: distilled_student(teacher, lm, cut, head, windows, fisher, seed)[0] for depth, cut in cuts.items()}


def fused_student(
    teacher: ItemRankingModel, lm: LanguageModel, section: DistillationConfig, head: TeacherConfig, windows: Sequence[Window],
    systems: Mapping[str, Baseline], valid: RankingTask, fisher: FisherResult, seed: int,
) -> tuple[ItemRankingModel, dict[str, tuple[float, float]]]:
    """Return the student of a section taught by the teacher and by recommenders without a language model as one (SASRec,
    EASE), and how each was heard: the scale that makes its scores as sure as fits the validation part, and its NDCG@10 there.

    The layers and the states that are matched are the teacher's. Raises LwaError for a section of several steps.
    """
    if section.steps:
        raise LwaError(f"distillation.steps {section.steps}: a student of several teachers is made in one step, set it to []")
    heard = {"teacher": (1.0, float(ndcg_at_k(valid.ranks(teacher), 10).mean()))}
    heard |= {name: calibrated(system, valid.asked) for name, system in systems.items()}
    signals = teacher_signals(teacher, windows, section, lm, seed)
    ordered = window_loader(windows, section.tokens_per_batch, lm.pad_id, seed, shuffle=False)
    student = fitted_student(teacher, signals, lm, section, head, ordered, seed, fisher)
    fused = fused_signals(signals, windows, systems, heard)
    distil(student, fused, windows, fisher, section.strategy, section, lm.pad_id, seed)
    return student, heard


def scores_left(scores: FisherResult | np.ndarray, section: Section, seed: int) -> np.ndarray:
    """Return the scores of the layers that a section's student keeps of a teacher whose layers have `scores`."""
    values = scores.per_layer if isinstance(scores, FisherResult) else scores
    return values[select_layers(len(values), section.n_layers, section.selection, scores, seed)]


def run_arm(
    strategy: str, seed: int, task: RankingTask, start: ItemRankingModel, signals: TeacherSignals,
    windows: Sequence[Window], fisher: FisherResult, section: AblationConfig,
) -> pd.DataFrame:
    """Distil a copy of the student `start` under `strategy` and rank the catalogue for every test case.

    The seed sets the order of the data. Returns columns strategy, seed, user_id, target, rank, steps, targets.
    """
    student = copy.deepcopy(start)
    trainer = distil(student, signals, windows, fisher, strategy, section, task.lm.pad_id, seed)
    return pd.DataFrame({
        "strategy": strategy, "seed": seed, "user_id": task.asked.user_ids, "target": task.asked.targets,
        "rank": task.ranks(student), "steps": trainer.state.global_step, "targets": int(signals.starts[-1]),
    })


def agreement(student: np.ndarray, teacher: np.ndarray, seen: Sequence[Sequence[int]], k: int = 10) -> pd.DataFrame:
    """How alike two models rank each user's items: `overlap`, the share of the top k in common, and Kendall's `tau` over all.

    student, teacher: scores (B, N); seen: items left out of each user's top k.
    """
    pairs = zip(top_k(student, k, seen), top_k(teacher, k, seen), strict=True)
    return pd.DataFrame({
        "overlap": [len(set(a) & set(b)) / k for a, b in pairs],
        "tau": [kendalltau(a, b).statistic for a, b in zip(student, teacher, strict=True)],
    })
