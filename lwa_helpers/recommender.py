"""Recommend real catalogue items to a user with any model: python -m lwa_helpers.recommender --user 1 --category MovieLens"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd

from lwa_helpers.data.amazon import load_amazon
from lwa_helpers.data.history_tokens import Reading
from lwa_helpers.data.interactions import Interactions
from lwa_helpers.data.movielens import load_movielens
from lwa_helpers.data.prompts import prompt_for
from lwa_helpers.errors import LwaError
from lwa_helpers.evaluation.baselines import ItemKNN
from lwa_helpers.models.language_model import LanguageModel
from lwa_helpers.models.loading import load_teacher
from lwa_helpers.models.registry import ModelSpec, model_spec
from lwa_helpers.paths import DATASET
from lwa_helpers.ranking.item_head import rank_catalogue
from lwa_helpers.teachers.answers import KINDS
from lwa_helpers.teachers.local_teacher import LocalTeacher
from lwa_helpers.teachers.ollama_teacher import KEPT_ANSWERS, OllamaTeacher

USERS_PER_PASS, QUESTIONS_PER_PASS = 32, 8


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

    def listed(self, items: np.ndarray, scores: np.ndarray, cold: bool) -> list[Recommendation]:
        """Ranked items as recommendations."""
        return [
            Recommendation(self.data.item_ids[item], self.titles[item], score, rank, cold)
            for rank, (item, score) in enumerate(zip(items, falling(scores), strict=True), start=1)
        ]


Ranked = tuple[np.ndarray, np.ndarray]  # item indices, best first, and their scores


class Ranker(Protocol):
    """Order each user's unseen items, at most n. answers: how a teacher answered, a row per user; None where none is asked."""

    answers: pd.DataFrame | None

    def top(self, shop: Shop, histories: Sequence[list[int]], n: int, progress: bool) -> list[Ranked]: ...


class CandidateRanker:
    """A teacher that orders a short list from Shop.candidates, knowing the user's newest titles."""

    answers: pd.DataFrame | None = None

    def __init__(self, teacher: OllamaTeacher | LocalTeacher, n_candidates: int, history_titles: int) -> None:
        self.teacher, self.n_candidates, self.history_titles = teacher, n_candidates, history_titles

    def top(self, shop: Shop, histories: Sequence[list[int]], n: int, progress: bool) -> list[Ranked]:
        lists = [shop.candidates(history, max(n, self.n_candidates)) for history in histories]
        found = [(items, np.empty(0)) for items in lists]
        frames = []
        for length in sorted({len(items) for items in lists} - {0}):  # a teacher takes lists of one length
            rows = [row for row, items in enumerate(lists) if len(items) == length]
            newest = [[shop.titles[item] for item in histories[row][-self.history_titles :]] for row in rows]
            answers = self.teacher.rank(newest, [[shop.titles[item] for item in lists[row]] for row in rows], progress)
            frames.append(answers.to_frame().set_index(pd.Index(rows)))
            for row, order, scores in zip(rows, answers.order[:, :n], answers.scores, strict=True):
                found[row] = lists[row][order], scores[order]
        self.answers = pd.concat(frames).sort_index() if frames else None
        return found


class CatalogueRanker:
    """A checkpoint with item tokens, which scores every item it was tuned on in one pass."""

    answers: pd.DataFrame | None = None

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm

    def top(self, shop: Shop, histories: Sequence[list[int]], n: int, progress: bool) -> list[Ranked]:
        """Users with histories of like length are read in one forward pass; items that the model does not know are not read.

        A user of whose items the model knows none gets popular ones.
        """
        items = pd.Index(shop.data.item_ids).get_indexer(self.lm.items.ids)
        if (items < 0).all():
            raise LwaError(f"model {self.lm.name!r} was trained on other items than {shop.data.name} holds")
        own = {item: place for place, item in enumerate(items) if item >= 0}
        titles = [shop.titles[item] if item >= 0 else "" for item in items]
        reading = Reading.of(titles, self.lm, prompt_for(shop.data.name))
        prompts = [
            reading.prompt([own[i] for i in history if i in own], self.lm.items.history_items) for history in histories
        ]
        known = [row for row, prompt in enumerate(prompts) if prompt]
        found = np.tile(shop.popularity[items], (len(prompts), 1))
        shown = [prompts[row] for row in known]
        found[known] = rank_catalogue(self.lm.model, shown, self.lm.items.tokens, USERS_PER_PASS, progress=progress)
        return [best_unseen(items, scores, history, n) for scores, history in zip(found, histories)]


