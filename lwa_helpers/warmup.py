"""Fit a new item head to the states of the untuned model before anything else moves."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from tqdm import tqdm
from transformers import Trainer, TrainingArguments

from lwa_helpers.config import Bf16, TeacherConfig
from lwa_helpers.paths import TRAINER_OUTPUT
from lwa_helpers.precision import autocast
from lwa_helpers.ranking import ItemHead, ItemRankingModel, future_nll, future_targets, spread

ROWS, DROPOUT = 256, 0.2


class StandardisedHead(nn.Module):
    """An item head on states brought to mean 0 and standard deviation 1: far better conditioned than on raw states."""

    def __init__(self, head: ItemHead, states: Tensor):
        super().__init__()
        self.head = head
        self.register_buffer("mean", states.mean(0))
        self.register_buffer("scale", spread(states).clamp_min(1e-6))

    def forward(self, states: Tensor, future: Tensor) -> dict[str, Tensor]:
        """Loss of the targets `future` (P, n) given states (P, d)."""
        shown = F.dropout((states - self.mean) / self.scale, DROPOUT, self.training)
        return {"loss": future_nll(self.head(shown), future)}

    @torch.no_grad()
    def fold(self) -> None:
        """Make the head read raw states: W <- W / scale, b <- b - E W (mean / scale)."""
        self.head.bias -= self.head.table @ self.head.project(self.mean / self.scale)
        self.head.project.weight /= self.scale


@torch.no_grad()
def title_end_states(
    model: ItemRankingModel, batches: Iterable[dict[str, Tensor]], bf16: Bf16
) -> tuple[Tensor, Tensor]:
    """Return final hidden states (P, d) where titles end, and the targets that follow each, (P, n)."""
    model.eval()
    device = next(model.parameters()).device
    states, future = [], []
    for batch in tqdm(batches, desc="states", unit="batch", mininterval=10):
        labels = batch["item_labels"].to(device)
        with autocast(bf16, device):
            hidden = model.last_hidden(batch["input_ids"].to(device), batch["attention_mask"].to(device))
        states.append(hidden[labels != -100].float())
        future.append(future_targets(labels, model.next_items))
    return torch.cat(states), torch.cat(future)


def fit_head(model: ItemRankingModel, batches: Iterable[dict[str, Tensor]], section: TeacherConfig, seed: int) -> None:
    """Train the model's item head alone for section.head_epochs on states that are computed once.

    A head that fits before the layers move spares them large first gradients (linear probing, then fine-tuning: Kumar et
    al., ICLR 2022).
    """
    states, future = title_end_states(model, batches, section.bf16)
    probe = StandardisedHead(model.head, states)
    arguments = TrainingArguments(
        output_dir=str(TRAINER_OUTPUT), num_train_epochs=section.head_epochs, per_device_train_batch_size=ROWS,
        learning_rate=section.head_only_learning_rate, lr_scheduler_type="cosine", weight_decay=section.weight_decay,
        seed=seed, save_strategy="no", report_to="none", logging_steps=50, disable_tqdm=True, remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(), dataloader_pin_memory=False,
    )

    def collate(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        return {"states": torch.stack([row[0] for row in rows]), "future": torch.stack([row[1] for row in rows])}

    Trainer(probe, arguments, data_collator=collate, train_dataset=TensorDataset(states.cpu(), future.cpu())).train()
    probe.fold()
