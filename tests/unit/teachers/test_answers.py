"""What teachers say: the question, reading and repairing an answer, fusion, and local models."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import jsonschema
import numpy as np
import pytest
from ollama_server import OllamaServer, Served, by_score
from scipy.stats import kendalltau
from teacher_questions import CANDIDATES, HISTORY, HOSTILE, teacher

from lwa_helpers.data.titles import clean_title
from lwa_helpers.teachers.answers import (
    Reply,
    TeacherAnswers,
    UnreadableAnswer,
    both_orders,
    order_scores,
    parse_ranking,
    ranking_messages,
    ranking_schema,
)
from lwa_helpers.teachers.local_teacher import LocalTeacher
from lwa_helpers.teachers.ollama_teacher import OllamaTeacher
from lwa_helpers.teachers.rank_fusion import fuse

# The question and its answer


def test_question_lists_cleaned_numbered_titles():
    _, user = ranking_messages(["Tom &amp; Jerry"], ["A\nB", "Amélie"])
    assert json.loads(user["content"]) == {
        "history": ["Tom & Jerry"],
        "candidates": [{"number": 1, "title": "A B"}, {"number": 2, "title": "Amélie"}],
    }


@pytest.mark.parametrize("title", HOSTILE)
def test_hostile_title_stays_data(title):
    """It changes neither the instruction nor the other candidates, and cannot leave its JSON string."""
    system, user = ranking_messages([title], ["Up", title, "Babe"])
    asked = json.loads(user["content"])
    assert [c["number"] for c in asked["candidates"]] == [1, 2, 3]
    assert [asked["candidates"][i]["title"] for i in (0, 2)] == ["Up", "Babe"]
    assert system == ranking_messages(["a"], ["b"])[0]
    assert all(c.isprintable() for c in user["content"]) and len(user["content"]) < 1_000
    assert not re.search(r"<|\[/?\w+\]", user["content"]) and asked["candidates"][1]["title"] == clean_title(title)


@pytest.mark.parametrize(
    ("answer", "good"),
    [
        ([2, 1, 3], True),
        ([1, 2], False),
        ([1, 1, 2], False),
        ([1, 2, 4], False),
        ([0, 1, 2], False),
        ([1, 2, "3"], False),
    ],
)
def test_schema_admits_permutations_only(answer, good):
    validator = jsonschema.Draft202012Validator(ranking_schema(3))
    assert validator.is_valid({"ranking": answer}) is good


@pytest.mark.parametrize(
    ("numbers", "order", "repeated", "invented", "omitted"),
    [
        ([3, 1, 2, 4], [2, 0, 1, 3], 0, 0, 0),
        ([4, 4, 2, 4], [3, 1, 0, 2], 2, 0, 2),
        ([9, 3, 0, -1], [2, 0, 1, 3], 0, 3, 3),
        ([2], [1, 0, 2, 3], 0, 0, 3),
        ([4, 3, 2, 1, 1, 77], [3, 2, 1, 0], 1, 1, 0),
    ],
)
def test_answer_is_repaired_and_counted(numbers, order, repeated, invented, omitted):
    counts = {"repeated": repeated, "invented": invented, "omitted": omitted, "repaired": 0, "unreadable": 0}
    assert parse_ranking(json.dumps({"ranking": numbers}), 4) == (order, counts)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2, 1, 3",
        '{"ranking": "213"}',
        '{"ranking": [1, 2',
        '{"ranking": [1, true]}',
        '{"ranking": [1.5]}',
        '{"ranking": []}',
        '{"ranking": [8, 9]}',
        "[" * 100_000,
        '{"ranking": [' + "1" * 5_000 + "]}",
        '{"order": [1, 2, 3]}',
        '<think>{"ranking": [1]}</think>',
        "null",
    ],
)
def test_answer_without_a_ranking_is_unreadable(text):
    with pytest.raises(UnreadableAnswer):
        parse_ranking(text, 3)


def test_scores_and_order_are_inverse():
    order = np.random.default_rng(0).permutation(7).tolist()
    answers = TeacherAnswers("t", [Reply(order_scores(order), 0.1)])
    assert answers.order.tolist() == [order]
    assert sorted(answers.scores[0]) == [1, 2, 3, 4, 5, 6, 7]


def test_rates_of_a_batch():
    invalid = {"repeated": 1, "invented": 0, "omitted": 1, "repaired": 0, "unreadable": 0}
    rng = np.random.default_rng(1)
    orders = [rng.permutation(5).tolist() for _ in range(4)]
    answers = TeacherAnswers("t", [Reply(order_scores(o), 0.1, *([invalid] * (i == 2))) for i, o in enumerate(orders)])
    assert answers.invalid_rate == 0.25
    taus = [kendalltau(np.arange(5), np.argsort(order)).statistic for order in orders]
    assert answers.position_bias == pytest.approx(np.mean(taus))
    assert answers.to_frame().repeated.tolist() == [0, 0, 1, 0]


def test_position_bias_is_none_for_a_teacher_of_titles_and_one_for_a_copyist(server):
    rows = [["a", "bbb", "cc", "dddd"], ["ee", "f", "ggggg", "hhh"]]
    asked = both_orders([HISTORY] * 2, rows)
    assert asked[1][2:] == [row[::-1] for row in rows]
    assert teacher(server).rank(*asked).position_bias == 0
    server.models["copyist:latest"] = Served(lambda messages, schema: {"ranking": [1, 2, 3, 4]})
    assert teacher(server, "copyist").rank(*asked).position_bias == 1


def test_an_unreadable_answer_says_nothing_of_position():
    counts = {"repeated": 0, "invented": 0, "omitted": 0, "repaired": 0, "unreadable": 1}
    repaired, read = Reply([3.0, 2.0, 1.0], 0.1, counts), Reply([1.0, 2.0, 3.0], 0.1)
    assert TeacherAnswers("t", [repaired, read]).position_bias == -1
    assert math.isnan(TeacherAnswers("t", [repaired]).position_bias)


# Fusion, by hand


def test_reciprocal_rank_fusion():
    fused = fuse([np.array([[9.0, 5.0, 1.0]]), np.array([[1.0, 2.0, 3.0]])], weights=[1, 2])
    assert fused[0] == pytest.approx([1 / 61 + 2 / 63, 1 / 62 + 2 / 62, 1 / 63 + 2 / 61])


def test_borda_fusion_shares_tied_ranks():
    fused = fuse([np.array([[9.0, 5.0, 5.0]]), np.array([[1.0, 2.0, 3.0]])], method="borda")
    assert fused[0] == pytest.approx([2 + 0, 0.5 + 1, 0.5 + 2])


def test_score_fusion_ignores_scale_and_a_teacher_without_opinion():
    scores, flat = np.array([[3.0, 1.0, 2.0]]), np.full((1, 3), 4.0)
    fused = fuse([1000 * scores - 7, flat], method="score")
    assert fused[0] == pytest.approx([math.sqrt(1.5), -math.sqrt(1.5), 0])


@pytest.mark.parametrize(
    ("rankings", "weights", "method"),
    [
        ([], None, "rrf"),
        ([np.ones((1, 2)), np.ones((1, 3))], None, "rrf"),
        ([np.array([[1.0, np.nan]])], None, "score"),
        ([np.ones((1, 2))], [0.0], "rrf"),
        ([np.ones((1, 2))], [-1.0], "rrf"),
        ([np.ones((1, 2))], [1.0, 1.0], "rrf"),
        ([np.ones((1, 2))], None, "median"),
    ],
)
def test_fusion_refuses(rankings, weights, method):
    with pytest.raises(ValueError):
        fuse(rankings, weights, method)


# Local models


def test_local_scores_are_title_log_probabilities(smollm2):
    """Oracle: the whole text in one forward pass, summed over the candidate's tokens."""
    import torch

    answers = LocalTeacher(smollm2, header="Films:\n").rank([HISTORY], [CANDIDATES])
    for candidate, score in zip(CANDIDATES, answers.scores[0]):
        parts = [
            smollm2.tokenizer(text)["input_ids"] for text in ("Films:\n", "Toy Story\n", "Babe\n", candidate + "\n")
        ]
        ids = torch.tensor([[token for part in parts for token in part]])
        with torch.no_grad():
            log_p = smollm2.model(ids).logits[0, :-1].log_softmax(-1)
        own = log_p.gather(1, ids[0, 1:, None])[-len(parts[-1]) :].sum()
        assert score == pytest.approx(own.item(), abs=1e-3)
    assert answers.invalid_rate == 0 and (answers.latency_s > 0).all() and answers.replies[0].mode == "title"


