"""The ablation: which layers a student keeps, what teaches it, and how small it can be, all on one recovery budget.

    python tests/benchmarks/distillation_ablation.py [--profile quick] [--only arms,selection] [--seeds 0 1 2 3 4]
                                                     [--report]

It needs the tuned teacher and the Fisher information of notebook 02:
`lwa reproduce --profile PROFILE --only 02 --set data.reading=titles`. --set data.reading=items, there and here, asks a
teacher that reads item tokens. A finished student is a row of results/benchmarks/distillation_ablation.csv; its ranks,
and a manifest, lie in a folder beside it. A student that has its row is not trained again, so the run can be stopped
and started; another teacher, or another setting of the students, has rows of its own. --report trains nothing: it
prints, for each experiment, every arm against the first one, paired by user and seed. distillation_table.py brings rows
into the paper. A recommender that teaches speaks of each user from a fit on others.

    selection  the layers kept, before and after recovery        frontier  30 … 2 layers
    arms       labels only, KL only, and each weighting          steps     one big cut, or two
    match      which layers' states are matched                  fusion    by this teacher, SASRec, EASE, and all three
    languages  by this teacher, by other tuned language models (--with NAME=DIRECTORY …, any tokenizer), and by all
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import tuned_run
from row_file import DEVICE, RowFile, keep_manifest

from lwa_helpers import files, paths
from lwa_helpers.config import ExperimentConfig
from lwa_helpers.configs.students import DistillationConfig
from lwa_helpers.data.loading import load_data
from lwa_helpers.distillation.ensemble import average_outputs, recommender_outputs
from lwa_helpers.distillation.recipes import Distillation, agreement, budget, calibrations, in_steps
from lwa_helpers.distillation.student import greedy_scores
from lwa_helpers.distillation.teacher_cache import TeacherOutputs, weights_hash
from lwa_helpers.distillation.weighting import LABELS, NO_HIDDEN
from lwa_helpers.errors import LwaError
from lwa_helpers.evaluation.cross_fit import CrossFitted
from lwa_helpers.evaluation.metrics import ndcg_at_k
from lwa_helpers.evaluation.statistics import difference_of_arms, ratio_of_means
from lwa_helpers.evaluation.tuned_baselines import tuned_baselines
from lwa_helpers.fisher.importance import block_influence
from lwa_helpers.fisher.result import FisherResult
from lwa_helpers.models.language_model import LanguageModel
from lwa_helpers.models.layers import decoder_layers
from lwa_helpers.models.loading import load_teacher
from lwa_helpers.ranking.cost import n_parameters
from lwa_helpers.ranking.item_head import ItemRanker
from lwa_helpers.ranking.task import RankingTask
from lwa_helpers.ranking.training import window_loader

FOLDER = paths.RESULTS / "benchmarks" / "distillation_ablation"
STRATEGIES = (
    NO_HIDDEN,
    LABELS,
    "uniform",
    "linear",
    "exponential",
    "schedule",
    "fisher",
    "fisher_x_depth",
    "softmax_fisher",
    "fisher_ahead",
    "inverse_fisher",
    "shuffled_fisher",
)
SELECTED = ("first", "last", "first_last", "drop_block", "uniform", "top_fisher", "block_influence", "greedy")
MATCHED = ("all", "no_last", "no_last_two", "last", "lower", "middle", "upper")
SHOWN = ["layers", "ndcg_before", "ndcg", "kept", "overlap", "tau", "seconds"]
TAUGHT = ("fusion", "languages")  # the experiments of several teachers
RECOMMENDERS = ("sasrec", "ease")
DEPTHS = (30, 20, 15, 12, 8, 6, 4, 2)


@dataclass(frozen=True)
class Arm:
    """One student: what differs from the profile's distillation section."""

    experiment: str
    name: str
    changes: dict = field(default_factory=dict, hash=False)
    draw: int = 0  # of a random selection
    taught: tuple[tuple[str, float], ...] = ()  # by whom, and how much each counts; nothing: by the teacher


