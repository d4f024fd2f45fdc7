"""The experiment's settings: one YAML file with a `base` and three profiles, checked field by field."""

from __future__ import annotations

from copy import deepcopy
from importlib.resources import files
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from lwa_helpers.errors import LwaError

TITLE_LIMIT = 200  # characters
PROFILES = ("smoke", "quick", "paper")
Bf16 = Literal["auto"] | bool  # what "auto" means on a device: precision.computes_in_bf16


class Section(BaseModel):
    """Strict: an unknown field or a value of the wrong type is an error, never a guess."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class DataConfig(Section):
    """Which interactions, how they are split, what a model reads of a history, and how it is cut into windows of items."""

    name: str
    root: str = "dataset/amazon"
    k_core: int = Field(ge=0)
    split: Literal["last_out", "timestamp", "file"]
    reading: Literal["items", "hybrid", "titles"] = "items"
    text_items: PositiveInt = 5
    examples: Literal["windows", "pairs"] = "windows"
    max_items: int = Field(ge=2)
    context_items: int = Field(ge=1)
    title_limit: int = Field(TITLE_LIMIT, ge=20, le=1000)
    max_tokens: PositiveInt | None = None


class TuningConfig(Section):
    """One training run of a ranking model on user windows.

    head_learning_rate: of the rows of embedding and head; rank: in how many dimensions these move. save_steps: a run that was
    killed goes on from its last checkpoint.
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
    gradient_checkpointing: bool = False
    save_steps: PositiveInt | None = None


class TeacherConfig(TuningConfig):
    """The teacher's name in model_config.yaml, and how it is tuned: first what is new, behind its first few layers, which are
    a fraction of the cost, then all of it.

    first_layers: 0 leaves the first step out. first_alpha: the weight of what the first layers have learnt, beside the labels,
    when all are trained. evaluate_every: epochs between two looks at the validation part, the best of which is kept, `patience`
    of them without a rise ending the run; null looks at none and keeps the last weights. Two controls: random_weights forgets
    what the model has read, frozen_layers trains item rows alone. co_teachers: baselines by name that teach beside the first
    layers; each speaks of users that it was not fitted on.
    """

    model: str
    random_weights: bool = False
    frozen_layers: bool = False
    first_layers: int = Field(ge=0)
    first_epochs: PositiveFloat
    first_learning_rate: PositiveFloat
    first_dropout: float = Field(ge=0, lt=1)
    first_alpha: float = Field(ge=0, le=1)
    co_teachers: list[str] = Field(default=[])
    evaluate_every: PositiveFloat | None = None
    patience: PositiveInt = 2
    softmax_items: PositiveInt = 50_000


class FisherConfig(Section):
    """How many examples (user windows) the Fisher information is averaged over, and how many are left for what costs more.

    loo_users: users for whom the catalogue is ranked once per left-out layer; 0 leaves that out.
    """

    n_examples: PositiveInt
    sampled_examples: PositiveInt
    loo_examples: PositiveInt
    loo_users: int = Field(ge=0)
    batch_size: PositiveInt


class LossConfig(Section):
    """(1 - alpha) CE + alpha tau^2 KL + beta * mean over matched layers of w_s d(h_s, map(h_t))."""

    alpha: float = Field(ge=0, le=1)
    temperature: PositiveFloat
    beta: float = Field(ge=0)
    top_k: PositiveInt | None = None
    match: Literal["all", "no_last", "no_last_two", "last", "lower", "middle", "upper"] = "all"


class AblationConfig(TuningConfig):
    """The arms of the weighting ablation: everything is equal except the layer weights."""

    strategies: list[str] = Field(min_length=2)
    seeds: list[int] = Field(min_length=1)
    n_layers: PositiveInt
    selection: str
    loss: LossConfig

    @property
    def depths(self) -> list[int]:
        """How many layers the students have."""
        return [self.n_layers]

    @property
    def matches_states(self) -> bool:
        """Whether any arm has a hidden-state term."""
        return self.loss.beta > 0 and bool(set(self.strategies) - {"none", "labels"})


