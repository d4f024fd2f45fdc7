"""Choose a profile's training settings on the validation part: NDCG@10 of the teacher and of the student under each.

    python tests/benchmarks/choose_settings.py [--profile quick]

The test part is never read. Each finished setting is a row of results/<profile>/settings.csv; a setting that has its row
is not run again, so the run can be stopped and started. Train and validation are those of the notebooks.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from row_file import RowFile

from lwa_helpers.arms import arm_windows, distil, fitted_student, teacher_signals
from lwa_helpers.config import ExperimentConfig, load_config
from lwa_helpers.data import load_data
from lwa_helpers.evaluation import Popularity, mean_interval, ndcg_at_k, ranks
from lwa_helpers.models import load_teacher
from lwa_helpers.paths import results_dir
from lwa_helpers.student import trim_vocabulary
from lwa_helpers.task import RankingTask
from lwa_helpers.tuning import RankingTrainer, training_arguments, window_loader
from lwa_helpers.warmup import fit_head

TEACHERS = [{"epochs": 0.1, "learning_rate": rate} for rate in (1e-5, 3e-5, 1e-4, 3e-4)] + [{"epochs": 0.2, "learning_rate": 1e-4}]
STUDENTS = [{"alpha": alpha} for alpha in (0.9, 0.5)]
HISTORIES = (8, 12, 24)


class Rows:
    """The finished settings, kept on disk."""

    def __init__(self, path: Path, seed: int):
        self.file, self.seed = RowFile(path, system=str, setting=str), seed

    def has(self, system: str, setting: object) -> bool:
        return self.file.has(system=system, setting=str(setting))

    def add(self, system: str, setting: object, ndcg: np.ndarray) -> None:
        mean = mean_interval(ndcg, seed=self.seed)
        row = {"system": system, "setting": str(setting), "ndcg": mean.estimate, "low": mean.low, "high": mean.high}
        self.file.add(pd.DataFrame([row]))
        print(pd.DataFrame([row]).round(4).to_string(header=False, index=False), flush=True)


def choose(config: ExperimentConfig, rows: Rows) -> None:
    """Run what has no row yet."""
    data = load_data(config.data)
    full = load_teacher(config.teacher.model)
    texts = RankingTask(data, full, config.data, config.evaluation, config.seed).texts()
    task = RankingTask(data, trim_vocabulary(full, texts), config.data, config.evaluation, config.seed, part="valid")
    if not rows.has("popularity", "counts"):
        rows.add("popularity", "counts", ndcg_at_k(ranks(Popularity().fit(data), task.asked), 10))
    teacher = tuned_teacher(task, config, rows)
    for titles in HISTORIES:
        if not rows.has("history", titles):
            asked = config.evaluation.model_copy(update={"history_titles": titles})
            reading = RankingTask(data, task.lm, config.data, asked, config.seed, part="valid")
            rows.add("history", titles, ndcg_at_k(reading.ranks(teacher), 10))
    compare_students(task, config, teacher, rows)


def tuned_teacher(task: RankingTask, config: ExperimentConfig, rows: Rows):
    """The teacher tuned as the profile says; on the way, each of TEACHERS has its row."""
    torch.manual_seed(config.seed)
    model = task.new_ranker(config.teacher.next_items, config.teacher.softmax_items)
    model.causal_lm.get_input_embeddings().requires_grad_(False)
    loader = task.train_loader(config.teacher, config.seed)
    fit_head(model, loader, config.teacher, config.seed)
    if not rows.has("teacher", "head only"):
        rows.add("teacher", "head only", ndcg_at_k(task.ranks(model), 10))
    own = {"epochs": config.teacher.epochs, "learning_rate": config.teacher.learning_rate}
    for setting in [*(s for s in TEACHERS if s != own), own]:
        tuned = copy.deepcopy(model)
        if setting == own or not rows.has("teacher", setting):
            section = config.teacher.model_copy(update=setting)
            arguments = training_arguments(section, len(loader), config.seed)
            RankingTrainer(tuned, arguments, loader, section.head_learning_rate).train()
        if not rows.has("teacher", setting):
            rows.add("teacher", setting, ndcg_at_k(task.ranks(tuned), 10))
    return tuned


def compare_students(task: RankingTask, config: ExperimentConfig, teacher, rows: Rows) -> None:
    """A student for each of STUDENTS, all from the same start."""
    section = config.distillation
    windows = arm_windows(task.train_windows(section), section, config.seed)
    signals = teacher_signals(teacher, windows, section, task.lm, config.seed)
    ordered = window_loader(windows, section.tokens_per_batch, task.lm.pad_id, config.seed, shuffle=False)
    start = fitted_student(teacher, signals, task.lm, section, config.teacher, ordered, config.seed)
    for setting in STUDENTS:
        if rows.has("student", setting):
            continue
        student, tried = copy.deepcopy(start), section.model_copy(update={"loss": section.loss.model_copy(update=setting)})
        distil(student, signals, windows, None, "uniform", tried, task.lm.pad_id, config.seed)
        rows.add("student", setting, ndcg_at_k(task.ranks(student), 10))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="quick")
    chosen = load_config(parser.parse_args().profile)
    choose(chosen, Rows(results_dir(chosen.profile) / "settings.csv", chosen.seed))
