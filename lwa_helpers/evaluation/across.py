"""Compare the points of a study from the frames that their notebooks saved.

A frame has one row per evaluation case. The frames of a point, one per seed of the study, hold the same cases. Values
of one user are taken together (see clusters.by_user), and seeds are crossed with users (see statistics).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from lwa_helpers.errors import LwaError
from lwa_helpers.evaluation.clusters import by_user
from lwa_helpers.evaluation.metrics import ndcg_at_k
from lwa_helpers.evaluation.statistics import difference_of_arms, mean_interval, ratio_of_arms
from lwa_helpers.evaluation.unmeasured import measured

Row = dict[str, Any]


def ndcg_of(frames: Sequence[pd.DataFrame], system: str) -> np.ndarray:
    """Return the NDCG@10 of a system, (users, seeds).

    Args:
        frames: one per seed, with the columns user_id and, for each system, the rank of each case's target.
        system: the column.

    Raises:
        LwaError: if the frames hold other users.
    """
    _same_users(frames)
    values = np.column_stack([ndcg_at_k(frame[system].to_numpy(), 10) for frame in frames])
    return by_user(values, frames[0].user_id)


def compare_teachers(frames: Sequence[pd.DataFrame], first: Sequence[pd.DataFrame], seed: int) -> Row:
    """Compare a tuned teacher with SASRec and, if it ranked for the same cases, with the first point's teacher.

    Args:
        frames: the ranks of its cases, as in `ndcg_of`, with columns teacher and sasrec.
        first: those of the first point.
        seed: of the bootstrap.

    Returns:
        users, ndcg, sasrec, to_sasrec and to_first, the last two with ends _low and _high.
    """
    teacher, sasrec = ndcg_of(frames, "teacher"), ndcg_of(frames, "sasrec")
    row = {"users": len(teacher), "sasrec": sasrec.mean()} | _ends("ndcg", mean_interval(teacher.mean(1), seed=seed))
    row |= _ends("to_sasrec", difference_of_arms(teacher, sasrec, seed=seed))
    if frames is not first and len(frames) == len(first) and frames[0].user_id.equals(first[0].user_id):
        row |= _ends("to_first", difference_of_arms(teacher, ndcg_of(first, "teacher"), seed=seed))
    return row


def compare_students(depths: Sequence[pd.DataFrame], ranks: Sequence[pd.DataFrame], n_layers: int, seed: int) -> Row:
    """Compare the final student with all layers on its budget, with its teacher and with SASRec.

    Args:
        depths: one frame per seed of the study, with the columns user_id, layers and, for each seed of the students,
            "seed <n>": the NDCG@10 of each case.
        ranks: as in `ndcg_of`, with the columns teacher, sasrec and co_taught.
        n_layers: of the student.
        seed: of the bootstrap.

    Returns:
        student, kept and of_teacher (per cent), student_to_sasrec, co_taught, each with ends _low and _high.
    """
    few, whole = (_students(depths, layers) for layers in (n_layers, max(depths[0].layers)))
    every, teacher, sasrec = few.mean(1, keepdims=True), *(ndcg_of(ranks, name) for name in ("teacher", "sasrec"))
    row = _ends("student", mean_interval(few.mean(1), seed=seed))
    row |= _ends("kept", measured(ratio_of_arms, few, whole, seed=seed), 100)
    mean = teacher.mean(1, keepdims=True)
    row |= _ends("of_teacher", measured(ratio_of_arms, every, mean, seed=seed), 100)
    row |= _ends("student_to_sasrec", difference_of_arms(every, sasrec.mean(1, keepdims=True), seed=seed))
    return row | _ends("co_taught", mean_interval(ndcg_of(ranks, "co_taught").mean(1), seed=seed))


def compare_arms(frames: Sequence[pd.DataFrame], reference: str, seed: int) -> pd.DataFrame:
    """Compare the arms of an ablation with one of them, paired by user and by seed.

    Args:
        frames: one per seed of the study, with the columns arm, seed, case, user_id and ndcg.
        reference: the arm that the others are compared with.
        seed: of the bootstrap.

    Returns:
        One row per arm, in the order of the ablation, with the columns arm, ndcg and difference with their ends
        (nan for the reference), seeds, and says ("better", "worse" or "no difference shown"; "" for the reference).
    """
    tables = {arm: _arm(frames, arm) for arm in frames[0].arm.unique()}
    rows = []
    for arm, table in tables.items():
        row = {"arm": arm, "seeds": table.shape[1]} | _ends("ndcg", mean_interval(table.mean(1), seed=seed))
        if arm != reference:
            row |= _ends("difference", difference_of_arms(table, tables[reference], seed=seed))
        rows.append(row)
    frame = pd.DataFrame(rows)
    outcomes = [frame.arm == reference, frame.difference_low > 0, frame.difference_high < 0]
    return frame.assign(says=np.select(outcomes, ["", "better", "worse"], "no difference shown"))


def _arm(frames: Sequence[pd.DataFrame], arm: str) -> np.ndarray:
    """NDCG@10 of an arm, (users, seeds of the ablation x seeds of the study)."""
    parts = [part[part.arm == arm].sort_values(["seed", "case"]) for part in frames]
    columns = [one for part in parts for _, one in part.groupby("seed")]
    _same_users(columns)
    return by_user(np.column_stack([one.ndcg for one in columns]), columns[0].user_id)


def _students(depths: Sequence[pd.DataFrame], layers: int) -> np.ndarray:
    """NDCG@10 of the students of one depth, (users, seeds of the students x seeds of the study)."""
    parts = [frame[frame.layers == layers] for frame in depths]
    _same_users(parts)
    values = [part.filter(like="seed ").to_numpy() for part in parts]
    return by_user(np.column_stack(values), parts[0].user_id)


def _same_users(frames: Sequence[pd.DataFrame]) -> None:
    users = frames[0].user_id.to_list()
    if any(frame.user_id.to_list() != users for frame in frames):
        raise LwaError("runs to be compared have other users: give them the same data and the same evaluation")


def _ends(name: str, values: Sequence[float], scale: float = 1.0) -> Row:
    """Return an estimate and the ends of its interval as three columns."""
    return {name + end: scale * value for end, value in zip(("", "_low", "_high"), values)}
