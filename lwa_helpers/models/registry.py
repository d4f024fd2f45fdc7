"""The model registry: what model_config.yaml says about each model, checked.

This module does not import torch, so that `lwa status` is quick.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from lwa_helpers.config import read_yaml
from lwa_helpers.errors import LwaError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")  # a commit, because a branch or tag may move


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
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    backend: Literal["embedded", "huggingface", "ollama", "path"]
    id: str
    revision: str | None = None
    licence: str | None = None
    prompt: Literal["chat", "plain"] | None = None
    think: bool | Literal["low", "medium", "high"] | None = None


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
    return spec


def model_spec(name: str) -> ModelSpec:
    """Return the entry of a registered name, or a new one for an existing directory or a .gguf file.

    Args:
        name: A registered name or a path.

    Raises:
        LwaError: If the model is unknown. The message lists the known names.
    """
    known = registry()
    if name in known:
        return known[name]
    path = Path(name)
    if path.suffix == ".gguf" or path.is_dir():
        return ModelSpec(name=path.stem, backend="path", id=str(path))
    raise LwaError(
        f"unknown model {name!r}: neither a registered name ({', '.join(known)}) nor a directory or .gguf file"
    )
