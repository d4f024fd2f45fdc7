"""Full ranking on the two Office Products sets of the literature: tuned baselines, the teacher and its 8-layer students.

    python tests/benchmarks/literature.py --root FOLDER --run office2014 (or office2018) [--systems popularity ease …]
    python tests/benchmarks/literature.py --root FOLDER [--history 10] [--every-target] [--set teacher.epochs=1 …] [--name NAME]

--run takes the settings of a table that the paper shows, and its name; literature_table.py brings it there. FOLDER holds
Office_Products.* with a column `split`, and meta_Office_Products.*. Amazon 2014 (complete, leave-one-out) needs nothing else;
Amazon 2018 (published test rows) wants --every-target, since a user has several. Whatever is finished has its row in
results/benchmarks/literature/<name>.csv and is not run again: a baseline, or one epoch of a model, whose checkpoint lies
beside. What made the rows is in <name>.json, and in each its commit; rows of other settings need another name. Settings and
epochs are chosen on the validation part; the test part is ranked once, at the end of each system.

`fused` is a student like `student`, taught by the teacher, SASRec and EASE together, weighted by their validation NDCG@10, and
`student_of_sasrec` one taught by SASRec's ranking alone; `ensemble` asks the three together, without a student. `fused_teacher`
is the teacher itself, all its layers, taught on by what the three say, without labels, and `student_of_fused` is taught by that one alone.
`ndcg` leaves the user's seen items out, `ndcg_all` ranks the target against the whole catalogue.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from row_file import DEVICE, RowFile, keep_manifest
from scipy.special import softmax
from transformers import TrainingArguments

from lwa_helpers.arms import fitted_student
from lwa_helpers.cli import parse_overrides
from lwa_helpers.config import ExperimentConfig, TuningConfig, load_config
from lwa_helpers.data import load_data
from lwa_helpers.data.windows import Window
from lwa_helpers.distillation import NO_HIDDEN, DistillationTrainer, layer_map
from lwa_helpers.errors import LwaError
from lwa_helpers.evaluation import (
    EASE,
    Baseline,
    Cases,
    ItemKNN,
    Popularity,
    RecentPopularity,
    SASRec,
    calibrated,
    cases,
    hit_rate_at_k,
    mean_interval,
    ndcg_at_k,
    paired_difference,
    rank_of_target,
    smallest_detectable_difference,
    tune,
)
from lwa_helpers.fused_signals import fuse, recommender_signals
from lwa_helpers.models import decoder_layers, load_teacher
from lwa_helpers.paths import RESULTS
from lwa_helpers.ranking import ItemRanker, ItemRankingModel, load_item_ranker
from lwa_helpers.signals import TeacherSignals
from lwa_helpers.student import trim_vocabulary
from lwa_helpers.task import RankingTask
from lwa_helpers.tuning import RankingTrainer, training_arguments, window_loader
from lwa_helpers.warmup import fit_head

BUDGET, VALID_USERS = 8, 600
FUSED = ["teacher", "sasrec", "ease"]
STUDENTS = {  # whose layers, and who teaches them
    "student": ("teacher", ["teacher"]), "student_of_sasrec": ("teacher", ["sasrec"]), "fused": ("teacher", FUSED),
    "fused_teacher": ("teacher", FUSED), "student_of_fused": ("fused_teacher", ["fused_teacher"]),
}  # fmt: skip
BOTH = {
    "data.title_limit": 40, "teacher.tokens_per_batch": 1024, "distillation.tokens_per_batch": 1024,
    "teacher.head_learning_rate": 3e-4, "teacher.epochs": 1,
}  # fmt: skip
RUNS = {"office2014": BOTH | {"distillation.epochs": 2}, "office2018": BOTH | {"distillation.epochs": 4, "teacher.epochs": 2}}
BASELINES = {
    "popularity": (Popularity, {}),
    "recent_popularity": (RecentPopularity, {"half_life": [0.01, 0.02, 0.05, 0.1, 0.2, 0.5]}),
    "itemknn": (ItemKNN, {"neighbours": [50, 200, 1000], "shrinkage": [0.0, 10.0, 100.0]}),
    "ease": (EASE, {"l2": [10.0, 30.0, 100.0, 300.0, 1000.0]}),
    "sasrec": (SASRec, {"dim": [64, 128], "dropout": [0.3, 0.5], "learning_rate": [1e-3, 3e-3], "max_epochs": [100]}),
}


class Table:
    """Finished rows, each with the commit that made it, and the test ranks of finished systems, kept on disk."""

    def __init__(self, folder: Path, commit: str):
        self.folder, self.commit = folder, commit
        self.file = RowFile(folder.with_suffix(".csv"), system=str, part=str, epoch=int)

    @property
    def frame(self) -> pd.DataFrame:
        return self.file.read()

    def has(self, system: str, part: str, epoch: int = 0) -> bool:
        return self.file.has(system=system, part=part, epoch=epoch)

    def add(self, system: str, part: str, rank: np.ndarray, rank_all: np.ndarray, epoch: int = 0, **facts) -> None:
        mean = mean_interval(ndcg_at_k(rank, 10), seed=0)
        row = {
            "system": system, "part": part, "epoch": epoch, "cases": len(rank), "ndcg": mean.estimate, "low": mean.low,
            "high": mean.high, "hr": hit_rate_at_k(rank, 10).mean(), "ndcg_all": ndcg_at_k(rank_all, 10).mean(),
            "commit": self.commit, **facts,
        }
        if part == "test":
            self.folder.mkdir(parents=True, exist_ok=True)
            np.save(self.folder / f"{system}.npy", rank)
        self.file.add(pd.DataFrame([row]))
        print(pd.DataFrame([row]).round(4).to_string(index=False), flush=True)


def both_ranks(system, asked: Cases, batch_size: int = 256) -> np.ndarray:
    """Ranks of the targets (2, B): with the user's seen items left out, and among all items."""
    parts = []
    for start in range(0, len(asked.targets), batch_size):
        part = slice(start, start + batch_size)
        scores = system.scores(asked.histories[part])
        parts.append([rank_of_target(scores, asked.targets[part], exclude) for exclude in (asked.histories[part], None)])
    return np.concatenate(parts, axis=1)


