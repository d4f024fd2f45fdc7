"""Whatever the libraries raise while they read a model, as one LwaError that names the model, the cause and the fix."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError

BARE = (KeyError, AttributeError, TypeError, IndexError, AssertionError)  # whose text says little without their name
LONGEST = 400  # characters of a library's message that are shown
FIXES = (
    (ImportError, "install the package, or give a checkpoint with tokenizer.json, or a GGUF"),
    (SafetensorError, "a .safetensors file is damaged: download or save it again"),
    (MemoryError, "weights take four bytes each in memory: give a smaller model"),
    (PermissionError, "make the file readable"),
)
OTHER_FIX = "give a causal language model as save_pretrained writes it, or a GGUF"


def unreadable(name: str, where: str | Path, error: BaseException) -> str:
    """Return the message of the LwaError for what a library raised while it read a model.

    Args:
        name: The model's name.
        where: Its folder, file or repository.
        error: What was raised.

    Returns:
        The message, with the cause and the fix.
    """
    fix = next((fix for kind, fix in FIXES if isinstance(error, kind)), OTHER_FIX)
    return f"model {name!r} ({where}) is not one that transformers can load: {cause(error)}; {fix}"


def cause(error: BaseException) -> str:
    """Return the part of an error's message that says what is wrong.

    That is its first line. A line that ends in a colon only announces the next one, so the two are joined.
    """
    if "trust_remote_code" in str(error):  # the libraries advise to run code that comes with the model
        return "it needs code that comes with it, which lwa never runs"
    lines = [line for line in (" ".join(line.split()) for line in str(error).splitlines()) if line]
    last = next((place for place, line in enumerate(lines) if not line.endswith(":")), len(lines) - 1)
    text = " ".join(lines[: last + 1]).rstrip(".:")
    if not text or isinstance(error, BARE):
        text = f"{type(error).__name__}: {text}".rstrip(": ")
    return text if len(text) <= LONGEST else text[:LONGEST] + "…"
