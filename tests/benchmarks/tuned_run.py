"""The run that a benchmark builds on: a profile's settings, by default with histories read as titles, and its teacher.

The tables that the paper shows are of titles; `--set data.reading=items` asks a teacher that reads item tokens.
"""

from __future__ import annotations

import argparse

from row_file import DEVICE

from lwa_helpers import paths
from lwa_helpers.cli import parse_overrides
from lwa_helpers.config import ExperimentConfig, load_config
from lwa_helpers.errors import LwaError
from lwa_helpers.models.language_model import LanguageModel
from lwa_helpers.models.loading import load_teacher


def parser(text: str | None) -> argparse.ArgumentParser:
    """The options that name a run; text: of --help."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--profile", default="quick")
    made.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting, e.g. data.reading=items"
    )
    return made


def settings(options: argparse.Namespace) -> ExperimentConfig:
    """The settings that the options name."""
    return load_config(options.profile, {"data.reading": "titles"} | parse_overrides(options.set))


def tuned_teacher(config: ExperimentConfig) -> LanguageModel:
    """The teacher of notebook 02. Raises LwaError where there is none, or one that reads otherwise than is set."""
    folder, reading = paths.results_dir(config.profile) / "models" / "teacher", config.data.reading
    lm = load_teacher(folder) if folder.is_dir() else None
    if lm is None or lm.items is None or lm.items.reading != reading:
        command = f"lwa reproduce --profile {config.profile} --only 02 --set data.reading={reading}"
        raise LwaError(
            f"{folder} holds no teacher that reads {reading}: run `{command}` first, or name its reading with --set"
        )
    lm.model.to(DEVICE)
    return lm
