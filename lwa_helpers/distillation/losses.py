"""The terms of the distillation loss: cross-entropy, temperature KL, distance of hidden states."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lwa_helpers.distillation.teacher_cache import TopLogits, with_rest
from lwa_helpers.errors import LwaError
from lwa_helpers.ranking.outputs import LabelOutputs, in_parts

LogitsAt = Callable[[slice], Tensor | TopLogits]


def output_losses(student: LabelOutputs, teacher: LogitsAt | None, temperature: float) -> Tensor:
    """Return the means over positions of the cross-entropy with the targets and of the KL to the teacher (0 without), (2,).

    teacher(rows): what it says at these positions.
    """

    def losses(rows: slice) -> Tensor:
        logits = student.head(student.states[rows])
        kl = kl_divergence(logits, teacher(rows), temperature) if teacher else logits.new_zeros(())
        return torch.stack([F.cross_entropy(logits.float(), student.targets[rows]), kl])

    return in_parts(losses, student)


def hidden_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean of 1 - cos(h_s, h_t) over positions, a scalar: free of each layer's scale. Inputs (P, d)."""
    return 1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1).mean()


def kl_divergence(student: Tensor, teacher: Tensor | TopLogits, temperature: float) -> Tensor:
    """Return tau^2 KL(softmax(t / tau) || softmax(s / tau)), mean over positions, a scalar. Inputs (P, C).

    A teacher's TopLogits, taken at that temperature, has k + 1 classes: its k items, and all others as one.
    Raises LwaError for another number of classes.
    """
    if isinstance(teacher, Tensor) and teacher.shape[-1] != student.shape[-1]:
        raise LwaError(
            f"the student tells {student.shape[-1]} tokens or items apart, its teacher {teacher.shape[-1]}: they must have the same "
            "(where the vocabulary is to be cut, cut the teacher's with trim_vocabulary and build the student from that)"
        )
    log_s = F.log_softmax(student.float() / temperature, dim=-1)
    if isinstance(teacher, TopLogits):
        log_s, log_t = with_rest(log_s, teacher.items), teacher.log_p
    else:
        log_t = F.log_softmax(teacher.float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)
