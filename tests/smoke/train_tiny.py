"""Distil a tiny student and save its weights: run by test_training_processes.py alone, killed, or in two processes."""

import argparse
import os
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "builders"))
from processes import leave_together
from safetensors.torch import save_file
from tiny_lm import item_lm, section, windows
from transformers import TrainerCallback

from lwa_helpers import DistillationTrainer
from lwa_helpers.configs.students import LossConfig
from lwa_helpers.distillation.recipes import trained_rows
from lwa_helpers.models.low_rank import low_rank
from lwa_helpers.ranking.training import train_or_resume, training_arguments, window_loader


class Kill(TrainerCallback):
    """End this process as `kill -9` does, at step n."""

    def __init__(self, n):
        self.n = n

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.n:
            os.kill(os.getpid(), signal.SIGKILL)


def train(out: Path, folder: Path | None = None, kill: int = -1, accumulate: int = 1, steps: int = 9) -> None:
    """Train a tiny student of other widths, so that projections are trained too, with rows in few dimensions.

    accumulate: how many batches of one process make one step.
    """
    torch.set_num_threads(1)
    teacher, student = item_lm(hidden=48), item_lm(layers=2, seed=1)
    own = section(epochs=3.0, tokens_per_batch=15, save_steps=2, learning_rate=1e-2, head_learning_rate=1e-2)
    loader = window_loader(windows(teacher) * 4, own.tokens_per_batch, 0, 7)
    arguments = training_arguments(own, len(loader), 0, checkpoints=folder)
    arguments.max_steps, arguments.gradient_accumulation_steps = steps, accumulate
    with low_rank(trained_rows(student.model), own.rank):
        trainer = DistillationTrainer(
            teacher,
            student,
            strategy="linear",
            loss=LossConfig(alpha=0.5, temperature=1.0, beta=1.0),
            args=arguments,
            loader=loader,
            head_learning_rate=own.head_learning_rate,
            callbacks=[Kill(kill)],
        )
        train_or_resume(trainer, folder) if folder else trainer.train()
    if trainer.is_world_process_zero():
        save_file(student.model.state_dict() | {"processes": torch.tensor(trainer.accelerator.num_processes)}, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--kill", type=int, default=-1)
    parser.add_argument("--accumulate", type=int, default=1)
    given = parser.parse_args()
    train(given.out, given.folder, given.kill, given.accumulate)
    leave_together()
