"""A teacher on an Ollama server: the protocol, what is sent, and which answers are kept."""

from __future__ import annotations

import json
import math
import time
from threading import Lock

import jsonschema
import numpy as np
import ollama
import pytest
from ollama_server import OllamaServer, Served
from teacher_questions import CANDIDATES, HISTORY, HOSTILE, longest_first, teacher

from lwa_helpers.errors import LwaError
from lwa_helpers.teachers.answers import (
    ranking_messages,
    ranking_schema,
)
from lwa_helpers.teachers.ollama_teacher import THINKING_TOKENS, OllamaTeacher

# Asking a server: the local one, and a real one where OLLAMA_HOST names it


def test_ranks_every_candidate_and_times_it(any_server, tmp_path):
    url, model = any_server
    answers = OllamaTeacher(model, host=url, cache=tmp_path).rank([HISTORY, []], [CANDIDATES, CANDIDATES[::-1]])
    assert [sorted(row) for row in answers.order.tolist()] == [[0, 1, 2]] * 2
    frame = answers.to_frame()
    assert set(frame["mode"]) <= {"labels", "written"}
    assert (frame.first_token_s > 0).all() and (frame.latency_s > 0).all()
    assert (frame.tokens_per_s > 0).all() and (frame.prompt_tokens > 0).all() and not frame.cached.any()


def test_absent_model_is_named_with_those_present(any_server):
    url, model = any_server
    with pytest.raises(LwaError, match=f"no model 'nobody'.*{model}.*ollama pull nobody"):
        OllamaTeacher("nobody", host=url, cache=None).rank([HISTORY], [CANDIDATES])


def test_answers_are_kept_and_not_asked_again(any_server, tmp_path):
    url, model = any_server
    first = OllamaTeacher(model, host=url, cache=tmp_path).rank([HISTORY], [CANDIDATES])
    again = OllamaTeacher(model, host=url, cache=tmp_path).rank([HISTORY], [CANDIDATES])
    assert again.to_frame().cached.all() and len(list(tmp_path.iterdir())) == 1
    np.testing.assert_array_equal(again.scores, first.scores)
    np.testing.assert_array_equal(again.latency_s, first.latency_s)


@pytest.mark.parametrize("mode", ["written", "auto"])
def test_hostile_titles_leave_every_candidate_ranked(any_server, mode):
    url, model = any_server
    answers = OllamaTeacher(model, host=url, mode=mode, cache=None, concurrency=2).rank(
        [HOSTILE] * 3, [["Up", *HOSTILE]] * 3
    )
    assert [sorted(row) for row in answers.order.tolist()] == [list(range(len(HOSTILE) + 1))] * 3


def test_the_protocol_is_the_official_clients(any_server):
    """Every call that teachers make, and its errors."""
    url, model = any_server
    client, question = ollama.Client(url), ranking_messages(HISTORY, CANDIDATES)
    assert model in [served.model for served in client.list().models]
    info = client.show(model).modelinfo
    assert info[f"{info['general.architecture']}.context_length"] > 0
    options = {"num_predict": 64, "temperature": 0}
    whole = client.chat(model, question, format=ranking_schema(3), options=options)
    assert whole.done and whole.message.role == "assistant" and whole.total_duration > 0 and whole.eval_duration > 0
    jsonschema.validate(json.loads(whole.message.content)["ranking"][0], {"type": "integer"})
    assert client.generate(model, "Say hi", stream=False, options=options).response
    loaded = client.chat(model, [])
    assert loaded.done and loaded.done_reason == "load" and not loaded.message.content
    assert client.generate(model, "").done
    assert client.chat(model, question, format="json", options=options).message.content.lstrip().startswith("{")
    for parts, text in (
        (
            client.chat(model, question, stream=True, format=ranking_schema(3), options=options),
            lambda p: p.message.content,
        ),
        (client.generate(model, "Say hi", stream=True, options=options), lambda p: p.response),
    ):
        parts = list(parts)
        assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True] and "".join(map(text, parts))
    assert model in [running.model for running in client.ps().models]
    for call, status in (
        (lambda: client.show("nobody"), 404),
        (lambda: client.chat("nobody", question), 404),
        (lambda: client.generate(model, "x", logprobs=True, top_logprobs=21), 400),
    ):
        with pytest.raises(ollama.ResponseError) as caught:
            call()
        assert caught.value.status_code == status


# What is sent: the local server only


