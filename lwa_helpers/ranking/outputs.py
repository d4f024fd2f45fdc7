"""What a model says at the positions where labels are predicted: states, and logits as they are needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lwa_helpers.fisher.losses import counted, states_at

LOGITS_AT_ONCE = 2**25  # 128 MiB in float32
FLOAT32_HEAD = 2**15  # rows: the items of a catalogue, not the words of a language


@dataclass
class LabelOutputs:
    """What is compared at the P positions that predict: logits head(states) (P, V), which need not exist all at once, the
    token (P,) that follows each, and the states (P, d) after each layer.
    """

    states: Tensor
    head: Callable[[Tensor], Tensor]
    targets: Tensor
    hidden: list[Tensor]

    @property
    def logits(self) -> Tensor:
        return self.head(self.states)

    def parts(self) -> list[slice]:
        """The positions in parts that have at most LOGITS_AT_ONCE logits (or are a single position)."""
        size = max(1, LOGITS_AT_ONCE // self.head(self.states[:1]).shape[-1])
        return [slice(start, min(start + size, len(self.states))) for start in range(0, len(self.states), size)]


def label_outputs(model: nn.Module, batch: dict[str, Tensor], hidden: bool = False) -> LabelOutputs:
    """Run a causal LM and keep only the positions that labels are predicted at (as in next_token_nll).

    hidden: keep the states after each layer as well. Hooks of the model itself do not run: one that is sharded is to be asked
    inside its own forward pass.
    """
    kept = counted(batch)
    states, head, out = states_at(model, batch, kept, output_hidden_states=hidden)
    layers = [state[:, :-1][kept] for state in out.hidden_states[1:]] if hidden else []
    return LabelOutputs(states, in_float32(head), batch["labels"][:, 1:][kept], layers)


def in_float32(head: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a head of at most FLOAT32_HEAD rows that computes in float32 whatever surrounds it; a larger one as it is.

    Scores of neighbouring items differ by less than bfloat16 resolves: in it, MovieLens-100K loses 0.003 NDCG@10. Float32 costs
    such a head 2 % of a training step of SmolLM2-135M.
    """
    if not isinstance(head, nn.Linear) or head.out_features > FLOAT32_HEAD:
        return head

    def exact(states: Tensor) -> Tensor:
        with torch.autocast(states.device.type, enabled=False):
            return F.linear(states.float(), head.weight.float(), head.bias)

    return exact


def in_parts(losses: Callable[[slice], Tensor], own: LabelOutputs) -> Tensor:
    """Return the mean over positions of losses(rows) (n,), means over some of them.

    Where there are more logits than may exist at a time, each part's are computed, used, and computed again in the backward
    pass.
    """
    parts = own.parts()
    if len(parts) == 1:
        return losses(parts[0])
    share = [(rows.stop - rows.start) / len(own.states) for rows in parts]
    return sum(w * checkpoint(losses, rows, use_reentrant=False) for w, rows in zip(share, parts))
