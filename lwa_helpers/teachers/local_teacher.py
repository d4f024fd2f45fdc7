"""A teacher that runs in this process: exact title log-probabilities, or numbers generated as Ollama is asked for."""

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
from lwa_helpers.models.language_model import LanguageModel
from lwa_helpers.ranking.title_head import TitleRanker
from lwa_helpers.teachers.answers import (
    KINDS,
    Reply,
    TeacherAnswers,
    UnreadableAnswer,
    check_question,
    order_scores,
    parse_ranking,
    ranking_messages,
)

ANSWER_OPENING = '{"ranking": ['


class LocalTeacher:
    """Rank candidates with a local causal LM; the interface is OllamaTeacher's.

    mode "score": log p(title | header + history) of each candidate by title_ranker.TitleRanker; never invalid.
    mode "generate": the LM continues the chat (its template; plain text where it has none or the registry says
    `prompt: plain`) after '{"ranking": [' greedily and without a grammar until the list closes; invalid answers are counted,
    and an unreadable one ranks in listed order.
    header: the text before the history in mode "score"; None takes the template that fits any shop. batch_size: questions
    scored together in mode "score"; the latency of each is its share of the batch, so time single ones with 1.
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
        """Rank the titles of each row of `candidates` (B, C) for the titles of each of B histories, oldest first."""
        check_question(histories, candidates)
        answer, replies = self._score if self.mode == "score" else self._generate, []
        with tqdm(total=len(histories), desc=f"rank with {self.name}", unit="question", disable=not progress) as bar:
            for start in range(0, len(histories), self.batch_size):
                batch = slice(start, start + self.batch_size)
                replies += answer(histories[batch], candidates[batch])
                bar.update(len(replies) - start)
        return TeacherAnswers(self.name, replies)

    def _score(self, histories: Sequence[Sequence[str]], candidates: Sequence[Sequence[str]]) -> list[Reply]:
        start, place = time.perf_counter(), {}
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
            order, counts = parse_ranking(ANSWER_OPENING + text.split("]")[0] + "]}", n)
        except UnreadableAnswer:
            order, counts = list(range(n)), dict.fromkeys(KINDS, 0) | {"unreadable": 1}
        speed = (tokens - 1) / (seconds - first) if tokens > 1 else math.nan
        return Reply(order_scores(order), seconds, counts, first, len(prompt), tokens, speed)

    def _prompt(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of the question and the opening of the answer."""
        tokenizer = self._lm.tokenizer
        if tokenizer.chat_template and self._lm.prompt != "plain":
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            return tokenizer(text + ANSWER_OPENING, add_special_tokens=False)["input_ids"]
        return tokenizer("\n\n".join(m["content"] for m in messages) + f"\n\n{ANSWER_OPENING}")["input_ids"]

    def _continue(self, prompt: list[int], max_new_tokens: int) -> tuple[str, float, int]:
        """Return the greedy continuation up to the list's end, seconds to its first token, and its number of tokens."""
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
        return self._lm.tokenizer.decode(out, skip_special_tokens=True), clock.seconds, len(out)


class _FirstToken:
    """A generation streamer that notes when the first new token came (the first put is the prompt)."""

    def __init__(self) -> None:
        self._start, self._puts, self.seconds = time.perf_counter(), 0, math.nan

    def put(self, _) -> None:
        self._puts += 1
        if self._puts == 2:
            self.seconds = time.perf_counter() - self._start

    def end(self) -> None:
        """Nothing is left to show."""
