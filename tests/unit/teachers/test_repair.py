"""Answers in other forms than the one asked for: what is found, what is refused, and whose words never count."""

from __future__ import annotations

import json
import time

import pytest
from ollama_server import OllamaServer, Served
from teacher_questions import CANDIDATES, HISTORY, longest_first, teacher

from lwa_helpers.teachers.answers import parse_ranking
from lwa_helpers.teachers.repair import UnreadableAnswer

FILMS = ["Heat", "Seven (1995)", "300"]
ORDER = '{"ranking": [2, 1, 3]}'


def counts(**faults):
    return dict.fromkeys(("repeated", "invented", "omitted", "repaired", "unreadable"), 0) | faults


FOUND = {
    "fence": f"```json\n{ORDER}\n```",
    "fence without a language": f"```\n{ORDER}```",
    "prose before": f"Here is the ranking: {ORDER}",
    "prose after": f"{ORDER}\nI chose Seven first.",
    "bold": f"**{ORDER}**",
    "tags of an answer": f"<answer>{ORDER}</answer>",
    "byte order mark": f"\ufeff{ORDER}",
    "thinking": f'<think>{{"ranking": [3]}}?</think>{ORDER}',
    "thinking that the prompt began": f'maybe {{"ranking": [3]}}</think>\n{ORDER}',
    "thinking afterwards": f'{ORDER}<think>or {{"ranking": [3]}}',
    "thinking of Mistral": f'[THINK]{{"ranking": [3]}}[/THINK]{ORDER}',
    "thinking of Kimi": f'◁think▷{{"ranking": [3]}}◁/think▷{ORDER}',
    "thinking of Seed": f'<seed:think>{{"ranking": [3]}}</seed:think>{ORDER}',
    "thinking of Cohere": f'<|START_THINKING|>{{"ranking": [3]}}<|END_THINKING|>{ORDER}',
    "thinking of gpt-oss": f'<|channel|>analysis<|message|>{{"ranking": [3]}}<|end|><|channel|>final<|message|>{ORDER}',
    "reasoning": f'<reasoning>{{"ranking": [3]}}</reasoning>{ORDER}',
    "texts": '{"ranking": ["2", "1", "3"]}',
    "numbers with a point": '{"ranking": [2.0, 1.0, 3.0]}',
    "numbers with a sign": '{"ranking": ["#2", "# 1", "candidate 3"]}',
    "objects": '{"ranking": [{"number": 2}, {"number": "1"}, {"candidate": 3}]}',
    "objects with titles": '{"ranking": [{"number": 2, "title": "Seven (1995)"}, {"title": "Heat"}, {"id": 3}]}',
    "titles": '{"ranking": ["Seven (1995)", " Heat ", "300"]}',
    "numbers and titles": '{"ranking": ["2. Seven (1995)", "1: Heat", "#3 - 300"]}',
    "nested": '{"ranking": {"ranking": [2, 1, 3]}}',
    "nested list": '{"ranking": [[2, 1, 3]]}',
    "in another object": '{"thought": "hm", "answer": {"ranking": [2, 1, 3]}}',
    "in a list": '[{"ranking": [2, 1, 3]}]',
    "JSON in a text": json.dumps(ORDER),
    "a list in a text": '{"ranking": "[2, 1, 3]"}',
    "numbers in a text": '{"ranking": "2, 1, 3"}',
    "a list alone": "[2, 1, 3]",
    "a list in prose": "My ranking: [2, 1, 3].",
    "capitals": '{"Ranking": [2, 1, 3]}',
    "single quotes": "{'ranking': [2, 1, 3]}",
    "no quotes": "{ranking: [2, 1, 3]}",
    "comma at the end": '{"ranking": [2, 1, 3,],}',
    "no bracket at the end": '{"ranking": [2, 1, 3]',
    "line break in a text": '{"why": "a\nb", "ranking": [2, 1, 3]}',
    "the last of several": f'{{"ranking": [3, 2, 1]}} No, rather: {ORDER}',
    "the last that names any": f'{ORDER} {{"ranking": []}}',
}


@pytest.mark.parametrize("answer", FOUND.values(), ids=FOUND)
def test_another_form_is_found_and_counted(answer):
    assert parse_ranking(answer, 3, FILMS) == ([1, 0, 2], counts(repaired=1))


def test_a_found_ranking_has_its_other_faults_counted_too():
    assert parse_ranking('{"ranking": ["2", "2", "9", "Up"]}', 3, FILMS) == (
        [1, 0, 2],
        counts(repeated=1, invented=2, omitted=2, repaired=1),
    )


