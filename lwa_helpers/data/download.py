"""Fetch a category of Amazon Reviews 2023 from the Hugging Face hub."""

from __future__ import annotations

import shutil
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from lwa_helpers import paths
from lwa_helpers.data.reading import find_file
from lwa_helpers.errors import LwaError

REPOSITORY = "McAuley-Lab/Amazon-Reviews-2023"
FILES = ("raw/review_categories/{}.jsonl", "raw/meta_categories/meta_{}.jsonl")


def download(category: str, root: str | Path | None = None) -> list[Path]:
    """Fetch reviews and items of a category into root (default: dataset/amazon) and return their paths.

    Shows progress, goes on where an interrupted call stopped, and compares each file's SHA-256 with the one that the
    hub states. A file that is there already is left alone. Raises LwaError for an unknown category, without a network,
    and when a checksum differs.
    """
    root = paths.DATASET / "amazon" if root is None else Path(root)
    fetched = [find_file(root, category, prefix) for prefix in ("", "meta_")]
    for place, pattern in enumerate(FILES):
        if fetched[place] is None:
            fetched[place] = _fetch(pattern.format(category), category, root)
    return fetched


def _fetch(name: str, category: str, root: Path) -> Path:
    stage = root / ".download"
    try:
        known = HfApi().get_paths_info(REPOSITORY, [name], repo_type="dataset")
        if not known:
            raise LwaError(f"{REPOSITORY} has no {name}: {category!r} is not one of its categories (try All_Beauty)")
        path = Path(hf_hub_download(REPOSITORY, name, repo_type="dataset", local_dir=stage))
    except (HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise LwaError(
            f"cannot fetch {name} from huggingface.co/datasets/{REPOSITORY} ({type(error).__name__}: {error}): "
            f"check the network and HF_HUB_OFFLINE, or put the file into {root} yourself; what has arrived is kept"
        ) from None
    if known[0].lfs and paths.sha256_of(path) != known[0].lfs.sha256:
        path.unlink()
        raise LwaError(f"{name} arrived damaged (SHA-256 differs from the hub's) and was deleted: fetch it again")
    target = root / path.name
    shutil.move(path, target)
    return target
