"""The only module that knows where files live."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lwa_helpers.errors import LwaError

PACKAGE = Path(__file__).resolve().parent
ROOT = Path(os.environ.get("LWA_ROOT") or PACKAGE.parent).resolve()
CONFIGS = PACKAGE / "configs"
NOTEBOOKS = ROOT / "notebooks"
FIGURES = ROOT / "figures"
PAPER = ROOT / "paper"
RESULTS = ROOT / "results"
DATASET = ROOT / "dataset"
CACHE = Path(os.environ.get("LWA_CACHE") or ROOT / ".cache").resolve()
TRAINER_OUTPUT = CACHE / "trainer"  # transformers.Trainer insists on a folder, even where it saves nothing


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


def results_dir(profile: str) -> Path:
    """The folder that all of one profile's outputs go to: results/<profile>."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", profile):
        raise LwaError(f"profile {profile!r}: use lower-case letters, digits and underscores")
    return RESULTS / profile
