"""Full ranking on the two Office Products sets of the literature: tuned baselines, the teacher, its 8-layer students.

    python tests/benchmarks/literature.py --root FOLDER --run office2014 (or office2018) [--systems popularity ease …]
    python tests/benchmarks/literature.py --root FOLDER [--history 10] [--every-target] [--set teacher.epochs=1 …]
                                          [--name NAME]

--run takes the settings of a table that the paper shows, and its name; literature_table.py brings it there. Histories
are read as titles; --set data.reading=items reads item tokens. FOLDER holds Office_Products.* with a column `split`,
and meta_Office_Products.*. Amazon 2014 (complete, leave-one-out) needs nothing else; Amazon 2018 (published test rows)
wants --every-target, since a user has several. Whatever is finished has its row in
results/benchmarks/literature/<name>.csv and is not run again; models lie beside it. What made the rows is in
<name>.json, and in each its commit; rows of other settings need another name. Settings, and the teacher's best weights,
are chosen on the validation part; the test part is ranked once, at the end of each system.

`fused` is a student like `student`, taught by the teacher, SASRec and EASE together, weighted by their validation
NDCG@10, and `student_of_sasrec` one taught by SASRec's ranking alone; a recommender speaks of each user from a fit on
others. `ensemble` asks the three together, without a student. `fused_teacher` is the teacher itself, all its layers,
taught on by what the three say, without labels, and `student_of_fused` is taught by that one alone. `ndcg` leaves the
user's seen items out, `ndcg_all` ranks the target against the whole catalogue.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
from row_file import DEVICE, RowFile, keep_manifest

from lwa_helpers.cli import parse_overrides
from lwa_helpers.config import ExperimentConfig, load_config
from lwa_helpers.configs.students import DistillationConfig
from lwa_helpers.data.interactions import Interactions
from lwa_helpers.data.loading import load_data
from lwa_helpers.distillation.ensemble import ensemble_outputs
from lwa_helpers.distillation.recipes import Distillation, budget, co_taught_student
from lwa_helpers.distillation.teacher_tuning import item_model
from lwa_helpers.distillation.teacher_tuning import tune as tune_teacher
from lwa_helpers.distillation.weighting import NO_HIDDEN
from lwa_helpers.errors import LwaError
from lwa_helpers.evaluation.baselines import EASE, ItemKNN, Popularity, RecentPopularity, tune
from lwa_helpers.evaluation.calibration import Calibration, calibrated, ensemble
from lwa_helpers.evaluation.cross_fit import CrossFitted
from lwa_helpers.evaluation.metrics import hit_rate_at_k, ndcg_at_k, rank_of_target
from lwa_helpers.evaluation.protocol import Baseline, Cases, cases
from lwa_helpers.evaluation.sasrec import SASRec
from lwa_helpers.evaluation.statistics import mean_interval, paired_difference, smallest_detectable_difference
from lwa_helpers.files import atomic_write
from lwa_helpers.models.language_model import LanguageModel
from lwa_helpers.models.layers import decoder_layers
from lwa_helpers.models.loading import load_teacher
from lwa_helpers.paths import RESULTS
from lwa_helpers.ranking.item_head import ItemRanker
from lwa_helpers.ranking.task import RankingTask

BUDGET = 8
FUSED = ["teacher", "sasrec", "ease"]
STUDENTS = {  # whose layers, and who teaches them
    "student": ("teacher", ["teacher"]), "student_of_sasrec": ("teacher", ["sasrec"]), "fused": ("teacher", FUSED),
    "fused_teacher": ("teacher", FUSED), "student_of_fused": ("fused_teacher", ["fused_teacher"]),
}  # fmt: skip
BOTH = {
    "data.title_limit": 40, "teacher.tokens_per_batch": 1024, "distillation.tokens_per_batch": 1024,
    "distillation.valid_users": 600, "teacher.epochs": 1,
}  # fmt: skip
RUNS = {
    "office2014": BOTH | {"distillation.epochs": 2},
    "office2018": BOTH | {"distillation.epochs": 4, "teacher.epochs": 2},
}
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
        self.file = RowFile(folder.with_suffix(".csv"), system=str, part=str)

    def has(self, system: str) -> bool:
        return self.file.has(system=system, part="test")

    def add(self, system: str, rank: np.ndarray, rank_all: np.ndarray, **facts) -> None:
        mean = mean_interval(ndcg_at_k(rank, 10), seed=0)
        row = {
            "system": system,
            "part": "test",
            "cases": len(rank),
            "ndcg": mean.estimate,
            "low": mean.low,
            "high": mean.high,
            "hr": hit_rate_at_k(rank, 10).mean(),
            "ndcg_all": ndcg_at_k(rank_all, 10).mean(),
            "commit": self.commit,
            **facts,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        np.save(self.folder / f"{system}.npy", rank)
        self.file.add(pd.DataFrame([row]))
        print(pd.DataFrame([row]).round(4).to_string(index=False), flush=True)


def both_ranks(system, eval_cases: Cases, batch_size: int = 256) -> np.ndarray:
    """Ranks of the targets (2, B): with the user's seen items left out, and among all items."""
    parts = []
    for start in range(0, len(eval_cases.targets), batch_size):
        part = slice(start, start + batch_size)
        scores = system.scores(eval_cases.histories[part])
        parts.append(
            [
                rank_of_target(scores, eval_cases.targets[part], exclude)
                for exclude in (eval_cases.histories[part], None)
            ]
        )
    return np.concatenate(parts, axis=1)