def test_local_scores_of_a_batch_are_those_of_single_questions(smollm2):
    histories, rows = [HISTORY, [], ["Up"]], [CANDIDATES, CANDIDATES[::-1], ["Heat", "Up", "Heat"]]
    alone, together = (LocalTeacher(smollm2, batch_size=n).rank(histories, rows) for n in (1, 2))
    np.testing.assert_allclose(together.scores, alone.scores, atol=1e-3)
    assert together.scores[2, 0] == together.scores[2, 2]


def test_a_real_model_behind_the_server_ranks_as_it_does_here(smollm2, tmp_path):
    local = LocalTeacher(smollm2)
    model = by_score(lambda history, title: local.rank([history], [[title]]).scores[0, 0])
    with OllamaServer({"smollm2:135m": model}) as server:
        served = OllamaTeacher("smollm2:135m", host=server.url, cache=tmp_path).rank([HISTORY], [CANDIDATES])
    assert served.order.tolist() == local.rank([HISTORY], [CANDIDATES]).order.tolist()


@pytest.mark.parametrize("title", HOSTILE)
def test_a_title_spells_no_chat_token(smollm2, title):
    special = set(smollm2.tokenizer.all_special_ids)
    tame, hostile = (
        [
            token
            for token in LocalTeacher(smollm2, "generate")._prompt(ranking_messages([name], [name]))
            if token in special
        ]
        for name in ("Up", title)
    )
    assert hostile == tame


