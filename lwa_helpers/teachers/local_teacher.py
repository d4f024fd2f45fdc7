"""A teacher that runs in this process: exact title log-probabilities, or numbers generated as Ollama is asked for."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from lwa_helpers.data.prompts import clean_title, prompt_for
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

if TYPE_CHECKING:
    from lwa_helpers.models import LanguageModel

ANSWER_OPENING = '{"ranking": ['


class LocalTeacher:
    """Rank candidates with a local causal LM; the interface is OllamaTeacher's.

    mode "score": log p(title | header + history) of each candidate by title_ranker.TitleRanker; never invalid.
    mode "generate": the LM continues the chat (its template, else plain text) after '{"ranking": [' greedily and
    without a grammar until the list closes; invalid answers are counted, and an unreadable one ranks in listed order.
    header: the text before the history in mode "score"; None takes the template that fits any shop.
    """

    def __init__(
        self, language_model: LanguageModel, mode: Literal["score", "generate"] = "score", header: str | None = None
    ) -> None:
        if mode not in ("score", "generate"):
            raise ValueError(f"unknown mode {mode!r}: choose score or generate")
        self.name, self.mode = language_model.name, mode
        self.header = prompt_for("amazon").header if header is None else header
        self._lm = language_model

    def rank(self, histories: Sequence[Sequence[str]], candidates: Sequence[Sequence[str]]) -> TeacherAnswers:
        """Rank the titles of each row of `candidates` (B, C) for the titles of each of B histories, oldest first."""
        check_question(histories, candidates)
        rank_one = self._score if self.mode == "score" else self._generate
        return TeacherAnswers(self.name, [rank_one(*question) for question in zip(histories, candidates, strict=True)])

    def _score(self, history: Sequence[str], candidates: Sequence[str]) -> Reply:
        from lwa_helpers.title_ranker import TitleRanker  # here, so that `lwa status` need not load torch

        titles = [clean_title(title) for title in [*history, *candidates]]
        start = time.perf_counter()
        ranker = TitleRanker(self._lm.model, self._lm.tokenizer, self.header, titles)
        places = range(len(history), len(titles))
        scores = ranker.score([range(len(history))], [places])[0]
        return Reply([float(score) for score in scores], time.perf_counter() - start)

    def _generate(self, history: Sequence[str], candidates: Sequence[str]) -> Reply:
        n = len(candidates)
        prompt = self._prompt(ranking_messages(history, candidates))
        start = time.perf_counter()
        text, first, tokens = self._continue(prompt, 8 * n + 16)
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
        if tokenizer.chat_template:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            return tokenizer(text + ANSWER_OPENING, add_special_tokens=False)["input_ids"]
        return tokenizer("\n\n".join(m["content"] for m in messages) + f"\n\n{ANSWER_OPENING}")["input_ids"]

    def _continue(self, prompt: list[int], max_new_tokens: int) -> tuple[str, float, int]:
        """Return the greedy continuation up to the list's end, seconds to its first token, and its number of tokens."""
        import torch
        from transformers import StopStringCriteria

        clock = _FirstToken()
        ids = torch.tensor([prompt], device=self._lm.model.device)
        out = self._lm.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens, use_cache=True,
            pad_token_id=self._lm.pad_id, streamer=clock,
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
