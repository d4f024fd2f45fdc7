"""The experiment's settings: one YAML file with a `base` section and three profiles, validated field by field."""

from __future__ import annotations

import os
from copy import deepcopy
from importlib.resources import files
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)

from lwa_helpers.configs.students import AblationConfig, Bf16, DistillationConfig, Section, Seed, TuningConfig
from lwa_helpers.errors import LwaError

TITLE_LIMIT = 200  # characters
PROFILES = ("smoke", "quick", "paper")
HomePath = Annotated[str, AfterValidator(os.path.expanduser)]  # a path or a name; ~ is the user's home


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
        probe_titles: how many titles the untuned teacher is asked to finish, to see whether it knows them by heart.
    """

    teachers: list[HomePath] = Field(min_length=1)
    n_users: PositiveInt
    written_users: PositiveInt
    fisher_windows: int = Field(ge=0)
    price_per_hour: PositiveFloat
    n_candidates: int = Field(ge=2)
    history_titles: PositiveInt
    probe_titles: int = Field(ge=2)


class EvaluationConfig(Section):
    """Full-catalogue ranking, and the baselines it is compared with.

    Attributes:
        part: the part whose targets are ranked: "test", or "valid" to choose settings without a look at the test part.
        users: how many cases are drawn for the evaluation; None takes all.
        every_target: whether each of a user's test items is a case, or only the first.
        history_items: how many of the newest items of a history are read.
        probe_users: how many cases the tuned teacher ranks again from shuffled histories.
        batch_size: histories in a batch.
        bf16: whether to compute in bfloat16; "auto" decides by the device.
        baselines: names of the baselines.
        sasrec_dims: embedding dimensions to tune SASRec over.
        sasrec_epochs: the most epochs that SASRec is trained for.
        sasrec_dropouts: dropout probabilities to tune SASRec over.
        sasrec_learning_rates: learning rates to tune SASRec over.
    """

    part: Literal["valid", "test"] = "test"
    users: PositiveInt | None = None
    every_target: bool = False
    history_items: PositiveInt
    probe_users: int = Field(ge=2)
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
