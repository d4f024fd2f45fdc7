"""The experiment's settings: one YAML file with a `base` section and three profiles, validated field by field."""

from __future__ import annotations

import os
from copy import deepcopy
from importlib.resources import files
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
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
Bf16 = Literal["auto"] | bool  # precision.computes_in_bf16 says what "auto" means on a device
HomePath = Annotated[str, AfterValidator(os.path.expanduser)]  # a path or a name; ~ is the user's home
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Section(BaseModel):
    """Base class of all settings: an unknown field or a value of the wrong type is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class DataConfig(Section):
    """The interactions, how they are split, and how a user's history is read and cut into windows of items.

    Attributes:
        name: "movielens" or an Amazon category, such as Office_Products.
        root: folder that holds the Amazon files.
        k_core: keep only Amazon users and items with at least this many interactions; 0 keeps all.
        split: how the interactions are split into train, validation and test parts.
        reading: how a model reads a history: "items" (one token each), "titles" (their text) or "hybrid" (one token
            each, and the titles of the newest `text_items`).
        text_items: how many of the newest items the "hybrid" reading follows with their titles.
        examples: "windows" of several targets, or "pairs" of a history and its next item.
        max_items: the most items in a window.
        context_items: items that a window repeats from the window before it; they are not targets again.
        title_limit: the most characters of an Amazon title; a longer one is cut.
        max_tokens: the most tokens in a window, which holds whole items only. None sets no limit; in training, windows
            are then limited to `tokens_per_batch` of the section.
    """

    name: str
    root: HomePath = "dataset/amazon"
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
    gradient_checkpointing: bool = False
    save_steps: PositiveInt | None = None


class TeacherConfig(TuningConfig):
    """The teacher, and how it is tuned in two steps.

    The first step trains the new item rows together with only the first few layers, at a fraction of the cost. The
    second step trains all layers.

    Attributes:
        model: the teacher's name in model_config.yaml.
        random_weights: a control: replace the pretrained weights with random ones.
        frozen_layers: a control: train only the item rows.
        first_layers: how many layers the first step trains; 0 skips that step.
        first_epochs: `epochs` of the first step.
        first_learning_rate: `learning_rate` of the first step.
        first_dropout: `dropout` of the first step.
        first_alpha: in the second step, the weight of the predictions of the first layers; the labels have the rest.
        co_teachers: names of the baselines that teach together with the first layers. Each predicts only for users
            that it was not fitted on.
        evaluate_every: epochs between two evaluations on the validation part; the best weights are kept. None
            evaluates never and keeps the last weights.
        patience: how many evaluations in a row without an improvement end the run.
        softmax_items: in a larger catalogue, the loss samples this many items instead of computing the whole softmax.
    """

    model: HomePath
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
    """How many examples (user windows) each measurement of layer importance averages over.

    Attributes:
        n_examples: windows for the Fisher information.
        sampled_examples: windows for the Fisher information with sampled labels, which costs more.
        loo_examples: windows for the leave-one-out loss, which costs more.
        loo_users: users for whom the catalogue is ranked once per left-out layer; 0 skips this.
        batch_size: windows in a batch.
    """

    n_examples: PositiveInt
    sampled_examples: PositiveInt
    loo_examples: PositiveInt
    loo_users: int = Field(ge=0)
    batch_size: PositiveInt


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
    """The arms of the weighting ablation, which differ only in the layer weights.

    Attributes:
        strategies: names of the layer weightings, one arm each.
        seeds: every arm is trained once with each seed.
        n_layers: how many layers the students have.
        selection: which of the teacher's layers the students keep (see student.select_layers).
        loss: the distillation loss.
    """

    strategies: list[str] = Field(min_length=2)
    seeds: list[Seed] = Field(min_length=1)
    n_layers: PositiveInt
    selection: str
    loss: LossConfig

    @property
    def depths(self) -> list[int]:
        """The number of layers of the students, as a list of one."""
        return [self.n_layers]

    @property
    def matches_states(self) -> bool:
        """Whether any arm has a hidden-state term."""
        return self.loss.beta > 0 and bool(set(self.strategies) - {"none", "labels"})


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


class ComparisonConfig(Section):
    """The comparison of teachers that rank a fixed set of candidates.

    Attributes:
        teachers: names in model_config.yaml, directories, .gguf files, or models that the Ollama server has.
        n_users: how many users the teachers rank for.
        written_users: for how many of them a teacher also writes the ranking out, in two orders of the candidates.
        fisher_windows: windows that the Fisher trace of a local teacher is averaged over; 0 skips it.
        price_per_hour: assumed cost of an hour of the machine in US dollars, from which the cost of 1,000
            recommendations follows.
        n_candidates: candidates per user.
        history_titles: how many of the newest titles a teacher is shown.
    """

    teachers: list[HomePath] = Field(min_length=1)
    n_users: PositiveInt
    written_users: PositiveInt
    fisher_windows: int = Field(ge=0)
    price_per_hour: PositiveFloat
    n_candidates: int = Field(ge=2)
    history_titles: PositiveInt


class EvaluationConfig(Section):
    """Full-catalogue ranking, and the baselines it is compared with.

    Attributes:
        users: how many cases are drawn for the evaluation; None takes all.
        every_target: whether each of a user's test items is a case, or only the first.
        history_items: how many of the newest items of a history are read.
        batch_size: histories in a batch.
        bf16: whether to compute in bfloat16; "auto" decides by the device.
        baselines: names of the baselines.
        sasrec_dims: embedding dimensions to tune SASRec over.
        sasrec_epochs: the most epochs that SASRec is trained for.
        sasrec_dropouts: dropout probabilities to tune SASRec over.
        sasrec_learning_rates: learning rates to tune SASRec over.
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
    """All settings of a run.

    Attributes:
        profile: name of the profile that the settings come from.
        seed: seed of everything that is random.
        target_minutes: the time that a run of the profile is meant to take.
    """

    profile: Literal["smoke", "quick", "paper"]
    seed: Seed
    target_minutes: PositiveFloat
    data: DataConfig
    teacher: TeacherConfig
    fisher: FisherConfig
    ablation: AblationConfig
    distillation: DistillationConfig
    comparison: ComparisonConfig
    evaluation: EvaluationConfig


