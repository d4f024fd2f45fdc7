"""Recommend real catalogue items to a user with any model.

On the command line: `lwa recommend --user 1 --category MovieLens`.
"""

from __future__ import annotations

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
from lwa_helpers.models.registry import ModelSpec
from lwa_helpers.paths import DATASET
from lwa_helpers.ranking.item_head import rank_catalogue
from lwa_helpers.teachers.answers import KINDS
from lwa_helpers.teachers.availability import find_model
from lwa_helpers.teachers.local_teacher import LocalTeacher
from lwa_helpers.teachers.ollama_teacher import KEPT_ANSWERS, OllamaTeacher

USERS_PER_PASS, QUESTIONS_PER_PASS = 32, 8


@dataclass(frozen=True)
class Recommendation:
    """One item recommended to a user.

    Attributes:
        item_id: the item's id in the catalogue.
        title: the item's title.
        score: the model's score, or the number of interactions if `cold`. Scores fall strictly with the rank.
        rank: place in the list; 1 is best.
        cold: whether the user is unknown, so that popular items are recommended.

    Example:
        >>> Recommendation("B1", "Toy Story", 0.9, rank=1, cold=False).title
        'Toy Story'
    """

    item_id: str
    title: str
    score: float
    rank: int
    cold: bool


class Shop:
    """One dataset as the recommender sees it.

    Attributes:
        data: the interactions.
        titles: titles of the N catalogue items.
        histories: for each user id, the indices of the items that the user chose, oldest first.
        popularity: number of interactions of each item, (N,).
    """

    def __init__(self, data: Interactions) -> None:
        self.data, self.titles = data, data.titles
        rows = pd.concat([data.train, data.valid, data.test], ignore_index=True)
        codes = pd.Index(data.item_ids).get_indexer(rows.parent_asin)
        self.histories = {user: group.tolist() for user, group in pd.Series(codes).groupby(rows.user_id.to_numpy())}
        self.popularity = np.bincount(codes, minlength=len(self.titles)).astype(float)

    @cached_property
    def neighbours(self) -> ItemKNN:
        """ItemKNN, fitted at the first use."""
        return ItemKNN().fit(self.data)

    def candidates(self, history: Sequence[int], n: int) -> np.ndarray:
        """Return the n best unseen items by ItemKNN as item indices, best first.

        Items of equal score, among them those that ItemKNN does not score, are ordered by popularity, then by their
        place in the catalogue.
        """
        near = self.neighbours.scores([list(history)])[0]
        best_first = np.lexsort((-self.popularity, -near))
        return best_first[~np.isin(best_first, history)][:n]

    def popular(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the indices of the n items with the most interactions, and their numbers of interactions."""
        items = np.argsort(-self.popularity, kind="stable")[:n]
        return items, self.popularity[items]

    def listed(self, items: np.ndarray, scores: np.ndarray, cold: bool) -> list[Recommendation]:
        """Return ranked items, as indices with their scores, as recommendations."""
        return [
            Recommendation(self.data.item_ids[item], self.titles[item], score, rank, cold)
            for rank, (item, score) in enumerate(zip(items, falling(scores), strict=True), start=1)
        ]


Ranked = tuple[np.ndarray, np.ndarray]  # item indices, best first, and their scores


class Ranker(Protocol):
    """A model that ranks each user's unseen items.

    Attributes:
        answers: how the teacher answered in the last call, one row per user; None if no teacher was asked.
    """

    answers: pd.DataFrame | None

    def top(self, shop: Shop, histories: Sequence[list[int]], n: int, progress: bool) -> list[Ranked]:
        """Return each user's n best unseen items, or fewer if fewer are left; `histories` hold item indices."""
        ...


class CandidateRanker:
    """A teacher that orders a short list of candidates, given the user's newest titles.

    Args:
        teacher: the model that is asked.
        n_candidates: length of the list from Shop.candidates.
        history_titles: how many of the newest titles the teacher is told.
    """

    answers: pd.DataFrame | None = None

    def __init__(self, teacher: OllamaTeacher | LocalTeacher, n_candidates: int, history_titles: int) -> None:
        self.teacher, self.n_candidates, self.history_titles = teacher, n_candidates, history_titles

    def top(self, shop: Shop, histories: Sequence[list[int]], n: int, progress: bool) -> list[Ranked]:
        """Return each user's n best candidates with their scores, and set `answers`.

        The list of candidates has at least n items, as far as there are unseen ones.

        Args:
            shop: the dataset.
            histories: item indices of each user's history, oldest first.
            n: items per user.
            progress: whether to show a progress bar.
        """
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
    """A checkpoint with item tokens, which scores all items that it was tuned on in one forward pass."""

    answers: pd.DataFrame | None = None

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm

    def top(self, shop: Shop, histories: Sequence[list[int]], n: int, progress: bool) -> list[Ranked]:
        """Return each user's n best unseen items with their scores.

        Users whose histories are about equally long share a forward pass. Items that the model does not know are left
        out of the history. A user whose whole history is unknown to the model gets popular items.

        Args:
            shop: the dataset.
            histories: item indices of each user's history, oldest first.
            n: items per user.
            progress: whether to show a progress bar.

        Raises:
            LwaError: if the catalogue holds none of the model's items.
        """
        tuned = self.lm.items
        assert tuned is not None, "a CatalogueRanker needs a model with item tokens"
        items = pd.Index(shop.data.item_ids).get_indexer(tuned.ids)
        if (items < 0).all():
            raise LwaError(f"model {self.lm.name!r} was trained on other items than {shop.data.name} holds")
        own = {item: place for place, item in enumerate(items) if item >= 0}
        titles = [shop.titles[item] if item >= 0 else "" for item in items]
        reading = Reading.of(titles, self.lm, prompt_for(shop.data.name))
        prompts = [reading.prompt([own[i] for i in history if i in own], tuned.history_items) for history in histories]
        known = [row for row, prompt in enumerate(prompts) if prompt]
        found = np.tile(shop.popularity[items], (len(prompts), 1))
        shown = [prompts[row] for row in known]
        found[known] = rank_catalogue(self.lm.model, shown, tuned.tokens, USERS_PER_PASS, progress=progress)
        return [best_unseen(items, scores, history, n) for scores, history in zip(found, histories)]


def best_unseen(items: np.ndarray, scores: np.ndarray, history: list[int], n: int) -> Ranked:
    """Return the n best items that are in the catalogue and not in the history.

    Args:
        items: catalogue index of each of the model's M items, -1 if the catalogue does not have it, (M,).
        scores: score of each item, (M,).
        history: catalogue indices that the user has chosen.
        n: how many items to return at most.

    Returns:
        The catalogue indices, best first, and their scores. Items of equal score keep the order of `items`.
    """
    eligible = np.flatnonzero((items >= 0) & ~np.isin(items, history))
    best = eligible[np.argsort(-scores[eligible], kind="stable")[:n]]
    return items[best], scores[best]


class BaseRecommender:
    """Recommend with any model: registered, in a directory (with or without item tokens) or file, or on a server.

    An unknown model name is an LwaError that lists the known ones. The model itself is loaded at the first use.

    Args:
        model_name: registered name, checkpoint directory, .gguf file, or a name that the Ollama server lists.
        root: folder of the Amazon files; None is dataset/amazon.
        k: core filter; 0 keeps every user and item.
        n_candidates: length of the list from Shop.candidates that a model without item tokens orders.
        history_titles: how many of the newest titles such a model is told.
        host: Ollama server; None is OLLAMA_HOST if it is set, else this machine.
        concurrency: how many questions the server is asked at a time.
        cache: folder that keeps the server's answers, so that an interrupted call resumes and no question is asked
            twice; None keeps none.

    Attributes:
        answers: after a call, how the model answered (mode, seconds, repairs), one row per user; None if no teacher
            was asked.

    Example:
        >>> recommender = BaseRecommender("smollm2-135m")
        >>> best = recommender.recommend(user_id="a stranger", category="MovieLens", top_k=1)[0]
        >>> best.rank, best.cold
        (1, True)
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
        self.spec: ModelSpec = find_model(str(model_name), host)
        self.root, self.k, self.host = Path(root or DATASET / "amazon"), k, host
        self.concurrency, self.cache = concurrency, cache
        self.answers: pd.DataFrame | None = None
        self.n_candidates, self.history_titles = n_candidates, history_titles
        self._shops: dict[str, Shop] = {}

    @cached_property
    def ranker(self) -> Ranker:
        """The model, loaded or found on its server. A model that is not there is an LwaError."""
        if self.spec.backend == "ollama":
            remote = OllamaTeacher(
                self.spec.id,
                self.host,
                think=self.spec.think,
                num_predict=self.spec.num_predict,
                concurrency=self.concurrency,
                cache=self.cache,
            )
            _ = remote.served  # an error if the model is not on the server
            teacher: OllamaTeacher | LocalTeacher = remote
        else:
            lm = load_teacher(self.spec.id if self.spec.backend == "path" else self.spec.name)
            if lm.items:
                return CatalogueRanker(lm)
            teacher = LocalTeacher(lm, batch_size=QUESTIONS_PER_PASS)
        return CandidateRanker(teacher, self.n_candidates, self.history_titles)

    def shop(self, category: str) -> Shop:
        """Return the dataset of a category, which is read once.

        Args:
            category: "MovieLens" for the embedded dataset, else an Amazon category whose files lie under `root`.
        """
        if category not in self._shops:
            movielens = category.lower() == "movielens"
            self._shops[category] = Shop(load_movielens() if movielens else load_amazon(self.root, category, k=self.k))
        return self._shops[category]

    def recommend(self, user_id: str, category: str, top_k: int = 10) -> list[Recommendation]:
        """Return up to top_k items that the user has not chosen yet, best first.

        The list is shorter only if fewer unseen items are left. An unknown user gets the items with the most
        interactions, marked cold=True. An LwaError names the model or server if it is missing or fails, and the
        category if it has no data.

        Args:
            user_id: the user.
            category: "MovieLens" or an Amazon category.
            top_k: how many items to recommend, at least 1.
        """
        return self.recommend_many([user_id], category, top_k, progress=False)[user_id]

    def recommend_many(
        self, user_ids: Iterable[str], category: str, top_k: int = 10, progress: bool = True
    ) -> dict[str, list[Recommendation]]:
        """Return for each user what `recommend` returns.

        Local models score several users at a time. A server is asked `concurrency` questions at a time. The first error
        ends the call.

        Args:
            user_ids: the users; repeated ones count once.
            category: "MovieLens" or an Amazon category.
            top_k: how many items to recommend to each user.
            progress: whether to show a progress bar.

        Raises:
            LwaError: if top_k is below 1.
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
        return {
            user: shop.listed(*(found[user] if user in found else shop.popular(top_k)), cold=user not in found)
            for user in users
        }


def falling(scores: np.ndarray) -> list[float]:
    """Return scores that fall strictly.

    A score that is not below the one before it is lowered to the next smaller float.

    Args:
        scores: (n,) in the order of the ranking.

    Raises:
        LwaError: if a score is not finite.
    """
    if not np.isfinite(scores).all():
        raise LwaError("the model gave scores that are not finite: its weights are damaged or its precision is too low")
    strict: list[float] = []
    for score in map(float, scores):
        strict.append(min(score, float(np.nextafter(strict[-1], -np.inf))) if strict else score)
    return strict


def table(user: str, recommendations: Sequence[Recommendation]) -> str:
    """Return the recommendations for one user as lines of text."""
    cold = " (unknown user: popular items)" if any(r.cold for r in recommendations) else ""
    rows = [f"{r.rank:>4}  {r.score:>10.3f}  {r.item_id:<12}  {r.title}" for r in recommendations]
    return "\n".join([f"user {user}{cold}", f"rank  {'score':>10}  {'item':<12}  title", *rows])


def repairs(answers: pd.DataFrame | None) -> str:
    """Return a line for each user whose answer had to be repaired, with the reasons; "" if there is none."""
    if answers is None:
        return ""
    wrong = answers.loc[answers[list(KINDS)].any(axis=1), list(KINDS)]
    counts = ({kind: n for kind, n in row.items() if n} for row in wrong.to_dict("records"))
    form = {"repaired": "in another form than asked for"}
    return "".join(
        f"user {user}: the model's answer was repaired "
        f"({', '.join(f'{n} {form.get(kind, kind)}' for kind, n in row.items())})\n"
        for user, row in zip(wrong.index, counts)
    )


if __name__ == "__main__":
    from lwa_helpers.cli import main

    sys.exit(main(["recommend", *sys.argv[1:]]))
