"""The comparison of teachers: the candidates that all of them rank, and failures that cost others nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch

from lwa_helpers.errors import LwaError
from lwa_helpers.evaluation.protocol import Cases
from lwa_helpers.models.language_model import LanguageModel
from lwa_helpers.models.loading import load_teacher
from lwa_helpers.ranking.cost import weight_bytes
from lwa_helpers.teachers.answers import TeacherAnswers
from lwa_helpers.teachers.availability import find_model
from lwa_helpers.teachers.local_teacher import LocalTeacher
from lwa_helpers.teachers.ollama_teacher import OllamaTeacher

MOST_USERS = 0.9  # the share of users whose unseen items must be enough for a list


def draw_candidates(
    cases: Cases, n_items: int, n_users: int, n_candidates: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw users, and for each of them the target and unseen items in random order.

    All lists are equally long. Where the catalogue has too few items that users have not seen, lists are as short as
    nine of ten of those users need that have any, and users with fewer unseen items are left out.

    Args:
        cases: the evaluation cases.
        n_items: items in the catalogue.
        n_users: how many users to draw; all if there are fewer.
        n_candidates: length of a list.
        seed: of the draw.

    Returns:
        The users as indices into the cases, at most n_users; and their candidates as item indices, (users, candidates).

    Raises:
        LwaError: if fewer than two of the drawn users have an unseen item beside the target.
    """
    rng, n_cases = np.random.default_rng(seed), len(cases.targets)
    users = np.sort(rng.choice(n_cases, min(n_users, n_cases), replace=False))
    unseen = np.array([n_items - len({*cases.histories[user], cases.targets[user]}) for user in users])
    if (unseen > 0).sum() < 2:
        raise LwaError(
            f"{(unseen > 0).sum()} of {len(users)} users have an item among {n_items} that they have not seen: "
            "a comparison needs two, so raise comparison.n_users or take a larger catalogue"
        )
    enough = int(np.quantile(unseen[unseen > 0], 1 - MOST_USERS, method="lower"))
    n_drawn = min(n_candidates - 1, enough)
    users = users[unseen >= n_drawn]
    return users, np.array([_candidates(cases, user, n_items, n_drawn, rng) for user in users])


def _candidates(cases: Cases, user: int, n_items: int, n_drawn: int, rng: np.random.Generator) -> np.ndarray:
    target = cases.targets[user]
    others = np.setdiff1d(np.arange(n_items), [*cases.histories[user], target])
    return rng.permutation([*rng.choice(others, n_drawn, replace=False), target])


@dataclass(frozen=True)
class Untuned:
    """A teacher as it is, which is asked twice.

    Attributes:
        scoring: the teacher that scores candidates, by their titles or labels where it can.
        writing: the same teacher, which writes the ranking.
        lm: the model, if it is a local one.
    """

    scoring: LocalTeacher | OllamaTeacher
    writing: LocalTeacher | OllamaTeacher
    lm: LanguageModel | None = None

    @classmethod
    def open(cls, name: str, header: str, device: torch.device, seed: int) -> Untuned:
        """Return a teacher: a local model, which is loaded, or one that the Ollama server has.

        Args:
            name: as in find_model.
            header: text before the history where a local model scores titles.
            device: where a local model computes.
            seed: of what a served model samples.
        """
        spec = find_model(name)
        if spec.backend == "ollama":
            served = partial(OllamaTeacher, spec.id, think=spec.think, num_predict=spec.num_predict, seed=seed)
            return cls(served(), served(mode="written"))
        lm = load_teacher(name)
        lm.model.to(device)
        return cls(LocalTeacher(lm, "score", header), LocalTeacher(lm, "generate"), lm)

    def scored(self, histories: Sequence[Sequence[str]], candidates: Sequence[Sequence[str]]) -> TeacherAnswers:
        """Return the answers of the scoring teacher; scores that are not finite are an LwaError."""
        answers = self.scoring.rank(histories, candidates)
        if not np.isfinite(answers.scores).all():
            raise LwaError("scores that are not finite: its weights are damaged or its precision is too low")
        return answers

    def memory_bytes(self) -> float:
        """Return the bytes of a local model's weights, or of what its server says that a served one takes."""
        if self.lm:
            return weight_bytes(self.lm.model)
        assert isinstance(self.scoring, OllamaTeacher), "a teacher that is not local is served"
        return self.scoring.memory_bytes()


class Failures(dict[str, str]):
    """Why teachers failed, by name. A teacher that fails costs the comparison its own numbers and no others."""

    @contextmanager
    def of(self, name: str, what: str = "") -> Iterator[None]:
        """Note and print what goes wrong in the block, and go on behind it; an interruption ends the comparison.

        Args:
            name: the teacher.
            what: the part of its row that the block measures; "" is all of it.
        """
        try:
            yield
        except Exception as error:  # whatever a model or a server raises is said in its row
            reason = str(error) if isinstance(error, LwaError) else f"{type(error).__name__}: {error}"
            reason = f"{what}: {reason}" if what else reason
            self[name] = f"{self[name]}; {reason}" if name in self else reason
            print(f"{name}: {reason}", flush=True)


def with_reasons(reachable: pd.DataFrame, failures: Mapping[str, str], answers: Mapping[str, object]) -> pd.DataFrame:
    """Return the rows of reachable_teachers with the reasons of those that failed when they were asked.

    Args:
        reachable: columns name, backend, reachable and reason.
        failures: why teachers failed, by name.
        answers: the answers of those that gave any, by name.

    Raises:
        LwaError: if no teacher answered. The message has the reason of each.
    """
    reasons = [failures.get(name, reason) for name, reason in zip(reachable.name, reachable.reason)]
    if not answers:
        listed = "\n".join(f"  {name}: {reason}" for name, reason in zip(reachable.name, reasons))
        raise LwaError(f"no teacher answered:\n{listed}")
    return reachable.assign(reason=reasons, answered=reachable.name.isin(list(answers)))
