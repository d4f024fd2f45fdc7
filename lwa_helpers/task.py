"""The recommendation task as a ranking model meets it: windows to train on, users to rank the catalogue for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch.utils.data import DataLoader

from lwa_helpers.config import DataConfig, EvaluationConfig, TuningConfig
from lwa_helpers.data import Interactions
from lwa_helpers.data.prompts import Prompt, prompt_for
from lwa_helpers.data.windows import Window, evaluation_windows, user_windows
from lwa_helpers.evaluation import Cases, cases, rank_of_target
from lwa_helpers.models import LanguageModel
from lwa_helpers.ranking import ItemHead, ItemRankingModel, rank_catalogue, title_vectors
from lwa_helpers.tuning import window_loader
from lwa_helpers.vocabulary import check_covered


@dataclass(frozen=True)
class RankingTask:
    """A dataset, a language model whose tokenizer reads it, how histories are cut into windows, and who is asked
    (the users of the test part, or of the validation part where settings are chosen)."""

    data: Interactions
    lm: LanguageModel
    cut: DataConfig
    evaluation: EvaluationConfig
    seed: int
    part: Literal["valid", "test"] = "test"

    def __post_init__(self):
        check_covered(self.lm.tokenizer, self.texts())

    @cached_property
    def prompt(self) -> Prompt:
        return prompt_for(self.data.name)

    @cached_property
    def log_popularity(self) -> torch.Tensor:
        """log((1 + n_i) / sum(1 + n)) from the train part, (N,): the item head's starting bias."""
        counts = self.data.train.parent_asin.value_counts().reindex(self.data.item_ids, fill_value=0).to_numpy() + 1
        return torch.from_numpy(np.log(counts / counts.sum())).float()

    def texts(self) -> list[str]:
        """Every text the prompt is put together from: what a cut vocabulary must hold."""
        return [self.prompt.header, *(title + self.prompt.separator for title in self.data.titles)]

    def new_ranker(self, next_items: int, softmax_items: int | None = None) -> ItemRankingModel:
        """The language model with an untrained item head: vectors from titles, bias from popularity."""
        vectors = title_vectors(
            self.lm.model, self.lm.tokenizer, self.prompt.header, self.data.titles, bf16=self.evaluation.bf16
        )
        return ItemRankingModel(self.lm.model, ItemHead(vectors, self.log_popularity), next_items, softmax_items)

    def train_windows(self, section: TuningConfig, last_text: bool = False) -> list[Window]:
        """Training windows (or pairs, as data.examples says) of a section of the settings, none longer than its batches."""
        budget = min(self.cut.max_tokens or section.tokens_per_batch, section.tokens_per_batch)
        return user_windows(
            self.data, self.lm.tokenizer, self.prompt, self.cut.max_titles, self.cut.context_titles,
            section.windows_per_user, max_tokens=budget, last_text=last_text,
            pairs=self.cut.examples == "pairs",
        )

    def train_loader(self, section: TuningConfig, seed: int) -> DataLoader:
        """Shuffled batches of the training windows."""
        return window_loader(self.train_windows(section), section.tokens_per_batch, self.lm.pad_id, seed)

    @cached_property
    def asked(self) -> Cases:
        """The cases of the part: all its users, or evaluation.users of them drawn with the seed."""
        every = cases(self.data, self.part)
        return Cases(*([values[i] for i in self._chosen] for values in every[:2]), every.targets[self._chosen])

    @cached_property
    def _chosen(self) -> np.ndarray:
        n, wanted = len(self.data.targets(self.part)), self.evaluation.users
        if wanted is None or wanted >= n:
            return np.arange(n)
        return np.sort(np.random.default_rng(self.seed).choice(n, wanted, replace=False))

    @cached_property
    def asked_windows(self) -> list[Window]:
        """The history of every case, to be ranked at its end."""
        windows = evaluation_windows(
            self.data, self.lm.tokenizer, self.prompt, self.part, self.evaluation.history_titles, self.cut.max_tokens
        )
        return [windows[i] for i in self._chosen]

    def scores(self, model: ItemRankingModel) -> np.ndarray:
        """Scores of the whole catalogue for every case, (B, N)."""
        return rank_catalogue(model, self.asked_windows, self.evaluation.batch_size, self.evaluation.bf16)

    def ranks(self, model: ItemRankingModel, scores: np.ndarray | None = None) -> np.ndarray:
        """Rank of each target among all items that the user has not seen, (B,), ties against the target."""
        scores = self.scores(model) if scores is None else scores
        return rank_of_target(scores, self.asked.targets, exclude=self.asked.histories)
