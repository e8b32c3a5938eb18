"""Downloads against a server that drops, refuses and lies; the presets on top of it."""

import functools
import hashlib
import random
import resource
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest

from common.errors import InputError
from data_prep import textfiles
from data_prep.hub import corpora
from data_prep.hub.corpora import CORPORA, Corpus, RemoteFile
from data_prep.hub.download import fetch
from data_prep.pipeline.workers import Progress
from data_prep.textfiles import main, parse
from tests.helpers.data_dirs import decoded, names
from tests.helpers.runs import called

CONTENT = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
Preset = Callable[..., subprocess.CompletedProcess[str]]


@dataclass
class Server:
    """What it sends, what goes wrong with each request in turn, and the ranges that were asked for."""

    url: str = ""
    content: bytes = CONTENT
    faults: list[str] = field(default_factory=list)
    asked: list[str | None] = field(default_factory=list)
    ranges: bool = True


def answer(request: BaseHTTPRequestHandler, server: Server) -> None:
    asked = request.headers.get("Range")
    server.asked.append(asked)
    assert request.headers["Accept-Encoding"] == "identity"  # the hash and ranges are of the bytes themselves
    fault = server.faults.pop(0) if server.faults else ""
    if fault.isdigit():
        request.send_response(int(fault))
        request.send_header("Retry-After", "7")
        request.end_headers()
        return
    begin = int(asked.removeprefix("bytes=").rstrip("-")) if asked and server.ranges else 0
    if begin and begin >= len(server.content):
        request.send_response(416)
        request.end_headers()
        return
    body = server.content[begin:]
    request.send_response(206 if asked and server.ranges else 200)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body[: len(body) // 3] if fault == "drop" else body)


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self, state)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        state.url = f"http://127.0.0.1:{running.server_port}/folder/file.bin"
        yield state
        running.shutdown()
    huggingface_hub.close_session()


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long it would have waited."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    return slept


def bring(server: Server, path: Path) -> bytes:
    fetch(server.url, SHA256, path, Progress("download", len(CONTENT)))
    return path.read_bytes()


def test_a_sound_file_is_fetched_once(server: Server, tmp_path: Path) -> None:
    for _ in range(2):
        assert bring(server, tmp_path / "downloads" / "file") == CONTENT
    assert server.asked == [None]
    assert names(tmp_path / "downloads") == ["file"]


def test_a_dropped_connection_goes_on_where_it_broke(server: Server, tmp_path: Path, pauses: list[float]) -> None:
    server.faults = ["drop", "503", "drop", "429"]
    assert bring(server, tmp_path / "file") == CONTENT
    assert server.asked == [None, "bytes=100000-", "bytes=100000-", "bytes=166666-", "bytes=166666-"]
    assert pauses == [2, 8, 2, 8]


def test_an_earlier_process_s_beginning_is_used(server: Server, tmp_path: Path) -> None:
    for part, ranges in [(CONTENT[:1234], True), (CONTENT, True), (CONTENT[:1234], False)]:
        (tmp_path / "file.part").write_bytes(part)
        server.asked, server.ranges = [], ranges
        assert bring(server, tmp_path / "file") == CONTENT
        assert server.asked == [f"bytes={len(part)}-"]
        (tmp_path / "file").unlink()


def test_a_wrong_hash_is_told_and_nothing_stays(server: Server, tmp_path: Path) -> None:
    for part, content in [(b"", CONTENT[:-1] + b"?"), (b"of another file", CONTENT), (CONTENT + b"more", CONTENT)]:
        if part:
            (tmp_path / "file.part").write_bytes(part)
        server.content = content
        with pytest.raises(InputError, match=f"not the pinned {SHA256[:16]}.*the same command fetches it again"):
            bring(server, tmp_path / "file")
        assert names(tmp_path) == []
    assert bring(server, tmp_path / "file") == CONTENT


