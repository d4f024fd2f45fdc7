"""The catalogue: one row per item, with what the item file says of it."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from lwa_helpers.data.review_files import ITEM_FIELDS, Repairs, read_table
from lwa_helpers.data.titles import clean_title


def item_table(frame: pl.DataFrame, meta: Path | None, repairs: Repairs, whole: bool) -> pl.DataFrame:
    """Return parent_asin, title (null where nothing readable is known) and the other fields, one row per item.

    The items of the interactions, in the order of their first line; with whole=True then those that only the item file
    names. An item described several times keeps the first description that has a title; the others are counted.
    """
    order = frame.group_by("parent_asin").agg(pl.col("line").min()).sort("line").select("parent_asin")
    known = _descriptions(order, meta, repairs, whole) if meta else order.with_columns(title=pl.lit(None, pl.String))
    if whole:
        order = pl.concat([order, known.select("parent_asin")]).unique(maintain_order=True)
    return order.join(known, on="parent_asin", how="left", maintain_order="left")


def _descriptions(order: pl.DataFrame, meta: Path, repairs: Repairs, whole: bool) -> pl.DataFrame:
    """The item file's rows of these items (all of them, if whole), in file order, one per item."""
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
