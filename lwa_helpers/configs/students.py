"""The settings of students: how they are trained, the distillation loss, the ablation and the final student."""

from __future__ import annotations

import re
from typing import Annotated, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

Bf16 = Literal["auto"] | bool  # precision.computes_in_bf16 says what "auto" means on a device
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Level = str | int | float  # of the factor of an ablation


class Section(BaseModel):
    """Base class of all settings: an unknown field or a value of the wrong type is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class TuningConfig(Section):
    """One training run of a ranking model on user windows.

    Attributes:
        windows_per_user: how many of each user's newest windows are used; None uses all.
        epochs: passes over the windows, possibly a fraction.
        tokens_per_batch: the most tokens in a batch.
        learning_rate: peak learning rate of all weights except the rows of the embedding and the head.
        head_learning_rate: peak learning rate of the rows of the embedding and the head.
        rank: the rank of the update to the rows of the embedding and the head.
        dropout: dropout probability on the input embeddings and the final states.
        weight_decay: weight decay of the optimiser.
        warmup_ratio: share of the steps over which the learning rate rises linearly.
        bf16: whether to compute in bfloat16; "auto" decides by the device.
        gradient_checkpointing: whether to recompute activations in the backward pass to save memory.
        evaluate_every: epochs between two evaluations on the validation part; the best weights are kept. None
            evaluates never and keeps the last weights.
        patience: how many evaluations in a row without an improvement end the run.
        save_steps: steps between two checkpoints. An interrupted run resumes from its last checkpoint. None saves none.
    """

    windows_per_user: PositiveInt | None = None
    epochs: PositiveFloat
    tokens_per_batch: PositiveInt
    learning_rate: PositiveFloat
    head_learning_rate: PositiveFloat
    rank: PositiveInt
    dropout: float = Field(ge=0, lt=1)
    weight_decay: float = Field(ge=0)
    warmup_ratio: float = Field(ge=0, lt=1)
    bf16: Bf16
    evaluate_every: PositiveFloat | None = None
    patience: PositiveInt = 2
    gradient_checkpointing: bool = False
    save_steps: PositiveInt | None = None


class LossConfig(Section):
    """The distillation loss: (1 - alpha) CE + alpha tau^2 KL + beta * mean over matched layers of w_s d(h_s, map(h_t)).

    Attributes:
        alpha: weight of the teacher's predictions against the labels.
        temperature: tau, the temperature of the KL term.
        beta: weight of the hidden-state term.
        top_k: take the KL over the teacher's k most likely items, with the rest as one outcome; None takes all items.
        match: which of the student's layers are matched (see weighting.matched_layers).
    """

    alpha: float = Field(ge=0, le=1)
    temperature: PositiveFloat
    beta: float = Field(ge=0)
    top_k: PositiveInt | None = None
    match: Literal["all", "no_last", "no_last_two", "last", "lower", "middle", "upper"] = "all"


class AblationConfig(TuningConfig):
    """An ablation: arms that differ in one factor, on one budget.

    Attributes:
        factor: what the arms differ in: "strategy" (the weighting of the hidden-state term), "selection" (which of the
            teacher's layers the students keep), "match" (which layers' states are matched), "depth" (number of layers),
            "steps" (one cut or several), "beta" (weight of the hidden-state term) or "teachers".
        levels: one for each arm: names, or numbers of a depth or beta. A level of "steps" is written as 15>8, one of
            "teachers" as teacher+sasrec+ease.
        reference: the level that the others are compared with; None is "uniform" among strategies, else the first.
        seeds: every arm is trained once with each seed.
        n_layers: how many layers the students have.
        selection: which of the teacher's layers the students keep (see student.select_layers).
        strategy: the weighting of the hidden-state term.
        loss: the distillation loss.
        valid_users: how many validation users the weights of several teachers are fitted on.
    """

    factor: Literal["strategy", "selection", "match", "depth", "steps", "beta", "teachers"] = "strategy"
    levels: list[Level] = Field(min_length=2)
    reference: Level | None = None
    seeds: list[Seed] = Field(min_length=1)
    n_layers: PositiveInt
    selection: str
    strategy: str = "uniform"
    loss: LossConfig
    valid_users: PositiveInt = 300

    @property
    def against(self) -> str:
        """The name of the level that the others are compared with."""
        if self.reference is not None:
            return str(self.reference)
        return "uniform" if self.factor == "strategy" else str(self.levels[0])

    @property
    def strategies(self) -> list[str]:
        """The weightings of all arms."""
        return [str(level) for level in self.levels] if self.factor == "strategy" else [self.strategy]

    @property
    def depths(self) -> list[int]:
        """The numbers of layers of all students."""
        if self.factor == "depth":
            return [level for level in self.levels if isinstance(level, int)]
        steps = [depth for level in self.levels for depth in self.steps_of(level)] if self.factor == "steps" else []
        return sorted({self.n_layers, *steps}, reverse=True)

    @property
    def matches_states(self) -> bool:
        """Whether any arm has a hidden-state term."""
        betas = self.levels if self.factor == "beta" else [self.loss.beta]
        return any(beta != 0 for beta in betas) and bool(set(self.strategies) - {"none", "labels"})

    def steps_of(self, level: Level) -> list[int]:
        """The numbers of layers that a level of "steps" names."""
        return [int(part) for part in str(level).split(">")]

    @property
    def co_teachers(self) -> list[str]:
        """The names of the baselines that teach in some arm."""
        if self.factor != "teachers":
            return []
        return sorted({name for level in self.levels for name in self.teachers_of(level)} - {"teacher"})

    def teachers_of(self, level: Level) -> list[str]:
        """The teachers that a level of "teachers" names."""
        return str(level).split("+")

    @model_validator(mode="after")
    def _levels_fit_the_factor(self) -> AblationConfig:
        """Return the section unchanged.

        Raises:
            ValueError: if a level is none of the factor, or the reference is no level.
        """
        for level in self.levels:
            if problem := self._problem(level):
                raise ValueError(f"level {level!r} of {self.factor}: {problem}")
        if self.reference is not None and self.reference not in self.levels:
            raise ValueError(f"reference {self.reference!r} is not among the levels")
        return self

    def _problem(self, level: Level) -> str | None:
        match self.factor:
            case "depth":
                return None if type(level) is int and level > 0 else "give a number of layers"
            case "beta":
                return None if isinstance(level, int | float) and level >= 0 else "give a number that is not negative"
            case "steps":
                whole = re.fullmatch(r"\d+(>\d+)*", str(level))
                steps = self.steps_of(level) if whole else []
                fits = steps and steps[-1] == self.n_layers and sorted(set(steps), reverse=True) == steps
                return None if fits else f"give falling numbers of layers that end with {self.n_layers}, as 15>8"
            case "match":
                names = get_args(LossConfig.model_fields["match"].annotation)
                return None if level in names else f"give one of {', '.join(names)}"
        return None if isinstance(level, str) else "give a name"


class DistillationConfig(TuningConfig):
    """The final student and the students that it is compared with.

    These are a student with all of the teacher's layers, students of other depths (`frontier`), and a student of
    several teachers (`co_teachers`). The students of one teacher share one budget and are trained with every seed.

    Attributes:
        n_layers: how many layers the final student has.
        seeds: seeds of the training runs.
        co_teachers: names of the baselines that teach one student together with the teacher.
        frontier: numbers of layers of further students.
        selection: which of the teacher's layers a student keeps (see student.select_layers).
        strategy: the weighting of the hidden-state term, or "none" to leave this term out.
        steps: falling numbers of layers that end with `n_layers`. Each student teaches the next, and all share the
            budget. An empty list distils the student in one step.
        loss: the distillation loss.
        valid_users: how many validation users the weights of several teachers are fitted on.
        timing_users: how many users are ranked to measure the speed.
        timing_rounds: how often each measurement of the speed is repeated.
    """

    n_layers: PositiveInt
    seeds: list[Seed] = Field(min_length=1)
    co_teachers: list[str]
    frontier: list[PositiveInt] = Field(default=[])
    selection: str
    strategy: str
    steps: list[PositiveInt] = Field(default=[])
    loss: LossConfig
    valid_users: PositiveInt
    timing_users: PositiveInt
    timing_rounds: PositiveInt

    @property
    def depths(self) -> list[int]:
        """The numbers of layers of the students, largest first."""
        return sorted({self.n_layers, *self.frontier}, reverse=True)

    @property
    def matches_states(self) -> bool:
        """Whether the student has a hidden-state term."""
        return self.loss.beta > 0 and self.strategy not in ("none", "labels")

    @field_validator("steps")
    @classmethod
    def _steps_lead_to_the_student(cls, steps: list[int], info: ValidationInfo) -> list[int]:
        """Return the steps unchanged.

        Raises:
            ValueError: if the steps do not fall strictly, or do not end with n_layers.
        """
        n_layers = info.data.get("n_layers")
        if steps and (steps[-1] != n_layers or sorted(set(steps), reverse=True) != steps):
            raise ValueError(f"steps must fall and end with n_layers = {n_layers}")
        return steps
