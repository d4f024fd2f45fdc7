"""Finding an Ollama server: its address, which teachers can be reached, and faults on the way."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time

import httpx
import ollama
import pytest
from ollama_server import OllamaServer
from teacher_questions import CANDIDATES, HISTORY, longest_first, teacher

from lwa_helpers.errors import LwaError
from lwa_helpers.paths import PACKAGE
from lwa_helpers.teachers import address
from lwa_helpers.teachers.address import server_url
from lwa_helpers.teachers.availability import reachable_teachers, status_lines
from lwa_helpers.teachers.ollama_teacher import OllamaTeacher

# The server's address


@pytest.mark.parametrize(
    ("host", "url"),
    [
        (None, "http://127.0.0.1:11434"),
        ("box", "http://box:11434"),
        ("box:1234/", "http://box:1234"),
        ("http://box", "http://box:80"),
        ("https://box/api-root/", "https://box:443/api-root"),
        ("[::1]:99", "http://[::1]:99"),
    ],
)
def test_server_url(host, url, monkeypatch):
    monkeypatch.delenv("OLLAMA_HOST", raising=False)
    assert server_url(host) == url
    assert ollama.Client(host)._client.base_url == ollama.Client(url)._client.base_url


@pytest.mark.parametrize(
    "host",
    ["file:///etc/passwd", "ftp://box", "http://user:secret@box", "box:port", "http://[::1", "bo x", "unix://socket"],
)
def test_server_url_refuses(host):
    with pytest.raises(LwaError, match="http"):
        server_url(host)


def test_server_url_reads_the_environment(monkeypatch):
    monkeypatch.setenv("OLLAMA_HOST", "box:7")
    assert server_url() == "http://box:7"
    assert server_url("other:8") == "http://other:8"


def test_server_url_reads_the_settings_where_nothing_else_names_a_host(monkeypatch):
    monkeypatch.setattr(address, "read_yaml", lambda name: {"ollama.yaml": {"host": "https://box:9"}}[name])
    monkeypatch.delenv("OLLAMA_HOST", raising=False)
    assert server_url() == "https://box:9" and server_url("other:8") == "http://other:8"
    monkeypatch.setenv("OLLAMA_HOST", "box:7")
    assert server_url() == "http://box:7"


# Faults


@pytest.mark.parametrize(
    "fault", ["drop", "cut", "stream_error", "invalid_json", "not_an_object", "error_500", "prose", "wrong_schema"]
)
def test_a_passing_fault_is_retried(server, fault):
    server.fault, server.faults = fault, 2
    assert teacher(server).rank([HISTORY], [CANDIDATES]).order.tolist() == [[1, 0, 2]]
    options = [body["options"] for body in server.asked()]
    assert [(o["seed"], o["temperature"]) for o in options] == [(0, 0.0), (1, 0.3), (2, 0.3)]


@pytest.mark.parametrize(
    "fault", ["drop", "cut", "stream_error", "invalid_json", "not_an_object", "error_500", "prose", "wrong_schema"]
)
def test_a_lasting_fault_is_an_error_naming_the_model(server, fault, tmp_path):
    server.fault = fault
    with pytest.raises(LwaError, match="model 'llama3'"):
        teacher(server, cache=tmp_path).rank([HISTORY], [CANDIDATES])
    assert len(server.asked()) == 3 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fault", ["slow", "trickle"])
def test_a_slow_server_times_out(server, fault):
    server.fault, server.delay_s = fault, 0.3
    start = time.perf_counter()
    with pytest.raises(LwaError, match="'llama3'.*no answer within 0.2 s"):
        teacher(server, timeout_s=0.2, retries=0).rank([HISTORY], [CANDIDATES])
    assert time.perf_counter() - start < 2


def test_connection_loss_is_retried(server, monkeypatch):
    asking, lost = (
        teacher(server),
        [ConnectionError("refused"), httpx.ReadError("reset"), httpx.DecodingError("no gzip")],
    )
    chat = asking.connection.client.chat

    def losing(**request):
        if lost:
            raise lost.pop()
        return chat(**request)

    monkeypatch.setattr(asking.connection.client, "chat", losing)
    with pytest.raises(LwaError, match="'llama3'.*no Ollama server answers"):
        asking.rank([HISTORY], [CANDIDATES])
    lost += [ConnectionError("refused"), httpx.ReadError("reset")]
    assert asking.rank([HISTORY], [CANDIDATES]).order.tolist() == [[1, 0, 2]]


def test_client_errors_are_not_retried(server):
    server.fault = "error_400"
    with pytest.raises(LwaError, match="'llama3'.*400"):
        teacher(server).rank([HISTORY], [CANDIDATES])
    assert len(server.asked()) == 1


def test_a_model_that_vanishes_half_way_keeps_what_was_answered(server, tmp_path):
    asking = teacher(server, cache=tmp_path)
    asking.rank([HISTORY], [CANDIDATES])
    server.fault = "vanish"
    with pytest.raises(LwaError, match="model 'llama3' not found"):
        asking.rank([HISTORY, ["Up"]], [CANDIDATES, CANDIDATES])
    assert len(list(tmp_path.iterdir())) == 1 and len(server.asked()) == 2


def test_a_server_that_is_down_is_an_error_naming_model_and_address():
    with OllamaServer({}) as server:
        url = server.url
    with pytest.raises(LwaError, match=f"'llama3'.*{url}.*ollama serve"):
        OllamaTeacher("llama3", host=url, retries=1, backoff_s=0.01).rank([HISTORY], [CANDIDATES])


def test_backoff_doubles(server, monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    server.fault = "error_500"
    with pytest.raises(LwaError):
        teacher(server, retries=3, backoff_s=0.5).rank([HISTORY], [CANDIDATES])
    assert waits == [0.5, 1.0, 2.0]


def test_an_old_server_is_refused():
    old = OllamaServer({"llama3:latest": longest_first}, version="0.4.7")
    with old as server, pytest.raises(LwaError, match="version 0.4.7"):
        teacher(server).rank([HISTORY], [CANDIDATES])


def test_after_an_error_nothing_more_is_asked(server):
    server.fault = "error_400"
    with pytest.raises(LwaError):
        teacher(server, concurrency=2).rank([HISTORY] * 200, [CANDIDATES] * 200)
    assert len(server.asked()) < 50


# Availability


def test_reachable_teachers_says_why_not(server, tmp_path):
    names = ["smollm2-135m", "llama3:latest", "qwen3", str(tmp_path), str(tmp_path / "absent.gguf")]
    rows = {row["name"]: row for row in reachable_teachers(names, server.url)}
    assert [rows[name]["reachable"] for name in names] == [True, True, False, True, False]
    assert rows["llama3:latest"] == {"name": "llama3:latest", "backend": "ollama", "reachable": True, "reason": ""}
    assert "ollama pull qwen3" in rows["qwen3"]["reason"] and "absent.gguf" in rows[names[-1]]["reason"]


HEAVY = {"torch", "pandas", "polars", "scipy", "transformers"}


def test_status_loads_nothing_heavy_and_no_client_where_nothing_listens(server):
    code = (
        "import sys; from lwa_helpers.teachers.availability import status_lines; status_lines(sys.argv[1]); "
        f"print(*({HEAVY | {'ollama', 'httpx'}} & sys.modules.keys()))"
    )
    for host, loaded in ((server.url, {"ollama", "httpx"}), ("127.0.0.1:9", set())):
        done = subprocess.run([sys.executable, "-c", code, host], capture_output=True, text=True, check=True)
        assert set(done.stdout.split()) == loaded


def test_status_asks_a_server_once_for_all_its_models(server):
    lines = status_lines(server.url)
    assert any("llama3:latest" in line and line.endswith("ready") for line in lines)
    assert [path for path, _ in server.requests] == ["/api/version", "/api/tags"]


def test_status_does_not_wait_for_a_server_that_is_silent(monkeypatch):
    monkeypatch.setattr("lwa_helpers.teachers.availability.STATUS_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url, start = f"http://127.0.0.1:{silent.getsockname()[1]}", time.perf_counter()
        lines = status_lines(url)
    assert time.perf_counter() - start < 2
    assert sum("gave no answer within 0.2 s" in line for line in lines) == 3


def test_the_address_of_a_server_that_is_refused_is_a_reason(server):
    (row,) = reachable_teachers(["qwen3"], "ftp://box")
    assert not row["reachable"] and "http(s)" in row["reason"]


def test_nothing_is_run_in_a_shell():
    for path in [*PACKAGE.joinpath("teachers").glob("*.py"), PACKAGE / "recommender.py"]:
        assert not re.search(r"subprocess|os\.(system|popen|exec|spawn)|shell=", path.read_text()), path
