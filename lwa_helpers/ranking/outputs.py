"""A model's outputs at the positions that predict labels: states, and logits computed when needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lwa_helpers.fisher.losses import counted, states_at
from lwa_helpers.ranking.model_checks import check_positions

LOGITS_AT_ONCE = 2**25  # 128 MiB in float32
FLOAT32_HEAD = 2**15  # rows: room for the items of a catalogue, but not for the vocabulary of a language


@dataclass
class LabelOutputs:
    """A model's outputs at the P positions that predict a label.

    The logits head(states) need not all exist at the same time.

    Attributes:
        states: final states, (P, d).
        head: maps states to logits, (P, d) to (P, V).
        targets: the token that follows each position, (P,).
        hidden: the states after each layer, (P, d) each; empty if they were not kept.
    """

    states: Tensor
    head: Callable[[Tensor], Tensor]
    targets: Tensor
    hidden: list[Tensor]

    @property
    def logits(self) -> Tensor:
        """The logits of all positions, (P, V)."""
        return self.head(self.states)

    def parts(self) -> list[slice]:
        """Split the positions into parts with at most LOGITS_AT_ONCE logits each, but at least one position."""
        size = max(1, LOGITS_AT_ONCE // self.head(self.states[:1]).shape[-1])
        return [slice(start, min(start + size, len(self.states))) for start in range(0, len(self.states), size)]


def label_outputs(model: nn.Module, batch: dict[str, Tensor], hidden: bool = False) -> LabelOutputs:
    """Run a causal LM and keep only the positions that predict labels, as in next_token_nll.

    Forward hooks of the model itself do not run. A sharded model must therefore be run inside its own forward pass (see
    training.through).

    Args:
        model: a causal LM.
        batch: input_ids and labels, and attention_mask if there is padding, (B, T) each.
        hidden: whether to keep the states after each layer as well.

    Returns:
        The outputs at these positions, in the order of the rows.

    Raises:
        LwaError: if the model has fewer positions than the rows have tokens.
    """
    kept = counted(batch)
    check_positions(model, batch["input_ids"].shape[1])
    states, head, out = states_at(model, batch, kept, output_hidden_states=hidden)
    layers = [state[:, :-1][kept] for state in out.hidden_states[1:]] if hidden else []
    return LabelOutputs(states, in_float32(head), batch["labels"][:, 1:][kept], layers)


def in_float32(head: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a version of the head that computes in float32 even inside autocast, or a large head as it is.

    A head is large if it has more than FLOAT32_HEAD rows. Scores of neighbouring items differ by less than the
    resolution of bfloat16, which costs 0.003 NDCG@10 on MovieLens-100K. The float32 head takes 2 % of a training step
    of SmolLM2-135M.
    """
    if not isinstance(head, nn.Linear) or head.out_features > FLOAT32_HEAD:
        return head

    def exact(states: Tensor) -> Tensor:
        with torch.autocast(states.device.type, enabled=False):
            return F.linear(states.float(), head.weight.float(), head.bias)

    return exact


def in_parts(losses: Callable[[slice], Tensor], own: LabelOutputs) -> Tensor:
    """Return the means of n losses over all positions, (n,).

    If there are more than LOGITS_AT_ONCE logits, the positions are processed in parts. The logits of a part are not
    kept but computed again in the backward pass.

    Args:
        losses: maps a slice of the positions to the means of the losses over these positions, (n,).
        own: the outputs that the losses are computed from.
    """
    parts = own.parts()
    if len(parts) == 1:
        return losses(parts[0])
    share = [(rows.stop - rows.start) / len(own.states) for rows in parts]
    return sum(w * checkpoint(losses, rows, use_reentrant=False) for w, rows in zip(share, parts))
