"""Requests to a server: all with one key, proxy, certificate and address; each refusal says what to do."""

from __future__ import annotations

import ssl
import subprocess

import pytest
from ollama_server import OllamaServer
from teacher_questions import CANDIDATES, HISTORY, longest_first, teacher

from lwa_helpers.errors import LwaError
from lwa_helpers.teachers.address import server_url
from lwa_helpers.teachers.availability import reachable_teachers
from lwa_helpers.teachers.ollama_teacher import OllamaTeacher

KEY = "s3cret-of-mine"
CALLS = ["/api/version", "/api/tags", "/api/show", "/api/chat", "/api/ps"]


def ask_all(asking):
    """Every request that a teacher makes."""
    assert asking.rank([HISTORY], [CANDIDATES]).order.tolist() == [[1, 0, 2]]
    assert asking.memory_bytes() > 0


def test_every_request_has_the_key(server, monkeypatch):
    monkeypatch.setenv("OLLAMA_API_KEY", KEY)
    server.key = KEY
    ask_all(teacher(server))
    assert [path for path, _ in server.requests] == CALLS and set(server.keys) == {f"Bearer {KEY}"}
    assert reachable_teachers(["llama3:latest"], server.url)[0]["reachable"]


@pytest.mark.parametrize("version", ["0.12.6", "0.12.11"])
def test_every_request_goes_below_the_path_of_the_address(server, version):
    server.prefix, server.version = "/behind/a/proxy", version
    asking = OllamaTeacher("llama3", host=f"{server.url}/behind/a/proxy/", cache=None)
    ask_all(asking)
    assert [path for path, _ in server.requests] == ["/behind/a/proxy" + call for call in CALLS]


def test_every_request_to_another_machine_goes_through_the_proxy_of_the_environment(server, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", server.url)
    monkeypatch.setenv("OLLAMA_API_KEY", KEY)
    monkeypatch.delenv("NO_PROXY", raising=False)
    ask_all(OllamaTeacher("llama3", host="ollama.invalid:99", cache=None))
    assert [path for path, _ in server.requests] == CALLS and set(server.keys) == {f"Bearer {KEY}"}


def test_a_certificate_of_the_environment_is_trusted_and_an_unknown_one_explained(server, tmp_path, monkeypatch):
    certificate, key = str(tmp_path / "certificate.pem"), str(tmp_path / "key.pem")
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate]
    try:
        subprocess.run(
            [*make, "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"],
            check=True,
            capture_output=True,
        )
    except FileNotFoundError:
        pytest.skip("openssl is not installed, so there is no certificate to test with")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    port = server.url.rpartition(":")[2]
    with pytest.raises(LwaError, match=r"(?s)no secure connection.*SSL_CERT_FILE.*http://"):
        OllamaTeacher("llama3", host=f"https://localhost:{port}", retries=0, cache=None).rank([HISTORY], [CANDIDATES])
    server._http.socket = context.wrap_socket(server._http.socket, server_side=True)
    url = f"https://localhost:{port}"
    with pytest.raises(LwaError, match="certificate.*SSL_CERT_FILE"):
        OllamaTeacher("llama3", host=url, retries=0, cache=None).rank([HISTORY], [CANDIDATES])
    monkeypatch.setenv("SSL_CERT_FILE", certificate)
    ask_all(OllamaTeacher("llama3", host=url, cache=None))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SSL_CERT_FILE", "/nowhere.pem"),
        ("HTTP_PROXY", "ftp://box:3128"),
        ("ALL_PROXY", "socks5://127.0.0.1:9"),
        ("OLLAMA_API_KEY", f"{KEY}\n"),
        ("OLLAMA_API_KEY", f"{KEY}é"),
        ("OLLAMA_API_KEY", f"{KEY} of"),
    ],
)
def test_an_environment_that_cannot_be_used_is_one_error_without_the_key(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(LwaError, match=name) as caught:
        OllamaTeacher("llama3", host="box", retries=0).rank([HISTORY], [CANDIDATES])
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    "host", ["http://box/?key=hidden", "box?key=hidden", "http://box/#hidden", "https://me:hidden@box"]
)
def test_an_address_with_a_query_or_a_password_is_refused_and_not_shown(host):
    with pytest.raises(LwaError, match="OLLAMA_API_KEY") as caught:
        server_url(host)
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("path", ["/api/version", "/api/chat"])
@pytest.mark.parametrize(
    ("status", "text", "remedy"),
    [
        (401, '{"error": "unauthorized"}', "OLLAMA_API_KEY"),
        (401, "null", "OLLAMA_API_KEY"),
        (403, '"forbidden"', "OLLAMA_API_KEY"),
        (404, "404 page not found", "before /api or /v1"),
        (404, """{"error": "model 'llama3' not found"}""", "ollama pull llama3"),
        (413, "", "fewer candidates"),
        (429, '{"error": {"message": "slow down", "code": 1}}', "concurrency"),
        (500, '{"error": "model requires more system memory"}', "smaller model"),
        (502, "<html><head><title>x</title></head><body><h1>Bad Gateway</h1></body></html>", "later"),
        (503, '["busy"]', "later"),
    ],
)  # fmt: skip
def test_each_status_says_what_to_do(server, path, status, text, remedy):
    server.instead[path] = (status, text)
    with pytest.raises(LwaError, match=f"(?s)'llama3'.*{server.url}.*HTTP {status}.*{remedy}") as caught:
        teacher(server, retries=1).rank([HISTORY], [CANDIDATES])
    assert "<" not in str(caught.value) and "\n" not in str(caught.value)
    asked = [called for called, _ in server.requests].count(path)
    assert asked == (2 if status in (429, 500, 502, 503) else 1)


