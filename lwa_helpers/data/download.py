"""Fetch a category of Amazon Reviews 2023 from the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import HTTPError
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers

from lwa_helpers import files, paths
from lwa_helpers.data.review_files import find_file
from lwa_helpers.errors import LwaError

REPOSITORY = "McAuley-Lab/Amazon-Reviews-2023"
FILES = ("raw/review_categories/{}.jsonl", "raw/meta_categories/meta_{}.jsonl")


def download(category: str, root: str | Path | None = None) -> list[Path]:
    """Fetch the reviews and the items of a category.

    Shows progress and resumes an interrupted download, which hf_hub_download would start again. Compares each file's
    SHA-256 with the one that the hub states. Does not touch a file that is already there. Raises LwaError for an
    unknown category, without a network, and when a checksum differs.

    Args:
        category: the name of the category, for example All_Beauty.
        root: the folder for the files; dataset/amazon by default.

    Returns:
        The paths of the review file and the item file.
    """
    root = paths.DATASET / "amazon" if root is None else Path(root)
    present = [find_file(root, category, prefix) for prefix in ("", "meta_")]
    return [
        file or _fetch(pattern.format(category), category, root) for file, pattern in zip(present, FILES, strict=True)
    ]


def _fetch(name: str, category: str, root: Path) -> Path:
    target = root / Path(name).name
    try:
        infos = HfApi().get_paths_info(REPOSITORY, [name], repo_type="dataset")
        known = [info for info in infos if isinstance(info, RepoFile)]
        if not known:
            raise LwaError(f"{REPOSITORY} has no {name}: {category!r} is not one of its categories (try All_Beauty)")
        sha256 = known[0].lfs and known[0].lfs.sha256
        partial = root / f".{target.name}.{(sha256 or known[0].blob_id)[:12]}.part"
        root.mkdir(parents=True, exist_ok=True)
        with open(partial, "ab") as file:
            url = hf_hub_url(REPOSITORY, name, repo_type="dataset")
            http_get(url, file, resume_size=file.tell(), headers=build_hf_headers(), expected_size=known[0].size)
    except (HTTPError, OSError) as error:
        raise LwaError(
            f"cannot fetch {name} from huggingface.co/datasets/{REPOSITORY} ({type(error).__name__}: {error}): "
            f"check the network and HF_HUB_OFFLINE, or put the file into {root} yourself; what has arrived is kept"
        ) from None
    if sha256 and files.sha256_of(partial) != sha256:
        partial.unlink()
        raise LwaError(f"{name} arrived damaged (SHA-256 differs from the hub's) and was deleted: fetch it again")
    return partial.replace(target)
