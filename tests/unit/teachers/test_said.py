"""Answers of a server that hold no ranking: why, and what to do where the tokens ran out."""

from __future__ import annotations

import json

import pytest
from ollama_server import OllamaServer, Served
from teacher_questions import CANDIDATES, HISTORY, longest_first, teacher

from lwa_helpers.errors import LwaError
from lwa_helpers.models import registry as models
from lwa_helpers.recommender import BaseRecommender
from lwa_helpers.teachers.answers import ranking_schema

END = {"message": {"role": "assistant", "content": ""}, "done": True}
CALL = [{"function": {"name": "search", "arguments": {"for": "Up"}}}]


def said(*parts, reason="stop", **last):
    """The lines that a server streams."""
    messages = [{"message": {"role": "assistant", "content": ""} | part, "done": False} for part in parts]
    lines = [*messages, END | {"done_reason": reason} | last]
    return 200, "".join(json.dumps({"model": "llama3"} | line) + "\n" for line in lines)


def failure(server, answer, **settings):
    """The message of the error where the server answers so."""
    server.instead["/api/chat"] = answer
    with pytest.raises(LwaError, match="'llama3'") as caught:
        teacher(server, mode="written", retries=0, **settings).rank([HISTORY], [CANDIDATES])
    return str(caught.value)


@pytest.mark.parametrize(
    "parts", [({"thinking": "long " * 50},), ({"content": "<think>1 or "}, {"content": "2?"}), ({},)]
)
def test_tokens_spent_on_thinking_are_said_with_the_remedy(server, parts):
    message = failure(server, said(*parts, reason="length"))
    assert "all 88 tokens of num_predict were spent on thinking" in message
    assert "`think: low`" in message and "larger `num_predict`" in message and "fewer candidates" in message


def test_a_cut_answer_is_said_with_the_remedy(server):
    message = failure(server, said({"content": '{"ranking": [2, '}, reason="length"))
    assert "spent on the answer, which was cut" in message and "think" not in message
    assert "larger `num_predict`" in message and "fewer candidates" in message


@pytest.mark.parametrize(
    ("parts", "cause"),
    [
        ([{"thinking": '{"ranking": [2, 1, 3]}'}], "only thought.*`think: low`"),
        ([{"content": '<think>{"ranking": [2, 1, 3]}</think>'}], "only thought"),
        ([{"tool_calls": CALL}], "called a tool"),
        ([], r"empty \(done_reason stop\)"),
        ([{"content": " \n"}], r"empty \(done_reason stop\)"),
        ([{"content": "I cannot help with that."}], "outside the schema.*I cannot help"),
    ],
)
def test_an_answer_without_a_ranking_says_what_there_was_instead(server, parts, cause):
    server.instead["/api/chat"] = said(*parts)
    with pytest.raises(LwaError, match=f"(?s)'llama3'.*{cause}"):
        teacher(server, mode="written", retries=0).rank([HISTORY], [CANDIDATES])


@pytest.mark.parametrize(
    "tail",
    [
        '{"error": "out of memory"}\n',
        '{"error": {"message": "out of memory"}}\n',
        "not JSON\n",
        "\n\n",
        "null\n",
        '{"message": null, "done": true}\n',
        '{"message": {"role": "assistant", "content": ""}, "done": true, "eval_count": "many"}\n',
        "",
    ],
)
def test_a_stream_that_breaks_amid_the_answer_is_asked_for_again_and_is_one_error_in_the_end(server, tail):
    start = json.dumps({"message": {"role": "assistant", "content": '{"rank'}, "done": False}) + "\n"
    server.instead["/api/chat"] = (200, start + tail)
    with pytest.raises(LwaError, match=r"'llama3'.*\(2 attempts\)"):
        teacher(server, mode="written", retries=1).rank([HISTORY], [CANDIDATES])
    assert len(server.asked()) == 2


@pytest.mark.parametrize(
    "last", [{}, {"eval_count": None}, {"eval_count": 0, "eval_duration": 0}, {"done_reason": None}]
)
def test_an_answer_without_counts_or_a_reason_is_read(server, last):
    server.instead["/api/chat"] = said({"content": '{"ranking": [2, 1, 3]}'}, **last)
    answers = teacher(server, mode="written").rank([HISTORY], [CANDIDATES])
    assert answers.order.tolist() == [[1, 0, 2]] and answers.to_frame().tokens_per_s.isna().all()


def test_a_finished_ranking_is_read_though_the_tokens_ran_out(server):
    server.instead["/api/chat"] = said({"content": '{"ranking": [2, 1, 3]}'}, reason="length")
    assert teacher(server, mode="written").rank([HISTORY], [CANDIDATES]).order.tolist() == [[1, 0, 2]]


# Settings


def test_a_larger_num_predict_is_the_remedy():
    """The model thinks in its answer, in some two hundred tokens."""

    def thinks_aloud(messages, schema):
        return "<think>" + "hm " * 200 + "</think>" + json.dumps(longest_first(messages, schema))

    with OllamaServer({"m:latest": Served(thinks_aloud)}) as server:
        with pytest.raises(LwaError, match="all 88 tokens of num_predict were spent on thinking"):
            teacher(server, "m").rank([HISTORY], [CANDIDATES])
        answers = teacher(server, "m", num_predict=500).rank([HISTORY], [CANDIDATES])
        assert server.asked()[-1]["options"]["num_predict"] == 500 and server.asked()[-1]["format"] == ranking_schema(3)
    assert answers.order.tolist() == [[1, 0, 2]] and answers.replies[0].counts["repaired"] == 1


def test_num_predict_of_an_entry_is_sent(server, monkeypatch):
    entry = {"backend": "ollama", "id": "llama3", "num_predict": 700}
    monkeypatch.setattr(models, "read_yaml", lambda name: {"mine": entry})
    recommender = BaseRecommender("mine", host=server.url, cache=None)
    recommender.recommend("1", "MovieLens", 2)
    assert server.asked()[0]["options"]["num_predict"] == 700


@pytest.mark.parametrize(
    ("field", "value"), [("num_predict", 0), ("num_predict", "many"), ("id", "../../etc"), ("id", "a b"), ("id", "")]
)
def test_an_entry_that_cannot_be_is_refused(monkeypatch, field, value):
    entry = {"backend": "ollama", "id": "llama3"} | {field: value}
    monkeypatch.setattr(models, "read_yaml", lambda name: {"mine": entry})
    with pytest.raises(LwaError, match=rf"'mine'.*{field}"):
        models.registry()


# Labels


def test_labels_that_came_too_late_name_the_remedy(server):
    server.version = "0.12.11"
    server.models["llama3:latest"].answer = lambda messages, schema: "<think>" + "hm " * 100
    with pytest.raises(LwaError, match="'llama3'.*all 32 tokens of num_predict were spent on thinking"):
        teacher(server, mode="labels").rank([HISTORY], [CANDIDATES])
