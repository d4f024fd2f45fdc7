"""Distil a tiny student and save its weights: run by test_training_processes.py alone, killed, or in two processes."""

import argparse
import os
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))
from safetensors.torch import save_file
from test_distillation import item_model, windows
from tiny_lm import language_model
from transformers import TrainerCallback

from lwa_helpers import DistillationTrainer
from lwa_helpers.config import LossConfig, load_config
from lwa_helpers.tuning import train_or_go_on, training_arguments, window_loader


class Kill(TrainerCallback):
    """End this process as `kill -9` does, at step n."""

    def __init__(self, n):
        self.n = n

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.n:
            os.kill(os.getpid(), signal.SIGKILL)


def train(out: Path, folder: Path | None = None, kill: int = -1, accumulate: int = 1, steps: int = 9) -> None:
    """Other widths, so that projections are trained too; `accumulate` batches of one process are one step."""
    torch.set_num_threads(1)
    lm, small = language_model(hidden=48), language_model(layers=2)
    data = windows(lm) * 4
    section = load_config("smoke").ablation.model_copy(
        update={"epochs": 3.0, "tokens_per_batch": 40, "save_steps": 2, "bf16": False, "learning_rate": 1e-2}
    )
    loader = window_loader(data, section.tokens_per_batch, 0, 7)
    arguments = training_arguments(section, len(loader), 0, checkpoints=folder)
    arguments.max_steps, arguments.gradient_accumulation_steps = steps, accumulate
    student = item_model(small, seed=1)
    trainer = DistillationTrainer(
        item_model(lm), student, strategy="linear", loss=LossConfig(alpha=0.5, temperature=1.0, beta=1.0), args=arguments,
        loader=loader, callbacks=[Kill(kill)],
    )
    train_or_go_on(trainer, folder) if folder else trainer.train()
    if trainer.is_world_process_zero():
        state = {name: value for name, value in student.state_dict().items() if "lm_head" not in name}
        save_file(state | {"processes": torch.tensor(trainer.accelerator.num_processes)}, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--kill", type=int, default=-1)
    parser.add_argument("--accumulate", type=int, default=1)
    given = parser.parse_args()
    train(given.out, given.folder, given.kill, given.accumulate)
