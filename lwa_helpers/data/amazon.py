"""Amazon Reviews data of any size: the 2023 edition, and the field names of the 2018 and 2014 editions."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pandas as pd
import polars as pl

from lwa_helpers import assets, files, paths
from lwa_helpers.config import TITLE_LIMIT
from lwa_helpers.data.interactions import COLUMNS, PARTS, Interactions
from lwa_helpers.data.items import item_table
from lwa_helpers.data.kcore import core
from lwa_helpers.data.repairs import Repairs, warn
from lwa_helpers.data.review_files import find_file
from lwa_helpers.data.splits import with_part
from lwa_helpers.data.titles import mend_title
from lwa_helpers.errors import LwaError

SPLITS = ("last_out", "timestamp", "file")

# Modules of this room that make the prepared files: an edit of another one leaves them as they are.
PREPARED_BY = (
    *("amazon", "blocks", "csv_records", "interactions", "items", "json_lines", "kcore", "page_script", "repairs"),
    *("review_files", "splits", "textfiles", "timestamps", "titles", "values"),
)


def load_amazon(
    root: str | Path, category: str, k: int = 5, split: str = "last_out", title_limit: int = TITLE_LIMIT
) -> Interactions:
    r"""Load a category from root/<category>.* and root/meta_<category>.*.

    The files may end in .parquet, .jsonl, .json or .csv; all but .parquet may also be gzipped (.gz). JSON has one
    object a line; a line may use Python's notation, as in the item files of 2014: it is read as a literal and never
    run. CSV is that of RFC 4180: a value in quotes may hold commas, line breaks and doubled quotes.

    A value means the same in every format; blank is null. An id is text or a whole number, without white space around
    it: 7, 7.0 and "7.0" are "7". A timestamp is a whole number of seconds or milliseconds from 1980 to 2099, or a
    counter below 1e8; micro- and nanoseconds, seconds with a fraction, dates and ISO 8601 texts become milliseconds,
    UTC where no zone is given. A rating is a number from 1 to 5, everything else is null. A title is text or a number;
    page script, "nan", "null", true, false, lists and objects are none. A row without a value under a field's first
    name has the one under its other name (asin for parent_asin).

    Repeated (user, item) pairs are dropped first (the earliest is kept, ties by file order), then the k-core filter is
    applied, then the rows are split. Users are ordered by their first line, and a user's rows by time, ties by file
    order. Timestamps are int64, in seconds or milliseconds as in the source; those in seconds in a file of milliseconds
    are multiplied by 1000. Every repair is counted, and one warning names each file that needed any. The result is kept
    in the cache folder; its key covers the contents of the files, the parameters and the code.

    Args:
        root: the folder that holds the files.
        category: the name of the category, as in the file names.
        k: the number of interactions that every user and item must have; 0 turns the k-core filter off.
        split: "last_out", "timestamp" (a row at a cut-off belongs to the later part) or "file" (the file's own column
            `split`; every row is kept as it is, whatever k, and the catalogue is the whole item file).
        title_limit: maximum length of a title, in characters. A longer title is cut at the last space before the
            limit, in the same way everywhere, and counted.

    Returns:
        The interactions and items. `report` counts rows, users, items and interactions before and after the k-core
        filter, and every repair; `warnings` holds the warnings.

    Raises:
        LwaError: if split or k is invalid, or a file cannot be read; the message names the file and the fix.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> lines = ["user_id,parent_asin,rating,timestamp", "ann,B1,5,1", "ann,B2,4,2", "ann,B3,5,3"]
        >>> _ = (folder / "Toys.csv").write_text("\n".join(lines))
        >>> data = load_amazon(folder, "Toys", k=0)
        >>> data.train.parent_asin.tolist(), data.valid.parent_asin.tolist(), data.test.parent_asin.tolist()
        (['B1'], ['B2'], ['B3'])
    """
    root = Path(root)
    if split not in SPLITS or isinstance(k, bool) or not isinstance(k, int) or k < 0:
        raise LwaError(f"split={split!r}, k={k!r}: split is {', '.join(SPLITS)}; k a whole number (0: no core)")
    reviews, meta = _review_file(root, category), find_file(root, category, "meta_")
    folder = paths.cache_folder("amazon") / f"{category}-{_key(reviews, meta, k, split, title_limit)}"
    if not folder.is_dir():
        with files.atomic_write(folder) as temporary:
            temporary.mkdir()
            _prepare(reviews, meta, 0 if split == "file" else k, split, title_limit, temporary)
    notes = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    told = [Repairs(file, **notes[name]).message() for name, file in (("reviews", reviews), ("meta", meta))]
    if meta is None:
        told.append(f"{root} holds no meta_{category} file: all {notes['report']['items']} items are without title")
    told = [message for message in told if message]
    warn(told)
    parts = {part: pd.read_parquet(folder / f"{part}.parquet") for part in PARTS}
    items = pd.read_parquet(folder / "items.parquet")
    items["title"] = items.title.astype(object).where(items.title.notna(), None)
    return Interactions(category, items=items, report=notes["report"], title_limit=title_limit, warnings=told, **parts)


def _review_file(root: Path, category: str) -> Path:
    path = find_file(root, category)
    if path is None:
        there = sorted(file.name for file in root.iterdir())[:20] if root.is_dir() else []
        raise LwaError(
            f"no reviews of {category} in {root} (there: {', '.join(there) or 'nothing'}): put {category}.jsonl.gz (or "
            f".jsonl, .json.gz, .csv, .parquet) there, or fetch it with `lwa data download {category}`"
        )
    return path


def _key(reviews: Path, meta: Path | None, k: int, split: str, title_limit: int) -> str:
    """Return a hash of the input files' contents, the parameters and the code that makes the result."""
    inputs = [
        reviews.suffixes,
        assets.cached_sha256(reviews),
        meta and assets.cached_sha256(meta),
        k,
        split,
        title_limit,
    ]
    code = [files.sha256_of(Path(__file__).with_name(f"{module}.py")) for module in PREPARED_BY]
    return files.sha256_of_text(json.dumps(inputs + code))[:16]


