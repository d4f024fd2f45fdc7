"""A teacher's outputs at every training position, computed once and read by all students."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from numpy.lib.format import open_memmap
from torch import Tensor, nn
from transformers import PreTrainedModel

from lwa_helpers import files
from lwa_helpers.assets import cache_entry
from lwa_helpers.configs.students import Bf16
from lwa_helpers.distillation.identity import Identity
from lwa_helpers.distillation.output_folders import META, delete_old, hold
from lwa_helpers.errors import LwaError
from lwa_helpers.fisher.losses import counted
from lwa_helpers.models.language_model import LanguageModel
from lwa_helpers.models.layers import decoder_layers, text_config
from lwa_helpers.models.precision import autocast, computes_in_bf16
from lwa_helpers.ranking.model_checks import plain_model
from lwa_helpers.ranking.outputs import label_outputs

Batches = Iterable[dict[str, Tensor]]
READ = ("input_ids", "attention_mask", "labels")  # the parts of a batch that outputs depend on
KEPT = 8  # how many outputs stay in the cache folder; the least recently used are deleted
FORMAT = 4  # raise it when what is stored, or how it is computed, changes


@dataclass
class TopLogits:
    """The k most likely tokens at each position, and their log-probabilities.

    Attributes:
        items: the tokens, (P, k).
        log_p: their log-probabilities, and in the last column the log of the total probability of all others, (P, k+1).
    """

    items: Tensor
    log_p: Tensor

    def __getitem__(self, rows: slice) -> TopLogits:
        return TopLogits(self.items[rows], self.log_p[rows])

    @classmethod
    def of(cls, logits: Tensor, k: int, temperature: float) -> TopLogits:
        """Cut softmax(logits / temperature), logits (P, N), to its k < N largest probabilities."""
        log_p = (logits.float() / temperature).log_softmax(-1)
        top = log_p.topk(k, dim=-1)
        return cls(top.indices, with_rest(log_p, top.indices))


def with_rest(log_p: Tensor, items: Tensor) -> Tensor:
    """Return log_p (P, N) at `items` (P, k), then the log of the total probability of all others, (P, k+1)."""
    rest = log_p.scatter(1, items, -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat([log_p.gather(1, items), rest], 1)


class TeacherOutputs:
    """A teacher's outputs at the P positions that predict labels, stored on disk and looked up by window.

    Positions are in the order of the windows. The arrays are memory-mapped; logits and states are float16.

    Args:
        directory: a folder that `compute` or ensemble.average_outputs wrote.

    Attributes:
        logits: the logits, (P, V), or log_p of TopLogits, (P, k+1).
        items: the items of TopLogits, (P, k), or None if all logits are stored.
        hidden: the states after the layers in `layers`, (P, S, d).
        layers: the teacher's layers (1 … L) whose states are stored, S of them.
        starts: the first position of each window, and P, (windows + 1,).
        n_layers: L, the number of layers of the teacher.
        top_k: k of TopLogits, or None.
        temperature: temperature of TopLogits.
        hidden_size: width of the states, d.
        identity: what the numbers of tokens and items mean; None if the teacher came without its tokenizer.
    """

    def __init__(self, directory: Path):
        self.directory = Path(directory)
        hold(self, self.directory)
        meta = json.loads((self.directory / META).read_text(encoding="utf-8"))
        self.identity = Identity.load(self.directory)
        self.n_layers, self.top_k, self.temperature = meta["n_layers"], meta["top_k"], meta["temperature"]
        self.layers: list[int] = meta["layers"]
        self.logits = np.load(self.directory / "logits.npy", mmap_mode="r")
        self.items = np.load(self.directory / "items.npy", mmap_mode="r") if self.top_k else None
        self.hidden = np.load(self.directory / "hidden.npy", mmap_mode="r")
        self.starts = np.load(self.directory / "starts.npy")
        self.hidden_size = self.hidden.shape[-1]

    @property
    def n_classes(self) -> int | None:
        """The number of tokens that the teacher tells apart; None if only the likely ones are stored."""
        return self.logits.shape[1] if self.items is None else None

    def lookup(
        self, windows: Tensor, device: torch.device, layers: Sequence[int] | None = None
    ) -> tuple[Tensor | TopLogits, list[Tensor]]:
        """Look up the outputs at the positions of some windows.

        Args:
            windows: indices of the windows, (B,).
            device: where to put the outputs.
            layers: layers of the teacher (1 … L) whose states are wanted; None takes all that are stored.

        Returns:
            The logits (P, N) or TopLogits, and the states (P, d) after each of the layers, window after window.
        """
        rows = np.concatenate([np.arange(self.starts[i], self.starts[i + 1]) for i in windows.tolist()])
        stored = torch.from_numpy(self.logits[rows]).to(device)
        logits: Tensor | TopLogits = stored
        if self.items is not None:
            logits = TopLogits(torch.from_numpy(self.items[rows]).long().to(device), stored.float().log_softmax(-1))
        wanted = self.layers if layers is None else layers
        places = np.array([self.layers.index(layer) for layer in wanted], dtype=np.intp)
        return logits, list(torch.from_numpy(self.hidden[np.ix_(rows, places)]).to(device).unbind(1))

    @classmethod
    def cached(
        cls,
        teacher: LanguageModel | nn.Module,
        batches: Batches,
        layers: list[int],
        bf16: Bf16,
        top_k: int | None = None,
        temperature: float = 1.0,
    ) -> TeacherOutputs:
        """Return the outputs from the cache folder, after computing them if they are not there yet.

        Their key is a hash of everything they depend on: the teacher's weights, config and tokenizer, the batches, the
        arguments, the device, and the versions of torch and transformers.

        Args:
            teacher: the teacher (see compute).
            batches: batches of windows in order (see compute).
            layers: the teacher's layers whose states are stored (see compute).
            bf16: whether to compute in bfloat16.
            top_k: how many of the most likely tokens are stored; None stores all logits.
            temperature: temperature of these tokens' probabilities.
        """
        model, identity = bare_model(teacher), Identity.of(teacher)
        device = next(model.parameters()).device
        bf16 = computes_in_bf16(bf16, device)
        key = [FORMAT, weights_hash(model), model.config.to_json_string(), batches_hash(batches, READ)]
        key += [
            layers,
            bf16,
            top_k,
            temperature if top_k else None,
            device.type,
            torch.__version__,
            transformers.__version__,
        ]
        key += [identity.sha256] if identity else []
        directory = cache_entry("teacher_outputs", key)
        try:
            found = cls(directory)
        except FileNotFoundError:  # not computed yet, or another run deletes them at this moment
            found = cls.compute(teacher, batches, layers, directory, bf16, top_k, temperature)
        os.utime(directory)
        delete_old(directory.parent, KEPT)
        return found

    @classmethod
    @torch.no_grad()
    def compute(
        cls,
        teacher: LanguageModel | nn.Module,
        batches: Batches,
        layers: list[int],
        directory: Path,
        bf16: Bf16,
        top_k: int | None = None,
        temperature: float = 1.0,
    ) -> TeacherOutputs:
        """Run the teacher over all windows and store its outputs in `directory`.

        Args:
            teacher: the teacher. With its tokenizer, as a LanguageModel, the outputs are refused to a student to which
                the numbers of tokens or items mean something else.
            batches: batches of windows in order (batch["window"] = 0, 1, …); they are read twice.
            layers: the teacher's layers (1 … L) that student layers are matched to. If they are stored for students of
                several depths, the outputs serve all of these.
            directory: the folder to write.
            bf16: whether to compute in bfloat16.
            top_k: how many of the most likely tokens are stored; None, or the number of all tokens, stores all logits.
            temperature: temperature of these tokens' probabilities.

        Returns:
            The outputs stored.

        Raises:
            LwaError: if the windows are out of order, or the batches can be read only once.
        """
        model, identity = bare_model(teacher).eval(), Identity.of(teacher)
        device, n_outputs = next(model.parameters()).device, vocabulary_size(model)
        k = top_k if top_k and top_k < n_outputs else None
        starts = _starts(batches)
        positions, width = int(starts[-1]), text_config(model).hidden_size
        shapes: dict[str, tuple[int, ...]] = {
            "logits": (positions, k + 1 if k else n_outputs),
            "hidden": (positions, len(layers), width),
        }
        with files.atomic_write(directory) as folder, output_arrays(folder, shapes, k) as arrays:
            at = 0
            for batch in batches:
                inputs = {key: batch[key].to(device) for key in READ}
                with autocast(bf16, device):
                    out = label_outputs(model, inputs, hidden=True)
                    for part in out.parts():
                        rows, logits = slice(at + part.start, at + part.stop), out.head(out.states[part])
                        top = TopLogits.of(logits, k, temperature) if k else None
                        arrays["logits"][rows] = (top.log_p if top else logits).half().cpu().numpy()
                        if top:
                            arrays["items"][rows] = top.items.cpu().numpy()
                rows = slice(at, at := at + len(out.states))  # this batch; `at` becomes the start of the next
                arrays["hidden"][rows] = (
                    in_half(torch.stack([out.hidden[layer - 1] for layer in layers], 1)).cpu().numpy()
                )
            if at != positions:
                raise LwaError(
                    f"teacher outputs: {positions} positions at first, then {at}: a generator can be read only once"
                )
            np.save(folder / "starts.npy", starts)
            if identity:
                identity.save(folder)
            meta = {"n_layers": len(decoder_layers(model)), "layers": layers, "top_k": k, "temperature": temperature}
            (folder / META).write_text(json.dumps(meta), encoding="utf-8")
        return cls(directory)


def bare_model(given: LanguageModel | nn.Module) -> PreTrainedModel:
    """Return the transformers model of a language model, without the wrappers around it (see plain_model)."""
    return plain_model(given.model if isinstance(given, LanguageModel) else given)


def in_half(states: Tensor) -> Tensor:
    """Return states (…, d) as float16; one too large for it is scaled down, since only its direction matters."""
    largest = states.float().abs().amax(-1, keepdim=True)
    return (states.float() / (largest / torch.finfo(torch.float16).max).clamp_min(1)).half()


def windows_of(batch: dict[str, Tensor]) -> Tensor:
    """Return the index of each row's window, (B,).

    Raises:
        LwaError: if the batch does not have these.
    """
    if "window" not in batch:
        raise LwaError('teacher outputs are found by window: each batch needs "window" (B,), as window_loader gives it')
    return batch["window"]


def vocabulary_size(model: PreTrainedModel) -> int:
    """Return the size of a model's vocabulary, the number of rows of its head."""
    head = model.get_output_embeddings()
    # The weight of a sharded head with rows in few dimensions exists only inside the model's forward pass.
    return head.out_features if isinstance(head, nn.Linear) else len(head.weight)


