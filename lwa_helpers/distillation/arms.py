"""The arms of an ablation: students that differ in one factor only."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from lwa_helpers.configs.students import AblationConfig, Level, LossConfig
from lwa_helpers.distillation.ensemble import ensemble_outputs
from lwa_helpers.distillation.recipes import Distillation, calibrations, check_catalogue, in_steps
from lwa_helpers.distillation.teacher_cache import TeacherOutputs
from lwa_helpers.errors import LwaError
from lwa_helpers.evaluation.cross_fit import CrossFitted
from lwa_helpers.models.language_model import LanguageModel
from lwa_helpers.ranking.task import RankingTask

Teachers = tuple[str, ...]
TEACHER = "teacher"  # the language model, in the factor "teachers"


@dataclass(frozen=True)
class Arm:
    """How one student is made.

    Attributes:
        name: the level of the ablation's factor, as in frames, figures and tables.
        n_layers: its number of layers.
        selection: which of the teacher's layers it keeps.
        strategy: the weighting of the hidden-state term.
        loss: the distillation loss.
        steps: falling numbers of layers that end with n_layers (see recipes.in_steps); nothing distils in one step.
        teachers: who teaches it: TEACHER and names of baselines, averaged.
    """

    name: str
    n_layers: int
    selection: str
    strategy: str
    loss: LossConfig
    steps: tuple[int, ...] = ()
    teachers: Teachers = (TEACHER,)


def arms_of(section: AblationConfig) -> list[Arm]:
    """Return the arms of an ablation, in the order of its levels."""
    base = Arm("", section.n_layers, section.selection, section.strategy, section.loss)
    return [replace(base, name=str(level), **_change(section, level)) for level in section.levels]


def _change(section: AblationConfig, level: Level) -> dict[str, Any]:
    """Return how the arm of one level differs from the others."""
    match section.factor:
        case "depth":
            return {"n_layers": level}
        case "match" | "beta":
            return {"loss": section.loss.model_copy(update={section.factor: level})}
        case "steps":
            steps = section.steps_of(level)
            return {"steps": tuple(steps) if len(steps) > 1 else ()}
        case "teachers":
            return {"teachers": tuple(section.teachers_of(level))}
    return {section.factor: level}


class Starts:
    """Students before training, each made once.

    Args:
        distillation: what the students share.
        layer_scores: scores of the teacher's layers for the selections that choose by them, but for "top_fisher".
    """

    def __init__(self, distillation: Distillation, layer_scores: Mapping[str, np.ndarray] | None = None):
        self._distillation, self._layer_scores = distillation, layer_scores or {}
        self._made: dict[tuple[int, str], LanguageModel] = {}

    def of(self, arm: Arm) -> LanguageModel:
        """Return a copy of the student that an arm starts from."""
        key = arm.n_layers, arm.selection
        if key not in self._made:
            self._made[key] = self._distillation.start(
                arm.n_layers, self._layer_scores.get(arm.selection), arm.selection
            )
        start = self._made[key]
        return replace(start, model=copy.deepcopy(start.model))


def outputs_by(
    distillation: Distillation, co_teachers: Mapping[str, CrossFitted], valid: RankingTask
) -> dict[Teachers, TeacherOutputs]:
    """Return what each set of teachers of an ablation says of the windows, except the teacher alone.

    Args:
        distillation: what the students share, with an AblationConfig.
        co_teachers: the recommenders without a language model, by name.
        valid: the validation cases that their scales and weights are fitted on.
    """
    section, items = distillation.section, distillation.teacher.items
    assert isinstance(section, AblationConfig) and items is not None  # the teacher ranks item tokens
    wanted = {arm.teachers for arm in arms_of(section)} - {(TEACHER,)}
    if not wanted:
        return {}
    check_catalogue(items.ids, valid)
    calibration = calibrations(distillation.teacher.model, co_teachers, valid)
    return {
        teachers: ensemble_outputs(
            distillation.teacher_outputs,
            distillation.windows,
            {name: co_teachers[name] for name in teachers if name != TEACHER},
            items.tokens,
            calibration,
            TEACHER in teachers,
        )
        for teachers in sorted(wanted)
    }


def _taught(arm: Arm, outputs: Mapping[Teachers, TeacherOutputs]) -> TeacherOutputs | None:
    """Return the outputs of an arm's teachers; None for the teacher alone. Raises LwaError if they are missing."""
    if arm.teachers == (TEACHER,):
        return None
    if arm.teachers not in outputs:
        raise LwaError(f"arm {arm.name}: what {' and '.join(arm.teachers)} teach was not computed")
    return outputs[arm.teachers]


def run_arm(
    arm: Arm, distillation: Distillation, starts: Starts, outputs: Mapping[Teachers, TeacherOutputs], task: RankingTask
) -> pd.DataFrame:
    """Distil the student of an arm and rank the catalogue for each evaluation case.

    Args:
        arm: the arm.
        distillation: what the students share.
        starts: their students before training.
        outputs: what is taught by each set of teachers other than the teacher alone.
        task: the evaluation cases.

    Returns:
        One row per case, with columns arm, seed, case (its place among the cases), user_id, target, rank, steps
        (training steps) and targets (training targets).
    """
    if arm.steps:
        student, trainer = in_steps(distillation, arm.steps, arm.selection, arm.strategy)
    else:
        student, taught = starts.of(arm), _taught(arm, outputs)
        trainer = distillation.train(student, arm.strategy, taught, loss=arm.loss)
    return pd.DataFrame(
        {
            "arm": arm.name,
            "seed": distillation.seed,
            "case": range(len(task.eval_cases.targets)),
            "user_id": task.eval_cases.user_ids,
            "target": task.eval_cases.targets,
            "rank": task.ranks(student.model),
            "steps": trainer.state.global_step,
            "targets": int(distillation.teacher_outputs.starts[-1]),
        }
    )
