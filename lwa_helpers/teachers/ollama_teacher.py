"""A teacher behind Ollama's HTTP API that gives structured answers or scored labels; every answer is kept on disk."""

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
from lwa_helpers.paths import cache_folder
from lwa_helpers.teachers.answers import (
    KINDS,
    Reply,
    TeacherAnswers,
    check_question,
    order_scores,
    parse_ranking,
    ranking_messages,
    ranking_schema,
)
from lwa_helpers.teachers.connection import BrokenAnswer, Connection, ServedModel, protocol
from lwa_helpers.teachers.labels import LABELS, TOP_LOGPROBS, answer_tokens, label_messages, label_schema, read_labels
from lwa_helpers.teachers.repair import UnreadableAnswer
from lwa_helpers.teachers.said import Said

KEPT_ANSWERS = cache_folder("teachers")
TEMPLATE_TOKENS = 256
THINKING_TOKENS = 2048
SMALLEST_CONTEXT = 4096
LABEL_TOKENS = 32
Question = tuple[Sequence[str], Sequence[str]]  # the titles of a history, and of the candidates


class OllamaTeacher:
    """Rank candidates with a model served by Ollama.

    Requests go to /api/chat, where `format` is a JSON schema of labels or candidate numbers. The mode says which of
    them the model is asked for, and each reply's `mode` says which it gave:

    * "written": the model writes the numbers of the candidates, best first.
    * "labels": the model names the label of the best candidate, and a candidate's score is the log-probability of its
      label. If the server reports no log-probabilities or there are more than 20 candidates, it is an LwaError.
    * "auto": labels if the server can score them, reports at least half of them, and the model does not think first;
      otherwise written.

    The temperature is 0. A written answer in another form than the schema's is read where it is unambiguous (see
    repair.find_ranking); one that cannot be read is asked for again with temperature 0.3 and another seed. The text of
    the model's thinking is never read as an answer.

    Args:
        name: the model's name on the server.
        host: Ollama server; None is OLLAMA_HOST if it is set, else this machine.
        mode: "auto", "labels" or "written".
        think: whether or how much the model thinks first. None turns thinking off, or to "low" for gpt-oss, which
            cannot turn it off.
        num_predict: the most tokens of an answer, with the thinking before it. None allows what the longest answer
            needs, and 2048 more if the model thinks.
        seed: seed of the sampling.
        timeout_s: see Connection.
        retries: see Connection.
        backoff_s: see Connection.
        keep_alive: how long the server keeps the model loaded after an answer, e.g. "10m".
        concurrency: how many questions are asked at a time.
        cache: folder that keeps the answers, by server, digest, prompt and options; None keeps none. The server is part
            of the key because the times in an answer are those of the server. Server and model must be reachable even
            if all answers are kept already.
    """

    def __init__(
        self,
        name: str,
        host: str | None = None,
        *,
        mode: Literal["auto", "labels", "written"] = "auto",
        think: bool | Literal["low", "medium", "high"] | None = None,
        num_predict: int | None = None,
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
        self.num_predict, self.keep_alive, self.concurrency, self.cache = num_predict, keep_alive, concurrency, cache
        self.connection = Connection(host, timeout_s, retries, backoff_s)

    @cached_property
    def served(self) -> ServedModel:
        """What the server says about the model. If either is not there, it is an LwaError."""
        return self.connection.find(self.name)

    def memory_bytes(self) -> float:
        """Return the bytes of memory that the model takes, as its server reports; nan if it is not loaded."""
        return self.connection.loaded_bytes(self.name)

    def rank(
        self, histories: Sequence[Sequence[str]], candidates: Sequence[Sequence[str]], progress: bool = False
    ) -> TeacherAnswers:
        """Return the answers to B questions of C candidates each.

        An LwaError names the model and the server if either is not there, a prompt would be cut, or an answer stays
        unreadable.

        Args:
            histories: titles of B users' histories, oldest first.
            candidates: titles to rank, (B, C).
            progress: whether to show a progress bar.
        """
        check_question(histories, candidates)
        _ = self.served
        with ThreadPoolExecutor(self.concurrency) as pool:
            answered = pool.map(self._rank_one, histories, candidates)
            bar = tqdm(answered, f"ask {self.name}", len(histories), unit="question", disable=not progress)
            try:
                return TeacherAnswers(self.name, list(bar))
            finally:
                pool.shutdown(wait=False, cancel_futures=True)  # ask nothing more after an error

    def _rank_one(self, history: Sequence[str], candidates: Sequence[str]) -> Reply:
        requests = self._requests(history, candidates)
        path = self._cache_file(requests)
        if path and path.is_file():
            return replace(_read(path), cached=True)
        reply = self._first_readable(requests, (history, candidates))
        if path:
            with atomic_write(path) as temporary:
                temporary.write_text(json.dumps(asdict(reply)), encoding="utf-8")
        return reply

    def _requests(self, history: Sequence[str], candidates: Sequence[str]) -> list[dict[str, Any]]:
        """Return the requests to send in turn until an answer can be read.

        Raises:
            LwaError: if labels are asked for and cannot be scored.
        """
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

    def _first_readable(self, requests: list[dict[str, Any]], question: Question) -> Reply:
        """Return the answer to the first request whose answer can be read.

        A request for labels comes first, if there is one. A request for the written ranking follows if the labels
        cannot be read. Its times then include the first request.

        Raises:
            LwaError: if the labels cannot be read and there is no second request.
        """
        start = time.perf_counter()
        if "logprobs" in requests[0]:
            try:
                return self.connection.retry(self.name, lambda _: self._ask_labels(requests[0], question))
            except UnreadableAnswer as error:
                if len(requests) == 1:
                    raise LwaError(
                        f"model {self.name!r}: no label-scored ranking ({error}): choose mode written"
                    ) from error
        spent = time.perf_counter() - start
        reply = self.connection.retry(self.name, lambda attempt: self._ask(requests[-1], question, attempt))
        return replace(reply, latency_s=spent + reply.latency_s, first_token_s=spent + reply.first_token_s)

    def _request(self, messages: list[dict[str, str]], schema: dict[str, Any], answer: int) -> dict[str, Any]:
        """Return a request: everything that the answer depends on.

        num_ctx is large enough that the server never cuts the prompt. A byte-level tokenizer makes at most one token of
        each byte, so the number of bytes is an upper bound on the tokens of the prompt.

        Args:
            messages: the chat.
            schema: JSON schema of the answer.
            answer: the most tokens in the answer, without thinking.

        Raises:
            LwaError: if the model's context may be too short.
        """
        think = self._thinking()
        answer = self.num_predict or answer + (THINKING_TOKENS if think else 0)
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
        """Return the value to send as `think`, None for none: the one given, else the least the model supports."""
        if self.think is not None:
            return self.think
        if "gpt-oss" in self.name:
            return "low"
        return False if self.served.thinks or "qwen3" in self.name else None

    def _ask(self, request: dict[str, Any], question: Question, attempt: int) -> Reply:
        """Stream one written answer, time it and parse it.

        Args:
            request: what to send.
            question: the titles of the question.
            attempt: 0, or the number of the retry, which changes seed and temperature.

        Returns:
            The answer.

        Raises:
            httpx.ReadTimeout: if the whole answer takes longer than timeout_s.
            BrokenAnswer: if the stream ends before the answer does, or the answer cannot be read.
        """
        if attempt:
            request = request | {"options": request["options"] | {"seed": self.seed + attempt, "temperature": 0.3}}
        start, first, said = time.perf_counter(), math.nan, Said()
        for part in self._stream(request):
            now = time.perf_counter() - start
            if now > self.connection.timeout_s:
                raise httpx.ReadTimeout("the answer trickles")
            if math.isnan(first) and (part.message.content or part.message.thinking):
                first = now
            said.add(part.message)
            if part.done:
                try:
                    order, counts = parse_ranking(said.content, len(question[1]), question[1], question[0])
                except UnreadableAnswer as error:
                    why = said.unreadable(error, part.done_reason, request["options"]["num_predict"])
                    raise BrokenAnswer(why) from error
                return Reply(order_scores(order), now, counts, first, *_usage(part))
        raise BrokenAnswer("the answer broke off")

    def _ask_labels(self, request: dict[str, Any], question: Question) -> Reply:
        """Ask for one label and read the scores of all labels.

        The request does not stream, because that is the documented way to get log-probabilities. The time to the first
        token is a sum of durations that the server reports in nanoseconds.

        Args:
            request: what to send.
            question: the titles of the question.

        Returns:
            The answer.

        Raises:
            UnreadableAnswer: if the labels cannot be scored.
        """
        start, said = time.perf_counter(), Said()
        with protocol():
            whole = self.connection.client.chat(**request, stream=False, keep_alive=self.keep_alive)
        seconds = time.perf_counter() - start
        said.add(whole.message)
        tokens, (history, candidates) = answer_tokens(whole.logprobs or (), said.content), question
        try:
            scores, counts = read_labels(tokens, len(candidates), [*history, *candidates])
        except UnreadableAnswer as error:
            if whole.done_reason == "length":
                why = said.unreadable(error, whole.done_reason, request["options"]["num_predict"])
                raise UnreadableAnswer(why) from error
            raise
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


def _usage(last: ollama.ChatResponse) -> tuple[float, float, float]:
    """Return the tokens of the prompt, the tokens of the answer, and the answer tokens per second.

    All are as the server reports them; the server measures in nanoseconds.
    """
    prompt, answer = (math.nan if x is None else x for x in (last.prompt_eval_count, last.eval_count))
    return prompt, answer, answer / last.eval_duration * 1e9 if last.eval_duration else math.nan


def _read(path: Path) -> Reply:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return Reply(**kept | {"counts": dict.fromkeys(KINDS, 0) | kept["counts"]})  # older ones lack a kind
    except (ValueError, TypeError, KeyError) as error:
        raise LwaError(f"{path} is not an answer kept by this version: delete it") from error
