"""Label-scored ranking: reading log-probabilities of labels, when it is used, and what takes its place otherwise."""

from __future__ import annotations

import json
import math
import time
from types import SimpleNamespace

import numpy as np
import ollama
import pytest
from ollama_server import OllamaServer, Served, written_by
from scipy.special import log_softmax
from teacher_questions import CANDIDATES, HISTORY, longest_first, teacher

from lwa_helpers.errors import LwaError
from lwa_helpers.teachers.answers import UnreadableAnswer
from lwa_helpers.teachers.labels import LABELS, label_messages, label_schema, read_labels


def tokens(*pieces):
    """Tokens as the client gives them: a text, or a text with its alternatives."""
    made = []
    for piece in pieces:
        text, top = (piece, {piece: 0.0}) if isinstance(piece, str) else piece
        others = [SimpleNamespace(token=other, logprob=log_p) for other, log_p in top.items()]
        made.append(SimpleNamespace(token=text, logprob=top[text], top_logprobs=others))
    return made


@pytest.fixture
def server():
    with OllamaServer({"llama3:latest": longest_first}, version="0.12.11") as running:
        yield running


# Reading


def test_each_label_scores_its_log_probability():
    top = {"B": -0.2, "A": -2.0, "C": -3.0, 'C"': -3.0, "The": -4.0, "D": -5.0}
    scores, counts = read_labels(tokens('{"', "best", '":', ' "', ("B", top), '"}'), 3)
    assert scores == pytest.approx([-2.0, -0.2, -3 + math.log(2)]) and not any(counts.values())


def test_a_label_in_one_token_with_its_quote():
    top = {' "B': -0.2, ' "A': -1.0, "C": -2.0, ' "C"}': -4.0, " ": -6.0}
    scores, _ = read_labels(tokens('{"best":', (' "B', top), '"}'), 3)
    assert scores == pytest.approx([-1.0, -0.2, -4.0])


def test_labels_that_were_not_reported_share_a_place_below_those_that_were():
    scores, counts = read_labels(tokens('{"best": "', ("B", {"B": -0.2, "D": -1.0, "x": -3.0}), '"}'), 4)
    assert scores[1] == -0.2 and scores[3] == -1.0 and scores[0] == scores[2] < -3.0
    assert counts["omitted"] == 2


def test_the_last_label_of_the_text_is_the_answer():
    thinking = tokens('Maybe {"best": "', ("A", {"A": -0.1, "B": -9.0}), '"}? No: {"best": "')
    assert read_labels([*thinking, *tokens(("B", {"B": -0.3, "A": -1.5}))], 2)[0] == [-1.5, -0.3]


@pytest.mark.parametrize(
    "answer",
    [
        [],
        tokens("I would say B"),
        tokens('{"best": "'),
        tokens('{"best": "', ("B", {"B": 0.0})),
        [SimpleNamespace(token='{"best": "B"}', logprob=0.0, top_logprobs=None)],
    ],
)
def test_an_answer_without_labels_or_with_few_is_unreadable(answer):
    with pytest.raises(UnreadableAnswer):
        read_labels(answer, 4)


def test_the_question_names_candidates_by_label():
    _, user = label_messages(["A\nB"], [f"title {i}" for i in range(20)])
    asked = json.loads(user["content"])
    assert asked["history"] == ["A B"] and asked["candidates"][19] == {"label": "T", "title": "title 19"}
    assert label_schema(3)["properties"]["best"]["enum"] == ["A", "B", "C"]


# Asking


def test_labels_are_used_where_they_are_offered(server):
    """Oracle: the server's p(label) is the softmax of the titles' lengths."""
    answers = teacher(server, keep_alive="3m").rank([HISTORY], [CANDIDATES])
    np.testing.assert_allclose(answers.scores[0], log_softmax([len(title) for title in CANDIDATES]), atol=1e-9)
    (body,) = server.asked()
    assert (
        body["keep_alive"] == "3m"
        and body["logprobs"] is True
        and body["top_logprobs"] == 20
        and body["stream"] is False
    )
    assert body["format"] == label_schema(3) and body["options"]["temperature"] == 0
    (row,) = answers.to_frame().to_dict("records")
    assert row["mode"] == "labels" and answers.invalid_rate == 0 and row["latency_s"] > 0
    assert row["first_token_s"] == pytest.approx((1_397_084 + 13_074_791) / 1e9)  # loading and reading the prompt
    assert row["tokens_per_s"] == pytest.approx(50.0)


@pytest.mark.parametrize(
    "reason", ["old server", "many candidates", "no logprobs", "thinking", "few labels", "asked to write"]
)
def test_the_written_ranking_takes_its_place_and_says_so(server, reason):
    rows, settings, questions = CANDIDATES, {}, 1
    if reason == "old server":
        server.version = "0.12.10"
    elif reason == "many candidates":
        rows = [f"film {i}" for i in range(len(LABELS) + 1)]
    elif reason == "no logprobs":
        server.fault, questions = "no_logprobs", 2
    elif reason == "thinking":
        server.models["llama3:latest"].thinks, settings = True, {"think": "low"}
    elif reason == "few labels":  # the server is certain, and names the one label only

        def certain(messages, schema):
            return {"best": "A"} if "best" in schema["properties"] else {"ranking": [1, 3, 2]}

        server.models["llama3:latest"].answer, questions = certain, 2
    else:
        settings = {"mode": "written"}
    answers = teacher(server, **settings).rank([HISTORY], [rows])
    assert answers.to_frame()["mode"].tolist() == ["written"] and len(server.asked()) == questions
    assert sorted(answers.order[0]) == list(range(len(rows)))


