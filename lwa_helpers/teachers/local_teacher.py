"""A teacher that runs in this process and either scores titles exactly or writes a ranking, as Ollama's models do."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Literal

import torch
from tqdm import tqdm
from transformers import StopStringCriteria

from lwa_helpers.data.prompts import prompt_for
from lwa_helpers.data.titles import clean_title
from lwa_helpers.errors import LwaError
from lwa_helpers.models.language_model import LanguageModel, text_rows
from lwa_helpers.ranking.title_head import TitleRanker
from lwa_helpers.teachers.answers import (
    KINDS,
    Reply,
    TeacherAnswers,
    check_question,
    order_scores,
    parse_ranking,
    ranking_messages,
)
from lwa_helpers.teachers.chat_prompt import chat_prompt, plain_prompt
from lwa_helpers.teachers.repair import UnreadableAnswer

ANSWER_OPENING = '{"ranking": ['


class LocalTeacher:
    """Rank candidates with a local causal LM; the interface is that of OllamaTeacher.

    Mode "score" scores each candidate by log p(title | header + history), computed by title_head.TitleRanker. Its
    answers are never invalid.

    Mode "generate" lets the LM continue the chat after '{"ranking": [', greedily and without a grammar, until the list
    closes. The chat follows the LM's template, mended as chat_prompt says, or is plain text if the LM has no template
    or the registry says `prompt: plain`. Invalid answers are counted. An unreadable one ranks the candidates in the
    order listed.

    Args:
        language_model: the LM.
        mode: "score" or "generate".
        header: text before the history in mode "score"; None takes the template that fits any shop.
        batch_size: questions scored together in mode "score". The latency of a question is its share of the batch, so
            use 1 to time single questions.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        mode: Literal["score", "generate"] = "score",
        header: str | None = None,
        batch_size: int = 1,
    ) -> None:
        if mode not in ("score", "generate"):
            raise ValueError(f"unknown mode {mode!r}: choose score or generate")
        self.name, self.mode = language_model.name, mode
        self.header = prompt_for("amazon").header if header is None else header
        self.batch_size = batch_size if mode == "score" else 1
        self._lm = language_model

    def rank(
        self, histories: Sequence[Sequence[str]], candidates: Sequence[Sequence[str]], progress: bool = False
    ) -> TeacherAnswers:
        """Return the answers to B questions of C candidates each.

        Args:
            histories: titles of B users' histories, oldest first.
            candidates: titles to rank, (B, C).
            progress: whether to show a progress bar.
        """
        check_question(histories, candidates)
        answer, replies = self._score if self.mode == "score" else self._generate, []
        with tqdm(total=len(histories), desc=f"rank with {self.name}", unit="question", disable=not progress) as bar:
            for start in range(0, len(histories), self.batch_size):
                batch = slice(start, start + self.batch_size)
                replies += answer(histories[batch], candidates[batch])
                bar.update(len(replies) - start)
        return TeacherAnswers(self.name, replies)

    def _score(self, histories: Sequence[Sequence[str]], candidates: Sequence[Sequence[str]]) -> list[Reply]:
        start = time.perf_counter()
        place: dict[str, int] = {}
        asked, listed = (
            [[place.setdefault(clean_title(title), len(place)) for title in row] for row in rows]
            for rows in (histories, candidates)
        )
        scores = TitleRanker(self._lm.model, self._lm.tokenizer, self.header, list(place)).score(asked, listed)
        seconds = (time.perf_counter() - start) / len(histories)
        return [Reply([float(score) for score in row], seconds, mode="title") for row in scores]

    def _generate(self, histories: Sequence[Sequence[str]], candidates: Sequence[Sequence[str]]) -> list[Reply]:
        return [self._generate_one(*question) for question in zip(histories, candidates, strict=True)]

    def _generate_one(self, history: Sequence[str], candidates: Sequence[str]) -> Reply:
        n = len(candidates)
        prompt = self._prompt(ranking_messages(history, candidates))
        start = time.perf_counter()
        text, first, tokens = self._continue(prompt, 4 * n + 16)
        seconds = time.perf_counter() - start
        try:
            order, counts = parse_ranking(ANSWER_OPENING + text.split("]")[0] + "]}", n, candidates, history)
        except UnreadableAnswer:
            order, counts = list(range(n)), dict.fromkeys(KINDS, 0) | {"unreadable": 1}
        speed = (tokens - 1) / (seconds - first) if tokens > 1 else math.nan
        return Reply(order_scores(order), seconds, counts, first, len(prompt), tokens, speed)

    def _prompt(self, messages: list[dict[str, str]]) -> list[int]:
        """Return the token ids of the question and of the opening of the answer.

        Raises:
            LwaError: if the LM's template cannot ask the question, or it must be asked by one and there is none.
        """
        lm = self._lm
        if lm.prompt == "chat" and not lm.tokenizer.chat_template:
            raise LwaError(f"model {lm.name!r} has no chat template: its entry in model_config.yaml cannot say chat")
        if lm.tokenizer.chat_template and lm.prompt != "plain":
            text = chat_prompt(lm.tokenizer, messages, lm.name)
            ids = lm.tokenizer(text + ANSWER_OPENING, add_special_tokens=False)["input_ids"]
        else:
            ids = lm.tokenizer(plain_prompt(messages) + ANSWER_OPENING)["input_ids"]
        if max(ids) >= text_rows(lm.model):
            token = lm.tokenizer.convert_ids_to_tokens(max(ids))
            raise LwaError(
                f"model {lm.name!r} has no row for {token!r}, which its chat template writes: say prompt: plain"
            )
        return ids

    def _continue(self, prompt: list[int], max_new_tokens: int) -> tuple[str, float, int]:
        """Return the greedy continuation up to the end of the list, the seconds to its first token, and its length.

        Args:
            prompt: token ids.
            max_new_tokens: the most tokens to generate.

        Returns:
            The text, the seconds from the call to the first new token (nan if there is none), and the number of tokens.
        """
        clock = _FirstToken()
        ids = torch.tensor([prompt], device=self._lm.model.device)
        out = self._lm.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            use_cache=True,
            pad_token_id=self._lm.pad_id,
            streamer=clock,
            stopping_criteria=[StopStringCriteria(self._lm.tokenizer, "]")],
        )[0, len(prompt) :]
        text = self._lm.tokenizer.decode(out, skip_special_tokens=True)
        assert isinstance(text, str)  # `out` is one sequence
        return text, clock.seconds, len(out)


class _FirstToken:
    """A generation streamer that measures the seconds to the first new token."""

    def __init__(self) -> None:
        self._start, self._puts, self.seconds = time.perf_counter(), 0, math.nan

    def put(self, _) -> None:
        """Count the tokens passed to the streamer. The first call is the prompt, the second the first new token."""
        self._puts += 1
        if self._puts == 2:
            self.seconds = time.perf_counter() - self._start

    def end(self) -> None:
        """Do nothing: a streamer must have this method."""
