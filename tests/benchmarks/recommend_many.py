"""Users per second of recommend() one by one and of recommend_many(), on MovieLens with SmolLM2-135M.

Histories are read as item tokens with the item head, and by titles.

    make benchmark NAME=recommend_many
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch

from lwa_helpers import BaseRecommender, load_movielens, load_teacher
from lwa_helpers.models.item_tokens import with_item_tokens
from lwa_helpers.models.language_model import ItemTokens

USERS = {"item head": 64, "titles": 8}


def with_item_head(directory: Path) -> Path:
    """SmolLM2 with item tokens that are not trained: speed does not depend on the numbers in their rows."""
    lm, data = load_teacher("smollm2-135m"), load_movielens()
    rows = torch.randn(len(data.items), lm.model.config.hidden_size)
    with_item_tokens(lm, data.titles, rows, rows, ItemTokens(data.item_ids)).save(directory)
    return directory


def users_per_second(recommender: BaseRecommender, users: list[str], together: bool) -> float:
    start = time.perf_counter()
    for group in [users] if together else [[user] for user in users]:
        recommender.recommend_many(group, "MovieLens", progress=False)
    return len(users) / (time.perf_counter() - start)


def main() -> None:
    print(f"{torch.get_num_threads()} threads; users per second")
    print(f"{'head':<12}{'one by one':>12}{'together':>12}{'ratio':>8}")
    with tempfile.TemporaryDirectory() as folder:
        models = {"item head": with_item_head(Path(folder)), "titles": "smollm2-135m"}
        for head, model in models.items():
            recommender = BaseRecommender(model)
            users = list(recommender.shop("MovieLens").histories)[: USERS[head]]
            recommender.recommend(users[0], "MovieLens")
            alone, together = (users_per_second(recommender, users, together) for together in (False, True))
            print(f"{head:<12}{alone:>12.2f}{together:>12.2f}{together / alone:>8.2f}")


if __name__ == "__main__":
    main()