@dataclass
class Ensemble:
    """The weighted mean of several systems' item probabilities, softmax(scale * scores)."""

    systems: list[tuple[Baseline, tuple[float, float]]]  # each with its scale and its weight

    def scores(self, histories: list[list[int]]) -> np.ndarray:
        parts = [weight * softmax(scale * system.scores(histories).astype(float), axis=1) for system, (scale, weight) in self.systems]
        return np.log(sum(parts))


class Study:
    """One dataset, its cases and its table."""

    def __init__(self, options: argparse.Namespace):
        self.config = settings(options)
        self.data = load_data(self.config.data)
        self.asked = cases(self.data, "test", options.every_target)
        folder = RESULTS / "benchmarks" / "literature" / (options.name or options.root.resolve().name)
        asked = {"history": options.history, "every_target": options.every_target, "data_hash": self.data.sha256}
        commit = keep_manifest(
            folder.with_suffix(".json"), self.config, asked, "give this run another --name",
            lambda: {"model_hash": load_teacher(self.config.teacher.model).sha256},
        )
        self.table = Table(folder, commit)
        some = np.random.default_rng(0).permutation(len(self.data.targets("valid")))[:VALID_USERS]
        valid = cases(self.data, "valid")
        self.taught, self.recommender = lru_cache(maxsize=1)(self._taught), lru_cache(self._recommender)
        self.valid = Cases(*([values[i] for i in some] for values in valid[:2]), valid.targets[some])
        print(f"{len(self.data.train)} train rows, {len(self.data.items)} items, {len(self.asked.targets)} test cases", flush=True)

    def baseline(self, name: str) -> None:
        """Tune on valid, rank test; every setting tried goes to <name>_tried.csv."""
        start, (kind, grid) = time.perf_counter(), BASELINES[name]
        tuned = tune(kind, grid, self.data, budget=BUDGET)
        self.table.folder.mkdir(parents=True, exist_ok=True)
        tuned.tried.to_csv(self.table.folder / f"{name}_tried.csv", index=False)
        both = both_ranks(tuned.best, self.asked)
        self.table.add(name, "test", *both, seconds=time.perf_counter() - start, settings=json.dumps(tuned.settings))

    def model(self, name: str) -> None:
        """Train teacher or student epoch by epoch, each a row, until one is worse on valid; then rank test with the best one."""
        section = self.section(name)
        for epoch in range(1, round(section.epochs) + 1):
            if epoch > 1 and self.best(name) < epoch - 1:
                break
            if not self.table.has(name, "valid", epoch):
                start = time.perf_counter()
                model, task = self.teacher(epoch) if name == "teacher" else self.student(name, epoch)
                model.save(self.checkpoint(name, epoch), task.lm.tokenizer, self.data.item_ids)
                both = both_ranks(self.ranker(model, task), self.valid)
                self.table.add(name, "valid", *both, epoch=epoch, seconds=time.perf_counter() - start)
        best = self.best(name)
        model, lm = load_item_ranker(self.checkpoint(name, best))
        both = both_ranks(self.ranker(model.to(DEVICE), self.task(lm)), self.asked)
        seconds = self.table.frame.query("system == @name").seconds.sum()
        self.table.add(name, "test", *both, seconds=seconds, settings=json.dumps({"best epoch": best}))

    def best(self, name: str) -> int:
        """The epoch of the highest NDCG@10 on valid."""
        own = self.table.frame.query("system == @name and part == 'valid'")
        return int(own.loc[own.ndcg.astype(float).idxmax(), "epoch"])

    def teacher(self, epoch: int) -> tuple[ItemRankingModel, RankingTask]:
        """One epoch more of the tuned teacher; before the first, its head alone."""
        section = self.config.teacher
        if epoch > 1:
            model, lm = load_item_ranker(self.checkpoint("teacher", epoch - 1))
            task = self.task(lm)
            model = ItemRankingModel(model.causal_lm, model.head, section.next_items, section.softmax_items)
        else:
            full = load_teacher(section.model)
            task = self.task(trim_vocabulary(full, self.task(full).texts()))
            model = task.new_ranker(section.next_items, section.softmax_items)
        model.to(DEVICE).causal_lm.get_input_embeddings().requires_grad_(False)
        loader = task.train_loader(section, seed=epoch)
        if epoch == 1:
            fit_head(model, loader, section, seed=0)
        head_rate = fall(section, epoch) * section.head_learning_rate
        RankingTrainer(model, arguments(section, len(loader), epoch), loader, head_rate).train()
        return model, task

    def student(self, name: str, epoch: int) -> tuple[ItemRankingModel, RankingTask]:
        """One epoch more of a student: first layers of its teacher (or all), distilled from what that says, alone or fused."""
        section, whole, cut = self.section(name), name == "fused_teacher", self.config.distillation
        teacher, task, windows, ordered, signals = self.taught(STUDENTS[name][0])
        if epoch > 1:
            before, _ = load_item_ranker(self.checkpoint(name, epoch - 1))
            student = ItemRankingModel(before.causal_lm, before.head, section.next_items)
        elif whole:
            student = ItemRankingModel(copy.deepcopy(teacher.causal_lm), copy.deepcopy(teacher.head), section.next_items)
        else:
            student = fitted_student(teacher, signals, task.lm, cut, self.config.teacher, ordered, 0)
        student.to(DEVICE).causal_lm.get_input_embeddings().requires_grad_(False)
        loader = window_loader(windows, section.tokens_per_batch, task.lm.pad_id, seed=epoch)
        loss = cut.loss.model_copy(update={"alpha": 1.0}) if whole else cut.loss  # it has learned from the labels already
        DistillationTrainer(
            self.said(name), student, None, NO_HIDDEN if whole else "uniform", loss,
            arguments(section, len(loader), epoch), loader=loader,
            head_learning_rate=fall(section, epoch) * section.head_learning_rate,
        ).train()
        return student, task

    def section(self, name: str) -> TuningConfig:
        """The settings that a model is trained by: what has all layers takes the teacher's rates, what is distilled the
        epochs of distillation."""
        teacher, distillation = self.config.teacher, self.config.distillation
        if name == "fused_teacher":
            return teacher.model_copy(update={"epochs": distillation.epochs})
        return teacher if name == "teacher" else distillation

    def _taught(self, name: str) -> tuple:
        """The best epoch of a teacher, its task, the windows, their loader in order, and what the teacher says on them."""
        section, best = self.config.distillation, self.best(name)
        teacher, lm = load_item_ranker(self.checkpoint(name, best))
        task = self.task(lm)
        windows = task.train_windows(section)
        ordered = window_loader(windows, section.tokens_per_batch, lm.pad_id, 0, shuffle=False)
        layers, folder = layer_map(section.n_layers, len(decoder_layers(teacher))), self.table.folder / f"signals_{name}_{best}"
        if not folder.is_dir():
            TeacherSignals.compute(teacher.to(DEVICE), ordered, layers, folder, section.bf16)
        return teacher.to(DEVICE), task, windows, ordered, TeacherSignals(folder)

    def said(self, name: str) -> TeacherSignals:
        """What a student is taught on the training windows: by its only teacher, or by all as one."""
        own, teachers = STUDENTS[name]
        _, _, windows, _, signals = self.taught(own)
        parts = [signals if teacher == own else self.said_by_recommender(teacher, windows, signals) for teacher in teachers]
        if len(parts) == 1:
            return parts[0]
        folder = self.table.folder / f"signals_fused_{self.best(own)}"
        return TeacherSignals(folder) if folder.is_dir() else fuse(parts, list(map(self.weight, teachers)), folder)

    def said_by_recommender(self, name: str, windows: list[Window], like: TeacherSignals) -> TeacherSignals:
        """What SASRec or EASE says on the training windows."""
        folder = self.table.folder / f"signals_{name}"
        if not folder.is_dir():
            system, (scale, _) = self.recommender(name)
            recommender_signals(system, windows, like, folder, scale)
        return TeacherSignals(folder)

    def _recommender(self, name: str) -> tuple[Baseline, tuple[float, float]]:
        """SASRec or EASE as tuned; the scale that makes it as sure as fits the validation part, and its NDCG@10 there."""
        if not self.table.has(name, "test"):
            raise LwaError(f"the tuned {name} is needed: run --systems {name} first")
        tuned = json.loads(self.table.frame.query("system == @name").settings.iloc[0])
        system = BASELINES[name][0](**tuned).fit(self.data)
        return system, calibrated(system, self.valid)

    def weight(self, name: str) -> float:
        """A teacher's NDCG@10 on valid."""
        if name in BASELINES:
            return self.recommender(name)[1][1]
        return self.table.frame.query("system == @name and part == 'valid'").ndcg.astype(float).max()

    def ensemble(self, name: str) -> None:
        """Rank test by the weighted mean of the item probabilities of those that teach the fused students."""
        start, (model, lm) = time.perf_counter(), load_item_ranker(self.checkpoint("teacher", self.best("teacher")))
        systems = [(self.ranker(model.to(DEVICE), self.task(lm)), (1.0, self.weight("teacher"))), *map(self.recommender, FUSED[1:])]
        both = both_ranks(Ensemble(systems), self.asked)
        settings = dict(zip(FUSED, (heard for _, heard in systems)))
        self.table.add(name, "test", *both, seconds=time.perf_counter() - start, settings=json.dumps(settings))

    def task(self, lm) -> RankingTask:
        return RankingTask(self.data, lm, self.config.data, self.config.evaluation, 0)

    def ranker(self, model: ItemRankingModel, task: RankingTask) -> ItemRanker:
        cut = self.config.evaluation
        titles = self.data.titles
        return ItemRanker(model, task.lm.tokenizer, task.prompt.header, titles, cut.batch_size, cut.bf16, cut.history_titles)

    def checkpoint(self, name: str, epoch: int) -> Path:
        return self.table.folder / f"{name}_{epoch}"

    def compare(self) -> None:
        """Every system with test ranks against SASRec, and what so many cases can show."""
        found = {path.stem: ndcg_at_k(np.load(path), 10) for path in sorted(self.table.folder.glob("*.npy"))}
        for name, values in found.items():
            alone = smallest_detectable_difference(math.sqrt(2) * values.std(ddof=1), len(values))
            line = f"{name:18s} NDCG@10 {values.mean():.4f}, unpaired rows closer than {alone:.4f} cannot be told apart"
            if "sasrec" in found and name != "sasrec":
                line += "; minus SASRec {:+.4f} [{:+.4f}, {:+.4f}]".format(*paired_difference(values, found["sasrec"], seed=0))
            print(line)


