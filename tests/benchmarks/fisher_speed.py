"""Time and peak memory of the Fisher pass beside an ordinary forward + backward on the same batches, SmolLM2-135M.

    python tests/benchmarks/fisher_speed.py [--reading items titles] [--rounds 5] [--examples 32] [--batch-size 16]
                                            [--dtypes fp32 bf16]

Batches are training windows of MovieLens, drawn and put together as in notebook 02, which the model reads as item
tokens or as titles; their labels are the items. Times are medians over interleaved rounds in one process; peak memory
(RSS above the loaded model) is read in a fresh process for each pass. The ordinary pass is what a training step does:
the model's own loss, backward into all parameters, gradients set to None.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

import numpy as np
import psutil
import torch
from peak_memory import peak_bytes, reset_peak

from lwa_helpers.config import load_config
from lwa_helpers.data.loading import load_data
from lwa_helpers.data.windows import collate
from lwa_helpers.distillation.teacher_tuning import item_model
from lwa_helpers.fisher.calculator import FisherInformationCalculator
from lwa_helpers.models.loading import load_teacher
from lwa_helpers.ranking.task import RankingTask

PASSES = ("step", "layer", "parameter")
READINGS = ("items", "titles")
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16}


def make_task(reading: str, examples: int, batch_size: int) -> tuple[torch.nn.Module, list[dict[str, torch.Tensor]]]:
    """An untuned model with item tokens, and batches of windows of like length."""
    config, rng = (
        load_config("quick", {"data.reading": reading, "teacher.model": "smollm2-135m"}),
        np.random.default_rng(0),
    )
    data = load_data(config.data)
    vectors = rng.standard_normal((len(data.items), 8))  # speed does not depend on them
    lm = item_model(load_teacher(config.teacher.model), data, vectors, config.data, config.evaluation, 0)
    windows = RankingTask(data, lm, config.data, config.evaluation, 0).train_windows(config.teacher)
    drawn = sorted(
        (windows[i] for i in rng.permutation(len(windows))[:examples]), key=lambda window: len(window.input_ids)
    )
    return lm.model, [
        collate(drawn[start : start + batch_size], lm.pad_id) for start in range(0, len(drawn), batch_size)
    ]


def run_pass(name: str, model, batches, autocast) -> float:
    """Seconds of one pass over the batches."""
    start = time.perf_counter()
    if name == "step":
        for batch in batches:
            with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
                loss = model(**batch, use_cache=False).loss
            loss.backward()
            model.zero_grad(set_to_none=True)
    else:
        FisherInformationCalculator(granularity=name, autocast=autocast).calculate(model, batches)
    return time.perf_counter() - start


def peak_memory(name: str, reading: str, dtype: str, options: argparse.Namespace) -> float:
    """MiB above the loaded model, in a fresh process."""
    command = [
        sys.executable,
        __file__,
        "--measure",
        name,
        "--reading",
        reading,
        "--dtypes",
        dtype,
        "--examples",
        str(options.examples),
        "--batch-size",
        str(options.batch_size),
    ]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["mib"]


def measure_memory(options: argparse.Namespace) -> None:
    model, batches = make_task(options.reading[0], options.examples, options.batch_size)
    reset_peak()
    before = psutil.Process().memory_info().rss
    run_pass(options.measure, model, batches, AUTOCAST[options.dtypes[0]])
    print(json.dumps({"mib": (peak_bytes() - before) / 2**20}))


def compare(reading: str, options: argparse.Namespace) -> None:
    model, batches = make_task(reading, options.examples, options.batch_size)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    print(f"{reading}: {options.examples} examples, {tokens} tokens, torch threads {torch.get_num_threads()}")
    for dtype in options.dtypes:
        for name in options.passes:
            run_pass(name, model, batches[:1], AUTOCAST[dtype])
        times = {name: [] for name in options.passes}
        for _ in range(options.rounds):
            for name in options.passes:
                times[name].append(run_pass(name, model, batches, AUTOCAST[dtype]))
        memory = (
            {} if options.no_memory else {name: peak_memory(name, reading, dtype, options) for name in options.passes}
        )
        for name in options.passes:
            ratio = statistics.median(a / b for a, b in zip(times[name], times["step"]))
            line = f"{reading} {dtype} {name:10s} {statistics.median(times[name]):7.2f} s  time ratio {ratio:.3f}"
            if memory:
                line += f"  peak {memory[name]:7.0f} MiB  memory ratio {memory[name] / memory['step']:.3f}"
            print(line, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reading", nargs="+", choices=READINGS, default=list(READINGS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--dtypes", nargs="+", choices=tuple(AUTOCAST), default=list(AUTOCAST))
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--measure", choices=PASSES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure_memory(arguments)
    for reading in () if arguments.measure else arguments.reading:
        compare(reading, arguments)
