"""Tokens a second of a distillation step with cached outputs and with a live teacher, and of both models' inference.

    python tests/benchmarks/distillation_speed.py [--profile quick] [--rounds 5] [--bf16] [--set data.reading=items]

Needs `lwa reproduce --profile PROFILE --only 02 --set data.reading=titles` (or items, as here). The ways take turns in
one process, so that a busy machine disturbs all alike; rows go to results/benchmarks/distillation_speed.csv, with a
manifest beside it. Goals on two cores: a step >= 3 times as fast with cached outputs; for the same users and the whole
catalogue, 8 of 30 layers >= 4 times as fast with the same head and >= 8 times as fast as the title head of the model
that the teacher was made from (in float32, which it always computes in, and of a vocabulary cut to the titles).
"""

from __future__ import annotations

import argparse
import time

import pandas as pd
import torch
import tuned_run
from row_file import keep_record

from lwa_helpers import files, paths
from lwa_helpers.data.loading import load_data
from lwa_helpers.distillation.recipes import Distillation, budget
from lwa_helpers.distillation.student import build_student
from lwa_helpers.distillation.trainer import DistillationTrainer
from lwa_helpers.models.loading import load_teacher
from lwa_helpers.models.vocabulary import trim_vocabulary
from lwa_helpers.ranking.cost import speed_ratio, time_side_by_side, weight_bytes
from lwa_helpers.ranking.item_head import rank_catalogue
from lwa_helpers.ranking.task import RankingTask
from lwa_helpers.ranking.title_head import TitleRanker
from lwa_helpers.ranking.training import training_arguments, window_loader

STEPS = 4  # of each timed run of the trainer
TITLE_HEAD_USERS = 2
FILE = paths.RESULTS / "benchmarks" / "distillation_speed.csv"
PAIRS = (  # what, the slow way, the fast way
    ("training step", "live teacher", "cached outputs"), ("inference", "teacher", "student"),
    ("heads", "teacher, title head", "student, item head"),
)  # fmt: skip


def title_head(name: str, task: RankingTask) -> TitleRanker:
    """A language model that ranks the task's titles by their words."""
    header, titles = task.prompt.header, task.data.titles
    lm = trim_vocabulary(load_teacher(name), [header, *(title + task.prompt.separator for title in titles)])
    return TitleRanker(lm.model.to(task.lm.model.device), lm.tokenizer, header, titles)


def main(options: argparse.Namespace) -> None:
    began, config, bf16 = time.perf_counter(), tuned_run.settings(options), options.bf16
    section = config.distillation.model_copy(update={"bf16": bf16, "epochs": 0.05, "strategy": "uniform"})
    lm = tuned_run.tuned_teacher(config)
    task = RankingTask(load_data(config.data), lm, config.data, config.evaluation, config.seed)
    windows = budget(task.train_windows(section), section, config.seed)
    outputs = Distillation(lm, None, section, windows, config.seed).teacher_outputs
    loader = window_loader(windows, section.tokens_per_batch, lm.pad_id, 0)
    tokens = sum(int(batch["attention_mask"].sum()) for batch, _ in zip(loader, range(STEPS)))
    ways = {}
    for name, source in {"cached outputs": outputs, "live teacher": lm}.items():
        student = build_student(lm, section.n_layers, section.selection)
        arguments = training_arguments(section.model_copy(update={"epochs": 1.0}), STEPS, 0)
        ways[name] = DistillationTrainer(
            source, student, None, section.strategy, section.loss, arguments, loader=loader
        ).train
    training = time_side_by_side(ways, options.rounds)
    prompts, size, items = task.prompts[: section.timing_users], config.evaluation.batch_size, lm.items.tokens
    models = {"teacher": lm.model, "student": build_student(lm, section.n_layers, section.selection).model}
    calls = {name: lambda m=m: rank_catalogue(m, prompts, items, size, bf16) for name, m in models.items()}
    inference = time_side_by_side(calls, options.rounds)
    head = title_head(config.teacher.model, task)
    few = [history[-config.evaluation.history_items :] for history in task.prompts.histories[:TITLE_HEAD_USERS]]
    heads = time_side_by_side({
        "teacher, title head": lambda: head.scores(few),
        "student, item head": lambda: rank_catalogue(models["student"], prompts[:TITLE_HEAD_USERS], items, size),
    }, options.rounds)  # fmt: skip
    frame = pd.concat(
        [
            training.assign(what="training step", rate=tokens / training.seconds, unit="tokens/s"),
            inference.assign(what="inference", rate=len(prompts) / inference.seconds, unit="users/s"),
            heads.assign(what="heads", rate=TITLE_HEAD_USERS / heads.seconds, unit="users/s"),
        ]
    ).assign(profile=config.profile, dtype="bf16" if bf16 else "f32", threads=torch.get_num_threads())
    with files.atomic_write(FILE) as path:
        frame.to_csv(path, index=False)
    keep_record(FILE, vars(options), began, config, data_hash=task.data.sha256, model_hash=lm.sha256)
    print(frame.groupby(["what", "name", "unit"]).rate.median().round(1).to_string())
    for what, slow, fast in PAIRS:
        ratio = speed_ratio(frame[frame.what == what], slow, fast)
        print(f"{what}: {fast} {ratio.median():.2f} times as fast as {slow} ({ratio.min():.2f} to {ratio.max():.2f})")
    held = {name: weight_bytes(model) for name, model in models.items()}
    print(
        f"memory of weights: {100 * (1 - held['student'] / held['teacher']):.0f} % less "
        f"({held['student'] / 2**20:.0f} MiB)"
    )


if __name__ == "__main__":
    parser = tuned_run.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bf16", action="store_true")
    main(parser.parse_args())
