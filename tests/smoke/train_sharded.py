"""Save losses and gradients of tiny students on two batches: one process does both, of two each does one, the student sharded.

Run by test_training_processes.py alone. The title head's logits are made at once and in parts, the item head's at once.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))
from safetensors.torch import save_file
from test_distillation import item_model, windows
from tiny_lm import language_model
from torch.distributed.fsdp import fully_shard

from lwa_helpers import DistillationTrainer, signals
from lwa_helpers.models import decoder_layers
from lwa_helpers.tuning import window_loader


def gradients(head: str, teacher: torch.nn.Module, student: torch.nn.Module, batches: list[dict]) -> dict[str, torch.Tensor]:
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
    found = {name: p.grad.full_tensor() if world > 1 else p.grad for name, p in student.named_parameters() if p.grad is not None}
    return {f"{head} {name}": value.clone() for name, value in found.items()} | {f"{head} loss": total}


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    lm = language_model()
    batches = list(window_loader(windows(lm) * 2, 40, 0, 0, shuffle=False))[:2]
    whole, out = signals.LOGITS_AT_ONCE, {}
    for head, at_once in {"title": whole, "title in parts": 3 * lm.model.config.vocab_size}.items():
        signals.LOGITS_AT_ONCE = at_once
        out |= gradients(head, lm.model, language_model(layers=2, seed=1).model, batches)
    signals.LOGITS_AT_ONCE = whole
    out |= gradients("item", item_model(lm), item_model(language_model(layers=2, seed=1), seed=1), batches)
    if int(os.environ.get("RANK", "0")) == 0:
        save_file(out, sys.argv[1])
    if dist.is_initialized():
        dist.barrier()
        os._exit(0)  # gloo's threads, taken down while Python ends, abort now and then
