"""`lwa data download` against a small hub on this machine: checksums compared, resumed where it broke off."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs

import pytest
from huggingface_hub import constants

from lwa_helpers.cli import main
from lwa_helpers.data import download
from lwa_helpers.errors import LwaError

REVIEWS, ITEMS = (pattern.format("Toys") for pattern in download.FILES)
CONTENT = {REVIEWS: bytes(range(256)) * 400, ITEMS: b'{"parent_asin": "a", "title": "A"}\n'}


class Hub(BaseHTTPRequestHandler):
    """The two requests that fetching a file needs; `stated` may differ from the content, `broken` cuts it in half."""

    stated: dict[str, str]
    broken = False
    ranges: list[str | None]

    def do_POST(self) -> None:
        names = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
        known = [
            {"type": "file", "path": n, "size": len(CONTENT[n]), "oid": "0",
             "lfs": {"oid": self.stated[n], "size": len(CONTENT[n]), "pointerSize": 9}}
            for n in names if n in CONTENT
        ]  # fmt: skip
        self.answer(200, json.dumps(known).encode(), {"Content-Type": "application/json"})

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        name = self.path.split("/resolve/main/")[1]
        wanted = self.headers.get("Range")
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        if body:
            self.ranges.append(wanted)
            if self.broken and start:
                return self.answer(403, b"", {})
        headers = {"ETag": f'"{self.stated[name]}"', "X-Repo-Commit": "0" * 40}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(CONTENT[name]) - 1}/{len(CONTENT[name])}"
        content = CONTENT[name][start:]
        sent = len(content) // 2 if self.broken else len(content)
        self.answer(206 if start else 200, content, headers, sent if body else 0)

    def answer(self, status: int, content: bytes, headers: dict[str, str], sent: int | None = None) -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(content[:sent])

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def hub(monkeypatch):
    stated = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENT.items()}
    handler = type("OneHub", (Hub,), {"stated": stated, "ranges": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    yield handler
    server.shutdown()


def test_files_arrive_with_progress_and_are_not_fetched_twice(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TQDM_POSITION", "-1")  # the bar is shown as on a terminal
    assert main(["data", "download", "Toys", "--root", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert shown.out.split() == [str(tmp_path / "Toys.jsonl"), str(tmp_path / "meta_Toys.jsonl")]
    assert re.search(r"Toys.jsonl: 100%\S* 102k/102k", shown.err)
    assert (tmp_path / "Toys.jsonl").read_bytes() == CONTENT[REVIEWS]
    assert (tmp_path / "meta_Toys.jsonl").read_bytes() == CONTENT[ITEMS]
    download.download("Toys", tmp_path)
    assert hub.ranges == [None, None]


def test_an_interrupted_download_goes_on_where_it_stopped(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)
    hub.broken = True
    with pytest.raises(LwaError, match="(?s)cannot fetch .*Toys.jsonl.*what has arrived is kept"):
        download.download("Toys", tmp_path)
    assert not (tmp_path / "Toys.jsonl").exists()
    hub.broken = False
    hub.ranges.clear()
    download.download("Toys", tmp_path)
    assert hub.ranges == [f"bytes={len(CONTENT[REVIEWS]) // 2}-", None]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["Toys.jsonl", "meta_Toys.jsonl"]
    assert (tmp_path / "Toys.jsonl").read_bytes() == CONTENT[REVIEWS]


def test_a_checksum_that_differs_is_an_error_and_leaves_nothing(hub, tmp_path):
    right = hub.stated[ITEMS]
    hub.stated[ITEMS] = "0" * 64
    with pytest.raises(LwaError, match="meta_Toys.jsonl arrived damaged"):
        download.download("Toys", tmp_path)
    assert (tmp_path / "Toys.jsonl").exists() and not (tmp_path / "meta_Toys.jsonl").exists()
    hub.stated[ITEMS] = right
    assert download.download("Toys", tmp_path)[1].read_bytes() == CONTENT[ITEMS]


def test_an_unknown_category_is_named(hub, tmp_path):
    with pytest.raises(LwaError, match="has no raw/review_categories/Tois.jsonl: 'Tois' is not one of"):
        download.download("Tois", tmp_path)


def test_without_a_network_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = "cannot fetch raw/review_categories/Toys.jsonl.*HF_HUB_OFFLINE, or put the file into"
    with pytest.raises(LwaError, match=message):
        download.download("Toys", tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(LwaError, match=f"(?s){message}"):
        download.download("Toys", tmp_path)
    assert not list(tmp_path.iterdir())
