"""A category in the layout of Amazon 2023, who bought what there, and what every list of recommendations must be."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest

from lwa_helpers import Recommendation

CATEGORY = "All_Beauty"
TITLES = ["Soap", "Red Lipstick", "Comb", "Hair Dryer 2000", "Cream & Oil", "Nail File", "Very Long Brush Set", "Towel"]
ITEMS = [f"B{i:03}" for i in range(len(TITLES))]
CHOICES = {
    "ann": [0, 1, 2],
    "bob": [1, 0, 3, 2],
    "cid": [4, 5, 1],
    "dan": [1, 2, 6],
    "eve": [0, 1, 5, 4, 3],
    "all": list(range(8)),
}
USERS = ["bob", "nobody", "ann", "all", "dan", "cid", "bob"]


def write_shop(folder: Path, titles: list[str] = TITLES) -> Path:
    """Lay the category out in a folder."""
    reviews = [
        {"user_id": user, "parent_asin": ITEMS[item], "rating": 5.0, "timestamp": 1_600_000_000_000 + when}
        for user, items in CHOICES.items()
        for when, item in enumerate(items)
    ]
    metadata = [{"parent_asin": item, "title": title} for item, title in zip(ITEMS, titles)]
    for name, rows in ((CATEGORY, reviews), (f"meta_{CATEGORY}", metadata)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def check_list(found: list[Recommendation], seen: set[str], titles: dict[str, str]) -> None:
    """Ranks from 1, finite scores that fall, no item twice or seen before, titles that belong to them."""
    assert [r.rank for r in found] == list(range(1, len(found) + 1))
    scores = [r.score for r in found]
    assert all(map(math.isfinite, scores)) and all(a > b for a, b in pairwise(scores))
    assert not seen & {r.item_id for r in found} and len({r.item_id for r in found}) == len(found)
    assert all(titles[r.item_id] == r.title for r in found)


def check_many(recommender, users: list[str], top_k: int) -> None:
    """recommend_many gives what recommend gives, in the order asked for."""
    many = recommender.recommend_many(users, CATEGORY, top_k, progress=False)
    assert list(many) == list(dict.fromkeys(users))
    for user, found in many.items():
        alone = recommender.recommend(user, CATEGORY, top_k)
        assert [(r.item_id, r.rank, r.cold) for r in found] == [(r.item_id, r.rank, r.cold) for r in alone]
        assert [r.score for r in found] == pytest.approx([r.score for r in alone], abs=1e-4)
