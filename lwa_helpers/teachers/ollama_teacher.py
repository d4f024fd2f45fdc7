"""A teacher behind Ollama's HTTP API, asked for structured answers; every answer is kept on disk."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import httpx
import ollama

from lwa_helpers.errors import LwaError
from lwa_helpers.paths import CACHE, atomic_write
from lwa_helpers.teachers.answers import (
    Reply,
    TeacherAnswers,
    UnreadableAnswer,
    check_question,
    order_scores,
    parse_ranking,
    ranking_messages,
    ranking_schema,
)
from lwa_helpers.teachers.connection import BrokenAnswer, Connection, ServedModel, protocol

TEMPLATE_TOKENS = 256
THINKING_TOKENS = 2048
SMALLEST_CONTEXT = 4096


class OllamaTeacher:
    """Rank candidates with a model served by Ollama (/api/chat, `format` = a JSON schema of candidate numbers).

    host: else OLLAMA_HOST, else this machine. think: None turns thinking off, or to "low" for gpt-oss, which cannot
    stop; thinking text is never read as an answer. Temperature 0; an unreadable answer is asked for again at
    temperature 0.3 and another seed. timeout_s, retries, backoff_s: see Connection. concurrency: questions in flight.
    cache: folder of the answers given so far, by (digest, prompt, options); None keeps none.
    """

    def __init__(
        self,
        name: str,
        host: str | None = None,
        *,
        think: bool | Literal["low", "medium", "high"] | None = None,
        seed: int = 0,
        timeout_s: float = 300.0,
        retries: int = 2,
        backoff_s: float = 1.0,
        keep_alive: str = "10m",
        concurrency: int = 1,
        cache: Path | None = CACHE / "teachers",
    ) -> None:
        self.name, self.think, self.seed = name, think, seed
        self.keep_alive, self.concurrency, self.cache = keep_alive, concurrency, cache
        self.connection = Connection(host, timeout_s, retries, backoff_s)

    @cached_property
    def served(self) -> ServedModel:
        """What the server says about the model. Raises LwaError when either is not there."""
        return self.connection.find(self.name)

    def rank(self, histories: Sequence[Sequence[str]], candidates: Sequence[Sequence[str]]) -> TeacherAnswers:
        """Rank the titles of each row of `candidates` (B, C) for the titles of each of B histories, oldest first.

        Raises LwaError naming model and server when either is not there, a prompt would be cut, or answers stay unreadable.
        """
        check_question(histories, candidates)
        _ = self.served
        with ThreadPoolExecutor(self.concurrency) as pool:
            return TeacherAnswers(self.name, list(pool.map(self._rank_one, histories, candidates)))

    def _rank_one(self, history: Sequence[str], candidates: Sequence[str]) -> Reply:
        request = self._request(ranking_messages(history, candidates), len(candidates))
        path = self._cache_file(request)
        if path and path.is_file():
            return replace(_read(path), cached=True)
        reply = self.connection.retry(self.name, lambda attempt: self._ask(request, len(candidates), attempt))
        if path:
            with atomic_write(path) as temporary:
                temporary.write_text(json.dumps(asdict(reply)), encoding="utf-8")
        return reply

    def _request(self, messages: list[dict[str, str]], n: int) -> dict[str, Any]:
        """All that the answer depends on; num_ctx is sized so that the server never cuts the prompt.

        A byte-level tokenizer makes at most one token of a byte, so bytes bound the prompt from above.
        """
        think = self._thinking()
        answer = 8 * n + 64 + (THINKING_TOKENS if think else 0)
        need = sum(len(message["content"].encode()) for message in messages) + TEMPLATE_TOKENS + answer
        limit = self.served.context_length or math.inf
        if need > limit:
            raise LwaError(
                f"model {self.name!r}: the prompt may need {need} tokens and the context holds {limit}, "
                "so the server would cut it: ask with fewer candidates or a shorter history"
            )
        context = min(limit, max(SMALLEST_CONTEXT, 2 ** math.ceil(math.log2(need))))
        options = {"seed": self.seed, "temperature": 0.0, "num_ctx": context, "num_predict": answer}
        request = {"model": self.name, "messages": messages, "format": ranking_schema(n), "options": options}
        return request if think is None else request | {"think": think}

    def _thinking(self) -> bool | str | None:
        """Return what to send as `think`: what was asked for, else the least that the model knows."""
        if self.think is not None:
            return self.think
        if "gpt-oss" in self.name:
            return "low"
        return False if self.served.thinks or "qwen3" in self.name else None

    def _ask(self, request: dict[str, Any], n: int, attempt: int) -> Reply:
        """Stream one answer, time it and read it."""
        if attempt:
            request = request | {"options": request["options"] | {"seed": self.seed + attempt, "temperature": 0.3}}
        start, first, text = time.perf_counter(), math.nan, ""
        for part in self._stream(request):
            now = time.perf_counter() - start
            if now > self.connection.timeout_s:
                raise httpx.ReadTimeout("the answer trickles")
            if math.isnan(first) and (part.message.content or part.message.thinking):
                first = now
            text += part.message.content or ""
            if part.done:
                return _reply(text, n, part, now, first)
        raise BrokenAnswer("the answer broke off")

    def _stream(self, request: dict[str, Any]) -> Iterator[ollama.ChatResponse]:
        with protocol():
            yield from self.connection.client.chat(**request, stream=True, keep_alive=self.keep_alive)

    def _cache_file(self, request: dict[str, Any]) -> Path | None:
        if self.cache is None or self.served.digest is None:
            return None
        key = json.dumps([self.served.digest, request], sort_keys=True)
        return self.cache / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


def _reply(text: str, n: int, last: ollama.ChatResponse, latency_s: float, first_token_s: float) -> Reply:
    """Read an answer and the server's own counts and nanoseconds."""
    try:
        order, counts = parse_ranking(text, n)
    except UnreadableAnswer as error:
        raise BrokenAnswer(f"the answer is outside the schema, {error}") from error
    prompt, answer = (math.nan if x is None else x for x in (last.prompt_eval_count, last.eval_count))
    speed = answer / last.eval_duration * 1e9 if last.eval_duration else math.nan
    return Reply(order_scores(order), latency_s, counts, first_token_s, prompt, answer, speed)


def _read(path: Path) -> Reply:
    try:
        return Reply(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise LwaError(f"{path} is not an answer kept by this version: delete it") from error
