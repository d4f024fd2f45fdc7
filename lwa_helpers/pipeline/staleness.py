"""Whether a notebook's results are current, and if not, why.

A stage's key has one component per thing that it depends on: its code, each setting, each module of lwa_helpers that
it reaches, each data file, the pinned packages, and each output of an earlier notebook that it read. The commit is
recorded in the manifest but is no component.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lwa_helpers import assets, files, paths
from lwa_helpers.config import ExperimentConfig, load_config, read_yaml
from lwa_helpers.errors import LwaError
from lwa_helpers.pipeline import code_digest, manifest
from lwa_helpers.pipeline.code_digest import ACROSS

UNUSED = {"target_minutes"}
RESOLVED = {"experiment_config.yaml", "distillation_config.yaml"}


@dataclass(frozen=True)
class Stage:
    """One numbered notebook.

    Attributes:
        path: the notebook.
        points: the runs of a study that it compares, a line each; none if it belongs to a single run.
    """

    path: Path
    points: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """File name without .ipynb."""
        return self.path.stem


def stages(only: str | None = None) -> list[Stage]:
    """The numbered notebooks of a run in order, or those that `only` lists ("02,03"). Raises LwaError on others."""
    found = [stage for stage in _numbered() if not stage.name.startswith(ACROSS)]
    if not found:
        raise LwaError(f"{paths.NOTEBOOKS} holds no numbered notebook (01_….ipynb)")
    if only is None:
        return found
    wanted = [number.strip() for number in only.split(",")]
    known = {key: stage for stage in found for key in (stage.name, stage.name[:2], stage.name[:2].lstrip("0"))}
    if unknown := set(wanted) - set(known):
        raise LwaError(f"no notebook {', '.join(sorted(unknown))}: there are {', '.join(s.name for s in found)}")
    return [stage for stage in found if stage in {known[key] for key in wanted}]


def across_stage(points: tuple[str, ...]) -> Stage:
    """The notebook that compares the points of a study. Raises LwaError if there is none."""
    found = [stage.path for stage in _numbered() if stage.name.startswith(ACROSS)]
    if not found:
        raise LwaError(f"{paths.NOTEBOOKS} holds no notebook {ACROSS}_….ipynb, which compares the points of a study")
    return Stage(found[0], points)


def _numbered() -> list[Stage]:
    return [Stage(path) for path in sorted(paths.checkout().joinpath("notebooks").glob("[0-9][0-9]_*.ipynb"))]


def components(stage: Stage, config: ExperimentConfig) -> dict[str, str]:
    """Everything a stage depends on except earlier outputs: what it is -> hash or value."""
    tree = code_digest.notebook_tree(stage.path)
    modules = code_digest.reached(tree)
    settings = config.model_dump(mode="json")
    used = code_digest.sections_used(tree, set(settings) - UNUSED) | {"seed", "profile"}
    parts = {"code": code_digest.digest(tree), "Python": platform.python_version()}
    parts |= {"points": ", ".join(stage.points)} if stage.points else {}
    parts |= {f"module {name}": _module_digest(path) for name, path in modules.items()}
    parts |= {f"setting {key}": value for name in sorted(used) for key, value in _flat(name, settings[name]).items()}
    parts |= {f"file {name}": _pins(name) for name in ("constraints.txt", "embedded.txt")}
    parts |= {f"file {name}": _yaml_digest(name, config) for name in _yaml_read(modules)}
    return parts | {f"file {path}": assets.cached_sha256(path) for path in _data_files(config, used)}


def why_stale(stage: Stage, config: ExperimentConfig, results: Path, by_hash: bool = False) -> str | None:
    """Say what changed since a notebook last succeeded.

    Args:
        stage: the notebook.
        config: its settings.
        results: the folder of its results.
        by_hash: whether to find an output that was damaged by its hash, which takes seconds, or by its size alone.

    Returns:
        One line, or None when its results are current.
    """
    state, record = load_state(results, stage), manifest.load(results, stage.name)
    if record is None:
        return "it has not been run"
    if state is None or state["started"] != record["started"]:
        return "its last run was not the runner's, or was interrupted"
    for name, output in record["outputs"].items():
        if not manifest.is_whole(results / name, output, by_hash):
            return f"its output {name} is missing or was changed"
    now = components(stage, config) | inputs(results, record["inputs"])
    return difference(state["components"], now)


def status(profile: str) -> list[str]:
    """One line per notebook: current, or stale and why."""
    config, results = load_config(profile), paths.results_dir(profile)
    lines: list[str] = []
    stale: dict[str, set[str]] = {}
    for stage in stages():
        reason = why_stale(stage, config, results)
        record = manifest.load(results, stage.name)
        waits = [name for name, outputs in stale.items() if record and outputs & set(record["inputs"])]
        if reason:
            stale[stage.name] = set(record["outputs"]) if record else set()
        note = f" (reads {', '.join(waits)}, which is stale)" if waits and not reason else ""
        lines.append(f"{stage.name:28} {'stale: ' + reason if reason else 'current' + note}")
    return lines


def inputs(results: Path, names: Iterable[str]) -> dict[str, str]:
    """What earlier outputs and numbers that a notebook read are now: their hashes and values."""
    places = {name: manifest.split_point(results, name) for name in names}
    known = {folder: manifest.fingerprints(folder) for folder in {folder for folder, _ in places.values()}}
    return {f"input {name}": known[folder].get(within, "missing") for name, (folder, within) in places.items()}


def difference(before: dict[str, str], now: dict[str, str]) -> str | None:
    """Say which components differ, the first one in full; None when none does."""
    changed = [key for key in [*now, *(before.keys() - now.keys())] if before.get(key) != now.get(key)]
    if not changed:
        return None
    key = changed[0]
    if key not in before:
        reason = f"{key} is new"
    elif key not in now:
        reason = f"{key} is gone"
    elif key.startswith(("setting", "Python")):
        reason = f"{key} changed from {before[key]} to {now[key]}"
    else:
        reason = f"{key} changed"
    return reason + (f" (and {len(changed) - 1} more)" if len(changed) > 1 else "")


def load_state(results: Path, stage: Stage) -> dict[str, Any] | None:
    """What the stage's last success depended on and how long it took, or None."""
    path = _state_file(results, stage)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def save_state(results: Path, stage: Stage, before: dict[str, str], seconds: float) -> None:
    """Record a success and its wall time: `before` are the components as they were when the stage began."""
    record = manifest.load_named(results, stage.name)
    read = {f"input {name}": sha256 for name, sha256 in record["inputs"].items()}
    state = {"started": record["started"], "seconds": seconds, "components": before | read}
    with files.atomic_write(_state_file(results, stage)) as temporary:
        temporary.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")


