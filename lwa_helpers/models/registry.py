"""The model registry: what model_config.yaml says of each model, checked; needs no torch, so that `lwa status` is quick."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from lwa_helpers.config import read_yaml
from lwa_helpers.errors import LwaError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")  # a branch or tag may move


class ModelSpec(BaseModel):
    """One entry of model_config.yaml.

    prompt: how a local model is asked to write, "chat" (its tokenizer's template) or "plain"; None: chat where it has one.
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
    """Return the registered models by name. Raises LwaError naming the entry and the field that is wrong."""
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
    """Look a model up by its registered name, or take an existing directory or .gguf file at its word.

    Raises LwaError listing the known names.
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
