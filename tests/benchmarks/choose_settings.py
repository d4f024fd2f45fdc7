"""Choose a profile's training settings on the validation part: NDCG@10 of the teacher and of the student under each.

    python tests/benchmarks/choose_settings.py [--profile quick] [--set data.reading=items]

The test part is never read. Each finished setting is a row of results/<profile>/settings_<reading>.csv; a setting that
has its row is not run again, so the run can be stopped and started. Train and validation are those of the notebooks.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import tuned_run
from row_file import DEVICE, RowFile

from lwa_helpers.config import ExperimentConfig
from lwa_helpers.data.loading import load_data
from lwa_helpers.distillation.recipes import Distillation, budget
from lwa_helpers.distillation.teacher_tuning import item_model, tune
from lwa_helpers.evaluation.baselines import Popularity
from lwa_helpers.evaluation.metrics import ndcg_at_k
from lwa_helpers.evaluation.protocol import ranks
from lwa_helpers.evaluation.statistics import mean_interval
from lwa_helpers.evaluation.tuned_baselines import tuned_baselines
from lwa_helpers.models.language_model import LanguageModel
from lwa_helpers.models.loading import load_teacher
from lwa_helpers.paths import results_dir
from lwa_helpers.ranking.task import RankingTask

TEACHERS = [{"epochs": 0.4, "learning_rate": rate} for rate in (5e-5, 1e-4, 2e-4, 4e-4)] + [
    {"epochs": 0.8, "learning_rate": 2e-4}
]
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


def copied(lm: LanguageModel) -> LanguageModel:
    """The same model, to be trained."""
    return replace(lm, model=copy.deepcopy(lm.model))


def choose(config: ExperimentConfig, rows: Rows) -> None:
    """Run what has no row yet."""
    data = load_data(config.data)
    vectors = tuned_baselines(data, config.evaluation, config.seed, ["sasrec"])["sasrec"].best.item_vectors
    untuned = item_model(load_teacher(config.teacher.model), data, vectors, config.data, config.evaluation, config.seed)
    untuned.model.to(DEVICE)
    task = RankingTask(data, untuned, config.data, config.evaluation, config.seed, "valid")
    if not rows.has("popularity", "counts"):
        rows.add("popularity", "counts", ndcg_at_k(ranks(Popularity().fit(data), task.eval_cases), 10))
    task = tuned_teacher(task, config, rows)
    for items in HISTORIES:
        if not rows.has("history", items):
            evaluation = config.evaluation.model_copy(update={"history_items": items})
            rows.add("history", items, ndcg_at_k(replace(task, evaluation=evaluation).ranks(task.lm.model), 10))
    compare_students(task, config, rows)


def tuned_teacher(task: RankingTask, config: ExperimentConfig, rows: Rows) -> RankingTask:
    """The task with its teacher tuned as the profile says; on the way, each of TEACHERS has its row."""
    own = {"epochs": config.teacher.epochs, "learning_rate": config.teacher.learning_rate}
    for setting in [*(s for s in TEACHERS if s != own), own]:
        tuned = replace(task, lm=copied(task.lm))
        if setting == own or not rows.has("teacher", setting):
            tune(tuned, config.teacher.model_copy(update={**setting, "evaluate_every": None}), config.seed)
        if not rows.has("teacher", setting):
            rows.add("teacher", setting, ndcg_at_k(tuned.ranks(tuned.lm.model), 10))
    return tuned


def compare_students(task: RankingTask, config: ExperimentConfig, rows: Rows) -> None:
    """A student for each of STUDENTS, all from the same start."""
    section = config.distillation
    windows = budget(task.train_windows(section), section, config.seed)
    distillation = Distillation(task.lm, None, section, windows, config.seed)
    start = distillation.start(section.n_layers)
    for setting in STUDENTS:
        if rows.has("student", setting):
            continue
        student, tried = copied(start), section.model_copy(update={"loss": section.loss.model_copy(update=setting)})
        replace(distillation, section=tried).train(student, section.strategy, distillation.teacher_outputs)
        rows.add("student", setting, ndcg_at_k(task.ranks(student.model), 10))


if __name__ == "__main__":
    chosen = tuned_run.settings(tuned_run.parser(__doc__).parse_args())
    file = results_dir(chosen.profile) / f"settings_{chosen.data.reading}.csv"
    choose(chosen, Rows(file, chosen.seed))
