"""What runs have in common is computed once: the same code, settings and inputs give the same results."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lwa_helpers import files, paths
from lwa_helpers.config import ExperimentConfig
from lwa_helpers.pipeline import code_digest, manifest
from lwa_helpers.pipeline.locks import locked
from lwa_helpers.pipeline.staleness import Stage, components, inputs, load_state, save_state


def adopt(stage: Stage, config: ExperimentConfig, overrides: dict[str, Any], results: Path) -> Path | None:
    """Take over the results that another run has of a notebook, if everything that they depend on is the same.

    The files are linked, not copied, where the file system can: results are replaced whole and never written into.

    Args:
        stage: The notebook.
        config: Its settings.
        overrides: Those of the settings that differ from the profile's.
        results: The folder of the run that takes them over.

    Returns:
        The other run's folder; None where there is none.
    """
    donor = find_donor(stage, config, results)
    if donor is None:
        return None
    record = manifest.load_named(donor, stage.name)
    for name in [*record["outputs"], f"notebooks/{stage.path.name}"]:
        _link(donor / name, results / name)
    record["settings"], record["records"]["overrides"] = config.model_dump(mode="json"), overrides
    manifest.write(results, record | {"shared_from": donor.relative_to(paths.RESULTS).as_posix()})
    save_state(results, stage, components(stage, config), 0.0)
    return donor


def find_donor(stage: Stage, config: ExperimentConfig, results: Path) -> Path | None:
    """Return the folder of another run whose results of a notebook depend on the same things as those of a run.

    Args:
        stage: The notebook.
        config: Its settings in the run.
        results: The run's folder.
    """
    own = components(stage, config)
    return next((folder for folder in _others(results) if _has(stage, folder, own, results)), None)


def _others(results: Path) -> list[Path]:
    """The folders of all other runs here: of profiles and of the points of all studies."""
    folders = [*paths.RESULTS.glob("*/state"), *paths.STUDIES.glob("*/*/seed-*/state")]
    return sorted(folder.parent for folder in folders if folder.parent != results)


def _has(stage: Stage, donor: Path, own: dict[str, str], results: Path) -> bool:
    """Whether a run's results of a notebook are whole and depend on the same things as in `results`."""
    state, record = load_state(donor, stage), manifest.load(donor, stage.name)
    if state is None or record is None or state["started"] != record["started"]:
        return False
    if state["components"] != own | inputs(results, record["inputs"]):
        return False
    return all(manifest.is_whole(donor / name, output) for name, output in record["outputs"].items())


def _link(source: Path, target: Path) -> None:
    """Give a file or folder a second name; a copy where the file system has no links."""
    with files.atomic_write(target) as temporary:
        if source.is_dir():
            shutil.copytree(source, temporary, copy_function=_link_file)
        else:
            _link_file(source, temporary)


def _link_file(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@contextmanager
def claimed(stage: Stage, config: ExperimentConfig, results: Path, label: str) -> Iterator[None]:
    """Let one run at a time compute a notebook with the same code, settings and earlier outputs; others wait.

    Args:
        stage: The notebook.
        config: Its settings.
        results: The folder of the run.
        label: How a message begins.
    """
    earlier = {name: output["sha256"] for name, output in _outputs_before(stage, results)}
    key = files.sha256_of_text(json.dumps([components(stage, config), earlier], sort_keys=True))
    with locked(paths.STUDIES / ".claims", f"{stage.name}-{key[:16]}", f"{label} waits: another run computes the same"):
        yield


def _outputs_before(stage: Stage, results: Path) -> list[tuple[str, dict[str, Any]]]:
    """The outputs of the notebooks before this one."""
    records = manifest.load_all(results)
    return [item for record in records if record["notebook"] < stage.name for item in record["outputs"].items()]


def key_of(stage: Stage, config: ExperimentConfig, before: list[Stage]) -> str:
    """Return what tells whether a notebook that has not run yet will give what another run of it gives.

    Args:
        stage: The notebook.
        config: Its settings.
        before: The notebooks of the run; it reads the outputs that it names of those with smaller numbers.
    """
    read = code_digest.outputs_read(code_digest.notebook_tree(stage.path))
    earlier = [
        key_of(other, config, before)
        for other in before
        if other.name < stage.name and read & code_digest.constants(code_digest.notebook_tree(other.path))
    ]
    return files.sha256_of_text(json.dumps([components(stage, config), *earlier], sort_keys=True))