def test_a_key_that_the_server_repeats_is_not_shown(server, monkeypatch):
    monkeypatch.setenv("OLLAMA_API_KEY", KEY)
    server.key = "another"
    with pytest.raises(LwaError, match="401.*OLLAMA_API_KEY") as caught:
        teacher(server).rank([HISTORY], [CANDIDATES])
    server.key, server.instead["/api/chat"] = None, (200, f'{{"error": "bad key {KEY}"}}\n')
    with pytest.raises(LwaError, match="bad key …") as amid:
        teacher(server, retries=0).rank([HISTORY], [CANDIDATES])
    for error in (caught.value, amid.value):
        while error:
            assert KEY not in str(error)
            error = error.__cause__


@pytest.mark.parametrize("path", CALLS[:4])
@pytest.mark.parametrize("text", ['{"error": "out of memory"}', '{"error": "out of memory", "models": []}'])
def test_an_error_with_http_200_is_an_error(server, path, text):
    server.instead[path] = (200, text)
    with pytest.raises(LwaError, match="'llama3'.*out of memory"):
        teacher(server, retries=0).rank([HISTORY], [CANDIDATES])


@pytest.mark.parametrize("path", CALLS[:4])
@pytest.mark.parametrize("text", ["ok", "null", "{}", '{"version": 1, "models": [1], "message": 1}'])
def test_an_answer_of_another_protocol_is_one_error(server, path, text):
    if path == "/api/version" and "version" in text:
        text = '{"Version": "1"}'
    server.instead[path] = (200, text)
    with pytest.raises(LwaError, match="'llama3'"):
        teacher(server, retries=0).rank([HISTORY], [CANDIDATES])


def test_a_version_in_other_words_is_taken_for_a_new_one():
    for version, old in (("0.5", False), ("v0.12.11-rc1", False), ("unknown", False), ("0.4", True)):
        with OllamaServer({"llama3:latest": longest_first}) as server:
            server.instead["/api/version"] = (200, f'{{"version": "{version}"}}')
            if old:
                with pytest.raises(LwaError, match=r"0\.5\.0 is needed"):
                    teacher(server, mode="written").rank([HISTORY], [CANDIDATES])
            else:
                teacher(server, mode="written").rank([HISTORY], [CANDIDATES])


@pytest.mark.parametrize("length", ["null", '"8192"', "0", "[1]"])
def test_a_context_length_that_is_none_is_not_known(server, length):
    server.instead["/api/show"] = (
        200,
        f'{{"model_info": {{"general.architecture": "a", "a.context_length": {length}}}}}',
    )
    assert teacher(server).served.context_length is None
    ask_all(teacher(server))