REFUSED = {
    "words": '{"ranking": ["two", "one", "three"]}',
    "thinking alone": f"<think>{ORDER}</think>",
    "thinking without an end": f"<think>perhaps {ORDER}",
    "truth": '{"ranking": [2, true]}',
    "nothing": '{"ranking": [2, null]}',
    "parts": '{"ranking": [2.5, 1]}',
    "not a number": '{"ranking": [NaN, 2]}',
    "ranks by name": '{"ranking": {"1": 2, "2": 1}}',
    "another key": '{"order": [2, 1, 3]}',
    "numbers in prose": "Sure! I would rank them 2, 1, 3.",
    "a list in the middle of prose": "I looked at [1, 2, 3] and chose 2.",
    "a part of a list in prose": "My ranking: [2, 1]",
    "rank and title": '{"ranking": ["1. Seven (1995)", "2. Heat"]}',
    "rank as number": '{"ranking": [{"number": 1, "title": "Seven (1995)"}]}',
    "two objects in one": '{"a": {"ranking": [1]}, "b": {"ranking": [2]}}',
    "a tag of YAML": "{'ranking': [!!python/name:os.system '']}",
}


@pytest.mark.parametrize("answer", REFUSED.values(), ids=REFUSED)
def test_what_is_no_ranking_or_could_be_two_is_refused(answer):
    with pytest.raises(UnreadableAnswer):
        parse_ranking(answer, 3, FILMS)


def test_a_title_that_two_candidates_have_or_that_is_anothers_number_names_none():
    for films in (["Heat", "Heat", "Up"], ["2", "Heat", "Up"]):
        with pytest.raises(UnreadableAnswer, match="more than one"):
            parse_ranking(json.dumps({"ranking": [films[0]]}), 3, films)


@pytest.mark.parametrize(
    "title",
    [
        'answer {"ranking": [3]}',
        "answer {'ranking': [3]}",
        "[3, 2, 1]",
        "<think>",
        "</think>",
        '\\"} {"ranking": [3]}',
    ],
)
@pytest.mark.parametrize("quoted", [str, json.dumps], ids=["plain", "as JSON"])
def test_a_quoted_title_is_no_answer_and_no_thinking(title, quoted):
    for films, history in ((FILMS, [title]), ([*FILMS[:2], title], [])):
        for answer in (f"{ORDER} since {quoted(title)}", f"Since {quoted(title)}\n{ORDER}"):
            assert parse_ranking(answer, 3, films, history)[0] == [1, 0, 2]
        with pytest.raises(UnreadableAnswer):
            parse_ranking(f"The user likes {quoted(title)}", 3, films, history)


@pytest.mark.parametrize("title", [ORDER, "[2, 1, 3]", "2, 1, 3"])
def test_a_title_alone_in_a_text_is_no_ranking(title):
    for answer in (json.dumps(title), json.dumps({"ranking": title})):
        assert parse_ranking(answer, 3, FILMS)[0] == [1, 0, 2]
        with pytest.raises(UnreadableAnswer):
            parse_ranking(answer, 3, FILMS, [title])


def test_titles_with_brackets_are_candidates_all_the_same():
    films = ["[REC]", "{2} <b>", "Up"]
    assert parse_ranking('So: {"ranking": ["{2} <b>", "[REC]", "Up"]}', 3, films)[0] == [1, 0, 2]


@pytest.mark.parametrize("opening", ["[", "[{", '{"a":', "[1", '{"ranking": [', "<think>", "[1, "])
def test_a_long_answer_without_a_ranking_is_refused_soon(opening):
    start = time.perf_counter()
    with pytest.raises(UnreadableAnswer):
        parse_ranking(opening * 5_000, 3, FILMS)
    assert time.perf_counter() - start < 5


# From a server


@pytest.mark.parametrize("form", ["fence", "thinking", "texts", "numbers with a point"])
def test_a_servers_answer_in_another_form_is_read_at_once(form):
    with OllamaServer({"m:latest": Served(lambda messages, schema: FOUND[form])}) as server:
        answers = teacher(server, "m").rank([HISTORY], [CANDIDATES])
        assert len(server.asked()) == 1
    assert answers.order.tolist() == [[1, 0, 2]] and answers.replies[0].counts == counts(repaired=1)
    assert answers.invalid_rate == 1 and answers.to_frame().repaired.tolist() == [1]


def test_an_answer_kept_before_there_was_this_kind_has_none_of_it(tmp_path):
    with OllamaServer({"llama3:latest": longest_first}) as server:
        teacher(server, cache=tmp_path).rank([HISTORY], [CANDIDATES])
        (path,) = tmp_path.iterdir()
        kept = json.loads(path.read_text())
        del kept["counts"]["repaired"]
        path.write_text(json.dumps(kept))
        assert teacher(server, cache=tmp_path).rank([HISTORY], [CANDIDATES]).replies[0].counts == counts()
