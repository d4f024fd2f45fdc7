"""The recommendation task as a language model meets it: windows to train on, users to rank the catalogue for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from lwa_helpers.config import DataConfig, EvaluationConfig, TuningConfig
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
    """A dataset, a language model that reads it, how histories are cut into windows, and who is asked
    (the users of the test part, or of the validation part where settings are chosen).
    """

    data: Interactions
    lm: LanguageModel
    cut: DataConfig
    evaluation: EvaluationConfig
    seed: int
    part: Literal["valid", "test"] = "test"

    def __post_init__(self):
        if self.lm.items and list(self.lm.items.ids) != self.data.item_ids:
            raise LwaError(
                f"model {self.lm.name!r} was made for other items than {self.data.name} holds: tune it on these"
            )

    @cached_property
    def prompt(self) -> Prompt:
        return prompt_for(self.data.name)

    @cached_property
    def reading(self) -> Reading:
        return Reading.of(self.data.titles, self.lm, self.prompt)

    @cached_property
    def log_popularity(self) -> np.ndarray:
        """log((1 + n_i) / sum(1 + n)) from the train part, (N,): the scores of a user without history."""
        counts = self.data.counts + 1
        return np.log(counts / counts.sum())

    def train_windows(self, section: TuningConfig) -> list[Window]:
        """Training windows (or pairs, as data.examples says) of a section of the settings, none longer than its batches."""
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
        """Shuffled batches of the training windows."""
        return window_loader(self.train_windows(section), section.tokens_per_batch, self.lm.pad_id, seed)

    @cached_property
    def eval_cases(self) -> Cases:
        """The cases of the part: all of them, or evaluation.users drawn with the seed."""
        every = cases(self.data, self.part, self.evaluation.every_target)
        n, wanted = len(every.targets), self.evaluation.users
        if wanted is None or wanted >= n:
            return every
        chosen = np.sort(np.random.default_rng(self.seed).choice(n, wanted, replace=False))
        return Cases(*([values[i] for i in chosen] for values in every[:2]), every.targets[chosen])

    @cached_property
    def prompts(self) -> list[list[int]]:
        """What the model reads of the history of every case."""
        longest = self.evaluation.history_items
        return [self.reading.prompt(history, longest, self.cut.max_tokens) for history in self.eval_cases.histories]

    def scores(self, model: PreTrainedModel) -> np.ndarray:
        """Scores of the whole catalogue for every case, (B, N); popularity's where there is nothing to read."""
        known = [row for row, prompt in enumerate(self.prompts) if prompt]
        scores = np.tile(self.log_popularity.astype(np.float32), (len(self.prompts), 1))
        shown = [self.prompts[row] for row in known]
        scores[known] = rank_catalogue(
            model, shown, self.lm.items.tokens, self.evaluation.batch_size, self.evaluation.bf16
        )
        return scores

    def ranks(self, model: PreTrainedModel, scores: np.ndarray | None = None) -> np.ndarray:
        """Rank of each target among all items that the user has not seen, (B,), ties against the target."""
        scores = self.scores(model) if scores is None else scores
        return rank_of_target(scores, self.eval_cases.targets, exclude=self.eval_cases.histories)
