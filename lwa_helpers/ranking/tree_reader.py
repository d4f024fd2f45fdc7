"""A causal LM that reads trees of tokens after prompts, every path as if it were read alone."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from lwa_helpers.errors import LwaError
from lwa_helpers.fisher.losses import read_at
from lwa_helpers.models.layers import backbone, text_config
from lwa_helpers.ranking.model_checks import difference, tolerance

LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}  # layer types whose mask can be a tree's
BRANCHES = 16  # other branches of the tree that check_tree reads
READ_RIGHT: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # longest prompt that check_tree found right


class TreeReader:
    """A causal LM that has read B prompts and reads trees of tokens that continue them.

    A token attends to its prompt and its ancestors, at the position that it has on its own path. Its logits therefore
    equal those from reading that path alone (tree attention: Miao et al., SpecInfer, ASPLOS 2024). The root of a tree
    is the last token of its prompt, so that token is read with the tree.

    Args:
        model: a causal LM.
        prompts: token ids of each prompt, at least one each.

    Raises:
        LwaError: if the model does not accept such a mask.
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]]):
        body = checked_backbone(model)
        self.model, self.cache = model, DynamicCache()
        self.last = np.array([prompt[-1] for prompt in prompts])
        self.lengths = np.array([len(prompt) - 1 for prompt in prompts])
        self.width = width = self.lengths.max()
        ids = np.array([[0] * (width + 1 - len(prompt)) + list(prompt[:-1]) for prompt in prompts], dtype=np.int64)
        self.positions = np.arange(width) - (width - self.lengths)[:, None]  # below zero: padding, on the left
        if width:
            visible = (self.positions >= 0)[:, None, :] & np.tri(width, dtype=bool)
            body(**self._inputs(ids, self.positions, visible))

    def read(self, tokens: np.ndarray, depths: np.ndarray, visible: np.ndarray) -> Tensor:
        """Read Q tokens of each tree.

        Args:
            tokens: token ids, (B, Q); those at depth 0 are not used, since the root is the prompt's last token.
            depths: the depth of each token in its tree, (B, Q).
            visible: which of the R tokens that were read after the prompt, and of these Q tokens, each of the Q tokens
                attends to, (B, Q, R + Q).

        Returns:
            The logits after each token, (B, Q, V).
        """
        tokens = np.where(depths == 0, self.last[:, None], tokens)
        at = self.lengths[:, None] + depths
        self.positions = np.concatenate([self.positions, at], 1)
        prompt = np.broadcast_to((self.positions[:, None, : self.width] >= 0), (*tokens.shape, self.width))
        return self.model(**self._inputs(tokens, at, np.concatenate([prompt, visible], 2))).logits

    def forget(self) -> None:
        """Forget all tokens that were read after the prompts."""
        self.cache.crop(int(self.width - self.positions.shape[1]))
        self.positions = self.positions[:, : self.width]

    def _inputs(self, tokens: np.ndarray, at: np.ndarray, visible: np.ndarray) -> dict:
        to = self.model.device
        return {
            "input_ids": torch.from_numpy(tokens).to(to),
            "position_ids": torch.from_numpy(at.clip(0)).to(to),
            "attention_mask": self._masks(at, visible),
            "past_key_values": self.cache,
            "use_cache": True,
        }

    def _masks(self, at: np.ndarray, visible: np.ndarray) -> Tensor | dict[str, Tensor]:
        """Return the additive mask (B, 1, Q, K), or one for each layer type if the model has layer types."""
        config = text_config(self.model)
        kinds = getattr(config, "layer_types", None)
        if kinds is None:
            kind = "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
            return self._additive(visible & self._near(kind, at))
        return {kind: self._additive(visible & self._near(kind, at)) for kind in set(kinds)}

    def _near(self, kind: str, at: np.ndarray) -> np.ndarray | bool:
        """Return which tokens are near enough for layers of a kind, (B, Q, K)."""
        config, query, key = text_config(self.model), at[:, :, None], self.positions[:, None, :]
        if kind == "sliding_attention" and config.sliding_window is not None:
            return query - key < config.sliding_window
        if kind == "chunked_attention":
            return query // config.attention_chunk_size == key // config.attention_chunk_size
        return True

    def _additive(self, visible: np.ndarray) -> Tensor:
        dtype, hidden = self.model.dtype, torch.from_numpy(~visible[:, None]).to(self.model.device)
        return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(hidden, torch.finfo(dtype).min)


