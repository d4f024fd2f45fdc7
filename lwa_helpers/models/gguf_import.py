"""What is checked of a .gguf file before and after transformers reads it, and of the copy that is kept of it."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import gguf
from transformers import PreTrainedModel
from transformers.integrations.gguf import read_gguf_metadata
from transformers.integrations.gguf.reader import GgufHeader

from lwa_helpers import assets, files
from lwa_helpers.errors import LwaError
from lwa_helpers.models.checkpoint_errors import cause
from lwa_helpers.models.layers import decoder_layers

TOKENS = [getattr(gguf.Keys.Tokenizer, f"{token}_ID") for token in ("BOS", "EOS", "UNK", "PAD", "SEP")]
SEAL = "conversion.json"  # hashes of the other files of a finished conversion


class GgufFile:
    """The settings and the tensor names of a .gguf file.

    Args:
        name: The model's name in messages.
        path: The file.

    Raises:
        LwaError: If the file is not a whole GGUF file.
    """

    def __init__(self, name: str, path: Path):
        self.path, self.label = path, f"model {name!r} ({path})"
        with path.open("rb") as file:
            start = file.read(64)
        if start.startswith(b"version https://git-lfs"):
            raise LwaError(f"{self.label} is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder")
        if not start.startswith(b"GGUF"):
            raise LwaError(f"{self.label} is not a GGUF file, or its start is damaged: download it again")
        try:
            self.settings, self.names = read_gguf_metadata(str(path))
            whole = self._size() <= path.stat().st_size
        except (struct.error, ValueError, LookupError, OverflowError, MemoryError) as error:
            raise LwaError(f"{self.label} is cut off or damaged ({cause(error)}): download it again") from error
        if not whole:
            raise LwaError(f"{self.label} is cut off: download it again")
        self.architecture = str(self.settings["general.architecture"])

    def _size(self) -> int:
        """Return how many bytes the file must have for its tensors, 0 if they are of a type of unknown size."""
        try:
            header = GgufHeader.from_file(str(self.path))
        except ValueError as error:
            if "not supported yet" in str(error):
                return 0
            raise
        return header.data_start + max((tensor.offset + tensor.nbytes for tensor in header.tensors), default=0)

    def check_kind(self) -> None:
        """Refuse what is no whole language model.

        Raises:
            LwaError: If it is a part of a split file, an adapter, an image projector or holds no weights or tokens.
        """
        kind = self.settings.get("general.type", "model")
        if kind == "mmproj" or self.architecture == "clip":
            raise LwaError(
                f"{self.label} is the image part of a model (mmproj): give the .gguf file of its language part"
            )
        if kind != "model":
            raise LwaError(f"{self.label} is no model but of type {kind!r}: give the .gguf file of a whole model")
        if (parts := self.settings.get("split.count", 0)) > 1:
            part = self.settings.get("split.no", 0) + 1
            raise LwaError(f"{self.label} is part {part} of {parts}: join them with `llama-gguf-split --merge` first")
        if not self.names:
            raise LwaError(f"{self.label} holds no weights: give the .gguf file of a whole model")
        if "tokenizer.ggml.tokens" not in self.settings:
            raise LwaError(f"{self.label} has no tokenizer: convert it again, with the tokenizer in the model's folder")
        for key in TOKENS:
            if (token := self.settings.get(key, 0)) >= self.settings["tokenizer.ggml.tokens"]:
                raise LwaError(
                    f"{self.label} names a token that it does not have ({key} is {token}, of "
                    f"{self.settings['tokenizer.ggml.tokens']} tokens): set it with "
                    f"`gguf-set-metadata {self.path.name} {key} NUMBER`"
                )

    def check_read(self, model: PreTrainedModel) -> None:
        """Check that transformers' reader, which leaves out what it does not know, has read all of the file.

        Args:
            model: What it read.

        Raises:
            LwaError: If tensors or a scaling of positions were left out.
        """
        left = self._unread(model)
        scaling = self.settings.get(f"{self.architecture}.rope.scaling.type", "none")
        if scaling not in ("none", "") and _has_plain_positions(model):
            left.append(f"the scaling of positions ({scaling})")
        if left:
            raise LwaError(
                f"{self.label} holds what transformers' GGUF reader leaves out: {', '.join(left[:3])}"
                f"{', …' if len(left) > 3 else ''}; give the .safetensors checkpoint that it was made from"
            )

    def _unread(self, model: PreTrainedModel) -> list[str]:
        """Return the tensors of the file that are none of the model's.

        Where llama.cpp has no name for some weight of the model (merged experts), only what certainly is none is
        returned: further layers, biases and factors of rotary positions.
        """
        n_layers, known = len(decoder_layers(model)), self._names_of(model)
        further = n_layers + self.settings.get(f"{self.architecture}.nextn_predict_layers", 0)  # no part of the model
        stems = {name.rsplit(".", 1)[0] for name in known if name}
        left = []
        for name in self.names:
            found = re.match(r"blk\.(\d+)\.", name)
            layer = int(found[1]) if found else 0
            if name in known or n_layers <= layer < further:
                continue
            if name.startswith("rope_"):
                left += [name] if _has_plain_positions(model) else []
            elif None not in known or layer >= further or name.rsplit(".", 1)[0] in stems:
                left.append(name)
        return left

    def _names_of(self, model: PreTrainedModel) -> set[str | None]:
        """Return llama.cpp's names of a model's tensors; None stands for tensors without a name."""
        architectures = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
        if self.architecture not in architectures:
            return {None}
        names = gguf.get_tensor_name_map(architectures[self.architecture], len(decoder_layers(model)))
        return {names.get_name(name, try_suffixes=(".weight", ".bias")) for name in model.state_dict()}


def _has_plain_positions(model: PreTrainedModel) -> bool:
    """Return whether no rotary position of a model is scaled."""
    settings = getattr(model.config, "rope_parameters", None) or {}
    kinds = [part for part in settings.values() if isinstance(part, dict)] or [settings]
    return all(kind.get("rope_type", "default") == "default" for kind in kinds)


def seal(folder: Path) -> None:
    """Write down the hashes of a finished conversion's files."""
    hashes = {path.name: files.sha256_of(path) for path in folder.iterdir()}
    (folder / SEAL).write_text(json.dumps(hashes), encoding="utf-8")


def is_sealed(folder: Path) -> bool:
    """Return whether a folder holds a conversion that was finished, with all its files as they were."""
    try:
        hashes = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        return bool(hashes) and all(assets.cached_sha256(folder / name) == sha256 for name, sha256 in hashes.items())
    except (OSError, ValueError, AttributeError):
        return False
