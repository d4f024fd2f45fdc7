"""Time and peak memory of one step of logit distillation over the whole vocabulary, beside TRL and ModelOpt.

    pip install --no-deps --target FOLDER trl datasets nvidia-modelopt multiprocess dill xxhash
    PYTHONPATH=FOLDER python tests/benchmarks/distillation_peers.py [--rows 8] [--tokens 128] [--rounds 3] [--bf16]
                                                                    [--ways …]

SmolLM2-135M (vocabulary 49,152) teaches its first 8 layers by forward KL at every token: lwa (logits in parts),
lwa_whole (all at once), trl (GKDTrainer with lmbda=0, beta=0), modelopt (mtd.convert with LogitsDistillationLoss). A
step is forward, backward and AdamW. The ways take turns in one process; the losses must agree before anything is timed.
Memory is what a step takes above what was held before it: resident memory on a CPU, allocated memory on a GPU. Rows go
to results/benchmarks/distillation_peers.csv.
"""

from __future__ import annotations

import argparse
import copy
import gc
from collections.abc import Callable

import pandas as pd
import psutil
import torch
from peak_memory import peak_bytes, reset_peak
from row_file import RowFile
from torch import Tensor, nn

import lwa_helpers.distillation.teacher_cache
from lwa_helpers import DistillationTrainer, build_student, load_teacher, paths
from lwa_helpers.configs.students import LossConfig
from lwa_helpers.models.precision import autocast
from lwa_helpers.ranking.cost import time_side_by_side

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KL_ONLY = LossConfig(alpha=1.0, beta=0.0, temperature=1.0)
WHOLE = 2**62
Loss = Callable[[dict[str, Tensor]], Tensor]


def lwa(teacher, student, at_once: int) -> Loss:
    trainer = DistillationTrainer(teacher, student, strategy="none", loss=KL_ONLY)

    def loss(batch: dict[str, Tensor]) -> Tensor:
        lwa_helpers.distillation.teacher_cache.LOGITS_AT_ONCE = at_once
        return trainer.compute_loss(student.model, batch)

    return loss


def trl(teacher, student) -> Loss:
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    where = {"output_dir": str(paths.TRAINER_OUTPUT), "use_cpu": DEVICE.type == "cpu"}
    arguments = GKDConfig(**where, lmbda=0.0, beta=0.0, report_to="none", bf16=False, gradient_checkpointing=False)
    tokenizer = copy.deepcopy(teacher.tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    unread = Dataset.from_dict(
        {"messages": [[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]]}
    )
    trainer = GKDTrainer(student.model, teacher.model, arguments, train_dataset=unread, processing_class=tokenizer)
    return lambda batch: trainer.compute_loss(student.model, batch)


def modelopt(teacher, student) -> tuple[Loss, nn.Module]:
    import modelopt.torch.distill as mtd

    criterion = {("lm_head", "lm_head"): mtd.LogitsDistillationLoss(reduction="none")}
    settings = {"teacher_model": teacher.model, "criterion": criterion, "loss_balancer": None}
    model = mtd.convert(student.model, mode=[("kd_loss", settings)])

    def loss(batch: dict[str, Tensor]) -> Tensor:
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        return model.compute_kd_loss(loss_reduction_fn=lambda each: each[:, :-1].mean())

    return loss, model


def loss_of(way: str, teacher, student) -> tuple[Loss, nn.Module]:
    match way:
        case "lwa":
            return lwa(teacher, student, lwa_helpers.distillation.teacher_cache.LOGITS_AT_ONCE), student.model
        case "lwa_whole":
            return lwa(teacher, student, WHOLE), student.model
        case "trl":
            return trl(teacher, student), student.model
        case "modelopt":
            return modelopt(teacher, student)
    raise ValueError(way)


def held() -> int:
    gc.collect()
    return torch.cuda.memory_allocated() if DEVICE.type == "cuda" else psutil.Process().memory_info().rss


def peak_of(step: Callable[[], object]) -> float:
    """MiB that a step takes above what is held before it."""
    before = held()
    torch.cuda.reset_peak_memory_stats() if DEVICE.type == "cuda" else reset_peak()
    step()
    return ((torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else peak_bytes()) - before) / 2**20


def main(options: argparse.Namespace) -> None:
    base = load_teacher("smollm2-135m")
    base.model.to(DEVICE).requires_grad_(False)
    ids = torch.randint(1, 40_000, (options.rows, options.tokens), generator=torch.Generator().manual_seed(0)).to(
        DEVICE
    )
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    steps, first = {}, {}
    for way in options.ways:
        student = build_student(base, 8, "first")
        student.model.to(DEVICE).train().requires_grad_(True)
        loss, model = loss_of(way, base, student)
        model.train()
        optimizer = torch.optim.AdamW([p for p in student.model.parameters() if p.requires_grad], 1e-5, fused=True)

        def step(loss=loss, optimizer=optimizer) -> float:
            with autocast(options.bf16, DEVICE):
                value = loss(batch)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            return value.item()

        first[way] = step()
        steps[way] = step
    print("losses:", first, flush=True)
    torch.testing.assert_close(
        torch.tensor(list(first.values())), torch.full((len(first),), first[options.ways[0]]), rtol=0.02, atol=0
    )
    times = time_side_by_side(steps, options.rounds).groupby("name").seconds.median()
    rows = pd.DataFrame(
        [
            {
                "way": way,
                "seconds": times[way],
                "tokens_per_second": ids.numel() / times[way],
                "peak_mib": peak_of(steps[way]),
            }
            for way in steps
        ]
    ).assign(device=DEVICE.type, dtype="bf16" if options.bf16 else "f32", rows=options.rows, tokens=options.tokens)
    RowFile(paths.RESULTS / "benchmarks" / "distillation_peers.csv").add(rows)
    print(rows.round(2).to_string(index=False))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--ways", nargs="+", default=["lwa", "lwa_whole", "trl", "modelopt"])
    main(parser.parse_args())