@dataclass
class Ensemble:
    """Several systems asked together."""

    systems: dict[str, Baseline]
    calibration: dict[str, Calibration]

    def scores(self, histories: list[list[int]]) -> np.ndarray:
        return ensemble({name: system.scores(histories) for name, system in self.systems.items()}, self.calibration)


class Study:
    """One dataset, its cases and its table."""

    def __init__(self, options: argparse.Namespace):
        self.config = settings(options)
        self.seed, self.data = self.config.seed, load_data(self.config.data)
        self.eval_cases = cases(self.data, "test", options.every_target)
        folder = RESULTS / "benchmarks" / "literature" / (options.name or options.root.resolve().name)
        facts = {"history": options.history, "every_target": options.every_target, "data_hash": self.data.sha256}
        commit = keep_manifest(
            folder.with_suffix(".json"),
            self.config,
            facts,
            "give this run another --name",
            lambda: {"model_hash": load_teacher(self.config.teacher.model).sha256},
        )
        self.table = Table(folder, commit)
        self.fitted = lru_cache(lambda name: self.as_tuned(name)(self.data))
        self.cross_fitted = lru_cache(lambda name: CrossFitted.of(self.as_tuned(name), self.data, self.seed))
        print(
            f"{len(self.data.train)} train rows, {len(self.data.items)} items, "
            f"{len(self.eval_cases.targets)} test cases",
            flush=True,
        )

    def baseline(self, name: str) -> None:
        """Tune on valid, rank test; every setting tried goes to <name>_tried.csv."""
        start, (kind, grid) = time.perf_counter(), BASELINES[name]
        tuned = tune(kind, grid, self.data, budget=BUDGET)
        self.table.folder.mkdir(parents=True, exist_ok=True)
        tuned.tried.to_csv(self.table.folder / f"{name}_tried.csv", index=False)
        both = both_ranks(tuned.best, self.eval_cases)
        self.table.add(name, *both, seconds=time.perf_counter() - start, settings=json.dumps(tuned.settings))

    def as_tuned(self, name: str) -> Callable[[Interactions], Baseline]:
        """How SASRec or EASE is fitted, as tuned."""
        if not self.table.has(name):
            raise LwaError(f"the tuned {name} is needed: run --systems {name} first")
        tuned = json.loads(self.table.file.read().query("system == @name").settings.iloc[0])
        return lambda data: BASELINES[name][0](**tuned).fit(data)

    def model(self, name: str) -> None:
        """Train teacher or student, keep its checkpoint, rank test."""
        start = time.perf_counter()
        made = self.teacher() if name == "teacher" else self.student(name)
        with atomic_write(self.table.folder / name) as folder:
            made.save(folder)
        both = both_ranks(self.ranker(made), self.eval_cases)
        self.table.add(name, *both, seconds=time.perf_counter() - start)

    def trained(self, name: str) -> LanguageModel:
        """A model that has its row."""
        if not self.table.has(name):
            raise LwaError(f"the model {name} is needed: run --systems {name} first")
        lm = load_teacher(self.table.folder / name)
        lm.model.to(DEVICE)
        return lm

    def teacher(self) -> LanguageModel:
        """The language model with item tokens, tuned to what the validation part likes best."""
        config, full = self.config, load_teacher(self.config.teacher.model)
        lm = item_model(full, self.data, self.fitted("sasrec").item_vectors, config.data, config.evaluation, self.seed)
        lm.model.to(DEVICE)
        task = self.task(lm)
        tune_teacher(task, config.teacher, self.seed, lambda model: ndcg_at_k(task.ranks(model), 10).mean())
        return lm

    def student(self, name: str) -> LanguageModel:
        """First layers of a teacher, or all, distilled from what it says, from recommenders or from both."""
        own, teachers = STUDENTS[name]
        teacher = self.trained(own)
        task, section = self.task(teacher), self.whole(teacher) if name == "fused_teacher" else self.config.distillation
        distillation = Distillation(
            teacher, None, section, budget(task.train_windows(section), section, self.seed), self.seed
        )
        others = {other: self.cross_fitted(other) for other in teachers if other in BASELINES}
        if own in teachers:
            return (
                co_taught_student(distillation, others, task)[0]
                if others
                else distillation.student(section.n_layers)[0]
            )
        eval_cases, heard = (
            task.eval_cases,
            {"teacher": Calibration(1.0, 0.0)},
        )  # whose layers it has, and who says nothing
        heard |= {
            other: calibrated(s.scores(eval_cases.histories, eval_cases.user_ids), eval_cases)
            for other, s in others.items()
        }
        said = ensemble_outputs(distillation.teacher_outputs, distillation.windows, others, teacher.items.tokens, heard)
        student = distillation.start(section.n_layers)
        distillation.train(student, section.strategy, said)
        return student

    def whole(self, teacher: LanguageModel) -> DistillationConfig:
        """The settings of a student of all layers: the teacher's rates, and no labels, which it has learned already."""
        own, section = self.config.teacher, self.config.distillation
        return section.model_copy(
            update={
                "n_layers": len(decoder_layers(teacher.model)),
                "strategy": NO_HIDDEN,
                "loss": section.loss.model_copy(update={"alpha": 1.0}),
                "learning_rate": own.learning_rate,
                "head_learning_rate": own.head_learning_rate,
            }
        )

    def ensemble(self, name: str) -> None:
        """Rank test by the weighted mean of the item probabilities of those that teach the fused students."""
        start, teacher = time.perf_counter(), self.trained("teacher")
        systems = {"teacher": self.ranker(teacher)} | {other: self.fitted(other) for other in FUSED[1:]}
        valid = self.task(teacher).eval_cases
        heard = {other: calibrated(system.scores(valid.histories), valid) for other, system in systems.items()}
        both = both_ranks(Ensemble(systems, heard), self.eval_cases)
        self.table.add(name, *both, seconds=time.perf_counter() - start, settings=json.dumps(heard))

    def task(self, lm: LanguageModel) -> RankingTask:
        """The training windows, and the validation users by whom weights are chosen and teachers weighed."""
        few = self.config.evaluation.model_copy(update={"users": self.config.distillation.valid_users})
        return RankingTask(self.data, lm, self.config.data, few, self.seed, "valid")

    def ranker(self, lm: LanguageModel) -> ItemRanker:
        cut = self.config.evaluation
        return ItemRanker(lm, self.task(lm).reading, cut.batch_size, cut.bf16, cut.history_items)

    def compare(self) -> None:
        """Every system with test ranks against SASRec, and what so many cases can show."""
        found = {path.stem: ndcg_at_k(np.load(path), 10) for path in sorted(self.table.folder.glob("*.npy"))}
        for name, values in found.items():
            alone = smallest_detectable_difference(math.sqrt(2) * values.std(ddof=1), len(values))
            line = f"{name:18s} NDCG@10 {values.mean():.4f}, unpaired rows closer than {alone:.4f} cannot be told apart"
            if "sasrec" in found and name != "sasrec":
                line += "; minus SASRec {:+.4f} [{:+.4f}, {:+.4f}]".format(
                    *paired_difference(values, found["sasrec"], seed=0)
                )
            print(line)