class DistillationConfig(TuningConfig):
    """The final student, one of all the teacher's layers and those of other depths (frontier) on the same budget, each with
    every seed; and one of several teachers (co_teachers, baselines by name), who are weighed on so many validation users.
    """

    n_layers: PositiveInt
    seeds: list[int] = Field(min_length=1)
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
        """How many layers the students have, most first."""
        return sorted({self.n_layers, *self.frontier}, reverse=True)

    @property
    def matches_states(self) -> bool:
        """Whether the student has a hidden-state term."""
        return self.loss.beta > 0 and self.strategy not in ("none", "labels")

    @field_validator("steps")
    @classmethod
    def _steps_lead_to_the_student(cls, steps: list[int], info: ValidationInfo) -> list[int]:
        n_layers = info.data.get("n_layers")
        if steps and (steps[-1] != n_layers or sorted(set(steps), reverse=True) != steps):
            raise ValueError(f"steps must fall and end with n_layers = {n_layers}")
        return steps


class ComparisonConfig(Section):
    """Teachers asked to rank a fixed candidate set.

    fisher_windows: over how many windows the Fisher trace of a local teacher is averaged, 0 for none. price_per_hour: what an
    hour of the machine costs in US dollars, an assumption that the cost per 1,000 recommendations is reckoned with.
    """

    teachers: list[str] = Field(min_length=1)
    n_users: PositiveInt
    written_users: PositiveInt
    fisher_windows: int = Field(ge=0)
    price_per_hour: PositiveFloat
    n_candidates: int = Field(ge=2)
    history_titles: PositiveInt


class EvaluationConfig(Section):
    """Full-catalogue ranking: users for whom it is done, whether each of a user's test items is a case or the first alone, and how
    many of the newest items they are ranked by.
    """

    users: PositiveInt | None = None
    every_target: bool = False
    history_items: PositiveInt
    batch_size: PositiveInt
    bf16: Bf16
    baselines: list[str]
    sasrec_dims: list[PositiveInt] = Field(min_length=1)
    sasrec_epochs: PositiveInt
    sasrec_dropouts: list[Annotated[float, Field(ge=0, lt=1)]] = Field(min_length=1)
    sasrec_learning_rates: list[PositiveFloat] = Field(min_length=1)


class ExperimentConfig(Section):
    """Everything a run depends on."""

    profile: Literal["smoke", "quick", "paper"]
    seed: int
    target_minutes: PositiveFloat
    data: DataConfig
    teacher: TeacherConfig
    fisher: FisherConfig
    ablation: AblationConfig
    distillation: DistillationConfig
    comparison: ComparisonConfig
    evaluation: EvaluationConfig


def read_yaml(name: str) -> dict[str, Any]:
    """Read one of the package's YAML files with the safe loader."""
    return yaml.safe_load(files("lwa_helpers").joinpath("configs", name).read_text(encoding="utf-8"))


def load_config(profile: str, overrides: dict[str, Any] | None = None) -> ExperimentConfig:
    """Return the checked settings of a profile with dotted overrides, e.g. {"data.name": "All_Beauty"}.

    Raises LwaError naming each field that is unknown or of the wrong type.
    """
    if profile not in PROFILES:
        raise LwaError(f"unknown profile {profile!r}: choose one of {', '.join(PROFILES)}")
    experiment = read_yaml("experiment_config.yaml")
    loss = read_yaml("distillation_config.yaml")["loss"]
    settings = merge(experiment["base"], {"ablation": {"loss": loss}, "distillation": {"loss": loss}})
    settings = merge(settings, experiment[profile] | {"profile": profile})
    for key, value in (overrides or {}).items():
        set_dotted(settings, key, value)
    try:
        return ExperimentConfig.model_validate(settings)
    except ValidationError as error:
        raise LwaError(explain(error, profile)) from None


def merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with the nested values of `change` laid over it; neither argument is modified."""
    merged = deepcopy(base)
    for key, value in change.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if nested else deepcopy(value)
    return merged


def set_dotted(settings: dict[str, Any], key: str, value: Any) -> None:
    """Set `a.b.c` in nested dictionaries; LwaError when a part of the path does not exist."""
    *sections, field = str(key).split(".")
    place = settings
    for section in sections:
        if not isinstance(place.get(section), dict):
            raise LwaError(f"unknown setting {key!r}: there is no section {section!r}; known here: {', '.join(place)}")
        place = place[section]
    place[field] = value


def explain(error: ValidationError, profile: str) -> str:
    """One line per wrong field: where, what was given, what is expected."""
    lines = []
    for problem in error.errors():
        field = ".".join(map(str, problem["loc"]))
        if problem["type"] == "extra_forbidden":
            lines.append(f"  {field}: no such setting (see lwa_helpers/configs/experiment_config.yaml)")
        else:
            lines.append(f"  {field} = {problem['input']!r}: {problem['msg']}")
    return f"settings of profile {profile!r} are not valid:\n" + "\n".join(lines)