def fall(section: TuningConfig, epoch: int) -> float:
    """Share of the learning rate where this epoch begins: a cosine over all of them, which each, run alone, follows in a
    straight line."""
    return 0.5 * (1 + math.cos(math.pi * (epoch - 1) / round(section.epochs)))


def arguments(section: TuningConfig, steps: int, epoch: int) -> TrainingArguments:
    """What Trainer needs for one epoch."""
    one = {"epochs": 1.0, "learning_rate": fall(section, epoch) * section.learning_rate}
    made = training_arguments(section.model_copy(update=one), steps, seed=epoch, logging_steps=50)
    end = {"lr_end": fall(section, epoch + 1) * section.learning_rate}
    made.lr_scheduler_type, made.lr_scheduler_kwargs = "polynomial", end
    return made


def settings(options: argparse.Namespace) -> ExperimentConfig:
    """The paper profile on windows as short as the histories that are ranked, and what --set says."""
    return load_config("paper", {
        "data.name": "Office_Products", "data.root": str(options.root.resolve()), "data.split": "file", "data.k_core": 0,
        "data.max_titles": options.history + 1, "data.context_titles": 2, "evaluation.history_titles": options.history,
        "teacher.next_items": 1, "teacher.head_learning_rate": 1e-3, "distillation.next_items": 1,
        "distillation.head_learning_rate": 1e-3, **RUNS.get(options.run, {}), **parse_overrides(options.set),
    })  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    everything = [*BASELINES, "teacher", *STUDENTS, "ensemble"]
    parser.add_argument("--systems", nargs="+", default=everything, choices=everything)
    parser.add_argument("--run", choices=RUNS, help="a table of the paper: its settings and its name")
    parser.add_argument("--history", type=int, default=10, help="newest titles read")
    parser.add_argument("--every-target", action="store_true", help="ask for each test row of a user, not the first alone")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting, e.g. teacher.epochs=1")
    parser.add_argument("--name", help="of the table; by default that of FOLDER")
    options = parser.parse_args()
    if options.run:
        options.name, options.every_target = options.name or options.run, options.run == "office2018"
    study = Study(options)
    torch.manual_seed(0)
    for system in options.systems:
        if not study.table.has(system, "test"):
            run = study.baseline if system in BASELINES else study.ensemble if system == "ensemble" else study.model
            run(system)
    study.compare()
