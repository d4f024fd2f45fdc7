"""Recommend real catalogue items to a user with any model: python -m lwa_helpers.recommender --user 1 --category MovieLens"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from lwa_helpers.data import Interactions, load_amazon, load_movielens
from lwa_helpers.data.prompts import prompt_for
from lwa_helpers.errors import LwaError
from lwa_helpers.evaluation.baselines import ItemKNN
from lwa_helpers.models import ModelSpec, backbone, load_teacher, model_spec
from lwa_helpers.paths import DATASET
from lwa_helpers.ranking import HEAD_FILE, ITEMS_FILE, load_item_ranker
from lwa_helpers.teachers import LocalTeacher, OllamaTeacher


@dataclass(frozen=True)
class Recommendation:
    """One item for a user: rank 1 is best, scores fall with the rank; cold: the user is unknown, the item is popular."""

    item_id: str
    title: str
    score: float
    rank: int
    cold: bool


class Shop:
    """One dataset as the recommender sees it: catalogue, what each user has chosen, popularity, candidates."""

    def __init__(self, data: Interactions) -> None:
        self.data, self.titles = data, data.titles
        rows = pd.concat([data.train, data.valid, data.test], ignore_index=True)
        codes = pd.Index(data.item_ids).get_indexer(rows.parent_asin)
        self.histories = {user: group.tolist() for user, group in pd.Series(codes).groupby(rows.user_id.to_numpy())}
        self.popularity = np.bincount(codes, minlength=len(self.titles)).astype(float)

    @cached_property
    def neighbours(self) -> ItemKNN:
        return ItemKNN().fit(self.data)

    def candidates(self, history: Sequence[int], n: int) -> np.ndarray:
        """The n best unseen items by ItemKNN, popularity where it says nothing or the same, then catalogue order."""
        near = self.neighbours.scores([list(history)])[0]
        best_first = np.lexsort((-self.popularity, -near))
        return best_first[~np.isin(best_first, history)][:n]

    def popular(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The n items with most interactions, and how many these are."""
        items = np.argsort(-self.popularity, kind="stable")[:n]
        return items, self.popularity[items]


class Ranker(Protocol):
    """Order a user's unseen items: returns item indices and their scores, at most n, best first."""

    def top(self, shop: Shop, history: list[int], n: int) -> tuple[np.ndarray, np.ndarray]: ...


class CandidateRanker:
    """A teacher that orders a short list from Shop.candidates, knowing the user's newest titles."""

    def __init__(self, teacher: OllamaTeacher | LocalTeacher, n_candidates: int, history_titles: int) -> None:
        self.teacher, self.n_candidates, self.history_titles = teacher, n_candidates, history_titles

    def top(self, shop: Shop, history: list[int], n: int) -> tuple[np.ndarray, np.ndarray]:
        items = shop.candidates(history, max(n, self.n_candidates))
        if len(items) == 0:
            return items, np.empty(0)
        newest = [shop.titles[item] for item in history[-self.history_titles :]]
        answers = self.teacher.rank([newest], [[shop.titles[item] for item in items]])
        order = answers.order[0][:n]
        return items[order], answers.scores[0][order]


