"""MovieLens-100K, from the data files inside the recbole package."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pandas as pd

from lwa_helpers.assets import embedded_file
from lwa_helpers.data.interactions import Interactions
from lwa_helpers.data.titles import distinct_titles


def load_movielens() -> Interactions:
    """Return MovieLens-100K, split leave-one-out: a user's last film is test, the one before it valid, the rest train.

    Every rating is an interaction, whatever its value. Users are ordered by number, and a user's rows by time, ties by
    file order. Timestamps are int64 seconds, as in the source. All 1,682 films stay in the catalogue, in file order;
    there is no k-core filter. Source: Harper & Konstan, ACM TiiS 2015.

    Raises LwaError if a file is missing or its contents differ.

    Example:
        >>> data = load_movielens()
        >>> len(data.item_ids), data.test.user_id.nunique()
        (1682, 943)
    """
    ratings = _read(embedded_file("ml-100k.inter"))
    films = _read(embedded_file("ml-100k.item"))
    frame = ratings.rename(columns={"item_id": "parent_asin"}).astype({"rating": "float64", "timestamp": "int64"})
    order = np.lexsort((frame.timestamp, frame.user_id.astype("int64")))
    frame = frame.iloc[order].reset_index(drop=True)
    items = pd.DataFrame({"parent_asin": films.item_id, "title": film_titles(films)})
    items = items.assign(year=films.release_year, genres=films["class"])
    later = frame.groupby("user_id", sort=False).cumcount(ascending=False)
    masks = {"train": later > 1, "valid": later == 1, "test": later == 0}
    parts = {name: frame[mask].reset_index(drop=True) for name, mask in masks.items()}
    report = {"rows": len(ratings), "users": frame.user_id.nunique(), "items": len(items)}
    return Interactions(name="movielens", items=items, report=report, **parts)


def film_titles(films: pd.DataFrame) -> list[str]:
    """Return distinct titles: films that share a title get " (year)", then " (2)", " (3)", … if they still do."""
    shared = films.movie_title.duplicated(keep=False) & films.release_year.str.fullmatch(r"\d{4}")
    dated = films.movie_title + " (" + films.release_year + ")"
    return distinct_titles(films.movie_title.where(~shared, dated).tolist())


def _read(path: Path) -> pd.DataFrame:
    frame = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False, quoting=csv.QUOTE_NONE, encoding="utf-8")
    return frame.rename(columns=lambda name: name.partition(":")[0])
