"""A teacher behind Ollama's HTTP API, asked for structured answers or scored labels; every answer is kept on disk."""

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
from tqdm import tqdm

from lwa_helpers.errors import LwaError
from lwa_helpers.files import atomic_write
from lwa_helpers.paths import CACHE
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
from lwa_helpers.teachers.labels import LABELS, TOP_LOGPROBS, answer_tokens, label_messages, label_schema, read_labels

KEPT_ANSWERS = CACHE / "teachers"
TEMPLATE_TOKENS = 256
THINKING_TOKENS = 2048
SMALLEST_CONTEXT = 4096
LABEL_TOKENS = 32


class OllamaTeacher:
    """Rank candidates with a model served by Ollama (/api/chat, `format` = a JSON schema of labels or candidate numbers).

    mode "written": the model writes the candidates' numbers, best first. mode "labels": it names the best candidate's label,
    and each candidate scores its label's log-probability; LwaError where the server gives none or there are more than 20.
    mode "auto": labels where they are offered, at least half are reported and the model does not think first; else written.
    Each reply's `mode` says which it was.
    host: else OLLAMA_HOST, else this machine. think: None turns thinking off, or to "low" for gpt-oss, which cannot stop;
    thinking text is never read as an answer. Temperature 0; a written answer that cannot be read is asked for again at
    temperature 0.3 and another seed. timeout_s, retries, backoff_s: see Connection. concurrency: questions in flight.
    cache: folder of the answers given so far, by (server, digest, prompt, options); None keeps none. Server and model must be
    there whatever has been kept; the server counts because the answer's times are its own.
    """

    def __init__(
        self,
        name: str,
        host: str | None = None,
        *,
        mode: Literal["auto", "labels", "written"] = "auto",
        think: bool | Literal["low", "medium", "high"] | None = None,
        seed: int = 0,
        timeout_s: float = 300.0,
        retries: int = 2,
        backoff_s: float = 1.0,
        keep_alive: str = "10m",
        concurrency: int = 1,
        cache: Path | None = KEPT_ANSWERS,
    ) -> None:
        if mode not in ("auto", "labels", "written"):
            raise ValueError(f"unknown mode {mode!r}: choose auto, labels or written")
        self.name, self.mode, self.think, self.seed = name, mode, think, seed
        self.keep_alive, self.concurrency, self.cache = keep_alive, concurrency, cache
        self.connection = Connection(host, timeout_s, retries, backoff_s)

    @cached_property
    def served(self) -> ServedModel:
        """What the server says about the model. Raises LwaError when either is not there."""
        return self.connection.find(self.name)

    def memory_bytes(self) -> float:
        """What the model takes on its server, by its own account; nan when it is not loaded."""
        return self.connection.loaded_bytes(self.name)

    def rank(
        self, histories: Sequence[Sequence[str]], candidates: Sequence[Sequence[str]], progress: bool = False
    ) -> TeacherAnswers:
        """Rank the titles of each row of `candidates` (B, C) for the titles of each of B histories, oldest first.

        Raises LwaError naming model and server when either is not there, a prompt would be cut, or answers stay unreadable.
        """
        check_question(histories, candidates)
        _ = self.served
        with ThreadPoolExecutor(self.concurrency) as pool:
            answered = pool.map(self._rank_one, histories, candidates)
            bar = tqdm(answered, f"ask {self.name}", len(histories), unit="question", disable=not progress)
            try:
                return TeacherAnswers(self.name, list(bar))
            finally:
                pool.shutdown(wait=False, cancel_futures=True)  # after an error, nothing more is asked

    def _rank_one(self, history: Sequence[str], candidates: Sequence[str]) -> Reply:
        requests = self._requests(history, candidates)
        path = self._cache_file(requests)
        if path and path.is_file():
            return replace(_read(path), cached=True)
        reply = self._first_readable(requests, len(candidates))
        if path:
            with atomic_write(path) as temporary:
                temporary.write_text(json.dumps(asdict(reply)), encoding="utf-8")
        return reply

    def _requests(self, history: Sequence[str], candidates: Sequence[str]) -> list[dict[str, Any]]:
        """What to ask, in turn, until an answer can be read."""
        n, requests = len(candidates), []
        offered = self.served.logprobs and n <= len(LABELS)
        if self.mode == "labels" and not offered:
            problem = (
                f"{n} candidates, there are {len(LABELS)} labels" if self.served.logprobs else "the server is too old"
            )
            raise LwaError(f"model {self.name!r}: no label-scored ranking ({problem}): choose mode written or auto")
        if offered and (self.mode == "labels" or (self.mode == "auto" and not self._thinking())):
            request = self._request(label_messages(history, candidates), label_schema(n), LABEL_TOKENS)
            requests.append(request | {"logprobs": True, "top_logprobs": TOP_LOGPROBS})
        if self.mode != "labels":
            requests.append(self._request(ranking_messages(history, candidates), ranking_schema(n), 8 * n + 64))
        return requests

    def _first_readable(self, requests: list[dict[str, Any]], n: int) -> Reply:
        """Ask for labels, if that is wanted, then for the written ranking if they can't be read; its time includes both."""
        start = time.perf_counter()
        if "logprobs" in requests[0]:
            try:
                return self.connection.retry(self.name, lambda _: self._ask_labels(requests[0], n))
            except UnreadableAnswer as error:
                if len(requests) == 1:
                    raise LwaError(
                        f"model {self.name!r}: no label-scored ranking ({error}): choose mode written"
                    ) from error
        spent = time.perf_counter() - start
        reply = self.connection.retry(self.name, lambda attempt: self._ask(requests[-1], n, attempt))
        return replace(reply, latency_s=spent + reply.latency_s, first_token_s=spent + reply.first_token_s)

    def _request(self, messages: list[dict[str, str]], schema: dict[str, Any], answer: int) -> dict[str, Any]:
        """All that the answer depends on; num_ctx is sized so that the server never cuts the prompt.

        A byte-level tokenizer makes at most one token of a byte, so bytes bound the prompt from above.
        """
        think = self._thinking()
        answer += THINKING_TOKENS if think else 0
        need = sum(len(message["content"].encode()) for message in messages) + TEMPLATE_TOKENS + answer
        limit = self.served.context_length or math.inf
        if need > limit:
            raise LwaError(
                f"model {self.name!r}: the prompt may need {need} tokens and the context holds {limit}, "
                "so the server would cut it: ask with fewer candidates or a shorter history"
            )
        context = min(limit, max(SMALLEST_CONTEXT, 2 ** math.ceil(math.log2(need))))
        options = {"seed": self.seed, "temperature": 0.0, "num_ctx": context, "num_predict": answer}
        request = {"model": self.name, "messages": messages, "format": schema, "options": options}
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

    def _ask_labels(self, request: dict[str, Any], n: int) -> Reply:
        """Ask for one label, whole: the documented place of log-probabilities. First token: by the server's nanoseconds."""
        start = time.perf_counter()
        with protocol():
            whole = self.connection.client.chat(**request, stream=False, keep_alive=self.keep_alive)
        seconds = time.perf_counter() - start
        scores, counts = read_labels(answer_tokens(whole.logprobs or (), whole.message.content or ""), n)
        first = ((whole.load_duration or 0) + (whole.prompt_eval_duration or math.nan)) / 1e9
        return Reply(scores, seconds, counts, first, *_usage(whole), mode="labels")

    def _stream(self, request: dict[str, Any]) -> Iterator[ollama.ChatResponse]:
        with protocol():
            yield from self.connection.client.chat(**request, stream=True, keep_alive=self.keep_alive)

    def _cache_file(self, requests: list[dict[str, Any]]) -> Path | None:
        if self.cache is None or self.served.digest is None:
            return None
        key = json.dumps([self.connection.url, self.served.digest, requests], sort_keys=True)
        return self.cache / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


def _reply(text: str, n: int, last: ollama.ChatResponse, latency_s: float, first_token_s: float) -> Reply:
    """Read a written ranking."""
    try:
        order, counts = parse_ranking(text, n)
    except UnreadableAnswer as error:
        raise BrokenAnswer(f"the answer is outside the schema, {error}") from error
    return Reply(order_scores(order), latency_s, counts, first_token_s, *_usage(last))


def _usage(last: ollama.ChatResponse) -> tuple[float, float, float]:
    """Tokens of the prompt and of the answer, and answer tokens per second, by the server's own nanoseconds."""
    prompt, answer = (math.nan if x is None else x for x in (last.prompt_eval_count, last.eval_count))
    return prompt, answer, answer / last.eval_duration * 1e9 if last.eval_duration else math.nan


def _read(path: Path) -> Reply:
    try:
        return Reply(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise LwaError(f"{path} is not an answer kept by this version: delete it") from error
