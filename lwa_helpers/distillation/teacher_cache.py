"""What a teacher says on every training position, computed once and read by all students."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import transformers
from numpy.lib.format import open_memmap
from torch import Tensor, nn

from lwa_helpers import files, paths
from lwa_helpers.config import Bf16
from lwa_helpers.errors import LwaError
from lwa_helpers.fisher.losses import counted
from lwa_helpers.models.layers import decoder_layers
from lwa_helpers.models.precision import autocast, computes_in_bf16
from lwa_helpers.ranking.outputs import label_outputs

Batches = Iterable[dict[str, Tensor]]
READ = ("input_ids", "attention_mask", "labels")  # what of a batch a model is shown and asked at
KEPT = 8  # how many outputs stay in the cache folder; those used longest ago go first
FORMAT = 4  # raise it when what is stored, or how it is computed, changes


@dataclass
class TopLogits:
    """The k most likely tokens of each position and how likely they are: items (P, k); log_p (P, k+1), the last column the log
    of the mass of all others.
    """

    items: Tensor
    log_p: Tensor

    def __getitem__(self, rows: slice) -> TopLogits:
        return TopLogits(self.items[rows], self.log_p[rows])

    @classmethod
    def of(cls, logits: Tensor, k: int, temperature: float) -> TopLogits:
        """Cut softmax(logits / temperature), logits (P, N), to its k < N largest."""
        log_p = (logits.float() / temperature).log_softmax(-1)
        top = log_p.topk(k, dim=-1)
        return cls(top.indices, with_rest(log_p, top.indices))


def with_rest(log_p: Tensor, items: Tensor) -> Tensor:
    """Return log p of `items` (P, k), then the log of the mass of all others, (P, k+1); log_p (P, N)."""
    rest = log_p.scatter(1, items, -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat([log_p.gather(1, items), rest], 1)


class TeacherOutputs:
    """A teacher's logits (P, V), or its k most likely tokens, and its states at mapped layers (P, S, d), found by window.

    Positions are those of labels, in the order of the windows. Arrays of float16 on disk, memory-mapped.
    """

    def __init__(self, directory: Path):
        """directory: what `compute` wrote, or `fuse`."""
        self.directory = Path(directory)
        meta = json.loads((self.directory / "meta.json").read_text(encoding="utf-8"))
        self.n_layers, self.top_k, self.temperature = meta["n_layers"], meta["top_k"], meta["temperature"]
        self.layers: list[int] = meta["layers"]
        self.logits = np.load(self.directory / "logits.npy", mmap_mode="r")
        self.items = np.load(self.directory / "items.npy", mmap_mode="r") if self.top_k else None
        self.hidden = np.load(self.directory / "hidden.npy", mmap_mode="r")
        self.starts = np.load(self.directory / "starts.npy")
        self.config = SimpleNamespace(hidden_size=self.hidden.shape[-1])

    def lookup(
        self, windows: Tensor, device: torch.device, layers: Sequence[int] | None = None
    ) -> tuple[Tensor | TopLogits, list[Tensor]]:
        """Return logits (P, N) or TopLogits, and the states (P, d) after each of `layers` (by default all that are held), at
        the positions of these windows (B,), row after row.
        """
        rows = np.concatenate([np.arange(self.starts[i], self.starts[i + 1]) for i in windows.tolist()])
        logits: Tensor | TopLogits = torch.from_numpy(self.logits[rows]).to(device)
        if self.items is not None:
            logits = TopLogits(torch.from_numpy(self.items[rows]).long().to(device), logits.float().log_softmax(-1))
        places = [self.layers.index(layer) for layer in (self.layers if layers is None else layers)]
        return logits, list(torch.from_numpy(self.hidden[np.ix_(rows, places)]).to(device).unbind(1))

    @classmethod
    def cached(
        cls,
        teacher: nn.Module,
        batches: Batches,
        layers: list[int],
        bf16: Bf16,
        top_k: int | None = None,
        temperature: float = 1.0,
    ) -> TeacherOutputs:
        """Return the outputs from the cache folder, where `compute` puts them if they are not there yet.

        The key holds whatever the outputs depend on: the teacher's weights and settings, the batches, the arguments, the
        device and the versions of torch and transformers.
        """
        device = next(teacher.parameters()).device
        bf16 = computes_in_bf16(bf16, device)
        key = [FORMAT, weights_hash(teacher), teacher.config.to_json_string(), batches_hash(batches, READ)]
        key += [
            layers,
            bf16,
            top_k,
            temperature if top_k else None,
            device.type,
            torch.__version__,
            transformers.__version__,
        ]
        directory = paths.CACHE / "teacher_outputs" / files.sha256_of_text(json.dumps(key))[:32]
        if not directory.is_dir():
            cls.compute(teacher, batches, layers, directory, bf16, top_k, temperature)
        os.utime(directory)
        for old in sorted(directory.parent.iterdir(), key=lambda path: -path.stat().st_mtime)[KEPT:]:
            files.remove(old)
        return cls(directory)

    @classmethod
    @torch.no_grad()
    def compute(
        cls,
        teacher: nn.Module,
        batches: Batches,
        layers: list[int],
        directory: Path,
        bf16: Bf16,
        top_k: int | None = None,
        temperature: float = 1.0,
    ) -> TeacherOutputs:
        """Run the teacher over batches in window order (batch["window"] = 0, 1, …) and store its outputs in `directory`.

        layers: those of the teacher's layers (1 … L) that student layers are matched to; what is stored for students of several
        depths serves them all. top_k: keep only the k most likely tokens at `temperature`; None, or as many as there are, keeps
        all logits. `batches` is read twice.
        Raises LwaError for windows out of order, and for batches that are there only once.
        """
        teacher.eval()
        device, n_outputs = next(teacher.parameters()).device, vocabulary_size(teacher)
        k = top_k if top_k and top_k < n_outputs else None
        starts = _starts(batches)
        positions, width = int(starts[-1]), teacher.config.hidden_size
        shapes = {"logits": (positions, k + 1 if k else n_outputs), "hidden": (positions, len(layers), width)}
        with files.atomic_write(directory) as folder, output_arrays(folder, shapes, k) as arrays:
            at = 0
            for batch in batches:
                inputs = {key: batch[key].to(device) for key in READ}
                with autocast(bf16, device):
                    out = label_outputs(teacher, inputs, hidden=True)
                    for part in out.parts():
                        rows, logits = slice(at + part.start, at + part.stop), out.head(out.states[part])
                        top = TopLogits.of(logits, k, temperature) if k else None
                        arrays["logits"][rows] = (top.log_p if top else logits).half().cpu().numpy()
                        if top:
                            arrays["items"][rows] = top.items.cpu().numpy()
                rows = slice(at, at := at + len(out.states))
                arrays["hidden"][rows] = (
                    in_half(torch.stack([out.hidden[layer - 1] for layer in layers], 1)).cpu().numpy()
                )
            if at != positions:
                raise LwaError(
                    f"teacher outputs: {positions} positions at first, then {at}: a generator can be read only once"
                )
            np.save(folder / "starts.npy", starts)
            meta = {"n_layers": len(decoder_layers(teacher)), "layers": layers, "top_k": k, "temperature": temperature}
            (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        return cls(directory)


def in_half(states: Tensor) -> Tensor:
    """Return states (…, d) as float16, one that is too large for it shortened to what fits: its direction is what counts."""
    largest = states.float().abs().amax(-1, keepdim=True)
    return (states.float() / (largest / torch.finfo(torch.float16).max).clamp_min(1)).half()


def windows_of(batch: dict[str, Tensor]) -> Tensor:
    """Return which window each row of a batch is, (B,). Raises LwaError where the batch does not say it."""
    if "window" not in batch:
        raise LwaError('teacher outputs are found by window: each batch needs "window" (B,), as window_loader gives it')
    return batch["window"]


def vocabulary_size(model: nn.Module) -> int:
    """Return how many tokens a model tells apart."""
    return len(model.get_output_embeddings().weight)


def _starts(batches: Batches) -> np.ndarray:
    """First position of every window, and the number of positions: (windows + 1,). Raises LwaError for windows out of order."""
    counts: list[int] = []
    for batch in batches:
        if windows_of(batch).tolist() != list(range(len(counts), len(counts) + len(batch["window"]))):
            raise LwaError("teacher outputs need the windows in order: make the loader with shuffle=False")
        counts += counted(batch).sum(1).tolist()
    if not counts:
        raise LwaError(
            "teacher outputs need at least one window: the loader gave no batch (a generator can be read only once)"
        )
    return np.concatenate([[0], np.cumsum(counts)])


@contextmanager
def output_arrays(folder: Path, shapes: dict[str, tuple[int, ...]], k: int | None) -> Iterator[dict[str, np.memmap]]:
    """Files of an outputs folder, mapped for writing: float16 of the given shapes, and items (P, k) int32 where k is set."""
    folder.mkdir(parents=True)
    arrays = {name: open_memmap(folder / f"{name}.npy", "w+", np.float16, shape) for name, shape in shapes.items()}
    if k:
        arrays["items"] = open_memmap(folder / "items.npy", "w+", np.int32, (shapes["logits"][0], k))
    yield arrays
    for array in arrays.values():
        array.flush()


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over the names, types, shapes and values of a model's parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def batches_hash(batches: Batches, keys: Sequence[str]) -> str:
    """SHA-256 over these tensors of every batch, padding included."""
    digest = hashlib.sha256()
    for batch in batches:
        for name in keys:
            digest.update(f"{name} {tuple(batch[name].shape)}\n".encode())
            digest.update(batch[name].contiguous().numpy())
    return digest.hexdigest()