def read_yaml(name: str) -> dict[str, Any]:
    """Return the content of one of the package's YAML files, read with the safe loader."""
    return yaml.safe_load(files("lwa_helpers").joinpath("configs", name).read_text(encoding="utf-8"))


def load_config(profile: str, overrides: dict[str, Any] | None = None) -> ExperimentConfig:
    """Return the validated settings of a profile.

    Args:
        profile: "smoke", "quick" or "paper".
        overrides: values that replace those of the profile, by dotted name, e.g. {"data.name": "All_Beauty"}.

    Raises:
        LwaError: if the profile is unknown, or a field is unknown or has a wrong value. The message names every such
            field.
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
    """Return a copy of `base` in which the nested values of `change` replace its own; neither argument is modified."""
    merged = deepcopy(base)
    for key, value in change.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if nested else deepcopy(value)
    return merged


def set_dotted(settings: dict[str, Any], key: str, value: Any) -> None:
    """Set a value in nested dictionaries, in place.

    Args:
        settings: the nested dictionaries.
        key: dotted path of the value, e.g. `a.b.c`.
        value: the new value.

    Raises:
        LwaError: if a section of the path does not exist.
    """
    *sections, field = str(key).split(".")
    place = settings
    for section in sections:
        if not isinstance(place.get(section), dict):
            raise LwaError(f"unknown setting {key!r}: there is no section {section!r}; known here: {', '.join(place)}")
        place = place[section]
    place[field] = value


def explain(error: ValidationError, profile: str) -> str:
    """Return a message with one line per wrong field: its dotted name, the value given and what is expected."""
    lines = []
    for problem in error.errors():
        field = ".".join(map(str, problem["loc"]))
        if problem["type"] == "extra_forbidden":
            lines.append(f"  {field}: no such setting (see lwa_helpers/configs/experiment_config.yaml)")
        else:
            lines.append(f"  {field} = {problem['input']!r}: {problem['msg']}")
    return f"settings of profile {profile!r} are not valid:\n" + "\n".join(lines)
