"""The catalogue: one row per item, with what the item file says about it."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from lwa_helpers.data.review_files import ITEM_FIELDS, Repairs, read_table
from lwa_helpers.data.titles import clean_title


def item_table(frame: pl.DataFrame, meta: Path | None, repairs: Repairs, whole: bool) -> pl.DataFrame:
    """Build the catalogue of a set of interactions.

    An item described several times keeps the first description that has a title; the others are counted.

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
        text = frame.with_columns(pl.exclude("line").cast(pl.String))
        repairs.add("rows_without_ids", text.filter(~_given("parent_asin"))["line"])
        text = text.filter(_given("parent_asin"))
        frames.append(text if whole else text.join(order, on="parent_asin", how="semi"))
    known = pl.concat(frames)
    readable = [title if title and clean_title(title) else None for title in known["title"]]
    known = known.with_columns(title=pl.Series(readable, dtype=pl.String))
    best = known.sort(pl.col("title").is_null(), "line").unique("parent_asin", keep="first", maintain_order=True)
    repairs.add("repeated_metadata", known.join(best, on="line", how="anti")["line"])
    return best.sort("line").drop("line")


def _given(name: str) -> pl.Expr:
    return pl.col(name).is_not_null() & (pl.col(name) != "")