def _prepare(reviews: Path, meta: Path | None, k: int, split: str, title_limit: int, folder: Path) -> None:
    """Write the parts, the items and the report of one load into a folder."""
    notes = {"reviews": Repairs(reviews), "meta": Repairs(meta)}
    rows, users, report = core(reviews, k, split == "file", notes["reviews"], folder)
    if rows.is_empty():
        raise LwaError(f"{reviews}: nothing is left of {report['rows']} rows after the {k}-core; choose a smaller k")
    rows = with_part(rows, split, str(reviews))
    items = item_table(rows, meta, notes["meta"], whole=split == "file")
    for part in PARTS:
        chosen = rows.filter(pl.col("split") == part)
        chosen = chosen.with_columns(user_id=users.gather(chosen["user"]))
        chosen.select(COLUMNS).write_parquet(folder / f"{part}.parquet")
    items.write_parquet(folder / "items.parquet")
    report |= _counts(rows, items, title_limit) | notes["reviews"].counts | notes["meta"].counts
    found = {name: {"counts": repairs.counts, "first": repairs.first} for name, repairs in notes.items()}
    (folder / "report.json").write_text(json.dumps({"report": report} | found, indent=1), encoding="utf-8")


def _counts(rows: pl.DataFrame, items: pl.DataFrame, title_limit: int) -> dict[str, int]:
    titles = [mend_title(title, title_limit) for title in items["title"].drop_nulls()]
    return {
        "users": rows["user"].n_unique(),
        "items": items.height,
        "interactions": rows.height,
        "null_ratings": rows["rating"].null_count(),
        "items_without_interactions": items.height - rows["parent_asin"].n_unique(),
        "untitled_items": items["title"].null_count(),
        "repeated_titles": len(titles) - len({text for text, _ in titles}),
    } | Counter(flaw for _, mended in titles for flaw in mended)
