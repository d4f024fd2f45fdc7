"""Save losses and gradients of tiny students on two batches.

One process does both; of two processes each does one, the student sharded.

Run by test_training_processes.py alone. Logits of words, and of item tokens whose rows are trained in few dimensions,
are made at once and in parts.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "builders"))
from processes import leave_together
from safetensors.torch import save_file
from tiny_lm import item_lm, language_model, windows
from torch.distributed.fsdp import fully_shard
from torch.nn.utils.parametrize import register_parametrization

from lwa_helpers import DistillationTrainer
from lwa_helpers.data.windows import collate
from lwa_helpers.distillation.recipes import trained_rows
from lwa_helpers.models.layers import decoder_layers
from lwa_helpers.models.low_rank import LowRankUpdate, main_directions
from lwa_helpers.ranking import outputs


def gradients(
    kind: str, teacher: torch.nn.Module, student: torch.nn.Module, batches: list[dict]
) -> dict[str, torch.Tensor]:
    """Mean loss and mean gradients over the batches of all processes."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world > 1:
        for layer in decoder_layers(student):
            fully_shard(layer)
        fully_shard(student, reshard_after_forward=True)  # as accelerate does
    trainer = DistillationTrainer(teacher, student, strategy="linear")
    mine = batches[int(os.environ.get("RANK", "0")) :: world]
    total = torch.zeros(())
    for batch in mine:
        loss = trainer.compute_loss(student, batch) / len(mine)
        loss.backward()
        total += loss.detach()
    if world > 1:
        dist.all_reduce(total)
        total /= world
    found = {
        name: p.grad.full_tensor() if world > 1 else p.grad
        for name, p in student.named_parameters()
        if p.grad is not None
    }
    return {f"{kind} {name}": value.clone() for name, value in found.items()} | {f"{kind} loss": total}


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    whole, out = outputs.LOGITS_AT_ONCE, {}
    for name, made in {"words": language_model, "items": item_lm}.items():
        lm = made()
        batches = [collate(rows, 0) for rows in (windows(lm), windows(lm)[1:])]
        for parts, at_once in {"": whole, " in parts": 3 * lm.model.config.vocab_size}.items():
            outputs.LOGITS_AT_ONCE = at_once
            student = made(layers=2, seed=1).model
            for module in trained_rows(student) if name == "items" else ():
                register_parametrization(
                    module, "weight", LowRankUpdate(module.weight, main_directions(module.weight, 4))
                )
            out |= gradients(name + parts, lm.model, student, batches)
    if int(os.environ.get("RANK", "0")) == 0:
        save_file(out, sys.argv[1])
    leave_together()
