"""The model registry: what model_config.yaml says about each model, checked.

This module does not import torch, so that `lwa status` is quick.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from lwa_helpers.config import read_yaml
from lwa_helpers.errors import LwaError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")  # a commit, because a branch or tag may move
_SERVED = re.compile(r"(?!.*\.\.)\w[\w.:/@+-]*", re.ASCII)


class ModelSpec(BaseModel):
    """One entry of model_config.yaml.

    Attributes:
        name: The registered name.
        backend: "embedded" (a GGUF file inside a Python package), "huggingface", "ollama" or "path" (a folder or file).
        id: The model's name in its backend, such as owner/name of a repository, or its path.
        revision: The pinned commit of a Hugging Face repository.
        licence: The model's licence.
        prompt: How a local model is asked to write: "chat" (by its tokenizer's template) or "plain". None is "chat"
            where the tokenizer has a template, else "plain".
        think: Ollama's setting of that name.
        num_predict: Ollama's setting of that name: the most tokens of an answer, with the thinking before it. None
            allows what the longest answer needs, and 2048 more if the model thinks.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    backend: Literal["embedded", "huggingface", "ollama", "path"]
    id: str
    revision: str | None = None
    licence: str | None = None
    prompt: Literal["chat", "plain"] | None = None
    think: bool | Literal["low", "medium", "high"] | None = None
    num_predict: PositiveInt | None = None


def registry() -> dict[str, ModelSpec]:
    """Return the registered models by name; a wrong entry raises LwaError, which names the entry and the field."""
    return {name: _entry(name, fields) for name, fields in read_yaml("model_config.yaml").items()}


def _entry(name: str, fields: Any) -> ModelSpec:
    try:
        spec = ModelSpec(name=name, **fields)
    except (ValidationError, TypeError) as error:
        problems = (
            error.errors() if isinstance(error, ValidationError) else [{"loc": (), "msg": "is not a list of fields"}]
        )
        wrong = "; ".join(f"{'.'.join(map(str, problem['loc']))} {problem['msg']}".strip() for problem in problems)
        raise LwaError(f"model_config.yaml: entry {name!r}: {wrong}") from None
    if spec.backend == "huggingface" and not (_HUB_ID.fullmatch(spec.id) and _COMMIT.fullmatch(spec.revision or "")):
        raise LwaError(
            f"model_config.yaml: entry {name!r} needs id: owner/name and a pinned revision (a commit's 40 digits), "
            f"has {spec.id!r} at {spec.revision!r}"
        )
    if spec.backend == "ollama" and not may_be_served(spec.id):
        raise LwaError(f"model_config.yaml: entry {name!r}: id {spec.id!r} is not the name of a model of Ollama")
    return spec


def may_be_served(name: str) -> bool:
    """Return whether a name may be that of a model of Ollama, such as qwen3, llama3.1:8b or hf.co/user/repo:Q4."""
    return len(name) < 400 and bool(_SERVED.fullmatch(name))


def full_name(name: str) -> str:
    """Return the name of a model of Ollama with its tag, by default `latest`."""
    return name if ":" in name.rsplit("/")[-1] else f"{name}:latest"


def find_spec(name: str) -> ModelSpec | None:
    """Return the entry of a registered name, a new one for an existing directory or a .gguf file, else None.

    An entry of a model of Ollama is found with and without the tag `latest`.

    Args:
        name: A name or a path.
    """
    known = registry()
    if name in known:
        return known[name]
    path = _expanded(name)
    if name.strip() and (path.suffix == ".gguf" or _is_directory(path)):
        return ModelSpec(name=path.stem, backend="path", id=str(path))
    served = (spec for spec in known.values() if spec.backend == "ollama")
    return next((spec for spec in served if full_name(spec.name) == full_name(name)), None)


def _expanded(name: str) -> Path:
    """Return the path that a name may be, with ~ as the user's home."""
    try:
        return Path(name).expanduser()
    except RuntimeError:  # there is no such user
        return Path(name)


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # the name is too long for a file
        return False


def unknown(name: str, also: str = "") -> str:
    """Return the message that a name stands for no model.

    Args:
        name: The name.
        also: What else it is not.
    """
    return (
        f"unknown model {name[:200]!r}: neither a registered name ({', '.join(registry())}) nor a directory or .gguf "
        f"file{also}"
    )


def model_spec(name: str) -> ModelSpec:
    """Return what find_spec does.

    Args:
        name: A registered name or a path.

    Raises:
        LwaError: If the model is unknown. The message lists the known names.
    """
    spec = find_spec(name)
    if spec is None:
        raise LwaError(unknown(name))
    return spec
