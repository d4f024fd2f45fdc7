"""The record that each notebook's run leaves: results/<profile>/manifests/<notebook>.json."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

from lwa_helpers import files, paths
from lwa_helpers.config import ExperimentConfig
from lwa_helpers.errors import LwaError
from lwa_helpers.pipeline import time_estimate

PACKAGES = ("torch", "transformers", "accelerate", "numpy", "pandas", "polars", "scipy", "matplotlib", "pydantic")


def path_of(results: Path, notebook: str) -> Path:
    """Where a notebook's manifest lies."""
    return results / "manifests" / f"{notebook}.json"


def load(results: Path, notebook: str) -> dict[str, Any] | None:
    """Read one manifest, or None when the notebook has not finished yet."""
    path = path_of(results, notebook)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def load_named(results: Path, notebook: str) -> dict[str, Any]:
    """Read the manifest of a notebook that has finished."""
    record = load(results, notebook)
    if record is None:
        raise LwaError(f"{notebook} has no manifest in {results}: run it first")
    return record


def load_all(results: Path) -> list[dict[str, Any]]:
    """Read the manifests of all finished notebooks, in order."""
    files = sorted((results / "manifests").glob("*.json"))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def split_point(results: Path, name: str) -> tuple[Path, str]:
    """Return the folder that an output lies in, and its name there.

    Args:
        results: the folder of the run that reads it.
        name: the output; that of a study's point begins with the point, such as deeper/seed-0/data/ranks.parquet.
    """
    point = re.fullmatch(r"([^/]+/seed-\d+)/(.+)", name)
    return (results.parent / point[1], point[2]) if point else (results, name)


def locate(results: Path, name: str) -> Path:
    """Return the path of an output that `split_point` explains."""
    folder, within = split_point(results, name)
    return folder / within


def fingerprints(results: Path, but: str = "") -> dict[str, str]:
    """Return the hash of every output of the finished notebooks, and their numbers and verdicts as text, by name.

    Args:
        results: their folder.
        but: a notebook to leave out.
    """
    found: dict[str, str] = {}
    for record in (record for record in load_all(results) if record["notebook"] != but):
        found |= {name: output["sha256"] for name, output in record["outputs"].items()}
        found |= {f"numbers/{name}": str(number["value"]) for name, number in record["numbers"].items()}
        found |= {f"verdicts/{name}": verdict["outcome"] for name, verdict in record["verdicts"].items()}
    return found


def size(path: Path) -> int:
    """Bytes in a file, or in all files of a folder; 0 when there is none."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def describe(path: Path) -> dict[str, Any]:
    """Hash and size of an output. Raises LwaError when it is missing or empty."""
    if size(path) == 0:
        raise LwaError(f"output {path} was declared but is missing or empty: write it before run.finish()")
    return {"sha256": files.sha256_of(path), "bytes": size(path)}


def is_whole(path: Path, output: dict[str, Any], by_hash: bool = True) -> bool:
    """Return whether an output is as its manifest describes it: of that size and, if asked for, that hash."""
    return size(path) == output["bytes"] and (not by_hash or files.sha256_of(path) == output["sha256"])


def install(staging: Path, results: Path, summary: dict[str, Any]) -> None:
    """Move the outputs into place, drop those that the last run made and this one did not, write the manifest."""
    path = path_of(results, summary["notebook"])
    last = load(results, summary["notebook"])
    path.unlink(missing_ok=True)
    for name in summary["outputs"]:
        files.replace(staging / name, results / name)
    for name in set(last["outputs"] if last else ()) - set(summary["outputs"]):
        files.remove(results / name)
    files.remove(staging)
    write(results, summary)


def write(results: Path, summary: dict[str, Any]) -> None:
    """Write the manifest of a notebook."""
    with files.atomic_write(path_of(results, summary["notebook"])) as temporary:
        temporary.write_text(json.dumps(summary, indent=1, sort_keys=True, default=plain) + "\n", encoding="utf-8")


def provenance(device: Any, config: ExperimentConfig) -> dict[str, Any]:
    """What made a result: commit, uncommitted changes, package versions, device, seed and settings."""
    return {
        "profile": config.profile,
        "seed": config.seed,
        "settings": config.model_dump(mode="json"),
        "commit": git("rev-parse", "HEAD") or "unknown",
        "dirty": bool(git("status", "--porcelain")),
        "device": device_name(device),
        "has_bf16": computes_bf16(device),
        "instructions": instructions(device),
        "speed": None if device is None else time_estimate.machine_speed(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def git(*arguments: str) -> str:
    """Output of a git command in the checkout; empty where git or the history is absent (a source archive)."""
    try:
        done = subprocess.run(["git", "-C", paths.ROOT, *arguments], capture_output=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.decode("utf-8", "replace").strip() if done.returncode == 0 else ""


def device_name(device: Any) -> str:
    """The processor or GPU in words."""
    if device is not None and device.type == "cuda":
        import torch

        return f"cuda ({torch.cuda.get_device_name(device)})"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"cpu ({model or platform.machine()}, {os.cpu_count()} cores)"


def computes_bf16(device: Any) -> bool | None:
    """Whether `bf16: auto` means bfloat16 on the device; None where nothing was computed."""
    if device is None:
        return None
    from lwa_helpers.models import precision

    return precision.has_bf16(device)


def instructions(device: Any) -> str | None:
    """The vector instructions that torch uses on a CPU, such as AVX2 or AVX512; None elsewhere."""
    if device is None or device.type != "cpu":
        return None
    import torch

    return torch.backends.cpu.get_cpu_capability()


def plain(value: Any) -> Any:
    """Turn a numpy or torch scalar or array, or a path, into what JSON can hold; for json.dumps(default=…)."""
    if isinstance(value, Path):
        return str(value)
    if not hasattr(value, "tolist"):
        raise LwaError(f"a value of type {type(value).__name__} cannot be written as JSON")
    return value.tolist()