def best_unseen(items: np.ndarray, scores: np.ndarray, history: list[int], n: int) -> Ranked:
    """The n best of the items that the catalogue has (index >= 0) and the user has not; equal scores in the head's order."""
    eligible = np.flatnonzero((items >= 0) & ~np.isin(items, history))
    best = eligible[np.argsort(-scores[eligible], kind="stable")[:n]]
    return items[best], scores[best]


class BaseRecommender:
    """Recommend with any registered model, a checkpoint directory (with item tokens or without) or a .gguf file.

    root: folder of the Amazon files, dataset/amazon by default; k: core filter, 0 keeps every user and item.
    n_candidates: length of the list that a model without item tokens orders (Shop.candidates makes it);
    history_titles: newest titles that it is told. host: Ollama server, else OLLAMA_HOST, else this machine; concurrency: questions
    that it is asked at a time; cache: folder that keeps its answers, so that a call that was cut off goes on and the same question
    is not asked twice; None keeps none.
    answers: after a call, how the model answered (mode, seconds, what had to be repaired), a row per user, where it was asked.
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
        concurrency: int = 4,
        cache: Path | None = KEPT_ANSWERS,
    ) -> None:
        self.spec: ModelSpec = model_spec(str(model_name))
        self.root, self.k, self.host = Path(root or DATASET / "amazon"), k, host
        self.concurrency, self.cache = concurrency, cache
        self.answers: pd.DataFrame | None = None
        self.n_candidates, self.history_titles = n_candidates, history_titles
        self._shops: dict[str, Shop] = {}

    @cached_property
    def ranker(self) -> Ranker:
        """The model, loaded or found on its server. Raises LwaError when it is not there."""
        if self.spec.backend == "ollama":
            teacher = OllamaTeacher(
                self.spec.id, self.host, think=self.spec.think, concurrency=self.concurrency, cache=self.cache
            )
            _ = teacher.served
        else:
            lm = load_teacher(self.spec.id if self.spec.backend == "path" else self.spec.name)
            if lm.items:
                return CatalogueRanker(lm)
            teacher = LocalTeacher(lm, batch_size=QUESTIONS_PER_PASS)
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
        return self.recommend_many([user_id], category, top_k, progress=False)[user_id]

    def recommend_many(
        self, user_ids: Iterable[str], category: str, top_k: int = 10, progress: bool = True
    ) -> dict[str, list[Recommendation]]:
        """Return what recommend() returns for each user, with a progress bar: local models score several users at a time,
        a server is asked `concurrency` questions at a time. The first error ends it.
        """
        if top_k < 1:
            raise LwaError(f"top_k = {top_k}: ask for at least 1 item")
        shop, ranker, users = self.shop(category), self.ranker, list(dict.fromkeys(user_ids))
        known = [user for user in users if str(user) in shop.histories]
        ranked = ranker.top(shop, [shop.histories[str(user)] for user in known], top_k, progress)
        self.answers = (
            None if ranker.answers is None else ranker.answers.set_axis([known[row] for row in ranker.answers.index])
        )
        found = dict(zip(known, ranked, strict=True))
        return {user: shop.listed(*found.get(user, shop.popular(top_k)), cold=user not in found) for user in users}


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


def repairs(answers: pd.DataFrame | None) -> str:
    """Say whose answers had to be repaired and why, a line per user; nothing when none had to be."""
    if answers is None:
        return ""
    wrong = answers.loc[answers[list(KINDS)].any(axis=1), list(KINDS)]
    counts = ({kind: n for kind, n in row.items() if n} for row in wrong.to_dict("records"))
    return "".join(
        f"user {user}: the model's answer was repaired ({', '.join(f'{n} {kind}' for kind, n in row.items())})\n"
        for user, row in zip(wrong.index, counts)
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table of recommendations for each user. Raises LwaError."""
    parser = argparse.ArgumentParser(prog="lwa recommend", description="Recommend catalogue items to a user.")
    parser.add_argument("--user", required=True, action="append", help="user id; may be given more than once")
    parser.add_argument(
        "--category", default="MovieLens", help="MovieLens or an Amazon category (default: %(default)s)"
    )
    parser.add_argument(
        "--model", default="smollm2-135m", help="registered name, directory or .gguf (default: %(default)s)"
    )
    parser.add_argument("--top-k", type=int, default=10, help="items per user (default: %(default)s)")
    parser.add_argument("--root", type=Path, help="folder of the Amazon files (default: dataset/amazon)")
    parser.add_argument("--host", help="Ollama server (default: OLLAMA_HOST, else this machine)")
    args = parser.parse_args(argv)
    recommender = BaseRecommender(args.model, args.root, host=args.host)
    found = recommender.recommend_many(args.user, args.category, args.top_k, progress=len(args.user) > 1)
    print("\n\n".join(table(user, recommendations) for user, recommendations in found.items()))
    print(repairs(recommender.answers), end="", file=sys.stderr)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LwaError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
