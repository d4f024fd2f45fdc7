"""Build a student from a teacher's own decoder layers: choose the layers to keep and copy the model with only these."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from torch import nn

from lwa_helpers.errors import LwaError
from lwa_helpers.fisher.importance import leave_one_layer_out
from lwa_helpers.fisher.losses import Loss, next_token_nll
from lwa_helpers.fisher.result import FisherResult
from lwa_helpers.models.language_model import LanguageModel
from lwa_helpers.models.layers import decoder_layers
from lwa_helpers.models.pruning import with_layers
from lwa_helpers.models.vocabulary import trim_vocabulary

# The selections that need scores, and what to pass as scores.
SCORED = {
    "top_fisher": "a FisherResult of the teacher",
    "block_influence": "importance.block_influence(teacher, batches)",
    "greedy": "student.greedy_scores(teacher, batches)",
}

SELECTIONS = ("first", "last", "first_last", "uniform", "drop_block", "random", *SCORED)


def select_layers(
    teacher_layers: int,
    n_layers: int,
    selection: str | Sequence[int],
    scores: FisherResult | Sequence[float] | np.ndarray | None = None,
    seed: int = 0,
) -> list[int]:
    """Return the indices of the teacher layers that the student keeps, in increasing order.

    Args:
        teacher_layers: L, the number of layers of the teacher.
        n_layers: n, the number of layers to keep.
        selection: the indices themselves, or one of
            "first": the n lowest;
            "last": the n highest;
            "first_last": half from each end;
            "drop_block": the n-1 lowest and the last;
            "uniform": evenly spaced, with both ends;
            "random": drawn with the seed;
            "top_fisher", "block_influence", "greedy": the n with the highest scores; of equal scores, the lower layer.
        scores: one score per teacher layer, (L,), for the selections that need them.
        seed: for "random".

    Raises:
        LwaError: if n_layers is not between 1 and L, if `selection` is unknown or does not name n_layers different
            layers, or if the scores that it needs are missing or do not fit.
    """
    if not isinstance(n_layers, (int, np.integer)) or not 1 <= n_layers <= teacher_layers:
        raise LwaError(
            f"n_layers = {n_layers!r}: the teacher has {teacher_layers} layers, choose 1 to {teacher_layers}"
        )
    everything = list(range(teacher_layers))
    if not isinstance(selection, str):
        kept = sorted({int(index) for index in selection})
        if not len(selection) == len(kept) == n_layers or not set(kept) <= set(everything):
            raise LwaError(
                f"selection {list(selection)} must name {n_layers} different layers of 0 to {teacher_layers - 1}"
            )
        return kept
    match selection:
        case "first":
            return everything[:n_layers]
        case "last":
            return everything[teacher_layers - n_layers :]
        case "first_last":
            return everything[: (n_layers + 1) // 2] + everything[teacher_layers - n_layers // 2 :]
        case "drop_block":
            return everything[: n_layers - 1] + everything[-1:]
        case "uniform":
            return sorted(np.linspace(0, teacher_layers - 1, n_layers).round().astype(int).tolist())
        case "random":
            return sorted(np.random.default_rng(seed).choice(teacher_layers, n_layers, replace=False).tolist())
        case "top_fisher" | "block_influence" | "greedy":
            values = _layer_scores(selection, scores, teacher_layers)
            return sorted(np.argsort(-values, kind="stable")[:n_layers].tolist())
    raise LwaError(f"unknown selection {selection!r}: one of {', '.join(SELECTIONS)}, or a list of layer indices")


def _layer_scores(
    selection: str, scores: FisherResult | Sequence[float] | np.ndarray | None, n_layers: int
) -> np.ndarray:
    """Return the scores, (L,), for a selection that needs them; only top_fisher accepts Fisher information."""
    if scores is None or (isinstance(scores, FisherResult) and selection != "top_fisher"):
        raise LwaError(f"selection {selection!r} needs scores, one per teacher layer: pass scores={SCORED[selection]}")
    values = np.asarray(scores.per_layer if isinstance(scores, FisherResult) else scores, dtype=np.float64)
    if values.shape != (n_layers,) or not np.isfinite(values).all():
        raise LwaError(
            f"selection {selection!r}: scores of shape {values.shape} given, {n_layers} finite ones are needed"
        )
    return values


def greedy_scores(
    model: nn.Module, batches: Iterable[dict], loss: Loss = next_token_nll, n_layers: int = 1
) -> np.ndarray:
    """Return each layer's place (0, 1, …) in the order in which a greedy search drops layers, (L,).

    Each step drops the layer whose removal raises the mean loss least, and then measures all remaining layers again
    (SLEB, Song et al. 2024, arXiv:2402.09025). The last `n_layers` layers share the highest place. The n highest scores
    are therefore the greedy choice of n layers, for every n >= n_layers.

    Args:
        model: the model; it is copied, not changed.
        batches: batches of tensors to measure the loss on, read once.
        loss: maps model and batch to one loss per row, (B,).
        n_layers: number of layers to leave.
    """
    batches = list(batches)
    left = list(range(len(decoder_layers(model))))
    scores = np.full(len(left), float(len(left) - n_layers))
    for place in range(len(left) - n_layers):
        worst = int(leave_one_layer_out(with_layers(model, left), batches, loss).argmin())
        scores[left.pop(worst)] = place
    return scores


def build_student(
    teacher: LanguageModel,
    n_layers: int = 8,
    selection: str | Sequence[int] = "uniform",
    texts: Iterable[str] | None = None,
    scores: FisherResult | Sequence[float] | np.ndarray | None = None,
    seed: int = 0,
) -> LanguageModel:
    """Return a student made of `n_layers` of the teacher's own layers; the teacher is not changed.

    Args:
        teacher: the teacher.
        n_layers: number of layers to keep.
        selection: which layers to keep (see select_layers).
        texts: cut the vocabulary to what these texts need (see trim_vocabulary); None keeps the whole vocabulary.
        scores: for the selections that need scores (see select_layers).
        seed: for the selection "random".

    Example:
        >>> from lwa_helpers import load_teacher
        >>> student = build_student(load_teacher("smollm2-135m"), n_layers=8, selection="first")
        >>> student.model.config.num_hidden_layers
        8
    """
    kept = select_layers(len(decoder_layers(teacher.model)), n_layers, selection, scores, seed)
    student = replace(teacher, name=f"{teacher.name}-{n_layers}L", model=with_layers(teacher.model, kept))
    return student if texts is None else trim_vocabulary(student, texts)