def test_order_and_speed_are_the_servers(server):
    answers = teacher(server).rank([HISTORY], [CANDIDATES])
    assert (
        answers.order.tolist() == [[1, 0, 2]] and 0 < answers.replies[0].first_token_s <= answers.replies[0].latency_s
    )
    assert answers.replies[0].tokens_per_s == pytest.approx(50.0)  # the server says 20 ms a token
    assert answers.invalid_rate == 0


def test_version_and_presence_are_checked_before_anything_is_asked(server):
    teacher(server).rank([HISTORY] * 2, [CANDIDATES] * 2)
    assert [path for path, _ in server.requests] == ["/api/version", "/api/tags", "/api/show", "/api/chat", "/api/chat"]
    with pytest.raises(LwaError):
        teacher(server, "nobody").rank([HISTORY], [CANDIDATES])
    assert len(server.asked()) == 2


def test_request_states_schema_seed_context_and_keep_alive(server):
    teacher(server, seed=5, keep_alive="3m").rank([HISTORY], [CANDIDATES])
    (body,) = server.asked()
    assert body["format"] == ranking_schema(3) and body["stream"] is True and body["keep_alive"] == "3m"
    assert body["options"]["seed"] == 5 and body["options"]["temperature"] == 0 and body["options"]["num_ctx"] == 4096
    assert "think" not in body


@pytest.mark.parametrize(
    ("name", "setting", "sent"), [("qwen3", None, False), ("gpt-oss", None, "low"), ("gpt-oss", "high", "high")]
)
def test_thinking_is_off_or_low_and_never_the_answer(name, setting, sent):
    """The server's thinking text says {"ranking": [3, 1, 2]}."""
    with OllamaServer({f"{name}:latest": Served(longest_first, thinks=True)}) as server:
        answers = teacher(server, name, think=setting).rank([HISTORY], [CANDIDATES])
        (body,) = server.asked()
    room = body["options"]["num_predict"] - (8 * len(CANDIDATES) + 64)
    assert body["think"] == sent and (room == THINKING_TOKENS if sent else room == 0)
    assert answers.order.tolist() == [[1, 0, 2]]


def test_a_prompt_that_would_be_cut_is_refused():
    with OllamaServer({"llama3:latest": Served(longest_first, context_length=2048)}) as server:
        with pytest.raises(LwaError, match="'llama3'.*context holds 2048.*fewer candidates"):
            teacher(server).rank([HISTORY], [["A long title of a film " * 5] * 40])
        assert server.asked() == []


def test_thinking_of_qwen3_is_turned_off_where_the_server_does_not_say_that_it_thinks():
    with OllamaServer({"qwen3:latest": longest_first}) as server:
        teacher(server, "qwen3").rank([HISTORY], [CANDIDATES])
        assert server.asked()[0]["think"] is False


def test_the_first_token_is_the_first(server):
    server.fault, server.delay_s = "trickle", 0.03
    reply = teacher(server).rank([HISTORY], [CANDIDATES]).replies[0]
    assert 0.03 <= reply.first_token_s < reply.latency_s / 2