def arms(experiment: str, section: DistillationConfig, n_teacher: int) -> list[Arm]:
    """The arms of an experiment that needs one teacher; the first is what the others are compared with."""
    match experiment:
        case "arms":
            return [Arm(experiment, name, {"strategy": name}) for name in STRATEGIES]
        case "selection":
            drawn = [Arm(experiment, f"random {draw}", {"selection": "random"}, draw) for draw in range(3)]
            return [Arm(experiment, name, {"selection": name}) for name in SELECTED] + drawn
        case "match":
            losses = [section.loss.model_copy(update={"match": name}) for name in MATCHED]
            return [Arm(experiment, loss.match, {"loss": loss, "strategy": "uniform"}) for loss in losses]
        case "frontier":
            return [Arm(experiment, f"{depth} layers", {"n_layers": depth}) for depth in DEPTHS if depth <= n_teacher]
        case "steps":
            steps = [round((n_teacher * section.n_layers) ** 0.5), section.n_layers]
            two = Arm(experiment, f"by way of {steps[0]} layers", {"steps": steps})
            return [Arm(experiment, "one step"), two]
    raise LwaError(
        f"unknown experiment {experiment!r}: choose arms, selection, match, frontier, steps, fusion or languages"
    )


class Rows:
    """The finished students of one teacher under one set of settings, kept on disk."""

    def __init__(self, teacher: str, settings: str, part: str):
        self.fixed, self.commit = {"teacher": teacher, "settings": settings, "part": part}, ""
        words = dict.fromkeys(("teacher", "settings", "part", "experiment", "arm", "student", "commit"), str)
        self.file = RowFile(FOLDER.with_suffix(".csv"), **words, seed=int)
        self.folder = FOLDER / f"{teacher}-{settings}" / part

    def read(self) -> pd.DataFrame:
        """The rows of this teacher and these settings."""
        every = self.file.read()
        return every[(every[list(self.fixed)] == list(self.fixed.values())).all(axis=1)]

    def ranks(self, experiment: str, arm: str, seed: int) -> Path:
        return self.folder / f"{experiment} {arm} {seed}.npy"

    def has(self, arm: Arm, seed: int) -> bool:
        row = self.file.has(**self.fixed, experiment=arm.experiment, arm=arm.name, seed=seed)
        return row and self.ranks(arm.experiment, arm.name, seed).exists()

    def twin(self, student: str, seed: int) -> tuple[dict, np.ndarray] | None:
        """Row and ranks of a finished student that is the same under another name."""
        every = self.read()
        same = every[(every.student == student) & (every.seed == seed)]
        if same.empty:
            return None
        row = same.iloc[0].drop(list(self.fixed)).to_dict()
        return row, np.load(self.ranks(row["experiment"], row["arm"], seed))

    def add(self, row: dict, ranks: np.ndarray) -> None:
        target = self.ranks(row["experiment"], row["arm"], row["seed"])
        with files.atomic_write(target) as temporary:
            np.save(temporary, ranks)
        self.file.add(pd.DataFrame([self.fixed | {"commit": self.commit} | row]))
        print(pd.Series(row).drop(["kept_low", "kept_high"]).to_dict(), flush=True)


