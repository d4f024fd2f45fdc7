"""Cross-fitting: score each user with a fit on other users, so that no score repeats memorised training rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lwa_helpers.data.interactions import Interactions
from lwa_helpers.evaluation.protocol import Baseline


@dataclass(frozen=True)
class CrossFitted:
    """One fit per fold of users, without that fold's training rows.

    Attributes:
        models: the fit for each fold.
        fold: the fold of each user.
    """

    models: list[Baseline]
    fold: dict[str, int]

    @classmethod
    def of(cls, fit: Callable[[Interactions], Baseline], data: Interactions, seed: int, folds: int = 2) -> CrossFitted:
        """Divide the users of the train part into `folds` folds and call `fit` once per fold, without its rows."""
        users = data.train.user_id.unique()
        dealt = np.random.default_rng(seed).permutation(np.arange(len(users)) % folds)
        fold = dict(zip(users, dealt.tolist(), strict=True))
        own = data.train.user_id.map(fold)
        parts = [replace(data, train=data.train[own != place].reset_index(drop=True)) for place in range(folds)]
        return cls([fit(part) for part in parts], fold)

    def scores(self, histories: Sequence[Sequence[int]], users: Sequence[str]) -> np.ndarray:
        """Score every item for each history, with the fit that has not seen its user.

        The first fit scores users without training rows.

        Args:
            histories: B sequences of item indices, oldest first.
            users: the B users.

        Returns:
            The scores, (B, N).
        """
        which = np.array([self.fold.get(user, 0) for user in users])
        parts = {place: np.flatnonzero(which == place) for place in range(len(self.models))}
        found = {
            place: self.models[place].scores([histories[row] for row in rows.tolist()])
            for place, rows in parts.items()
            if len(rows)
        }
        out = np.empty((len(histories), next(iter(found.values())).shape[1]))
        for place, values in found.items():
            out[parts[place]] = values
        return out
