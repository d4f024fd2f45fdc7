"""The item head: a causal LM reads the history once, and item vectors rank the whole catalogue. The other: title_ranker.py."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lwa_helpers.config import Bf16
from lwa_helpers.data.windows import Window, check_items, collate, encode
from lwa_helpers.errors import LwaError
from lwa_helpers.last_layer import last_layer_at
from lwa_helpers.models import LanguageModel, backbone, load_teacher
from lwa_helpers.precision import autocast
from lwa_helpers.vocabulary import check_covered

HEAD_FILE = "item_head.safetensors"
ITEMS_FILE = "items.json"
INITIAL_SCALE = 0.02


class ItemHead(nn.Module):
    """score(h, i) = (W h) . e_i + b_i for every item i: hidden (..., d) -> scores (..., N)."""

    def __init__(self, vectors: Tensor, log_popularity: Tensor):
        """vectors (N, d): starting item table; log_popularity (N,): starting bias."""
        super().__init__()
        self.table = nn.Parameter(vectors.clone().float())
        self.bias = nn.Parameter(log_popularity.clone().float())
        self.project = nn.Linear(vectors.shape[1], vectors.shape[1], bias=False)
        nn.init.eye_(self.project.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        return (self.project(hidden) @ self.table.T).float() + self.bias


@dataclass
class RankingOutput:
    """loss: mean NLL over targets, or None; logits (P, N) at the P labelled positions, None where the loss was sampled."""

    loss: Tensor | None
    logits: Tensor | None


class ItemRankingModel(nn.Module):
    """A causal LM without its vocabulary head, and an item head that reads it where a title ends."""

    def __init__(self, causal_lm: PreTrainedModel, head: ItemHead, next_items: int = 1, softmax_items: int | None = None):
        """next_items: how many of the following targets of a row the training loss of a position counts; softmax_items: in
        a catalogue of more items than this, training on labels draws so many for its softmax (sampled_nll); None: never."""
        super().__init__()
        self.causal_lm, self.head, self.next_items, self.softmax_items = causal_lm, head, next_items, softmax_items
        causal_lm.config.use_cache = False
        if causal_lm.device.type == "cpu":
            causal_lm.set_attn_implementation("eager")  # torch's fused attention is the slower one there for short windows

    @property
    def config(self):
        return self.causal_lm.config

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, item_labels: Tensor, labels: Tensor | None = None
    ) -> RankingOutput:
        """Score every item at each position of (B, T) whose item_labels is not -100; `labels` (title tokens) are not read."""
        at = item_labels != -100
        states = self.last_hidden(input_ids, attention_mask)[at]
        if self.training and self.softmax_items and len(self.head.bias) > self.softmax_items and at.any():
            future = future_targets(item_labels, self.next_items)
            return RankingOutput(sampled_nll(self.head, states, future, self.softmax_items), None)
        logits = self.head(states)
        return RankingOutput(next_items_loss(logits, item_labels, self.next_items) if at.any() else None, logits)

    def gradient_checkpointing_enable(self, **options) -> None:
        """Compute activations again in the backward pass; Trainer calls it when its arguments say so."""
        self.causal_lm.gradient_checkpointing_enable(**options)

    def last_hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Final hidden states, (B, T, d)."""
        return backbone(self.causal_lm)(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    def end_states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Final hidden states at the last token of each right-padded row, (B, d), without gradients."""
        rows, ends = torch.arange(len(input_ids), device=input_ids.device), attention_mask.sum(1) - 1
        with torch.no_grad(), last_layer_at(self.causal_lm, rows, ends):
            return self.last_hidden(input_ids, attention_mask)[rows, ends]

    def save(self, directory: str | Path, tokenizer: PreTrainedTokenizerBase, item_ids: Sequence[str]) -> None:
        """Write a plain transformers checkpoint with its tokenizer, the item head beside it, and whose rows they are."""
        self.causal_lm.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        save_file(self.head.state_dict(), Path(directory) / HEAD_FILE)
        (Path(directory) / ITEMS_FILE).write_text(json.dumps(list(item_ids)), encoding="utf-8")


def future_targets(item_labels: Tensor, n: int) -> Tensor:
    """Return, for each of the P labelled positions of (B, T), its target and the n-1 targets after it in the same row.

    (P, n) item indices, -100 where the row has no further target.
    """
    rows, columns = (item_labels != -100).nonzero(as_tuple=True)
    targets = item_labels[rows, columns]
    future = targets.new_full((len(targets), n), -100)
    for step in range(min(n, len(targets))):
        same = rows[: len(rows) - step] == rows[step:]
        future[: len(rows) - step, step] = torch.where(same, targets[step:], -100)
    return future


def next_items_loss(logits: Tensor, item_labels: Tensor, n: int = 1) -> Tensor:
    """Return the mean over positions of the mean -log p of the next n targets in the row, a scalar; n = 1 is next-item loss.

    The items of one session often share a time stamp, so that their order says little: with n > 1 each position learns from
    the few that follow. logits (P, N) at the labelled positions of item_labels (B, T).
    """
    return future_nll(logits, future_targets(item_labels, n))


def future_nll(logits: Tensor, future: Tensor) -> Tensor:
    """Return the mean over positions of the mean -log p of their known targets, a scalar.

    logits (P, N); future (P, n) item indices, -100 where there is none, the first of each row known.
    """
    return _mean_known(-logits.float().log_softmax(-1).gather(1, future.clamp_min(0)), future)


def sampled_nll(head: ItemHead, hidden: Tensor, future: Tensor, n: int) -> Tensor:
    """Return future_nll(head(hidden), future) with the softmax's denominator Z estimated from n drawn items, a scalar.

    Items are drawn with replacement from q = softmax(head.bias), at first their popularity, once for all P positions.
    Z = sum over a row's own targets of e^s + (1/n) sum over the drawn items that are none of them of e^(s - log q), which
    is unbiased; its logarithm errs by O(1/n). Source: Bengio & Senecal, 2008. hidden (P, d); future (P, m) as in future_nll.
    """
    log_q = head.bias.detach().log_softmax(0)
    drawn = torch.multinomial(log_q.exp(), n, replacement=True)
    query, own = head.project(hidden), future.clamp_min(0)
    scores = (torch.einsum("pd,pmd->pm", query, head.table[own].to(query.dtype))).float() + head.bias[own]
    others = (query @ head.table[drawn].T).float() + head.bias[drawn] - log_q[drawn] - math.log(n)
    repeated = (future[:, :, None] == future[:, None, :]).tril(-1).any(2) | (future == -100)
    hit = (drawn == future[:, :, None]).any(1)
    log_z = torch.cat([scores.masked_fill(repeated, -math.inf), others.masked_fill(hit, -math.inf)], 1).logsumexp(1)
    return _mean_known(log_z[:, None] - scores, future)


def _mean_known(nll: Tensor, future: Tensor) -> Tensor:
    """Mean over rows of (P, m) of the mean over the known targets of each."""
    known = future != -100
    return ((nll * known).sum(1) / known.sum(1)).mean()


def load_item_head(directory: str | Path) -> ItemHead:
    """Read the head that ItemRankingModel.save wrote. Raises LwaError when it is absent."""
    path = Path(directory) / HEAD_FILE
    if not path.is_file():
        raise LwaError(f"{path} does not exist: this checkpoint has no item head")
    state = load_file(path)
    head = ItemHead(state["table"], state["bias"])
    head.load_state_dict(state)
    return head


def load_item_ranker(directory: str | Path) -> tuple[ItemRankingModel, LanguageModel]:
    """Read a saved ranking model: the model, and the checkpoint with its tokenizer. Raises LwaError when it has no head."""
    head = load_item_head(directory)
    checkpoint = load_teacher(directory)
    return ItemRankingModel(checkpoint.model, head).eval(), checkpoint


def item_row_nll(model: ItemRankingModel, batch: dict[str, Tensor]) -> Tensor:
    """Return the summed -log softmax of each row's targets, (B,): the Fisher loss of the item head."""
    out = model(**{key: batch[key] for key in ("input_ids", "attention_mask", "item_labels")})
    rows, positions = (batch["item_labels"] != -100).nonzero(as_tuple=True)
    nll = F.cross_entropy(out.logits, batch["item_labels"][rows, positions], reduction="none")
    return torch.zeros(len(batch["input_ids"]), dtype=nll.dtype, device=nll.device).index_add(0, rows, nll)


def _sample_items(model: ItemRankingModel, batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Return the batch with item labels drawn from the model: what the sampled (true) Fisher needs."""
    out = model(**{key: batch[key] for key in ("input_ids", "attention_mask", "item_labels")})
    drawn = torch.multinomial(out.logits.softmax(-1), 1, generator=generator).squeeze(1)
    labels = batch["item_labels"].clone()
    labels[labels != -100] = drawn
    return batch | {"item_labels": labels}


item_row_nll.sample = _sample_items


@torch.no_grad()
def title_vectors(
    causal_lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, header: str, titles: Sequence[str], batch_size: int = 64,
    bf16: Bf16 = False,
) -> Tensor:
    """Return a starting vector for every title, (N, d): its mean final hidden state after `header`, each dimension
    standardised over the catalogue and scaled by INITIAL_SCALE, so that first scores are small beside log popularity."""
    prefix, tokens = encode(tokenizer, header, [title + "\n" for title in titles])
    vectors = torch.empty(len(titles), causal_lm.config.hidden_size)
    by_length = sorted(range(len(titles)), key=lambda i: len(tokens[i]))
    for start in range(0, len(titles), batch_size):
        chosen = by_length[start : start + batch_size]
        ids, mask = (rows.to(causal_lm.device) for rows in pad_right([prefix + tokens[i] for i in chosen]))
        with autocast(bf16, causal_lm.device):
            hidden = backbone(causal_lm)(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        own = mask.clone()
        own[:, : len(prefix)] = 0
        vectors[chosen] = ((hidden * own[..., None]).sum(1) / own.sum(1, keepdim=True)).float().cpu()
    centred = vectors - vectors.mean(0)
    return INITIAL_SCALE * centred / spread(centred).clamp_min(1e-6)


def spread(rows: Tensor) -> Tensor:
    """Return the standard deviation of each column of (n, d): (d,), 0 for a single row."""
    return rows.std(0, correction=min(1, len(rows) - 1))


def pad_right(rows: Sequence[Sequence[int]], pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Return ids and attention mask (B, T) of rows of different length."""
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad_id] * (length - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return ids, mask


@torch.no_grad()
def rank_catalogue(model: ItemRankingModel, windows: Sequence[Window], batch_size: int, bf16: Bf16 = False) -> np.ndarray:
    """Return the scores of all items at the last token of each window, (len(windows), N) float32, in their order.

    Windows of like length are read together, `batch_size` at a time.
    """
    model.eval()
    device = next(model.parameters()).device
    order = np.argsort([len(window.input_ids) for window in windows], kind="stable")
    scores = np.empty((len(windows), len(model.head.bias)), dtype=np.float32)
    for start in tqdm(range(0, len(order), batch_size), desc="ranking", unit="batch", mininterval=10):
        rows = order[start : start + batch_size]
        batch = {key: value.to(device) for key, value in collate([windows[i] for i in rows], pad_id=0).items()}
        with autocast(bf16, device):
            scores[rows] = model.head(model.end_states(batch["input_ids"], batch["attention_mask"])).cpu().numpy()
    return scores


class ItemRanker:
    """The item head for histories of item indices, as TitleRanker and the baselines are asked."""

    def __init__(
        self, model: ItemRankingModel, tokenizer: PreTrainedTokenizerBase, header: str, titles: Sequence[str],
        batch_size: int = 32, bf16: Bf16 = False, max_titles: int | None = None,
    ):
        """batch_size: histories read together, of like length; max_titles: the newest, that are read (None: all).

        Raises LwaError for a title outside the model's cut vocabulary.
        """
        self.model, self.batch_size, self.bf16, self.max_titles = model, batch_size, bf16, max_titles
        lines = [title + "\n" for title in titles]
        check_covered(tokenizer, [header, *lines])
        self.header, self.tokens = encode(tokenizer, header, lines)

    def scores(self, histories: Sequence[Sequence[int]]) -> np.ndarray:
        """Return the score of every item of the catalogue after each history, (B, N) float32.

        Raises ValueError for an item index outside the catalogue.
        """
        check_items(histories, len(self.tokens))
        newest = histories
        if self.max_titles is not None:
            newest = [history[max(0, len(history) - self.max_titles) :] for history in histories]
        rows = [[*self.header, *(token for item in history for token in self.tokens[item])] for history in newest]
        return rank_catalogue(self.model, [Window("", row, [-100] * len(row)) for row in rows], self.batch_size, self.bf16)