def checked_backbone(model: PreTrainedModel) -> nn.Module:
    """Return the model's layers without its head, if they follow a given attention mask and given position ids.

    Raises:
        LwaError: if they do not.
    """
    config, body = text_config(model), backbone(model)
    if strange := set(getattr(config, "layer_types", None) or ()) - LAYERS:
        raise LwaError(_refusal(model, f"its {' and '.join(sorted(strange))} layers follow no attention mask"))
    if "local" in (getattr(config, "attention_layers", None) or ()):  # GPT-Neo
        raise LwaError(
            _refusal(model, "its local attention goes by a token's place in the row, whatever the mask says")
        )
    if getattr(config, "alibi", False):
        raise LwaError(_refusal(model, "its attention biases (ALiBi) go by a token's place in the row"))
    if "position_ids" not in inspect.signature(body.forward).parameters:
        raise LwaError(_refusal(model, "its layers take no position_ids"))
    return body


def _refusal(model: PreTrainedModel, reason: str) -> str:
    """Return the message for a model that the title head cannot use."""
    return f"{type(model).__name__} cannot rank by title: {reason}; use the item head"


@torch.no_grad()
def check_tree(model: PreTrainedModel, prompt: Sequence[int], title: Sequence[int]) -> None:
    """Check that a tree gives a title the probabilities that one plain pass over prompt and title gives it.

    Settings alone do not show every window or bias, so this is measured, at the longest prompt of each model. A shorter
    prompt is within what was measured and is not read again. The title is one branch of a tree with other branches.

    Args:
        model: a causal LM.
        prompt: token ids, at least one.
        title: token ids, at least one.

    Raises:
        LwaError: if the probabilities differ, or the model does not run with a tree's mask.
    """
    if READ_RIGHT.get(model, 0) >= len(prompt):
        return
    beginnings = [prompt[:8], prompt[:3]]  # so that padding is measured too, on rows that cost nothing
    try:
        gap = max(_gap(model, rows, title) for rows in ([prompt], beginnings))
    except Exception as error:  # what a model raises for such a mask is open-ended
        if isinstance(error, LwaError | torch.OutOfMemoryError):
            raise
        reason = f"it fails on a tree's attention mask ({type(error).__name__}: {_first_line(error)})"
        raise LwaError(_refusal(model, reason)) from error
    if gap > tolerance(model):
        reason = f"after {len(prompt)} tokens its logits for titles in a tree are {gap:.1%} off those for one title"
        raise LwaError(_refusal(model, f"{reason}, so its attention does not follow the mask"))
    READ_RIGHT[model] = len(prompt)


def _gap(model: PreTrainedModel, prompts: Sequence[Sequence[int]], title: Sequence[int]) -> float:
    """Return how far the logits that predict a title in a tree are off those of a plain pass, over all prompts."""
    got = _branch(TreeReader(model, prompts), title)
    return difference(got, torch.stack([_plain(model, prompt, title) for prompt in prompts]))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no reason given")


def _branch(reader: TreeReader, title: Sequence[int]) -> Tensor:
    """Return the logits that predict a title's tokens, read after other branches of one token each, (B, P, V)."""
    row = np.array([0, *(title[place % len(title)] for place in range(BRANCHES)), *title[:-1]])
    depths = np.array([0, *[1] * BRANCHES, *range(1, len(title))])
    sees = np.eye(len(row), dtype=bool)
    sees[:, 0] = True
    sees[1 + BRANCHES :, 1 + BRANCHES :] = np.tri(len(title) - 1, dtype=bool)
    rows = len(reader.last)
    logits = reader.read(np.tile(row, (rows, 1)), np.tile(depths, (rows, 1)), np.tile(sees, (rows, 1, 1)))
    return logits[:, [0, *range(1 + BRANCHES, len(row))]]


def _plain(model: PreTrainedModel, prompt: Sequence[int], title: Sequence[int]) -> Tensor:
    """Return the logits that predict a title's tokens from one pass over prompt and title, (P, V)."""
    ids = torch.tensor([[*prompt, *title]], device=model.device)
    kept = torch.zeros(1, ids.shape[1] - 1, dtype=torch.bool, device=model.device)
    kept[:, len(prompt) - 1 :] = True
    return read_at(model, {"input_ids": ids}, kept)[0]
