"""Train a ranking model on batches of user windows with transformers.Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback

from lwa_helpers.config import TuningConfig
from lwa_helpers.data.windows import LengthBatches, Window, collate
from lwa_helpers.paths import TRAINER_OUTPUT


class IndexedWindows(torch.utils.data.Dataset):
    """Windows with their position in the list, by which cached teacher signals are found."""

    def __init__(self, windows: Sequence[Window]):
        self.windows = list(windows)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> tuple[int, Window]:
        return index, self.windows[index]


def window_loader(windows: Sequence[Window], tokens_per_batch: int, pad_id: int, seed: int, shuffle: bool = True) -> DataLoader:
    """Return batches of at most `tokens_per_batch` padded tokens, of windows of like length; batch["window"] (B,) is
    each row's index in `windows`. Without `shuffle` the rows come in the order given."""

    def batch(rows: list[tuple[int, Window]]) -> dict[str, torch.Tensor]:
        return collate([window for _, window in rows], pad_id) | {"window": torch.tensor([index for index, _ in rows])}

    if not shuffle:
        longest = max(len(window.input_ids) for window in windows)
        return DataLoader(IndexedWindows(windows), batch_size=max(1, tokens_per_batch // longest), collate_fn=batch)
    sampler = LengthBatches(windows, tokens_per_batch, seed=seed)
    return DataLoader(IndexedWindows(windows), batch_sampler=sampler, collate_fn=batch)


def training_arguments(config: TuningConfig, steps_per_epoch: int, seed: int, logging_steps: int = 5) -> TrainingArguments:
    """Translate a section of the settings; the learning rate falls as a cosine after a linear warm-up."""
    steps = max(1, round(config.epochs * steps_per_epoch))
    return TrainingArguments(
        output_dir=str(TRAINER_OUTPUT), max_steps=steps, learning_rate=config.learning_rate, lr_scheduler_type="cosine",
        warmup_steps=round(config.warmup_ratio * steps), weight_decay=config.weight_decay, bf16=config.bf16, seed=seed,
        max_grad_norm=1.0, logging_steps=logging_steps, save_strategy="no", report_to="none", remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(), dataloader_pin_memory=torch.cuda.is_available(), disable_tqdm=True,
    )


class RankingTrainer(Trainer):
    """transformers.Trainer over a ready-made DataLoader, with a learning rate of its own for the item head."""

    def __init__(
        self, model: nn.Module, args: TrainingArguments, loader: DataLoader | None = None,
        head_learning_rate: float | None = None, logs: str | Path | None = None, extra: Sequence[nn.Parameter] = (),
        callbacks: Sequence[TrainerCallback] = (),
    ):
        """logs: folder for TensorBoard; extra: trained parameters that are not the model's own."""
        self.loader = loader
        groups = parameter_groups(model, args.learning_rate, head_learning_rate or args.learning_rate, extra)
        optimizer = (torch.optim.AdamW, {"params": groups, "lr": args.learning_rate, "weight_decay": args.weight_decay, "fused": True})
        board = [TensorBoardCallback(SummaryWriter(str(logs)))] if logs else []
        super().__init__(
            model=model, args=args, train_dataset=loader.dataset if loader else None, optimizer_cls_and_kwargs=optimizer,
            callbacks=[*callbacks, *board],
        )
        self.model_accepts_loss_kwargs = False

    def get_train_dataloader(self) -> DataLoader:
        return self.accelerator.prepare(self.loader)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = {key: value for key, value in inputs.items() if key != "window"}
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def parameter_groups(model: nn.Module, learning_rate: float, head_learning_rate: float, extra: Sequence[nn.Parameter] = ()) -> list[dict]:
    """Split the trained parameters into backbone and item head (or other new parameters)."""
    head = {id(p) for p in getattr(model, "head", nn.Module()).parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    body = {"params": [p for p in trained if id(p) not in head], "lr": learning_rate}
    new = {"params": [p for p in trained if id(p) in head] + list(extra), "lr": head_learning_rate}
    return [group for group in (body, new) if group["params"]]


def loss_frame(trainer: Trainer, run: str) -> pd.DataFrame:
    """Return the trainer's logged losses: columns run, step, epoch, and a column for each loss."""
    rows = [row for row in trainer.state.log_history if "loss" in row]
    return pd.DataFrame(rows).assign(run=run)
