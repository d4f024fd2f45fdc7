"""The catalogue: one row per item, with what the item file says about it."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from lwa_helpers.data.repairs import Repairs
from lwa_helpers.data.review_files import ITEM_FIELDS, read_table
from lwa_helpers.data.titles import NO_TITLE, mend_title
from lwa_helpers.data.values import identifiers, text_of


def item_table(frame: pl.DataFrame, meta: Path | None, repairs: Repairs, whole: bool) -> pl.DataFrame:
    """Build the catalogue of a set of interactions.

    An item described several times keeps the first description that has a title; the others are counted. Titles that
    are page script or no text are left out and counted.

    Args:
        frame: the interactions, with the columns parent_asin and line.
        meta: the item file, or None if there is none.
        repairs: counts what was wrong in the item file.
        whole: whether to add the items that only the item file names.

    Returns:
        One row per item: parent_asin, title (null if no readable one is known) and the other fields. The items of the
        interactions come first, in the order of their first line.
    """
    order = frame.group_by("parent_asin").agg(pl.col("line").min()).sort("line").select("parent_asin")
    known = _descriptions(order, meta, repairs, whole) if meta else order.with_columns(title=pl.lit(None, pl.String))
    if whole:
        order = pl.concat([order, known.select("parent_asin")]).unique(maintain_order=True)
    return order.join(known, on="parent_asin", how="left", maintain_order="left")


def _descriptions(order: pl.DataFrame, meta: Path, repairs: Repairs, whole: bool) -> pl.DataFrame:
    """Return the item file's rows for these items (for all items if whole), in file order, one per item."""
    frames = []
    for frame in read_table(meta, ITEM_FIELDS, {"parent_asin", "title"}, repairs):
        text = frame.with_columns(text_of(column) for column in frame.drop("line"))
        text = text.with_columns(identifiers(text["parent_asin"]))
        repairs.add("rows_without_ids", text.filter(pl.col("parent_asin").is_null())["line"])
        text = text.drop_nulls("parent_asin")
        frames.append(text if whole else text.join(order, on="parent_asin", how="semi"))
    known = _with_titles(pl.concat(frames, how="diagonal"), repairs)
    known = known.select(name for name in (*ITEM_FIELDS, "line") if name in known.columns)
    best = known.sort(pl.col("title").is_null(), "line").unique("parent_asin", keep="first", maintain_order=True)
    repairs.add("repeated_metadata", known.join(best, on="line", how="anti")["line"])
    return best.sort("line").drop("line")


def _with_titles(known: pl.DataFrame, repairs: Repairs) -> pl.DataFrame:
    """Set titles to null of which nothing readable is left."""
    mended = [mend_title(title or "") for title in known["title"]]
    for problem in NO_TITLE:
        repairs.add(problem, [line for line, (_, flaws) in zip(known["line"], mended) if problem in flaws])
    readable = [title if text else None for title, (text, _) in zip(known["title"], mended)]
    return known.with_columns(title=pl.Series(readable, dtype=pl.String))