class Ablation:
    """One teacher, its task, and everything that students share."""

    def __init__(self, config: ExperimentConfig, part: str, epochs: float | None):
        self.config, self.lm = config, tuned_run.tuned_teacher(config)
        self.fisher = FisherResult.load(paths.results_dir(config.profile) / "fisher" / "teacher.safetensors")
        self.n_teacher = len(decoder_layers(self.lm.model))
        depths = [depth for depth in DEPTHS if depth <= self.n_teacher]
        changes = {"frontier": depths} | (
            {"epochs": epochs} if epochs else {}
        )  # the teacher is asked once for all depths
        self.section = config.distillation.model_copy(update=changes)
        self.task = RankingTask(load_data(config.data), self.lm, config.data, config.evaluation, config.seed, part)
        self.windows = budget(self.task.train_windows(self.section), self.section, config.seed)
        settings = [each.model_dump(mode="json") for each in (self.section, config.data, config.evaluation)]
        self.rows = Rows(weights_hash(self.lm.model)[:12], files.sha256_of_text(json.dumps(settings))[:12], part)
        self.start = lru_cache(self._start)

    def keep_manifest(self) -> None:
        """Write what makes the rows beside their ranks."""
        config = self.config.model_copy(update={"distillation": self.section})
        fixed = {"settings_hash" if name == "settings" else name: value for name, value in self.rows.fixed.items()}
        facts = fixed | {"data_hash": self.task.data.sha256, "model_hash": self.lm.sha256}
        fix = "set them as they were, or move its folder away"
        self.rows.commit = keep_manifest(self.rows.folder / "manifest.json", config, facts, fix)

    @cached_property
    def teacher_scores(self) -> np.ndarray:
        return self.task.scores(self.lm.model)

    @cached_property
    def teacher_ndcg(self) -> np.ndarray:
        return ndcg_at_k(self.task.ranks(self.lm.model, self.teacher_scores), 10)

    def distillation(self, seed: int, **changes) -> Distillation:
        """What students of one seed share, with these changes to the section."""
        return Distillation(self.lm, self.fisher, self.section.model_copy(update=changes), self.windows, seed)

    def layer_scores(self, selection: str):
        """What a selection chooses by, measured on training windows with the loss of their items."""
        if selection not in ("block_influence", "greedy"):
            return self.fisher
        file = self.rows.folder / f"{selection}.json"
        if not file.exists():
            few = self.windows[:: max(1, len(self.windows) // self.config.fisher.loo_examples)]
            batches = window_loader(few, self.section.tokens_per_batch, self.lm.pad_id, 0, shuffle=False)
            measure = block_influence if selection == "block_influence" else greedy_scores
            scores = measure(self.lm.model, batches)
            with files.atomic_write(file) as temporary:
                temporary.write_text(json.dumps(scores.tolist()), encoding="utf-8")
        return json.loads(file.read_text(encoding="utf-8"))

    def _start(self, n_layers: int, selection: str, draw: int) -> tuple[LanguageModel, np.ndarray]:
        """A student before recovery, and its ranks."""
        student = self.distillation(draw, selection=selection).start(n_layers, self.layer_scores(selection))
        return student, self.task.ranks(student.model)

    def run(self, arm: Arm, seed: int, outputs: TeacherOutputs | None = None) -> None:
        """Train one student and write its row; what is the same student in another experiment is not trained again."""
        distillation, before = self.distillation(seed, **arm.changes), np.array([])
        section = distillation.section
        student_key = files.sha256_of_text(json.dumps([section.model_dump(mode="json"), arm.draw, arm.taught]))[:12]
        named = {"experiment": arm.experiment, "arm": arm.name, "seed": seed, "student": student_key}
        named["heard"] = json.dumps(dict(arm.taught)) if arm.taught else ""
        if twin := self.rows.twin(student_key, seed):
            self.rows.add(twin[0] | named, twin[1])
            return
        if section.steps:
            began = time.perf_counter()
            student, trainer = in_steps(distillation, section.steps, section.selection, section.strategy)
        else:
            start, before = self.start(section.n_layers, section.selection, arm.draw)
            outputs = outputs or distillation.teacher_outputs
            student, began = replace(start, model=copy.deepcopy(start.model)), time.perf_counter()
            trainer = distillation.train(student, section.strategy, outputs)
        seconds, scores = time.perf_counter() - began, self.task.scores(student.model)
        ranks = self.task.ranks(student.model, scores)
        ndcg, alike = (
            ndcg_at_k(ranks, 10),
            agreement(scores, self.teacher_scores, self.task.eval_cases.histories).mean(),
        )
        kept = ratio_of_means(ndcg, self.teacher_ndcg, seed=self.config.seed)
        self.rows.add(
            {
                **named,
                "profile": self.config.profile,
                "layers": len(decoder_layers(student.model)),
                "parameters": n_parameters(student.model),
                "ndcg_teacher": self.teacher_ndcg.mean(),
                "ndcg_before": ndcg_at_k(before, 10).mean() if len(before) else np.nan,
                "ndcg": ndcg.mean(),
                "kept": kept.estimate,
                "kept_low": kept.low,
                "kept_high": kept.high,
                "overlap": alike.overlap,
                "tau": alike.tau,
                "epochs": self.section.epochs,
                "steps": trainer.state.global_step,
                "windows": len(self.windows),
                "tokens": sum(len(window.input_ids) for window in self.windows),
                "seconds": seconds,
            },
            ranks,
        )

    def recommenders(self) -> Iterator[tuple[str, CrossFitted]]:
        """SASRec and EASE, tuned on the validation part."""
        data = self.task.data
        for name, found in tuned_baselines(data, self.config.evaluation, self.config.seed, RECOMMENDERS).items():
            yield name, found.cross_fitted(data, self.config.seed)

    def languages(self, directories: dict[str, Path]) -> Iterator[tuple[str, CrossFitted]]:
        """Further tuned language models: like the first teacher, each is one fit for all users."""
        models = {name: load_teacher(directory) for name, directory in directories.items()}
        self.same_languages({name: weights_hash(lm.model) for name, lm in models.items()})
        cut = self.config.evaluation
        for name, lm in models.items():
            lm.model.to(DEVICE)
            ranker = ItemRanker(lm, self.valid(lm).reading, cut.batch_size, cut.bf16, cut.history_items)
            yield name, CrossFitted([ranker], {})

    def same_languages(self, known: dict[str, str]) -> None:
        """Keep the hashes of further language models beside their rows; LwaError where the rows are of others."""
        file = self.rows.folder / "languages.json"
        if file.exists() and json.loads(file.read_text(encoding="utf-8")) != known:
            raise LwaError(f"{file}: the rows of languages are of other models: move them and {file.name} away")
        with files.atomic_write(file) as temporary:
            temporary.write_text(json.dumps(known), encoding="utf-8")

    def taught_by(self, experiment: str, others: dict[str, Path], seeds: list[int]) -> None:
        """The student of the first teacher's layers, taught by all teachers as one and by each alone.

        As one, each teacher is heard by its validation NDCG.
        """
        first, valid, items = self.distillation(0).teacher_outputs, self.valid(self.lm), self.lm.items.tokens
        systems = dict(self.recommenders() if experiment == "fusion" else self.languages(others))
        heard, said = calibrations(self.lm.model, systems, valid), {"teacher": first}
        with tempfile.TemporaryDirectory() as folder:
            for name, system in systems.items():
                said[name] = recommender_outputs(
                    system, self.windows, first, Path(folder) / name, items, heard[name].scale
                )
            print("scale, and NDCG@10, on the validation part:", heard, flush=True)
            weights = tuple((name, found.weight) for name, found in heard.items())
            fused = average_outputs(
                list(said.values()), [weight for _, weight in weights], Path(folder) / "fused", [items] * len(said)
            )
            students = {"fused": (fused, weights)}
            for name, outputs in said.items():
                students[f"{name} alone"] = (outputs, ((name, 1.0),) if name != "teacher" else ())
            for seed, (name, (outputs, taught)) in product(seeds, students.items()):
                if not self.rows.has(arm := Arm(experiment, name, taught=taught), seed):
                    self.run(arm, seed, outputs)

    def valid(self, lm: LanguageModel) -> RankingTask:
        """The validation part, as a teacher reads it."""
        few = self.config.evaluation.model_copy(update={"users": self.section.valid_users})
        return RankingTask(self.task.data, lm, self.config.data, few, self.config.seed, "valid")


def measured(rows: Rows, experiment: str) -> tuple[pd.DataFrame, dict[str, np.ndarray], list[int]]:
    """An experiment's means by arm over the seeds of all arms, each arm's NDCG@10 (users, seeds), and these seeds."""
    found = rows.read()
    part = found[found.experiment == experiment]
    names = list(dict.fromkeys(part.arm))
    seeds = sorted(set.intersection(*(set(part[part.arm == name].seed) for name in names)))
    if not seeds:
        raise LwaError(f"{rows.file.path}: the arms of {experiment} have no seed in common: finish the run of one seed")
    tables = {n: np.stack([ndcg_at_k(np.load(rows.ranks(experiment, n, s)), 10) for s in seeds], 1) for n in names}
    return part[part.seed.isin(seeds)].groupby("arm", sort=False)[SHOWN].mean(), tables, seeds


def against(tables: dict[str, np.ndarray], first: str, seed: int) -> pd.DataFrame:
    """Every other arm minus `first`, paired by user and seed, with interval: columns difference, low, high, says."""
    found = {
        name: difference_of_arms(table, tables[first], seed=seed)[:3] for name, table in tables.items() if name != first
    }
    frame = pd.DataFrame.from_dict(found, orient="index", columns=["difference", "low", "high"])
    frame["says"] = np.select([frame.low > 0, frame.high < 0], ["better", "worse"], "no difference shown")
    return frame


def report(rows: Rows, seed: int) -> None:
    """Print each experiment: quality, agreement and cost by arm, and the difference to the first arm with interval."""
    for experiment in rows.read().experiment.unique():
        mean, tables, seeds = measured(rows, experiment)
        first = next(iter(tables))
        print(f"\n{experiment}: {len(tables[first])} users, seeds {seeds}, against {first}")
        print(mean.join(against(tables, first, seed)).round(4).to_string())


def named(text: str) -> tuple[str, Path]:
    """NAME=DIRECTORY; the name becomes part of a file's name."""
    name, _, directory = text.partition("=")
    if not re.fullmatch(r"[A-Za-z][\w.-]*", name) or name in ("teacher", *RECOMMENDERS) or not directory:
        raise argparse.ArgumentTypeError(
            f"{text!r}: give NAME=DIRECTORY, a name that begins with a letter, not of another teacher"
        )
    return name, Path(directory)


def main() -> None:
    parser = tuned_run.parser(__doc__)
    parser.add_argument(
        "--only", default="arms,selection,match,frontier,steps,fusion", help="experiments, in this order"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--epochs", type=float, help="recovery budget in passes over the windows (default: the profile's)"
    )
    parser.add_argument("--part", choices=("valid", "test"), default="test")
    parser.add_argument("--with", dest="others", type=named, nargs="+", default=[], metavar="NAME=DIRECTORY")
    parser.add_argument("--report", action="store_true", help="print what is there, train nothing")
    arguments = parser.parse_args()
    only, others = arguments.only.split(","), dict(arguments.others)
    if ("languages" in only) != bool(others) or len(others) != len(arguments.others):
        parser.error("--only languages and --with NAME=DIRECTORY (each another name) go together")
    ablation = Ablation(tuned_run.settings(arguments), arguments.part, arguments.epochs)
    if not arguments.report:
        ablation.keep_manifest()
        for experiment in only:
            if experiment in TAUGHT:
                ablation.taught_by(experiment, others, arguments.seeds)
                continue
            for seed in arguments.seeds:
                for arm in arms(experiment, ablation.section, ablation.n_teacher):
                    if not ablation.rows.has(arm, seed):
                        ablation.run(arm, seed)
    report(ablation.rows, ablation.config.seed)


if __name__ == "__main__":
    main()
