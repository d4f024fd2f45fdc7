"""SASRec with full-softmax cross-entropy, and eSASRec: sequential recommenders that a language model must beat."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from lwa_helpers.errors import LwaError
from lwa_helpers.evaluation.metrics import ndcg_at_k
from lwa_helpers.evaluation.protocol import Cases, cases, item_index, ranks

if TYPE_CHECKING:
    from lwa_helpers.data.interactions import Interactions


class ItemTransformer(nn.Module):
    """Causal transformer over item indices; index n_items starts every sequence and pads short ones on the right.

    Positions are counted from the newest item, as in SASRec, so that a longer history has no position unseen in
    training. Logits over the catalogue are the products of hidden states and item vectors (tied weights).

    Args:
        n_items: the number of items in the catalogue.
        max_length: maximum number of items in a sequence.
        dim: the width of the hidden states, of the item vectors and of SASRec's feed-forward networks.
        layers: the number of layers.
        heads: the number of attention heads.
        dropout: the dropout rate.
        gated: whether to use the layers of eSASRec instead of SASRec's.
    """

    def __init__(
        self, n_items: int, max_length: int, dim: int, layers: int, heads: int, dropout: float, gated: bool = False
    ) -> None:
        super().__init__()
        self.items = nn.Embedding(n_items + 1, dim)
        self.places = nn.Embedding(max_length + 1, dim)
        self.dropout = nn.Dropout(dropout)
        layer = nn.TransformerEncoderLayer(dim, heads, dim, dropout, F.gelu, batch_first=True, norm_first=True)
        plain = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(dim), enable_nested_tensor=False)
        self.encoder = GatedEncoder(dim, layers, heads, dropout) if gated else plain
        for table in (self.items, self.places):
            nn.init.normal_(table.weight, std=dim**-0.5)

    def forward(self, items: torch.Tensor) -> torch.Tensor:
        """Compute the hidden state at each position.

        Args:
            items: (B, T) item indices.

        Returns:
            The hidden states, (B, T, dim). Each depends on the items up to its position and on the number of items
            that follow.
        """
        length = items.shape[1]
        known = (items[:, 1:] != self.items.num_embeddings - 1).sum(dim=1, keepdim=True)
        age = (known - torch.arange(length, device=items.device)).clamp(min=0)
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=items.device)
        embedded = self.items(items) + self.places(age)
        return self.encoder(self.dropout(embedded), mask=mask, is_causal=True)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the scores (…, N) of all items for hidden states (…, dim)."""
        return hidden @ self.items.weight[:-1].T


