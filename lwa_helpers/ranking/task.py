"""The recommendation task for a language model: windows to train on, and evaluation cases to rank the catalogue for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from lwa_helpers.config import DataConfig, EvaluationConfig
from lwa_helpers.configs.students import TuningConfig
from lwa_helpers.data.history_tokens import Reading
from lwa_helpers.data.interactions import Interactions
from lwa_helpers.data.prompts import Prompt, prompt_for
from lwa_helpers.data.windows import Window, user_windows
from lwa_helpers.errors import LwaError
from lwa_helpers.evaluation.metrics import rank_of_target
from lwa_helpers.evaluation.protocol import Cases, cases
from lwa_helpers.models.language_model import LanguageModel
from lwa_helpers.ranking.item_head import rank_catalogue
from lwa_helpers.ranking.training import window_loader


@dataclass(frozen=True)
class RankingTask:
    """A dataset, a language model that reads it, and how the model is trained and evaluated on it.

    Attributes:
        data: the dataset.
        lm: the language model; its item tokens, if any, are those of the dataset.
        cut: how histories are read and cut into windows.
        evaluation: how many cases are evaluated, and how.
        seed: of the draw of the evaluation cases.
        part: the part whose targets are ranked; None takes that of `evaluation`.

    Raises:
        LwaError: if the model has item tokens for other items than those of the dataset.
    """

    data: Interactions
    lm: LanguageModel
    cut: DataConfig
    evaluation: EvaluationConfig
    seed: int
    part: Literal["valid", "test"] | None = None

    def __post_init__(self):
        if self.lm.items and list(self.lm.items.ids) != self.data.item_ids:
            raise LwaError(
                f"model {self.lm.name!r} was made for other items than {self.data.name} holds: tune it on these"
            )

    @cached_property
    def prompt(self) -> Prompt:
        """The prompt template of this dataset."""
        return prompt_for(self.data.name)

    @cached_property
    def reading(self) -> Reading:
        """How histories become tokens for this model."""
        return Reading.of(self.data.titles, self.lm, self.prompt)

    @cached_property
    def log_popularity(self) -> np.ndarray:
        """log((1 + n_i) / sum(1 + n)) with n_i from the train part, (N,): the scores for an empty history."""
        counts = self.data.counts + 1
        return np.log(counts / counts.sum())

    def train_windows(self, section: TuningConfig) -> list[Window]:
        """Return the training windows (or pairs, if data.examples says so) for a section of the settings.

        No window is longer than a batch of the section.
        """
        budget = min(self.cut.max_tokens or section.tokens_per_batch, section.tokens_per_batch)
        return user_windows(
            self.data,
            self.reading,
            self.cut.max_items,
            self.cut.context_items,
            section.windows_per_user,
            max_tokens=budget,
            pairs=self.cut.examples == "pairs",
        )

    def train_loader(self, section: TuningConfig, seed: int) -> DataLoader:
        """Return a loader of shuffled batches of the training windows."""
        return window_loader(self.train_windows(section), section.tokens_per_batch, self.lm.pad_id, seed)

    @cached_property
    def eval_cases(self) -> Cases:
        """The cases of the part: all of them, or a sample of evaluation.users cases drawn with the seed."""
        every = cases(self.data, self.part or self.evaluation.part, self.evaluation.every_target)
        n, wanted = len(every.targets), self.evaluation.users
        if wanted is None or wanted >= n:
            return every
        chosen = np.sort(np.random.default_rng(self.seed).choice(n, wanted, replace=False))
        users, histories = [every.user_ids[i] for i in chosen], [every.histories[i] for i in chosen]
        return Cases(users, histories, every.targets[chosen])

    @cached_property
    def prompts(self) -> list[list[int]]:
        """The tokens that the model reads for each case's history."""
        longest = self.evaluation.history_items
        return [self.reading.prompt(history, longest, self.cut.max_tokens) for history in self.eval_cases.histories]

    def scores(self, model: PreTrainedModel) -> np.ndarray:
        """Return the scores of the whole catalogue for each case, (B, N); if its prompt is empty, by popularity."""
        assert self.lm.items is not None  # the item head ranks item tokens
        known = [row for row, prompt in enumerate(self.prompts) if prompt]
        scores = np.tile(self.log_popularity.astype(np.float32), (len(self.prompts), 1))
        shown = [self.prompts[row] for row in known]
        scores[known] = rank_catalogue(
            model, shown, self.lm.items.tokens, self.evaluation.batch_size, self.evaluation.bf16
        )
        return scores

    def ranks(self, model: PreTrainedModel, scores: np.ndarray | None = None) -> np.ndarray:
        """Return each target's rank among the items that the user has not seen, (B,); ties count against the target.

        Args:
            model: the model to evaluate; it has the vocabulary of the task's model.
            scores: what `scores` returned for this model, if that is known already, (B, N).
        """
        scores = self.scores(model) if scores is None else scores
        return rank_of_target(scores, self.eval_cases.targets, exclude=self.eval_cases.histories)
