"""Train the item rows of the embedding and the head in few dimensions, and leave ordinary matrices behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lwa_helpers.models.layers import weight_of


class LowRankUpdate(nn.Module):
    """Compute weight = base + left right, where only `left` (V, rank) and `right` (rank, d) are trained.

    `right` starts at zero, so that the weight is unchanged at first.

    Args:
        base: The weight at the start, (V, d).
        left: The start of `left`, (V, rank).
    """

    base: Tensor

    def __init__(self, base: Tensor, left: Tensor):
        super().__init__()
        self.register_buffer("base", base.detach().clone())
        self.start = left

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the matrix, (V, d)."""
        return self.base + left @ right

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the two factors at the start, for torch's parametrize."""
        return self.start.to(weight).clone(), weight.new_zeros(self.start.shape[1], weight.shape[1])


def main_directions(rows: Tensor, rank: int) -> Tensor:
    """Compute the coordinates of rows along the directions in which they differ most.

    The mean square norm of the coordinates is 1, so that a learning rate means the same for every matrix. (Rows eight
    times as long act like a rate eight times as high, which cost MovieLens-100K a tenth of its NDCG@10.)

    Args:
        rows: The rows, (V, d).
        rank: Number of directions.

    Returns:
        Coordinates (V, rank).
    """
    left, scale, _ = torch.linalg.svd(rows.detach().float(), full_matrices=False)
    left = (left * scale)[:, :rank]
    return (left / left.square().sum(1).mean().sqrt().clamp_min(1e-12)).contiguous()  # contiguous, as FSDP requires


@contextmanager
def low_rank(modules: list[nn.Module], rank: int) -> Iterator[None]:
    """Train the `weight` of each module as a LowRankUpdate inside; afterwards it is a plain parameter again.

    All modules start from the main directions of the last module's rows. For [embedding, head] these are the head's,
    which separate the items as their users do. The embedding's own directions would separate the words of the titles.
    """
    left = main_directions(weight_of(modules[-1]), rank)
    for module in modules:
        parametrize.register_parametrization(module, "weight", LowRankUpdate(weight_of(module), left))
    try:
        yield
    finally:
        for module in modules:
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
