"""The terms of the distillation loss: cross-entropy, KL divergence at a temperature, distance of hidden states."""

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
    """Return the cross-entropy with the targets and the KL divergence from the teacher, (2,), means over positions.

    Args:
        student: the student's outputs.
        teacher: maps a slice of the positions to the teacher's logits there; without it the KL divergence is 0.
        temperature: tau of the KL divergence.
    """

    def losses(rows: slice) -> Tensor:
        logits = student.head(student.states[rows])
        kl = kl_divergence(logits, teacher(rows), temperature) if teacher else logits.new_zeros(())
        return torch.stack([F.cross_entropy(logits.float(), student.targets[rows]), kl])

    return in_parts(losses, student)


def hidden_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean of 1 - cos(h_s, h_t) over positions, a scalar that ignores each layer's scale; inputs (P, d)."""
    return 1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1).mean()


def kl_divergence(student: Tensor, teacher: Tensor | TopLogits, temperature: float) -> Tensor:
    """Return tau^2 KL(softmax(t / tau) || softmax(s / tau)), the mean over positions, a scalar.

    Args:
        student: the student's logits s, (P, C).
        teacher: the teacher's logits t, (P, C), or its TopLogits at this temperature. TopLogits have k + 1 classes: the
            k items, and all others as one class.
        temperature: tau.

    Raises:
        LwaError: if the teacher's logits have another number of classes.
    """
    if isinstance(teacher, Tensor) and teacher.shape[-1] != student.shape[-1]:
        raise LwaError(
            f"the student tells {student.shape[-1]} tokens or items apart, its teacher {teacher.shape[-1]}: "
            "they must have the same (where the vocabulary is to be cut, cut the teacher's with trim_vocabulary and "
            "build the student from that)"
        )
    log_s = F.log_softmax(student.float() / temperature, dim=-1)
    if isinstance(teacher, TopLogits):
        log_s, log_t = with_rest(log_s, teacher.items), teacher.log_p
    else:
        log_t = F.log_softmax(teacher.float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)