def _starts(batches: Batches) -> np.ndarray:
    """Return the first position of every window, then the number of positions, (windows + 1,).

    Raises:
        LwaError: if the windows are out of order, or there are none.
    """
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
    """Create the arrays of an outputs folder, mapped for writing, and flush them at the end.

    Args:
        folder: the folder to create.
        shapes: shape of each float16 array, by name.
        k: how many items per position to store, as int32 (P, k); None stores no items.

    Yields:
        The arrays by name.
    """
    folder.mkdir(parents=True)
    arrays = {name: open_memmap(folder / f"{name}.npy", "w+", np.float16, shape) for name, shape in shapes.items()}
    if k:
        arrays["items"] = open_memmap(folder / "items.npy", "w+", np.int32, (shapes["logits"][0], k))
    yield arrays
    for array in arrays.values():
        array.flush()


def weights_hash(model: nn.Module) -> str:
    """Return a SHA-256 hash over the names, types, shapes and values of a model's parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def batches_hash(batches: Batches, keys: Sequence[str]) -> str:
    """Return a SHA-256 hash over the tensors `keys` of every batch, padding included."""
    digest = hashlib.sha256()
    for batch in batches:
        for name in keys:
            digest.update(f"{name} {tuple(batch[name].shape)}\n".encode())
            digest.update(batch[name].contiguous().numpy().data)
    return digest.hexdigest()