def test_thinking_is_never_the_answer(server):
    """The server's thinking names C."""
    server.models["llama3:latest"].thinks = True
    answers = teacher(server, mode="labels", think="low").rank([HISTORY], [CANDIDATES])
    np.testing.assert_allclose(answers.scores[0], log_softmax([len(title) for title in CANDIDATES]), atol=1e-9)
    server.models["llama3:latest"].answer = lambda messages, schema: ""  # all tokens went into thinking
    with pytest.raises(LwaError, match="'llama3'.*no label-scored ranking"):
        teacher(server, mode="labels", think="low").rank([HISTORY], [CANDIDATES])


def test_a_written_answer_that_was_kept_is_no_label_scored_one(server, tmp_path):
    server.fault = "no_logprobs"
    assert teacher(server, cache=tmp_path).rank([HISTORY], [CANDIDATES]).replies[0].mode == "written"
    with pytest.raises(LwaError, match="'llama3'.*no label-scored ranking"):
        teacher(server, mode="labels", cache=tmp_path).rank([HISTORY], [CANDIDATES])


@pytest.mark.parametrize(
    ("version", "fault", "n", "message"),
    [
        ("0.12.10", None, 3, "too old"),
        ("0.12.11", None, 21, "21 candidates"),
        ("0.12.11", "no_logprobs", 3, "no label"),
    ],
)
def test_labels_that_must_be_but_cannot_be_are_an_error(server, version, fault, n, message):
    server.version, server.fault = version, fault
    with pytest.raises(LwaError, match=f"'llama3'.*{message}.*mode written"):
        teacher(server, mode="labels").rank([HISTORY], [[f"film {i}" for i in range(n)]])


def test_a_resumed_comparison_asks_for_nothing_again(server, tmp_path):
    rows = [CANDIDATES, CANDIDATES[::-1]]
    server.fault, server.faults = "no_logprobs", 1
    first = teacher(server, cache=tmp_path).rank([HISTORY] * 2, rows)
    assert first.to_frame()["mode"].tolist() == ["written", "labels"]
    again = teacher(server, cache=tmp_path).rank([HISTORY] * 2, rows)
    assert len(server.asked()) == 3 and again.to_frame()["cached"].all()
    np.testing.assert_array_equal(again.scores, first.scores)
    assert again.to_frame()["mode"].tolist() == first.to_frame()["mode"].tolist()


def test_the_time_of_an_answer_includes_the_labels_asked_for_in_vain(server):
    server.fault, server.faults = "no_logprobs", 1
    whole = server.models["llama3:latest"].answer

    def answer(messages, schema):
        time.sleep(0.2 if "best" in schema["properties"] else 0)
        return whole(messages, schema)

    server.models["llama3:latest"].answer = answer
    reply = teacher(server).rank([HISTORY], [CANDIDATES]).replies[0]
    assert reply.mode == "written" and 0.2 < reply.first_token_s <= reply.latency_s


@pytest.mark.parametrize("fault", ["error_500", "drop"])
def test_a_fault_is_retried_as_for_any_answer(server, fault):
    server.fault, server.faults = fault, 2
    answers = teacher(server).rank([HISTORY], [CANDIDATES])
    assert answers.replies[0].mode == "labels" and len(server.asked()) == 3
    server.faults = 10**9
    with pytest.raises(LwaError, match="model 'llama3'"):
        teacher(server).rank([HISTORY], [CANDIDATES])


# With a real model behind the server


@pytest.fixture(scope="module")
def real(smollm2):
    with OllamaServer({"smollm2:135m": Served(written_by(smollm2))}, version="0.12.11") as running:
        yield running


def test_labels_of_a_real_model(smollm2, real):
    """Oracle: one forward pass over the chat, its answer opened up to the label."""
    import torch

    answers = teacher(real, "smollm2:135m", mode="labels").rank([HISTORY], [CANDIDATES])
    messages = label_messages(HISTORY, CANDIDATES)
    said = ollama.Client(real.url).chat("smollm2:135m", messages, format=label_schema(3)).message.content
    opening = said[: said.index(":") + 1] + said[said.index(":") + 1 :].split(json.loads(said)["best"])[0]
    text = smollm2.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) + opening
    ids = smollm2.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        log_p = smollm2.model(ids).logits[0, -1].log_softmax(-1)
    letters = [smollm2.tokenizer(label, add_special_tokens=False)["input_ids"][0] for label in "ABC"]
    np.testing.assert_allclose(answers.scores[0], log_p[letters], atol=1e-3)


def test_a_real_model_writes_under_the_schema(real):
    answers = teacher(real, "smollm2:135m", mode="written").rank([HISTORY], [CANDIDATES])
    assert sorted(answers.order[0]) == [0, 1, 2] and answers.replies[0].counts["unreadable"] == 0
