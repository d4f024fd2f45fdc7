"""The only module that knows where files live."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lwa_helpers.errors import LwaError

PACKAGE = Path(__file__).resolve().parent
ROOT = Path(os.path.expanduser(os.environ.get("LWA_ROOT") or PACKAGE.parent)).resolve()
CONFIGS = PACKAGE / "configs"
NOTEBOOKS = ROOT / "notebooks"
FIGURES = ROOT / "figures"
PAPER = ROOT / "paper"
RESULTS = ROOT / "results"
STUDIES = RESULTS / "studies"
DATASET = ROOT / "dataset"
CACHE = Path(os.path.expanduser(os.environ.get("LWA_CACHE") or ROOT / ".cache")).resolve()
CACHE_FOLDERS = {
    "amazon": "prepared Amazon sets",
    "checkpoints": "training runs that can be resumed",
    "embedded": "models that packages hold in parts, joined",
    "models": "GGUF files, converted",
    "sha256": "hashes of large files, by size and time of change",
    "teacher_outputs": "logits and states of teachers on training windows",
    "teachers": "answers of served teachers",
    "trainer": "nothing: transformers.Trainer insists on a folder, even where it saves nothing",
}
TRAINER_OUTPUT = CACHE / "trainer"


def checkout() -> Path:
    """Find the repository.

    Returns:
        Its root folder.

    Raises:
        LwaError: when the package was installed without its checkout (no notebooks/ folder beside it).
    """
    if not NOTEBOOKS.is_dir():
        raise LwaError(
            f"{ROOT} holds no notebooks/ folder: lwa_helpers runs from a checkout. "
            "Install it there with `make setup`, or name the checkout in LWA_ROOT."
        )
    return ROOT


def cache_folder(kind: str) -> Path:
    """Return the folder of one kind of cached files, one of CACHE_FOLDERS; deleting it costs time and no result."""
    if kind not in CACHE_FOLDERS:
        raise LwaError(f"no cache folder {kind!r}: known are {', '.join(CACHE_FOLDERS)}")
    return CACHE / kind


def run_dir(profile: str, study: str | None = None) -> Path:
    """Return the folder that a notebook's outputs go to: the one that the runner names in LWA_RUN, else its own.

    Args:
        profile: the profile that it runs with.
        study: the study whose points it compares, if it does.
    """
    if given := os.environ.get("LWA_RUN"):
        return Path(given)
    return across_dir(Path(study).stem) if study else results_dir(profile)


def across_dir(study: str) -> Path:
    """The folder of the comparison of a study's points."""
    return STUDIES / study / "across"


def results_dir(profile: str) -> Path:
    """The folder that all of one profile's outputs go to: results/<profile>."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", profile):
        raise LwaError(f"profile {profile!r}: use lower-case letters, digits and underscores")
    return RESULTS / profile