class CatalogueRanker:
    """A checkpoint with an item head, which scores every item it was trained on in one pass."""

    def __init__(self, directory: Path, history_titles: int) -> None:
        (self.model, self.lm), self.history_titles = load_item_ranker(directory), history_titles
        path = directory / ITEMS_FILE
        if not path.is_file():
            raise LwaError(f"{path} does not exist: it lists the ids of the items that the head scores, in its order")
        self.item_ids: list[str] = json.loads(path.read_text(encoding="utf-8"))
        if len(self.item_ids) != len(self.model.head.bias):
            raise LwaError(f"{path} lists {len(self.item_ids)} items, the item head has {len(self.model.head.bias)}")

    def top(self, shop: Shop, history: list[int], n: int) -> tuple[np.ndarray, np.ndarray]:
        items = pd.Index(shop.data.item_ids).get_indexer(self.item_ids)
        if (items < 0).all():
            raise LwaError(f"model {self.lm.name!r} was trained on other items than {shop.data.name} holds")
        scores = self._scores(shop, history[-self.history_titles :])
        eligible = np.flatnonzero((items >= 0) & ~np.isin(items, history))
        best = eligible[np.argsort(-scores[eligible], kind="stable")[:n]]
        return items[best], scores[best]

    def _scores(self, shop: Shop, history: Sequence[int]) -> np.ndarray:
        prompt = prompt_for(shop.data.name)
        texts = [prompt.header, *(shop.titles[item] + prompt.separator for item in history)]
        rows = self.lm.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ids = [token for row in rows for token in row]
        with torch.no_grad():
            hidden = backbone(self.model.causal_lm)(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
            return self.model.head(hidden).double().numpy()


class BaseRecommender:
    """Recommend with any registered model, a checkpoint directory (either ranking head) or a .gguf file.

    root: folder of the Amazon files, dataset/amazon by default; k: core filter, 0 keeps every user and item.
    n_candidates: length of the list that a model without an item head orders (Shop.candidates makes it);
    history_titles: newest titles it is told. host: Ollama server, else OLLAMA_HOST, else this machine.
    Raises LwaError for an unknown model name (listing the known ones); the model itself is loaded at the first use.
    """

    def __init__(
        self,
        model_name: str = "smollm2-135m",
        root: str | Path | None = None,
        *,
        k: int = 0,
        n_candidates: int = 20,
        history_titles: int = 10,
        host: str | None = None,
    ) -> None:
        self.spec: ModelSpec = model_spec(str(model_name))
        self.root, self.k, self.host = Path(root or DATASET / "amazon"), k, host
        self.n_candidates, self.history_titles = n_candidates, history_titles
        self._shops: dict[str, Shop] = {}

    @cached_property
    def ranker(self) -> Ranker:
        """The model, loaded or found on its server. Raises LwaError when it is not there."""
        if self.spec.backend == "path" and (Path(self.spec.id) / HEAD_FILE).is_file():
            return CatalogueRanker(Path(self.spec.id), self.history_titles)
        if self.spec.backend == "ollama":
            teacher = OllamaTeacher(self.spec.id, self.host, think=self.spec.think, cache=None)
            _ = teacher.served
        else:
            teacher = LocalTeacher(load_teacher(self.spec.id if self.spec.backend == "path" else self.spec.name))
        return CandidateRanker(teacher, self.n_candidates, self.history_titles)

    def shop(self, category: str) -> Shop:
        """The dataset of a category, read once: "MovieLens" is the embedded one, others lie under root."""
        if category not in self._shops:
            movielens = category.lower() == "movielens"
            self._shops[category] = Shop(load_movielens() if movielens else load_amazon(self.root, category, k=self.k))
        return self._shops[category]

    def recommend(self, user_id: str, category: str, top_k: int = 10) -> list[Recommendation]:
        """Return up to top_k items that the user has not chosen yet, best first; fewer only when no more are left.

        An unknown user gets the items with most interactions, cold=True.
        Raises LwaError naming model or server when it is not there or fails, the category when it has no data.
        """
        if top_k < 1:
            raise LwaError(f"top_k = {top_k}: ask for at least 1 item")
        shop, ranker = self.shop(category), self.ranker
        history = shop.histories.get(str(user_id))
        items, scores = shop.popular(top_k) if history is None else ranker.top(shop, history, top_k)
        return [
            Recommendation(shop.data.item_ids[item], shop.titles[item], score, rank, history is None)
            for rank, (item, score) in enumerate(zip(items, falling(scores), strict=True), start=1)
        ]

    def recommend_many(
        self, user_ids: Iterable[str], category: str, top_k: int = 10, progress: bool = True
    ) -> dict[str, list[Recommendation]]:
        """Return recommend() for each user, with a progress bar."""
        users = tqdm(list(user_ids), desc=f"recommend {category}", unit="user", disable=not progress)
        return {user: self.recommend(user, category, top_k) for user in users}


def falling(scores: np.ndarray) -> list[float]:
    """Return scores that fall strictly: equal ones, whose order is settled, are lowered by the least possible.

    Raises LwaError for a score that is not finite.
    """
    if not np.isfinite(scores).all():
        raise LwaError("the model gave scores that are not finite: its weights are damaged or its precision is too low")
    strict: list[float] = []
    for score in map(float, scores):
        strict.append(min(score, float(np.nextafter(strict[-1], -np.inf))) if strict else score)
    return strict


def table(user: str, recommendations: Sequence[Recommendation]) -> str:
    """Return the recommendations of one user as lines of text."""
    cold = " (unknown user: popular items)" if any(r.cold for r in recommendations) else ""
    rows = [f"{r.rank:>4}  {r.score:>10.3f}  {r.item_id:<12}  {r.title}" for r in recommendations]
    return "\n".join([f"user {user}{cold}", f"rank  {'score':>10}  {'item':<12}  title", *rows])


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table of recommendations for each user. Raises LwaError."""
    parser = argparse.ArgumentParser(prog="lwa recommend", description="Recommend catalogue items to a user.")
    parser.add_argument("--user", required=True, action="append", help="user id; may be given more than once")
    parser.add_argument("--category", default="MovieLens", help="MovieLens or an Amazon category (default: %(default)s)")
    parser.add_argument("--model", default="smollm2-135m", help="registered name, directory or .gguf (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=10, help="items per user (default: %(default)s)")
    parser.add_argument("--root", type=Path, help="folder of the Amazon files (default: dataset/amazon)")
    parser.add_argument("--host", help="Ollama server (default: OLLAMA_HOST, else this machine)")
    args = parser.parse_args(argv)
    recommender = BaseRecommender(args.model, args.root, host=args.host)
    found = recommender.recommend_many(args.user, args.category, args.top_k, progress=len(args.user) > 1)
    print("\n\n".join(table(user, recommendations) for user, recommendations in found.items()))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LwaError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
