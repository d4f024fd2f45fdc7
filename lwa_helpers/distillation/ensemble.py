"""Several teachers as one: their item probabilities are averaged at every training position."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from lwa_helpers import files
from lwa_helpers.assets import cache_entry
from lwa_helpers.data.windows import Window
from lwa_helpers.distillation.identity import FILE, check_same_items
from lwa_helpers.distillation.output_folders import META
from lwa_helpers.distillation.teacher_cache import TeacherOutputs, output_arrays
from lwa_helpers.errors import LwaError
from lwa_helpers.evaluation.calibration import Calibration
from lwa_helpers.evaluation.calibration import weights as fair_weights
from lwa_helpers.evaluation.cross_fit import CrossFitted

ROWS = 1024  # positions that are fused at a time
SMALLEST = 1e-30  # lower limit of a fused probability, so that its logarithm is finite
NOTHING = -1e4  # logit of a token that is not an item: its probability is 0 in float32, and float16 can hold it


def recommender_outputs(
    recommender: CrossFitted,
    windows: Sequence[Window],
    like: TeacherOutputs,
    directory: Path,
    items: slice,
    scale: float = 1.0,
) -> TeacherOutputs:
    """Write the outputs of a recommender without a language model (SASRec, EASE) in the form of teacher outputs.

    The logits of the item tokens are `scale` times the recommender's scores, given the items that precede each target.
    The hidden states are copied from `like`.

    Args:
        recommender: the recommender.
        windows: the windows that `like` was computed on.
        like: a teacher's outputs on these windows, with all logits.
        directory: the folder to write.
        items: the columns of the logits that are items.
        scale: factor from scores to logits.

    Returns:
        The outputs written.

    Raises:
        LwaError: if `like` is of other windows or was cut to top_k, or the recommender scores another number of items.
    """
    histories = [(window.user_id, history) for window in windows for history in window.histories()]
    if len(histories) != int(like.starts[-1]):
        raise LwaError(
            f"these windows have {len(histories)} targets, the outputs {like.starts[-1]}: give the same windows"
        )
    if like.items is not None:
        raise LwaError("outputs that a recommender is to be beside need all logits: compute them with top_k=None")
    shape = len(histories), like.logits.shape[1]
    with files.atomic_write(directory) as folder, output_arrays(folder, {"logits": shape}, None) as arrays:
        arrays["logits"][:] = NOTHING
        for start in range(0, len(histories), ROWS):
            users, shown = zip(*histories[start : start + ROWS])
            scores = recommender.scores(shown, users)
            if scores.shape[1] != items.stop - items.start:
                raise LwaError(
                    f"the recommender scores {scores.shape[1]} items, the teacher has {items.stop - items.start}: "
                    "fit it on the teacher's catalogue"
                )
            arrays["logits"][start : start + ROWS, items] = scale * scores
        _copy_all_but_logits(like, folder)
    return TeacherOutputs(directory)


def average_outputs(
    outputs: Sequence[TeacherOutputs], weights: Sequence[float], directory: Path, items: Sequence[slice]
) -> TeacherOutputs:
    """Write the outputs of several teachers as one: the weighted mean of their item probabilities.

    The hidden states are those of the first teacher. The teachers may have different tokenizers, because they share the
    targets, which are the positions, and the items. The items must be in the same order.

    Args:
        outputs: the outputs of each teacher on the same windows, with all logits.
        weights: one per teacher, for example its NDCG on the validation part; they are scaled to sum 1.
        directory: the folder to write.
        items: the columns of each teacher's logits that are items, the same number for all teachers.

    Returns:
        The fused outputs, with the vocabulary of the first teacher.

    Raises:
        LwaError: if the outputs are of different windows or catalogues or were cut to top_k, or if the weights do not
            fit.
    """
    share = np.asarray(weights, dtype=np.float32)
    if share.shape != (len(outputs),) or not np.isfinite(share).all() or (share < 0).any() or not share.any():
        raise LwaError(f"weights {list(weights)}: give {len(outputs)} finite numbers >= 0, not all zero")
    first = outputs[0]
    if any(s.items is not None for s in outputs):
        raise LwaError("fusion needs all logits of every teacher: compute the outputs with top_k=None")
    catalogues = {own.stop - own.start for own in items}
    if len(catalogues) > 1 or not all(np.array_equal(s.starts, first.starts) for s in outputs):
        raise LwaError("the outputs to be fused must be of the same windows and the same catalogue")
    for other in outputs[1:]:
        check_same_items(first.identity, other.identity)
    share /= share.sum()
    with files.atomic_write(directory) as folder, output_arrays(folder, {"logits": first.logits.shape}, None) as arrays:
        arrays["logits"][:] = NOTHING
        for start in range(0, len(first.logits), ROWS):
            rows = slice(start, start + ROWS)
            parts = [
                torch.from_numpy(np.array(s.logits[rows, own])).float().softmax(-1) * weight
                for s, own, weight in zip(outputs, items, share.tolist(), strict=True)
            ]
            arrays["logits"][rows, items[0]] = sum(parts).clamp_min(SMALLEST).log().half().numpy()
        _copy_all_but_logits(first, folder)
    return TeacherOutputs(directory)


def _copy_all_but_logits(outputs: TeacherOutputs, folder: Path) -> None:
    """Copy the hidden states, the window starts and the metadata."""
    identity = [FILE] if outputs.identity else []
    for name in ("hidden.npy", "starts.npy", *identity, META):
        shutil.copyfile(outputs.directory / name, folder / name)


def ensemble_outputs(
    teacher: TeacherOutputs,
    windows: Sequence[Window],
    systems: Mapping[str, CrossFitted],
    items: slice,
    calibration: Mapping[str, Calibration],
    with_teacher: bool = True,
) -> TeacherOutputs:
    """Return a teacher's outputs fused with those of recommenders on the same windows.

    They are written to the cache folder under a name that depends only on what they are made of. That name is part of
    the name of a run's checkpoints, so an interrupted run finds its checkpoints again.

    Args:
        teacher: the teacher's outputs, with all logits.
        windows: the windows that they were computed on.
        systems: the recommenders by name.
        items: the columns of the logits that are items.
        calibration: scale and weight of "teacher" and of each of the recommenders.
        with_teacher: whether the teacher is one of those who are fused.
    """
    names = ["teacher", *systems] if with_teacher else list(systems)
    key = [teacher.directory.name, {name: list(map(float, calibration[name])) for name in names}]
    directory = cache_entry("teacher_outputs", key)
    with tempfile.TemporaryDirectory() as folder:
        parts = [
            recommender_outputs(system, windows, teacher, Path(folder) / name, items, calibration[name].scale)
            for name, system in systems.items()
        ]
        said = [teacher, *parts] if with_teacher else parts
        return average_outputs(said, fair_weights(calibration, names), directory, [items] * len(names))
