"""Train a ranking model on batches of user windows with transformers.Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback

from lwa_helpers.config import TuningConfig
from lwa_helpers.data.windows import LengthBatches, Window, collate
from lwa_helpers.paths import TRAINER_OUTPUT, remove
from lwa_helpers.precision import computes_in_bf16

NEW = ("head", "projections")  # modules of a trained model that start untrained
UNEVEN = {"even_batches": False}  # batches of a token budget differ in rows, so none is filled up for another process


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
    sampler.drop_last = True  # where several processes share the batches: all take as many steps
    return DataLoader(IndexedWindows(windows), batch_sampler=sampler, collate_fn=batch)


def training_arguments(
    config: TuningConfig, steps_per_epoch: int, seed: int, logging_steps: int = 5, checkpoints: Path | None = None
) -> TrainingArguments:
    """Translate a section of the settings; the learning rate falls as a cosine after a linear warm-up.

    checkpoints: a folder that belongs to this run alone, used where config.save_steps is set: see train_or_go_on.
    """
    steps = max(1, round(config.epochs * steps_per_epoch))
    saving = {"save_strategy": "no", "output_dir": str(TRAINER_OUTPUT)}
    if config.save_steps and checkpoints:
        saving = {"save_strategy": "steps", "output_dir": str(checkpoints)}
        saving |= {"save_steps": config.save_steps, "save_total_limit": 1}
    bf16 = computes_in_bf16(config.bf16, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return TrainingArguments(
        **saving, max_steps=steps, learning_rate=config.learning_rate, lr_scheduler_type="cosine",
        warmup_steps=round(config.warmup_ratio * steps), weight_decay=config.weight_decay, bf16=bf16, seed=seed,
        max_grad_norm=1.0, logging_steps=logging_steps, report_to="none", remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(), dataloader_pin_memory=torch.cuda.is_available(), disable_tqdm=True,
        gradient_checkpointing=config.gradient_checkpointing or None, accelerator_config=UNEVEN,
    )


class RankingTrainer(Trainer):
    """transformers.Trainer over a ready-made DataLoader, with a learning rate of its own for the item head."""

    def __init__(
        self, model: nn.Module, args: TrainingArguments, loader: DataLoader | None = None,
        head_learning_rate: float | None = None, logs: str | Path | None = None, callbacks: Sequence[TrainerCallback] = (),
    ):
        """logs: folder for TensorBoard."""
        self.loader = loader
        groups = parameter_groups(model, args.learning_rate, head_learning_rate or args.learning_rate)
        optimizer = (torch.optim.AdamW, {"params": groups, "lr": args.learning_rate, "weight_decay": args.weight_decay, "fused": True})
        board = [TensorBoardCallback(SummaryWriter(str(logs)))] if logs else []
        super().__init__(
            model=model, args=args, train_dataset=loader.dataset if loader else None, optimizer_cls_and_kwargs=optimizer,
            callbacks=[*callbacks, *board],
        )
        self.model_accepts_loss_kwargs = False

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Give each tied tensor memory of its own: a safetensors file takes none that is shared."""
        if state_dict is None and not isinstance(self.model, PreTrainedModel):
            state_dict = {name: value.clone() for name, value in self.model.state_dict().items()}
        super()._save(output_dir, state_dict)

    def get_train_dataloader(self) -> DataLoader:
        return self.accelerator.prepare(self.loader)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = {key: value for key, value in inputs.items() if key != "window"}
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def train_or_go_on(trainer: Trainer, checkpoints: Path) -> None:
    """Train from the last whole checkpoint in the folder that the run writes to, and delete the folder when all is done.

    On one CPU process the weights are, bit for bit, those of a run that was never interrupted.
    """
    trainer.train(resume_from_checkpoint=last_checkpoint(checkpoints))
    if trainer.is_world_process_zero():
        remove(checkpoints)


def last_checkpoint(folder: Path) -> str | None:
    """Return the newest checkpoint in `folder` that was written to its end: trainer_state.json is the last of its files."""
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json") if path.read_text().rstrip().endswith("}")]
    return str(max(whole, key=lambda path: int(path.name.split("-")[1]))) if whole else None


def parameter_groups(model: nn.Module, learning_rate: float, head_learning_rate: float) -> list[dict]:
    """Split the trained parameters into backbone and what is new: item head, projections."""
    head = {id(p) for name in NEW if (module := getattr(model, name, None)) for p in module.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    body = {"params": [p for p in trained if id(p) not in head], "lr": learning_rate}
    new = {"params": [p for p in trained if id(p) in head], "lr": head_learning_rate}
    return [group for group in (body, new) if group["params"]]


def loss_frame(trainer: Trainer, run: str) -> pd.DataFrame:
    """Return the trainer's logged losses: columns run, step, epoch, and a column for each loss."""
    rows = [row for row in trainer.state.log_history if "loss" in row]
    return pd.DataFrame(rows).assign(run=run)
