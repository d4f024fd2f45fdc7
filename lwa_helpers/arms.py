"""The arms of an ablation: students that differ in one thing and share layers, data, budget and teacher signals."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader

from lwa_helpers.config import AblationConfig, DistillationConfig, TeacherConfig
from lwa_helpers.data.windows import Window
from lwa_helpers.distillation import DistillationTrainer
from lwa_helpers.fisher import FisherResult
from lwa_helpers.models import LanguageModel
from lwa_helpers.ranking import ItemRankingModel
from lwa_helpers.signals import TeacherSignals
from lwa_helpers.student import build_student
from lwa_helpers.task import RankingTask
from lwa_helpers.tuning import training_arguments, window_loader
from lwa_helpers.warmup import fit_head


def student_ranker(
    teacher: ItemRankingModel, lm: LanguageModel, section: AblationConfig | DistillationConfig
) -> ItemRankingModel:
    """Return a student of the teacher's own tuned layers with a copy of its item head; its token embedding is frozen."""
    tuned = LanguageModel(lm.name, teacher.causal_lm, lm.tokenizer, lm.sha256)
    student = build_student(tuned, section.n_layers, section.selection).model
    student.get_input_embeddings().requires_grad_(False)
    return ItemRankingModel(student, copy.deepcopy(teacher.head), section.next_items)


def fitted_student(
    teacher: ItemRankingModel, signals: TeacherSignals, lm: LanguageModel, section: AblationConfig | DistillationConfig,
    head: TeacherConfig, loader: DataLoader, seed: int,
) -> ItemRankingModel:
    """Return a student whose item head has moved from the teacher's states to its own, its layers still the teacher's.

    The teacher's head is carried over in standardised coordinates (W <- W * std of the teacher's states, b <- b + E W mean),
    then fitted on the student's standardised states as the teacher's own head was.
    """
    student = student_ranker(teacher, lm, section).to(next(teacher.parameters()).device)
    states = torch.from_numpy(signals.hidden[:, -1].astype(np.float32)).to(student.head.bias.device)
    with torch.no_grad():
        student.head.bias += student.head.table @ student.head.project(states.mean(0))
        student.head.project.weight *= states.std(0)
    fit_head(student, loader, head, seed)
    return student


def arm_windows(windows: Sequence[Window], section: AblationConfig, seed: int) -> list[Window]:
    """Return the windows that a budget of section.epochs passes over: a drawn share of them when it is below one."""
    n = round(min(1.0, section.epochs) * len(windows))
    chosen = np.sort(np.random.default_rng(seed).choice(len(windows), max(1, n), replace=False))
    return [windows[i] for i in chosen]


def run_arm(
    strategy: str, seed: int, task: RankingTask, start: ItemRankingModel, signals: TeacherSignals,
    windows: Sequence[Window], fisher: FisherResult, section: AblationConfig,
) -> pd.DataFrame:
    """Distil a copy of the student `start` under `strategy` and rank the catalogue for every test case.

    The seed sets the order of the data. Returns columns strategy, seed, user_id, target, rank, steps, targets.
    """
    torch.manual_seed(seed)
    student = copy.deepcopy(start)
    loader = window_loader(windows, section.tokens_per_batch, task.lm.pad_id, seed)
    whole = section.model_copy(update={"epochs": max(1.0, section.epochs)})
    trainer = DistillationTrainer(
        signals, student, fisher, strategy, section.loss, training_arguments(whole, len(loader), seed), loader=loader,
        head_learning_rate=section.head_learning_rate,
    )
    trainer.train()
    return pd.DataFrame({
        "strategy": strategy, "seed": seed, "user_id": task.asked.user_ids, "target": task.asked.targets,
        "rank": task.ranks(student), "steps": trainer.state.global_step, "targets": int(signals.starts[-1]),
    })
