"""Time and peak memory of the Fisher pass beside an ordinary forward + backward on the same batches, SmolLM2-135M.

    python tests/benchmarks/fisher_speed.py [--rounds 5] [--examples 32] [--batch-size 8] [--tokens 110] [--dtypes fp32 bf16]

Times are medians over interleaved rounds in one process; peak memory (RSS above the loaded model) is read in a fresh process
for each pass. Rows differ in length by up to a tenth, are padded to the longest of their batch, and every token has a label.
The ordinary pass is what a training step does: the model's own loss, backward into all parameters, gradients set to None.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

import psutil
import torch
from peak_memory import peak_bytes, reset_peak

from lwa_helpers.fisher import FisherInformationCalculator
from lwa_helpers.models import load_teacher

PASSES = ("step", "layer", "parameter")
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16}


def make_batches(examples: int, batch_size: int, tokens: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for start in range(0, examples, batch_size):
        rows = min(batch_size, examples - start)
        lengths = torch.randint(int(0.9 * tokens), int(1.1 * tokens) + 1, (rows,), generator=generator)
        ids = torch.randint(0, 40_000, (rows, int(lengths.max())), generator=generator)
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return batches


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


def peak_memory(name: str, dtype: str, options: argparse.Namespace) -> float:
    """MiB above the loaded model, in a fresh process."""
    command = [sys.executable, __file__, "--measure", name, "--dtypes", dtype, "--examples", str(options.examples),
               "--batch-size", str(options.batch_size), "--tokens", str(options.tokens)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["mib"]


def measure_memory(options: argparse.Namespace) -> None:
    model = load_teacher("smollm2-135m").model
    batches = make_batches(options.examples, options.batch_size, options.tokens)
    reset_peak()
    before = psutil.Process().memory_info().rss
    run_pass(options.measure, model, batches, AUTOCAST[options.dtypes[0]])
    print(json.dumps({"mib": (peak_bytes() - before) / 2**20}))


def compare(options: argparse.Namespace) -> None:
    model = load_teacher("smollm2-135m").model
    batches = make_batches(options.examples, options.batch_size, options.tokens)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    print(f"{options.examples} examples, {tokens} tokens, torch threads {torch.get_num_threads()}")
    for dtype in options.dtypes:
        for name in options.passes:
            run_pass(name, model, batches[:1], AUTOCAST[dtype])
        times = {name: [] for name in options.passes}
        for _ in range(options.rounds):
            for name in options.passes:
                times[name].append(run_pass(name, model, batches, AUTOCAST[dtype]))
        memory = {} if options.no_memory else {name: peak_memory(name, dtype, options) for name in options.passes}
        for name in options.passes:
            ratio = statistics.median(a / b for a, b in zip(times[name], times["step"]))
            line = f"{dtype} {name:10s} {statistics.median(times[name]):7.2f} s  time ratio {ratio:.3f}"
            if memory:
                line += f"  peak {memory[name]:7.0f} MiB  memory ratio {memory[name] / memory['step']:.3f}"
            print(line, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=110)
    parser.add_argument("--dtypes", nargs="+", choices=tuple(AUTOCAST), default=list(AUTOCAST))
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--measure", choices=PASSES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    measure_memory(arguments) if arguments.measure else compare(arguments)
