"""Names of models: what is registered, a path or on the server is a model; any other is one error that lists all."""

from __future__ import annotations

import pytest
from ollama_server import OllamaServer, Served
from teacher_questions import longest_first
from tiny_shop import CATEGORY, write_shop

from lwa_helpers import BaseRecommender, cli
from lwa_helpers.errors import LwaError
from lwa_helpers.models.registry import may_be_served, model_spec
from lwa_helpers.teachers.availability import find_model, reachable_teachers

SERVED = ["qwen3:latest", "llama3.1:8b", "hf.co/user/Repo-GGUF:Q4_K_M", "localhost:5000/me/mine:v1.0", "mistral:latest"]


@pytest.fixture
def server(monkeypatch):
    with OllamaServer({name: Served(longest_first) for name in SERVED}) as running:
        monkeypatch.setenv("OLLAMA_HOST", running.url)
        yield running


@pytest.mark.parametrize("name", [*SERVED, "qwen3", "mistral"])
def test_every_name_that_the_server_lists_is_a_model_everywhere(server, tmp_path, capsys, monkeypatch, name):
    monkeypatch.setitem(BaseRecommender.__init__.__kwdefaults__, "cache", None)
    root = write_shop(tmp_path)
    assert [row["reachable"] for row in reachable_teachers([name])] == [True]
    arguments = ["--user", "ann", "--category", CATEGORY, "--root", str(root), "--top-k", "1", "--model", name]
    assert cli.main(["recommend", *arguments]) == 0
    assert "Very Long Brush Set" in capsys.readouterr().out
    assert server.asked()[0]["model"] == find_model(name).id


def test_a_registered_name_has_its_settings_with_and_without_its_tag(server):
    assert find_model("qwen3:latest") == find_model("qwen3") == model_spec("qwen3")
    assert find_model("llama3") == model_spec("llama3:latest") and find_model("llama3").name == "llama3:latest"
    assert [row["name"] for row in reachable_teachers(["qwen3:latest", "mistral"])] == ["qwen3", "mistral"]
    assert server.requests[-1][0] == "/api/tags"


def test_a_name_of_nothing_is_one_error_that_lists_what_there_is(server):
    with pytest.raises(LwaError, match=rf"unknown model 'gpt-9'.*smollm2-135m.*{server.url}.*llama3\.1:8b") as caught:
        BaseRecommender("gpt-9")
    (row,) = reachable_teachers(["gpt-9"])
    assert row == {"name": "gpt-9", "backend": "unknown", "reachable": False, "reason": str(caught.value)}
    for name in ("llama3.1", "llama3.1:70b", "Mistral:latest"):
        with pytest.raises(LwaError, match="unknown model"):
            find_model(name)


def test_without_a_server_the_error_says_that_none_answers():
    with OllamaServer({}) as server:
        url = server.url
    with pytest.raises(LwaError, match=rf"unknown model 'mistral'.*smollm2-135m.*no Ollama server answers at {url}"):
        BaseRecommender("mistral", host=url)
    with pytest.raises(LwaError, match="unknown model 'mistral'.*http"):
        BaseRecommender("mistral", host="ftp://box")
    assert BaseRecommender("smollm2-135m", host=url).spec.backend == "embedded"


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "a/../b",
        "",
        " ",
        "a b",
        "~nobody",
        "a\nb",
        "a\x00b",
        "-rf",
        "x" * 5_000,
        "a\\b",
    ],
)
def test_a_name_that_is_none_asks_no_server_and_is_one_error(server, name):
    with pytest.raises(LwaError, match=r"(?s)unknown model"):
        find_model(name)
    assert not may_be_served(name) and not reachable_teachers([name])[0]["reachable"]
    assert server.requests == []


def test_a_name_that_a_server_should_not_list_is_not_taken_from_it(server):
    server.models["../../x:latest"] = Served(longest_first)
    with pytest.raises(LwaError, match="unknown model"):
        find_model("../../x:latest")


def test_a_path_wins_over_a_model_of_the_server_and_a_missing_file_over_none(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    server.models["file.gguf:latest"] = Served(longest_first)
    assert find_model("file.gguf").backend == "ollama"
    (tmp_path / "mistral").mkdir()
    (tmp_path / "file.gguf").write_bytes(b"x")
    assert {find_model(name).backend for name in ("mistral", "file.gguf", "absent.gguf")} == {"path"}
    assert "absent.gguf does not exist" in reachable_teachers(["absent.gguf"])[0]["reason"]
