"""A study: named points of settings, each run with several seeds, as configs/studies/NAME.yaml says."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lwa_helpers import paths
from lwa_helpers.config import ExperimentConfig, explain, load_config
from lwa_helpers.configs.students import Seed
from lwa_helpers.errors import LwaError, one_line
from lwa_helpers.pipeline.code_digest import ACROSS
from lwa_helpers.pipeline.overrides import typed
from lwa_helpers.pipeline.staleness import Stage, stages

NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")
Settings = dict[str, Any]


class Point(BaseModel):
    """One point of a study. In the file, its settings stand beside its title and notebooks: their names have dots.

    Attributes:
        title: What tables call it; None takes its name.
        notebooks: The notebooks that it runs; None takes the study's.
        settings: Its settings, by dotted name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    title: str | None = None
    notebooks: Annotated[list[str], Field(min_length=1)] | None = None
    settings: Settings = Field(default={})

    @model_validator(mode="before")
    @classmethod
    def _gather_settings(cls, content: Any) -> Any:
        """Return the point with its dotted names gathered in `settings`."""
        if not isinstance(content, dict):
            return content
        own = {key: value for key, value in content.items() if key in ("title", "notebooks")}
        return own | {"settings": {key: value for key, value in content.items() if key not in own}}


class Study(BaseModel):
    """One file of configs/studies.

    Attributes:
        name: The file's name without .yaml.
        source: The name or the whole path by which it is loaded.
        profile: The profile whose settings the points start from.
        notebooks: The notebooks that each point runs, such as ["01", "02", "03"]. "06" runs once, after all points.
        seeds: Every point is run once with each seed.
        settings: Settings of all points, by dotted name.
        points: The points by name, each with what distinguishes it.
        slurm: Options of submitit for the engine "slurm", such as slurm_partition, gpus_per_node or timeout_min.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    source: str
    profile: Literal["smoke", "quick", "paper"]
    notebooks: Annotated[list[str], Field(min_length=1)]
    seeds: Annotated[list[Seed], Field(min_length=1)]
    settings: Settings = Field(default={})
    points: Annotated[dict[str, Point], Field(min_length=1)]
    slurm: dict[str, int | str] = Field(default={})

    @property
    def across(self) -> Path:
        """Where the results of the notebook that compares the points go."""
        return paths.across_dir(self.name)

    @property
    def compares(self) -> bool:
        """Whether the study has the notebook that compares its points."""
        return ACROSS in self.notebooks


@dataclass(frozen=True)
class Unit:
    """One point of a study with one seed: a run of its own.

    Attributes:
        study: The study's name.
        source: The name or the whole path by which the study is loaded.
        point: The point's name.
        title: What tables call the point.
        seed: The seed.
        stages: The notebooks, in order.
        config: Their settings.
        overrides: Those of the settings that differ from the profile's, by dotted name.
    """

    study: str
    source: str
    point: str
    title: str
    seed: int
    stages: list[Stage]
    config: ExperimentConfig
    overrides: Settings

    @property
    def name(self) -> str:
        """The name on the command line and in messages: point/seed-0."""
        return f"{self.point}/seed-{self.seed}"

    @property
    def folder(self) -> Path:
        """Where its results go."""
        return paths.STUDIES / self.study / self.point / f"seed-{self.seed}"


def load_study(name: str) -> Study:
    """Read a study.

    Args:
        name: The name of a file in configs/studies, or the path of a .yaml file.

    Returns:
        The study, checked.

    Raises:
        LwaError: If there is no such study, or it is not one. The message names the field.
    """
    is_path = name.endswith((".yaml", ".yml"))
    path = Path(name).expanduser().resolve() if is_path else paths.CONFIGS / "studies" / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in (paths.CONFIGS / "studies").glob("*.yaml")))
        raise LwaError(f"no study {name!r}: there are {known}; or give the path of a .yaml file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        study = Study.model_validate({"name": path.stem, "source": str(path) if is_path else name, **content})
    except ValidationError as error:
        raise LwaError(explain(error, str(path))) from None
    except (yaml.YAMLError, TypeError, UnicodeDecodeError) as error:
        raise LwaError(f"{path} is no study: {one_line(error)[:200]}") from None
    _check(study, path)
    return study


def _check(study: Study, path: Path) -> None:
    for name in (study.name, *study.points):
        if not NAME.fullmatch(name):
            raise LwaError(f"{path}: {name!r} cannot be a folder: use lower-case letters, digits, '.', '_' and '-'")
    if len(set(study.seeds)) < len(study.seeds):
        raise LwaError(f"{path}: a seed is named twice")
    if "across" in study.points:
        raise LwaError(f"{path}: a point cannot be called across: the comparison of the points goes there")
    for settings in (study.settings, *(point.settings for point in study.points.values())):
        if "seed" in settings or "profile" in settings:
            raise LwaError(f"{path}: seed and profile are no settings of a point: write seeds and profile of the study")


def units(study: Study, only: list[str] | None = None) -> list[Unit]:
    """Return the runs of a study: seed by seed all points, so that whole comparisons are done early.

    Args:
        study: The study.
        only: Points ("deeper") or runs ("deeper/seed-1") to leave the others out.

    Returns:
        The runs.

    Raises:
        LwaError: If a point has a setting that is not valid, or `only` names nothing of the study.
    """
    every = [_unit(study, point, seed) for seed in study.seeds for point in study.points]
    if not only:
        return every
    names = {name for unit in every for name in (unit.point, unit.name)}
    if unknown := [name for name in only if name not in names]:
        raise LwaError(f"{study.name} has no point {unknown[0]!r}: there are {', '.join(study.points)}")
    return [unit for unit in every if unit.point in only or unit.name in only]


def _unit(study: Study, name: str, seed: int) -> Unit:
    point = study.points[name]
    try:
        overrides = typed({**study.settings, **point.settings, "seed": seed})
        config = load_config(study.profile, overrides)
        chosen = stages(",".join(number for number in point.notebooks or study.notebooks if number != ACROSS))
    except LwaError as error:
        raise LwaError(f"{study.name}, point {name}: {error}") from None
    return Unit(study.name, study.source, name, point.title or name, seed, chosen, config, overrides)
