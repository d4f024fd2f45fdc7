"""A local HTTP server that speaks Ollama's documented API, with faults to be switched on; the tests supply the ranker.

    with OllamaServer({"llama3:latest": by_score(lambda history, title: len(title))}) as server:
        OllamaTeacher("llama3", host=server.url).rank(...)

A model's answer is one of the functions of ollama_answers.py, or a test's own; an object is sent as JSON in tokens of a
few characters. Streamed or not; durations are in nanoseconds.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, Self
from urllib.parse import urlsplit

from jsonschema import Draft202012Validator, SchemaError
from ollama_answers import Answer, Messages, Token, by_score, written_by

__all__ = ["FAULTS", "OllamaServer", "Served", "by_score", "written_by"]

THOUGHT = [
    Token('maybe {"ranking": [3, 1, 2]}? {"best": "'),
    Token("C", -0.1, (("C", -0.1), ("B", -3.0), ("A", -4.0))),
    Token('"}!'),
]

FAULTS = (
    "slow",
    "trickle",
    "drop",
    "cut",
    "stream_error",
    "invalid_json",
    "not_an_object",
    "error_500",
    "error_400",
    "prose",
    "wrong_schema",
    "vanish",
    "no_logprobs",
)


@dataclass
class Served:
    """A model on the server."""

    answer: Answer
    thinks: bool = False
    context_length: int = 8192
    architecture: str = "llama"

    def digest(self, name: str) -> str:
        return hashlib.sha256(name.encode()).hexdigest()


class _Listener(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gave up waiting is what the slow faults are for; anything else is printed."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class OllamaServer:
    """Serve `models` (name with tag -> Served or its answer function) on a free port of this machine.

    fault: one of FAULTS, hits the next `faults` calls of generate or chat. requests: (path, body) of every call.
    keys: the Authorization of every call; any but `Bearer <key>` is refused where `key` is set. prefix: what stands
    before /api. instead: path -> (status, text) that is answered there. It is its own proxy: a request for another host
    is answered too.
    """

    def __init__(self, models: dict[str, Served | Answer], version: str = "0.12.6") -> None:
        self.models = {name: m if isinstance(m, Served) else Served(m) for name, m in models.items()}
        self.version, self.fault, self.faults, self.delay_s = version, None, 10**9, 1.0
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.keys: list[str | None] = []
        self.key, self.prefix, self.instead = None, "", {}
        self.loaded: set[str] = set()
        self._http = _Listener(("127.0.0.1", 0), type("Handler", (_Handler,), {"ollama": self}))
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> Self:
        self._thread = Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def asked(self, path: str = "/api/chat") -> list[dict[str, Any]]:
        """Bodies of the calls of one path, in order."""
        return [body for where, body in self.requests if where == path]

    def next_fault(self) -> str | None:
        """The fault of the call at hand, counted down."""
        if self.fault is None or self.faults <= 0:
            return None
        self.faults -= 1
        return self.fault

    @property
    def gives_logprobs(self) -> bool:
        """Ollama has them from 0.12.11 on."""
        return tuple(map(int, self.version.split("."))) >= (0, 12, 11)

    def find(self, name: str) -> tuple[str, Served] | None:
        full = name if ":" in name.rsplit("/")[-1] else f"{name}:latest"
        return (full, self.models[full]) if full in self.models else None


class _HttpError(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    ollama: OllamaServer

    def log_message(self, *_: object) -> None:
        """Tests read `requests` instead."""

    def do_GET(self) -> None:
        self._route({"/api/version": self._version, "/api/tags": self._tags, "/api/ps": self._ps}, {})

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            body = json.loads(raw)
        except json.JSONDecodeError as error:
            return self._json({"error": str(error)}, 400)
        self._route({"/api/show": self._show, "/api/generate": self._generate, "/api/chat": self._chat}, body)

    def _route(self, routes: dict[str, Callable[[dict[str, Any]], None]], body: dict[str, Any]) -> None:
        path, key = urlsplit(self.path).path, self.headers.get("Authorization")
        self.ollama.requests.append((path, body))
        self.ollama.keys.append(key)
        if self.ollama.key and key != f"Bearer {self.ollama.key}":
            return self._json({"error": f"unauthorized: {key}"}, 401)
        if path in self.ollama.instead:
            status, text = self.ollama.instead[path]
            return self._bytes(text.encode(), status)
        route = path.removeprefix(self.ollama.prefix)
        if route not in routes or not path.startswith(self.ollama.prefix):
            return self._bytes(b"404 page not found", 404)
        try:
            routes[route](body)
        except _HttpError as error:
            self._json({"error": str(error)}, error.status)

    def _json(self, body: Any, status: int = 200) -> None:
        self._bytes(json.dumps(body).encode(), status)

    def _bytes(self, data: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _version(self, _: dict[str, Any]) -> None:
        self._json({"version": self.ollama.version})

    def _tags(self, _: dict[str, Any]) -> None:
        self._json({"models": [self._tag(name, model) for name, model in self.ollama.models.items()]})

    def _tag(self, name: str, model: Served) -> dict[str, Any]:
        return {
            "name": name,
            "model": name,
            "modified_at": "2025-10-01T12:00:00.123456789Z",
            "size": 4661224676,
            "digest": model.digest(name),
            "details": self._details(model),
        }

    def _ps(self, _: dict[str, Any]) -> None:
        models = [(name, self.ollama.models[name]) for name in sorted(self.ollama.loaded & self.ollama.models.keys())]
        self._json(
            {
                "models": [
                    {
                        "name": name,
                        "model": name,
                        "size": 5137025024,
                        "size_vram": 0,
                        "digest": model.digest(name),
                        "details": self._details(model),
                        "expires_at": "2025-10-01T12:10:00.123456789Z",
                        "context_length": 4096,
                    }
                    for name, model in models
                ]
            }
        )

    def _details(self, model: Served) -> dict[str, Any]:
        return {
            "parent_model": "",
            "format": "gguf",
            "family": model.architecture,
            "families": [model.architecture],
            "parameter_size": "8.0B",
            "quantization_level": "Q4_0",
        }

    def _show(self, body: dict[str, Any]) -> None:
        _, model = self._model(body)
        info = {
            "general.architecture": model.architecture,
            f"{model.architecture}.context_length": model.context_length,
        }
        self._json(
            {
                "modelfile": "",
                "parameters": "",
                "template": "{{ .Prompt }}",
                "details": self._details(model),
                "model_info": info,
                "capabilities": ["completion"] + ["thinking"] * model.thinks,
                "modified_at": "2025-10-01T12:00:00.123456789Z",
            }
        )

    def _model(self, body: dict[str, Any]) -> tuple[str, Served]:
        if not body.get("model"):
            raise _HttpError(400, "model is required")
        found = self.ollama.find(body["model"])
        if found is None:
            raise _HttpError(404, f"model '{body['model']}' not found")
        return found

    def _generate(self, body: dict[str, Any]) -> None:
        messages = [{"role": "user", "content": body.get("prompt", "")}]
        self._complete(body, messages, lambda text: {"response": text}, lambda text: {"response": "", "thinking": text})

    def _chat(self, body: dict[str, Any]) -> None:
        messages = body.get("messages") or [{"content": ""}]

        def say(text: str) -> dict[str, Any]:
            return {"message": {"role": "assistant", "content": text}}

        def think(text: str) -> dict[str, Any]:
            return {"message": {"role": "assistant", "content": "", "thinking": text}}

        self._complete(body, messages, say, think)

    def _complete(self, body: dict[str, Any], messages: Messages, say: Callable, think: Callable) -> None:
        fault = self.ollama.next_fault()
        if fault == "vanish":
            self.ollama.models.pop(self._model(body)[0])
        name, model = self._model(body)
        self._check(body, model)
        self.ollama.loaded.add(name)
        if not any(message.get("content") for message in messages):  # documented: this loads the model, or unloads it
            if body.get("keep_alive") == 0:
                self.ollama.loaded.discard(name)
            return self._json(
                self._part(body, say(""), True, done_reason="unload" if body.get("keep_alive") == 0 else "load")
            )
        if fault in ("error_500", "error_400"):
            raise _HttpError(int(fault[-3:]), "the model failed to generate a response")
        if fault == "slow":
            time.sleep(self.ollama.delay_s)
        tokens = self._tokens(model, messages, body, fault)
        thought = THOUGHT if body.get("think") else []
        parts = [self._part(body, think(token.text), **self._logprobs(body, [token], fault)) for token in thought]
        parts += [self._part(body, say(token.text), **self._logprobs(body, [token], fault)) for token in tokens]
        last = self._part(body, say(""), done=True, **self._usage(body, messages, tokens))
        if body.get("stream", True):
            self._stream([*parts, last], fault)
        elif fault in ("invalid_json", "drop"):
            self._bytes(b'{"model": "x", "mess')
        else:
            said, thoughts = ("".join(token.text for token in some) for some in (tokens, thought))
            whole = think(thoughts) if thought else {}
            for key, value in say(said).items():
                whole[key] = whole.get(key, {}) | value if isinstance(value, dict) else value
            self._json(last | whole | self._logprobs(body, [*thought, *tokens], fault))

    def _check(self, body: dict[str, Any], model: Served) -> None:
        if not 0 <= body.get("top_logprobs", 0) <= 20:
            raise _HttpError(400, "top_logprobs must be between 0 and 20")
        if body.get("think") and not model.thinks:
            raise _HttpError(400, f'"{body["model"]}" does not support thinking')
        try:
            Draft202012Validator.check_schema(self._schema(body))
        except SchemaError as error:
            raise _HttpError(400, f"invalid JSON schema in format: {error.message}") from error

    def _schema(self, body: dict[str, Any]) -> dict[str, Any]:
        """What `format` demands: a schema, "json" for any object, or nothing."""
        return {"type": "object"} if body.get("format") == "json" else body.get("format") or {}

    def _tokens(self, model: Served, messages: Messages, body: dict[str, Any], fault: str | None) -> list[Token]:
        if fault == "prose":
            answer = "Sure! I would rank them 2, 1, 3."
        elif fault == "wrong_schema":
            answer = {"answer": "the second"}
        else:
            answer = model.answer(messages, self._schema(body))
        if not isinstance(answer, list):
            text = answer if isinstance(answer, str) else json.dumps(answer)
            answer = [Token(piece, 0.0, ((piece, 0.0),)) for piece in re.findall(r"\s*\S{1,3}", text)]
        limit = body.get("options", {}).get("num_predict", -1)
        return answer[: limit if limit >= 0 else None]

    def _part(self, body: dict[str, Any], content: dict[str, Any], done: bool = False, **more: Any) -> dict[str, Any]:
        return {"model": body["model"], "created_at": "2025-10-17T23:14:07.414671Z", **content, "done": done, **more}

    def _logprobs(self, body: dict[str, Any], tokens: list[Token], fault: str | None) -> dict[str, Any]:
        if not body.get("logprobs") or not self.ollama.gives_logprobs or fault == "no_logprobs":
            return {}

        def entry(text: str, log_p: float) -> dict[str, Any]:
            return {"token": text, "logprob": log_p, "bytes": list(text.encode())}

        n = body.get("top_logprobs", 0)
        return {
            "logprobs": [
                entry(token.text, token.log_p)
                | ({"top_logprobs": [entry(*other) for other in token.top[:n]]} if n else {})
                for token in tokens
            ]
        }

    def _usage(self, body: dict[str, Any], messages: Messages, tokens: list[Token]) -> dict[str, Any]:
        return {
            "done_reason": "length" if len(tokens) == body.get("options", {}).get("num_predict") else "stop",
            "total_duration": 174_560_334,
            "load_duration": 1_397_084,
            "prompt_eval_count": sum(len(m["content"].split()) for m in messages),
            "prompt_eval_duration": 13_074_791,
            "eval_count": len(tokens),
            "eval_duration": 20_000_000 * len(tokens),
        }

    def _stream(self, parts: list[dict[str, Any]], fault: str | None) -> None:
        """NDJSON in chunked transfer; a fault strikes half-way."""
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for line in self._lines(parts, fault):
            if fault == "trickle":
                time.sleep(self.ollama.delay_s)
            self.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")
            self.wfile.flush()
        if fault == "drop":
            self.close_connection = True
        else:
            self.wfile.write(b"0\r\n\r\n")

    def _lines(self, parts: list[dict[str, Any]], fault: str | None) -> Iterator[bytes]:
        half = (
            parts[: len(parts) // 2]
            if fault in ("drop", "cut", "stream_error", "invalid_json", "not_an_object")
            else parts
        )
        yield from (json.dumps(part).encode() + b"\n" for part in half)
        broken = {
            "stream_error": b'{"error": "an error was encountered while running the model"}\n',
            "invalid_json": b'{"model": "x", "mess\n',
            "not_an_object": b"[1, 2]\n",
        }
        if fault in broken:
            yield broken[fault]