def _state_file(results: Path, stage: Stage) -> Path:
    return results / "state" / f"{stage.name}.json"


def _module_digest(path: Path) -> str:
    return code_digest.digest(code_digest.module_tree(path))


def _flat(key: str, value: Any) -> dict[str, str]:
    """{"data": {"name": "x"}} -> {"data.name": '"x"'}."""
    if not isinstance(value, dict):
        return {key: json.dumps(value)}
    return {name: text for inner, v in value.items() for name, text in _flat(f"{key}.{inner}", v).items()}


def _pins(name: str) -> str:
    """Hash a requirements file without its comments."""
    lines = (paths.ROOT / name).read_text(encoding="utf-8").splitlines()
    return files.sha256_of_text("\n".join(line for line in lines if line.strip() and not line.startswith("#")))


def _yaml_read(modules: dict[str, Path]) -> list[str]:
    """The package's YAML files that the modules name, except those that the settings already hold."""
    known = {path.name for path in paths.CONFIGS.glob("*.yaml")} - RESOLVED
    written = set().union(*(code_digest.constants(code_digest.module_tree(path)) for path in modules.values()))
    return sorted(known & written)


def _yaml_digest(name: str, config: ExperimentConfig) -> str:
    """Hash a YAML file's contents; of the model registry, only the entries of the models that the settings name."""
    content = read_yaml(name)
    if name == "model_config.yaml":
        content = {model: content.get(model) for model in _models(config)}
    return files.sha256_of_text(json.dumps(content, sort_keys=True))


def _models(config: ExperimentConfig) -> list[str]:
    return sorted({config.teacher.model, *config.comparison.teachers})


def _data_files(config: ExperimentConfig, used: set[str]) -> list[Path]:
    """The files outside the repository that the settings name: the reviews, and models given as a path."""
    files: list[Path] = []
    if "data" in used and config.data.name != "movielens":
        root = paths.ROOT / config.data.root
        files += [*root.glob(f"{config.data.name}.*"), *root.glob(f"meta_{config.data.name}.*")]
    for model in _models(config) if used & {"teacher", "comparison"} else ():
        place = paths.ROOT / model
        files += place.rglob("*") if place.is_dir() else [place]
    return sorted(path for path in files if path.is_file())