def test_a_server_on_this_machine_is_not_asked_through_a_proxy(server, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert teacher(server).rank([HISTORY], [CANDIDATES]).order.tolist() == [[1, 0, 2]]


def test_a_build_from_source_is_taken_to_be_new(server):
    server.version = "0.0.0"
    assert teacher(server).served.logprobs


def test_room_is_left_for_the_chat_template_and_the_answer():
    """A prompt is let through from the context that holds its bytes, 256 tokens of a template and the answer."""
    need = (
        sum(len(message["content"].encode()) for message in ranking_messages(HISTORY, CANDIDATES)) + 256 + (8 * 3 + 64)
    )
    for length in (need - 1, need):
        with OllamaServer({"llama3:latest": Served(longest_first, context_length=length)}) as server:
            if length < need:
                with pytest.raises(LwaError, match=f"may need {need} tokens"):
                    teacher(server).rank([HISTORY], [CANDIDATES])
            else:
                teacher(server).rank([HISTORY], [CANDIDATES])
                assert server.asked()[0]["options"]["num_ctx"] == need


def test_answers_of_a_model_without_a_digest_are_not_kept(server, tmp_path, monkeypatch):
    monkeypatch.setattr(Served, "digest", lambda self, name: None)
    for _ in range(2):
        teacher(server, cache=tmp_path).rank([HISTORY], [CANDIDATES])
    assert len(server.asked()) == 2 and not list(tmp_path.iterdir())


def test_context_grows_with_the_prompt(server):
    teacher(server).rank([HISTORY], [[f"The long title of film number {i} " * 4 for i in range(25)]])
    options = server.asked()[0]["options"]
    assert options["num_ctx"] == 8192 and options["num_predict"] < options["num_ctx"]


# What is made of the answers


def test_wrong_numbers_are_counted_by_kind():
    with OllamaServer({"llama3:latest": lambda question, schema: {"ranking": [3, 3, 9]}}) as server:
        answers = teacher(server).rank([HISTORY], [CANDIDATES])
    assert answers.order.tolist() == [[2, 0, 1]] and answers.invalid_rate == 1
    assert answers.replies[0].counts == {"repeated": 1, "invented": 1, "omitted": 2, "repaired": 0, "unreadable": 0}


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"name": "other"},
        {"think": "low"},
        {"mode": "written"},
        {"rows": CANDIDATES[::-1]},
        {"rows": CANDIDATES[:2]},
        {"history": HISTORY[::-1]},
        {"digest": "of another build"},
    ],
)
def test_the_cache_knows_apart_whatever_the_answer_depends_on(tmp_path, change, monkeypatch):
    def ask(history=HISTORY, rows=CANDIDATES, digest=None, **settings):
        if digest:
            monkeypatch.setattr(Served, "digest", lambda self, name: digest)
        return teacher(server, cache=tmp_path, **settings).rank([history], [rows]).replies[0].cached

    models = {name: Served(longest_first, thinks=True) for name in ("llama3:latest", "other:latest")}
    with OllamaServer(models, version="0.12.11") as server:
        assert [ask(), ask(), ask(**change), ask(**change)] == [False, True, False, True]


def test_a_damaged_kept_answer_is_named(server, tmp_path):
    teacher(server, cache=tmp_path).rank([HISTORY], [CANDIDATES])
    (path,) = tmp_path.iterdir()
    path.write_text("{")
    with pytest.raises(LwaError, match=path.name):
        teacher(server, cache=tmp_path).rank([HISTORY], [CANDIDATES])


def test_concurrency_is_bounded_and_keeps_the_order_of_questions(server):
    busy, seen, lock = [], [], Lock()

    def answer(messages, schema):
        with lock:
            busy.append(1)
            seen.append(len(busy))
        time.sleep(0.03)
        with lock:
            busy.pop()
        return longest_first(messages, schema)

    server.models["llama3:latest"].answer = answer
    rows = [CANDIDATES, CANDIDATES[::-1]] * 4
    answers = teacher(server, concurrency=3).rank([HISTORY] * 8, rows)
    assert answers.order.tolist() == [[1, 0, 2], [1, 2, 0]] * 4
    assert 1 < max(seen) <= 3


def test_memory_is_the_servers_own_account(server):
    server.models["other:latest"] = Served(longest_first)
    teacher(server, "other").rank([HISTORY], [CANDIDATES])
    asking = teacher(server)
    assert math.isnan(asking.memory_bytes())
    asking.rank([HISTORY], [CANDIDATES])
    assert asking.memory_bytes() == 5137025024


@pytest.mark.parametrize(
    ("histories", "candidates"), [([], []), ([HISTORY], []), ([HISTORY] * 2, [["a"], ["a", "b"]]), ([[]], [[]])]
)
def test_uneven_questions_are_refused(server, histories, candidates):
    with pytest.raises(ValueError):
        teacher(server).rank(histories, candidates)


# The local server itself, read by the official client


def test_server_thinks_and_gives_logprobs():
    with OllamaServer({"qwen3:latest": Served(longest_first, thinks=True)}, version="0.12.11") as server:
        client = ollama.Client(server.url)
        question = ranking_messages(HISTORY, CANDIDATES)
        whole = client.chat("qwen3", question, format=ranking_schema(3), think=True, logprobs=True, top_logprobs=2)
        assert json.loads(whole.message.content) == {"ranking": [2, 1, 3]} and whole.message.role == "assistant"
        assert whole.done and whole.done_reason == "stop" and whole.total_duration > whole.load_duration > 0
        spelled = "".join(token.token for token in whole.logprobs)
        assert whole.message.thinking and spelled == whole.message.thinking + whole.message.content
        parts = list(client.generate("qwen3", question[1]["content"], stream=True, logprobs=True, top_logprobs=1))
        assert "".join(part.response for part in parts) == whole.message.content
        assert parts[0].logprobs[0].top_logprobs[0].logprob == 0