def settings(options: argparse.Namespace) -> ExperimentConfig:
    """The paper profile on windows as short as the histories that are ranked, and what --set says."""
    return load_config("paper", {
        "data.name": "Office_Products", "data.root": str(options.root.resolve()), "data.split": "file",
        "data.k_core": 0, "data.reading": "titles", "data.max_items": options.history + 1, "data.context_items": 2,
        "evaluation.history_items": options.history, **RUNS.get(options.run, {}), **parse_overrides(options.set),
    })  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    everything = [*BASELINES, "teacher", *STUDENTS, "ensemble"]
    parser.add_argument("--systems", nargs="+", default=everything, choices=everything)
    parser.add_argument("--run", choices=RUNS, help="a table of the paper: its settings and its name")
    parser.add_argument("--history", type=int, default=10, help="newest items read")
    parser.add_argument(
        "--every-target", action="store_true", help="ask for each test row of a user, not the first alone"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting, e.g. teacher.epochs=1"
    )
    parser.add_argument("--name", help="of the table; by default that of FOLDER")
    options = parser.parse_args()
    if options.run:
        options.name, options.every_target = options.name or options.run, options.run == "office2018"
    study = Study(options)
    for system in options.systems:
        if not study.table.has(system):
            run = study.baseline if system in BASELINES else study.ensemble if system == "ensemble" else study.model
            run(system)
    study.compare()