class GatedLayer(nn.Module):
    """Layer of eSASRec: x + sigmoid(W x) f(norm x), once for attention and once for a SwiGLU network of width 4 dim.

    Source: LiGR, Borisyuk et al. 2025, arXiv:2502.03417, from which eSASRec takes its layers.
    """

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, heads, dropout, batch_first=True)
        self.norms = nn.ModuleList([nn.LayerNorm(dim), nn.LayerNorm(dim)])
        self.gates = nn.ModuleList([nn.Linear(dim, dim), nn.Linear(dim, dim)])
        self.up, self.down = nn.Linear(dim, 8 * dim), nn.Linear(4 * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Map x (B, T, dim) to (B, T, dim); mask (T, T) is added to the attention scores."""
        y = self.norms[0](x)
        y = self.attention(y, y, y, attn_mask=mask, need_weights=False, is_causal=True)[0]
        x = x + self.gates[0](x).sigmoid() * self.dropout(y)
        gate, value = self.up(self.norms[1](x)).chunk(2, dim=-1)
        return x + self.gates[1](x).sigmoid() * self.dropout(self.down(F.silu(gate) * value))


class GatedEncoder(nn.Module):
    """Gated layers and a final norm, with the call signature of nn.TransformerEncoder."""

    def __init__(self, dim: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList([GatedLayer(dim, heads, dropout) for _ in range(layers)])
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: torch.Tensor, mask: torch.Tensor, is_causal: bool = True) -> torch.Tensor:
        """Map x (B, T, dim) to (B, T, dim); mask as in `GatedLayer`."""
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm(x)


class SASRec:
    """Self-attentive sequential recommendation, trained to predict the next item out of the whole catalogue.

    The loss is -log softmax over all N items at every position of the user's train sequence. Training stops when valid
    NDCG@10 has not risen for `patience` epochs and keeps the best epoch; `log` then has one row per epoch. Source: Kang
    & McAuley, ICDM 2018; the full softmax: Klenitskiy & Vasilev, RecSys 2023.
    """

    def __init__(
        self, dim: int = 64, layers: int = 2, heads: int = 2, dropout: float = 0.3, max_length: int = 50,
        learning_rate: float = 3e-3, weight_decay: float = 0.01, batch_size: int = 32, max_epochs: int = 100,
        patience: int = 5, seed: int = 0, device: str = "cpu",
    ) -> None:  # fmt: skip
        if min(dim, layers, heads, max_length, batch_size, max_epochs, patience) < 1 or dim % heads:
            raise LwaError("SASRec needs sizes of at least 1, and dim divisible by heads")
        sizes = {"max_length": max_length, "dim": dim, "layers": layers, "heads": heads}
        self.shape: dict[str, Any] = sizes | {"dropout": dropout}
        self.max_length, self.batch_size, self.seed, self.device = max_length, batch_size, seed, device
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.max_epochs, self.patience = max_epochs, patience

    @property
    def item_vectors(self) -> np.ndarray:
        """The item vectors, (N, dim), in the order of `item_ids`."""
        return self.model.items.weight[:-1].detach().cpu().numpy()

    def fit(self, interactions: Interactions) -> Self:
        """Train on the train part and stop early by the valid part.

        The global random state stays as it was.

        Returns:
            The fitted model itself.

        Raises:
            LwaError: if the train part is empty.
        """
        index = item_index(interactions)
        by_user = interactions.train.groupby("user_id", sort=False).parent_asin
        sequences = [[index[item] for item in items] for _, items in by_user]
        if not sequences:
            raise LwaError(f"{interactions.name}: the train part is empty, so nothing can be learnt; change the split")
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            self.model = ItemTransformer(len(index), **self.shape).to(self.device)
            self._train(sequences, cases(interactions, "valid"))
        return self

    def save(self, path: str | Path) -> None:
        """Write the model and its shape to one safetensors file."""
        shape = self.shape | {"n_items": self.model.items.num_embeddings - 1}
        save_file(self.model.state_dict(), path, metadata={"shape": json.dumps(shape)})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Load a model that `save` wrote; it is ready to score."""
        with safe_open(path, "pt") as file:
            shape = json.loads(file.metadata()["shape"])
        found = cls(**{name: shape[name] for name in ("dim", "layers", "heads", "dropout", "max_length")})
        found.model = ItemTransformer(**shape)
        found.model.load_state_dict(load_file(path))
        return found

    @torch.inference_mode()
    def scores(self, histories: Sequence[Sequence[int]]) -> np.ndarray:
        """Return the logits (B, N) of the next item after each history, from its newest max_length items."""
        self.model.eval()
        rows = [history[-self.max_length :] for history in histories]
        hidden = self.model(self._padded(rows))
        last = torch.tensor([len(row) for row in rows], device=self.device)
        return self.model.logits(hidden[torch.arange(len(rows), device=self.device), last]).float().cpu().numpy()

    def _train(self, sequences: list[list[int]], valid: Cases) -> None:
        optimizer = torch.optim.AdamW(self.model.parameters(), self.learning_rate, weight_decay=self.weight_decay)
        rng = np.random.default_rng(self.seed)
        self.log: list[dict[str, float]] = []
        best, stale = -1.0, 0
        while len(self.log) < self.max_epochs and stale < self.patience:
            loss = self._epoch(sequences, optimizer, rng)
            ndcg = float(ndcg_at_k(ranks(self, valid), 10).mean())
            self.log.append({"epoch": len(self.log) + 1, "loss": loss, "valid NDCG@10": ndcg})
            stale = 0 if ndcg > best else stale + 1
            if not stale:
                best, state = ndcg, copy.deepcopy(self.model.state_dict())
        self.model.load_state_dict(state)

    def _epoch(self, sequences: list[list[int]], optimizer: torch.optim.Optimizer, rng: np.random.Generator) -> float:
        self.model.train()
        total, count = 0.0, 0
        for rows in self._batches(sequences, rng):
            target = self._padded(rows)[:, 1:]
            known = target != self.model.items.num_embeddings - 1
            hidden = self.model(self._padded([row[:-1] for row in rows]))
            loss = self._loss(hidden[known], target[known])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total, count = total + loss.item() * int(known.sum()), count + int(known.sum())
        return total / count

    def _loss(self, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.model.logits(hidden), target)

    def _batches(self, sequences: list[list[int]], rng: np.random.Generator) -> Iterator[list[list[int]]]:
        """Yield shuffled batches of pieces of similar length, at most max_length; a sequence's first cut is random."""
        pieces = []
        for sequence in sequences:
            first = rng.integers(self.max_length) + 1 if len(sequence) > self.max_length else len(sequence)
            cuts = [0, *range(int(first), len(sequence), self.max_length), len(sequence)]
            pieces += [sequence[start:stop] for start, stop in itertools.pairwise(cuts)]
        pieces = [pieces[i] for i in rng.permutation(len(pieces))]
        pieces.sort(key=len)
        starts = np.arange(0, len(pieces), self.batch_size)
        yield from (pieces[start : start + self.batch_size] for start in rng.permutation(starts))

    def _padded(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return (B, 1 + longest) indices: the start index, the items, then padding on the right."""
        start = self.model.items.num_embeddings - 1
        width = 1 + max(map(len, rows))
        return torch.tensor([[start, *row] + [start] * (width - 1 - len(row)) for row in rows], device=self.device)


class ESASRec(SASRec):
    """SASRec with gated layers and a softmax over the target and random negatives.

    Source: eSASRec, Tikhonovich et al., RecSys 2025.

    Args:
        negatives: number of items drawn uniformly for each batch.
        **settings: the arguments of `SASRec`.
    """

    def __init__(self, negatives: int = 256, **settings: Any) -> None:
        super().__init__(**settings)
        self.shape["gated"], self.negatives = True, negatives

    def _loss(self, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        items = self.model.items.weight
        drawn = torch.randint(len(items) - 1, (self.negatives,), device=hidden.device)
        others = (hidden @ items[drawn].T).masked_fill(drawn == target[:, None], -torch.inf)
        scores = torch.cat([(hidden * items[target]).sum(-1, keepdim=True), others], 1)
        return F.cross_entropy(scores, torch.zeros_like(target))
