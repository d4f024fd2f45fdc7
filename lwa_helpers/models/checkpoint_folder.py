"""What a model's folder or repository holds, looked at before anything of it is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING
from transformers.utils import cached_file

from lwa_helpers.errors import LwaError

# Keys of config.json and files beside it by which tools say that the weights are quantised.
QUANTISED_KEYS = ("quantization_config", "compression_config", "quantization")
QUANTISED_FILES = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
    "quanto_qmap.json": "quanto",
}
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
TOKENIZER_FILES = ("tokenizer.json", "*.model", "*vocab*", "*.tiktoken", "tekken.json", "merges.txt")


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter of PEFT, such as LoRA."""
    return (folder / ADAPTER_CONFIG).is_file()


def check_folder(name: str, folder: Path) -> tuple[dict[str, Any], list[Path]]:
    """Check that a folder holds a checkpoint of unquantised weights.

    Args:
        name: The model's name.
        folder: The folder.

    Returns:
        What config.json says, and the files of the weights.

    Raises:
        LwaError: If it holds none. The message says what it holds instead.
    """
    if not folder.is_dir():
        raise LwaError(f"model directory {folder} does not exist: give the folder that holds config.json and weights")
    weights = sorted(folder.glob("*.safetensors"))
    settings = json_object(folder / "config.json") if (folder / "config.json").is_file() else None
    if settings is not None:
        check_settings(name, folder, settings, [path.name for path in folder.iterdir()])
    if not weights:
        raise LwaError(f"model directory {folder} holds no .safetensors file: {_instead(folder)}")
    if settings is None:
        raise LwaError(
            f"model {name!r} ({folder}) is not one that transformers can load: there is no config.json beside its "
            "weights; copy it from where the model came from"
        )
    for path in weights:
        with path.open("rb") as file:
            if file.read(32).startswith(b"version https://git-lfs"):
                raise LwaError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder")
    return settings, weights


def _instead(folder: Path) -> str:
    """Return what to do about a folder without .safetensors files, by what it holds."""
    if found := sorted(folder.glob("*.gguf")):
        return f"it holds {found[0].name}, so give {found[0]}"
    if found := sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]):
        return (
            f"it holds {found[0].name}; convert it once with transformers: "
            f"AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        )
    inner = [path.parent for name in ("config.json", ADAPTER_CONFIG) for path in folder.glob(f"*/{name}")]
    inner += [path.parent for path in folder.glob("snapshots/*/config.json")]  # of the Hugging Face cache
    if inner:
        return f"there is a model in a folder of it, so give {inner[0]}"
    return "save it with save_pretrained"


def settings_of(repository: str, revision: str | None) -> dict[str, Any]:
    """Return config.json of a repository of the hub as it stands in the file.

    Args:
        repository: Its owner and name.
        revision: The pinned commit.

    Returns:
        The settings; none where the hub does not answer or has no such file, which loading will say.

    Raises:
        LwaError: If the file is not a JSON object.
    """
    quiet = {f"_raise_exceptions_for_{kind}": False for kind in ("missing_entries", "connection_errors", "gated_repo")}
    path = cached_file(repository, "config.json", revision=revision, **quiet)
    return json_object(Path(path)) if path else {}


def json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        LwaError: If the file does not hold one.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LwaError(f"{path} is not a JSON file ({error}): copy it again from where the model came from") from None
    if not isinstance(settings, dict):
        raise LwaError(f"{path} holds a {type(settings).__name__}, not an object {{…}}: copy it again from the model")
    return settings


def check_settings(name: str, where: str | Path, settings: dict[str, Any], files: Iterable[str] = ()) -> None:
    """Refuse a model that is quantised or that transformers has no class for, before anything of it is loaded.

    Args:
        name: The model's name.
        where: Its folder or repository.
        settings: What config.json says.
        files: Names of the files beside it.

    Raises:
        LwaError: If it is one of these.
    """
    if method := _quantisation(settings, set(files)):
        raise LwaError(
            f"model {name!r} ({where}) is quantised ({method}): give an unquantised checkpoint or a GGUF of it"
        )
    kind, code = settings.get("model_type"), settings.get("auto_map")
    if code and kind not in CONFIG_MAPPING:
        raise LwaError(
            f"model {name!r} ({where}) is not one that transformers can load: its type {kind!r} needs code that comes "
            "with it, which lwa never runs; give a model of an architecture that is part of transformers"
        )


def _quantisation(settings: dict[str, Any], files: set[str]) -> str | None:
    """Return the method by which a model's weights are quantised, or None for plain weights."""
    inner = settings.get("text_config")
    for holder in (settings, inner if isinstance(inner, dict) else {}):
        for key in QUANTISED_KEYS:
            if (found := holder.get(key)) is not None:
                return _method(found)
    return next((method for file, method in QUANTISED_FILES.items() if file in files), None)


def _method(found: Any) -> str:
    if not isinstance(found, dict):
        return str(found)
    bits = "bitsandbytes" if found.get("load_in_4bit") or found.get("load_in_8bit") else "an unnamed method"
    return str(found.get("quant_method") or found.get("quant_algo") or found.get("mode") or bits)


def has_tokenizer(folder: str | Path) -> bool:
    """Return whether a folder holds a file with the words of a tokenizer."""
    return any(any(Path(folder).glob(pattern)) for pattern in TOKENIZER_FILES)


def no_tokenizer(name: str, where: str | Path) -> str:
    """Return the message for a checkpoint without a tokenizer."""
    return (
        f"model {name!r} ({where}) has no tokenizer: copy tokenizer.json and tokenizer_config.json of the model that "
        "it was made from into its folder"
    )
