"""What a teacher says on every training position, computed once and read by all students."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from lwa_helpers.errors import LwaError
from lwa_helpers.models import decoder_layers
from lwa_helpers.ranking import ItemRankingModel


class TeacherSignals:
    """A teacher's item logits (P, N) and states at mapped layers (P, S, d) in float16 on disk, found by window index."""

    def __init__(self, directory: Path, n_layers: int, starts: np.ndarray):
        self.logits = np.load(directory / "logits.npy", mmap_mode="r")
        self.hidden = np.load(directory / "hidden.npy", mmap_mode="r")
        self.n_layers, self.starts = n_layers, starts
        self.config = SimpleNamespace(hidden_size=self.hidden.shape[-1])

    def lookup(self, windows: Tensor, device: torch.device) -> tuple[Tensor, list[Tensor]]:
        """Return logits (P, N) and S states (P, d) of the positions of these windows (B,), row after row."""
        rows = np.concatenate([np.arange(self.starts[i], self.starts[i + 1]) for i in windows.tolist()])
        logits = torch.from_numpy(self.logits[rows]).to(device)
        return logits, list(torch.from_numpy(self.hidden[rows]).to(device).unbind(1))

    @classmethod
    @torch.no_grad()
    def compute(
        cls, teacher: ItemRankingModel, batches: Iterable[dict[str, Tensor]], layers: list[int], directory: Path, bf16: bool
    ) -> TeacherSignals:
        """Run the teacher over batches in window order (batch["window"] = 0, 1, …) and store its signals in `directory`.

        layers: the teacher layers (1 … L) that student layers are matched to. Raises LwaError for windows out of order.
        """
        teacher.eval()
        device = next(teacher.parameters()).device
        logits, hidden, counts = [], [], []
        for batch in batches:
            if batch["window"].tolist() != list(range(len(counts), len(counts) + len(batch["window"]))):
                raise LwaError("teacher signals need the windows in order: make the loader with shuffle=False")
            counts += (batch["item_labels"] != -100).sum(1).tolist()
            inputs = {key: batch[key].to(device) for key in ("input_ids", "attention_mask", "item_labels")}
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
                out = teacher(**inputs, output_hidden_states=True)
            logits.append(out.logits.half().cpu().numpy())
            hidden.append(torch.stack([out.hidden[layer] for layer in layers], 1).half().cpu().numpy())
        directory.mkdir(parents=True, exist_ok=True)
        np.save(directory / "logits.npy", np.concatenate(logits))
        np.save(directory / "hidden.npy", np.concatenate(hidden))
        return cls(directory, len(decoder_layers(teacher)), np.concatenate([[0], np.cumsum(counts)]))