def test_a_file_of_that_name_with_other_content_is_not_replaced(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(InputError, match="remove it to download it again"):
        bring(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_it_gives_up_in_one_line_with_the_address(server: Server, tmp_path: Path, pauses: list[float]) -> None:
    dead = Server("http://127.0.0.1:9/file")
    for source, faults, requests in [(server, ["404"], 1), (server, ["503"] * 20, 6), (dead, [], 0)]:
        server.faults, server.asked = faults, []
        with pytest.raises(InputError, match=rf"{source.url}: .*; --input or .* work without a network") as raised:
            bring(source, tmp_path / "file")
        assert "\n" not in str(raised.value)
        assert len(server.asked) == requests
    assert pauses[-4:] == [2, 4, 8, 16]


def test_a_full_disk_is_told_and_with_room_again_the_beginning_counts(server: Server, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(InputError, match=r"cannot be written .*; make room there, then give the same command"):
            bring(server, tmp_path / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert bring(server, tmp_path / "file") == CONTENT
    assert server.asked == [None, "bytes=200000-"]


@pytest.fixture
def preset(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Preset:
    """Runs `textfiles.py tales ...` in tmp_path, tales being what the server sends."""
    server.content = b"once\n--\nupon a time\n--\n" * 500
    sha256 = hashlib.sha256(server.content).hexdigest()
    tales = Corpus((RemoteFile(server.url, sha256, len(server.content)),), tokenizer="char", split_documents_on="--")
    monkeypatch.setitem(corpora.CORPORA, "tales", tales)
    unknown = RemoteFile(server.url + ".2", None)
    monkeypatch.setitem(corpora.CORPORA, "unknown", Corpus((*tales.train, unknown)))
    monkeypatch.chdir(tmp_path)

    return functools.partial(called, main)


def test_a_preset_downloads_checks_and_prepares(server: Server, preset: Preset, tmp_path: Path) -> None:
    assert preset("tales").returncode == 0
    assert names(tmp_path / "data") == ["downloads", "tales"]
    assert decoded(tmp_path / "data" / "tales") == server.content.replace(b"--", b"")
    copy = tmp_path / "copy.txt"
    copy.write_bytes(server.content)
    assert preset("tales", "--input", str(copy), "--out", "data/copied", "--shard-tokens", "900").returncode == 0
    assert decoded(tmp_path / "data" / "copied") == server.content.replace(b"--", b"")
    copy.write_bytes(server.content + b"?")
    refused = preset("tales", "--input", str(copy), "--out", "data/other")
    assert refused.returncode == 2 and "copy.txt: its sha256 is " in refused.stderr
    assert len(server.asked) == 1


def test_impossible_presets_are_refused_before_any_download(server: Server, preset: Preset, tmp_path: Path) -> None:
    for arguments, line in (
        (["unknown"], f"textfiles: no sha256 is pinned for {server.url}.2; fetch "),
        (["tales", "--val-input", "x"], "tales takes --input alone, or neither"),
        (["tinystories", "--input", "x"], "tinystories takes both --input and --val-input, or neither"),
        (["tinyshakespear"], "no preset 'tinyshakespear', only tinyshakespeare, tinystories"),
    ):
        refused = preset(*arguments)
        assert refused.returncode == 2 and line in refused.stderr and refused.stderr.count("\n") == 1
    assert server.asked == [] and names(tmp_path) == []


def test_the_real_presets_pin_what_they_fetch(shared_data: Path, tmp_path: Path) -> None:
    for name, corpus in CORPORA.items():
        options, preset = parse([name])
        assert preset == name
        assert (options.out, options.tokenizer) == (Path("data") / name, corpus.tokenizer)
        for file in corpus.train + corpus.val:
            assert file.url.startswith("https://")
            assert file.sha256 is None or len(bytes.fromhex(file.sha256)) == 32
    out = tmp_path / "shakespeare"
    arguments = ["tinyshakespeare", "--input", str(shared_data / "tinyshakespeare.txt"), "--out", str(out)]
    manifest = textfiles.prepare(*parse(arguments))
    assert [split.tokens for split in manifest.splits.values()] == [1_003_854, 111_540]
    assert manifest.source["files"][0]["name"] == "input.txt"
    assert manifest.source["urls"] == [CORPORA["tinyshakespeare"].train[0].url]
