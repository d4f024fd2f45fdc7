"""The item head: after a history, the logits of the item tokens rank the whole catalogue.

The other head is the title head, in title_head.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from lwa_helpers.configs.students import Bf16
from lwa_helpers.data.history_tokens import Reading
from lwa_helpers.models.language_model import LanguageModel
from lwa_helpers.models.layers import backbone
from lwa_helpers.models.precision import autocast
from lwa_helpers.ranking.last_layer import is_exact, last_layer_at
from lwa_helpers.ranking.model_checks import check_positions, head_is_last, plain_model


def sampled_nll(head: nn.Linear, states: Tensor, targets: Tensor, log_q: Tensor, n: int) -> Tensor:
    """Return the mean -log p of the targets, with the softmax denominator Z estimated from n sampled tokens, a scalar.

    The tokens are drawn with replacement from a proposal q, once for all P positions. The estimate is
    Z = e^(s of the target) + (1/n) sum of e^(s - log q) over the drawn tokens other than the target. It is unbiased,
    and its logarithm has an error of O(1/n) (Bengio & Senecal, IEEE Trans. Neural Networks 2008).

    Args:
        head: maps states to scores s of V tokens.
        states: final states, (P, d).
        targets: target tokens, (P,).
        log_q: logarithm of the proposal, (V,); -inf for tokens that are never drawn.
        n: number of tokens to draw.
    """
    drawn = torch.multinomial(log_q.exp(), n, replacement=True)
    own = (states * head.weight[targets].to(states.dtype)).sum(-1).float()
    others = (states @ head.weight[drawn].T.to(states.dtype)).float() - log_q[drawn] - math.log(n)
    others = others.masked_fill(drawn == targets[:, None], -math.inf)
    return (torch.cat([own[:, None], others], 1).logsumexp(1) - own).mean()


def pad_right(rows: Sequence[Sequence[int]], pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Pad rows of different lengths on the right; return their ids and attention mask, (B, T) each."""
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad_id] * (length - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return ids, mask


@torch.no_grad()
def end_states(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the final hidden states at the last token of each right-padded row, (B, d)."""
    rows, ends = torch.arange(len(input_ids), device=input_ids.device), attention_mask.sum(1) - 1
    with last_layer_at(model, rows, ends) if is_exact(model) else nullcontext():
        out = backbone(model)(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    return out.last_hidden_state[rows, ends]


@torch.no_grad()
def end_logits(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the model's own logits at the last token of each right-padded row, (B, V).

    They are what end_states and the head give, except in models that change what their head returns.
    """
    rows, ends = torch.arange(len(input_ids), device=input_ids.device), attention_mask.sum(1) - 1
    head, exact = model.get_output_embeddings(), exact_head(model)
    handles = [
        head.register_forward_pre_hook(lambda _, args: (args[0][rows, ends][None],)),
        head.register_forward_hook(lambda _, args, output: exact(args[0])),
    ]
    try:
        return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()


def exact_head(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """Return a model's head, which computes in float32 even inside autocast, because close scores need that."""
    head = model.get_output_embeddings()

    def exact(states: Tensor) -> Tensor:
        with torch.autocast(states.device.type, enabled=False):
            return type(head).forward(head, states.float())

    return exact


@torch.no_grad()
def rank_catalogue(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    items: slice,
    batch_size: int,
    bf16: Bf16 = False,
    progress: bool = True,
) -> np.ndarray:
    """Return the logits of all item tokens after each prompt, (B, N) float32, in the order of the prompts.

    Args:
        model: a causal LM with item tokens, or a wrapper around one (see plain_model).
        prompts: token ids of each prompt, at least one each.
        items: the columns of the logits that are items, as in ItemTokens.tokens.
        batch_size: number of prompts that are read together; they have similar lengths.
        bf16: whether to compute in bfloat16, except for the head.
        progress: whether to show a progress bar.

    Raises:
        LwaError: if the model has fewer positions than the longest prompt has tokens.
        ValueError: if a prompt is empty.
    """
    if empty := [row for row, prompt in enumerate(prompts) if not len(prompt)]:
        raise ValueError(f"prompt {empty[0]} is empty: after a history without items there is nothing to predict from")
    inner = plain_model(model).eval()
    check_positions(inner, max(map(len, prompts), default=0))
    order = np.argsort([len(prompt) for prompt in prompts], kind="stable")
    scores = np.empty((len(prompts), items.stop - items.start), dtype=np.float32)
    starts = range(0, len(order), batch_size)
    for start in tqdm(starts, desc="ranking", unit="batch", mininterval=10, disable=not progress):
        rows = order[start : start + batch_size]
        ids, mask = (part.to(inner.device) for part in pad_right([prompts[row] for row in rows]))
        with autocast(bf16, inner.device):
            if head_is_last(inner):
                logits = exact_head(inner)(end_states(inner, ids, mask))
            else:
                logits = end_logits(inner, ids, mask)
        scores[rows] = logits[:, items].float().cpu().numpy()
    return scores


class ItemRanker:
    """The item head for histories of item indices, called in the same way as TitleRanker and the baselines.

    Args:
        lm: a language model with item tokens.
        reading: how histories become tokens.
        batch_size: number of histories that are read together; they have similar lengths.
        bf16: whether to compute in bfloat16, except for the head.
        max_items: how many of the newest items of a history are read; None reads all.
    """

    def __init__(
        self,
        lm: LanguageModel,
        reading: Reading,
        batch_size: int = 32,
        bf16: Bf16 = False,
        max_items: int | None = None,
    ):
        self.lm, self.reading, self.batch_size, self.bf16, self.max_items = lm, reading, batch_size, bf16, max_items

    def scores(self, histories: Sequence[Sequence[int]]) -> np.ndarray:
        """Return the score of every item of the catalogue after each history, (B, N) float32.

        An item index outside the catalogue raises ValueError. So does an empty history if the reading has no header.
        """
        assert self.lm.items is not None  # this head ranks item tokens
        prompts = [self.reading.prompt(history, self.max_items) for history in histories]
        return rank_catalogue(self.lm.model, prompts, self.lm.items.tokens, self.batch_size, self.bf16)