def test_a_local_model_is_asked_in_the_style_that_its_entry_says(smollm2):
    messages = ranking_messages(HISTORY, CANDIDATES)
    chat, plain = (
        smollm2.tokenizer.decode(LocalTeacher(replace(smollm2, prompt=style), "generate")._prompt(messages))
        for style in ("chat", "plain")
    )
    assert plain == "\n\n".join([messages[0]["content"], messages[1]["content"], '{"ranking": ['])
    assert chat.startswith("<|im_start|>system\n" + messages[0]["content"]) and chat.endswith(
        '<|im_start|>assistant\n{"ranking": ['
    )


def test_local_generation_is_read_by_the_same_rules(smollm2):
    answers = LocalTeacher(smollm2, mode="generate").rank([HISTORY], [CANDIDATES])
    assert sorted(answers.order[0]) == [0, 1, 2]
    reply = answers.replies[0]
    assert 0 < reply.first_token_s <= reply.latency_s and reply.answer_tokens >= 1


@pytest.mark.parametrize(
    ("text", "order", "kind"),
    [
        ("3, 1, 2]}", [2, 0, 1], None),
        ("2, 2]", [1, 0, 2], "repeated"),
        ('"Up", "Se7en"]', [2, 0, 1], "repaired"),
        ("3, 1, 2, ", [2, 0, 1], "repaired"),
        ("many films", [0, 1, 2], "unreadable"),
        ("8]", [0, 1, 2], "unreadable"),
    ],
)
def test_generated_text_is_repaired_and_counted(monkeypatch, text, order, kind):
    local = LocalTeacher(SimpleNamespace(name="m"), mode="generate")
    monkeypatch.setattr(local, "_prompt", lambda messages: [1, 2])
    monkeypatch.setattr(local, "_continue", lambda prompt, limit: (text, 0.0, 4))
    answers = local.rank([HISTORY], [CANDIDATES])
    assert answers.order.tolist() == [order]
    assert (answers.invalid_rate == 0) if kind is None else answers.replies[0].counts[kind] == 1
