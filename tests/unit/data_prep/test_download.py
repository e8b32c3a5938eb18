"""Downloads against a server that drops, refuses and lies; the presets on top of it."""

import datetime
import email.utils
import hashlib
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from common.errors import InputError
from data_prep import textfiles
from data_prep.hub import corpora, download
from data_prep.hub.corpora import CORPORA, Corpus, RemoteFile
from data_prep.hub.download import asked_seconds, fetch
from data_prep.textfiles import main, parse
from tests.unit.data_prep.test_textfiles import decoded, names

CONTENT = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


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


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long it would have waited."""
    slept: list[float] = []
    monkeypatch.setattr(download.time, "sleep", slept.append)
    return slept


def test_a_sound_file_is_fetched_once(server: Server, tmp_path: Path) -> None:
    for _ in range(2):
        fetch(server.url, SHA256, tmp_path / "downloads" / "file", num_bytes=len(CONTENT))
        assert (tmp_path / "downloads" / "file").read_bytes() == CONTENT
    assert server.asked == [None]
    assert names(tmp_path / "downloads") == ["file"]


@pytest.mark.parametrize("num_bytes", [None, len(CONTENT)])
def test_a_dropped_connection_goes_on_where_it_broke(
    server: Server, tmp_path: Path, pauses: list[float], num_bytes: int | None
) -> None:
    server.faults = ["drop", "503", "drop", "429"]
    fetch(server.url, SHA256, tmp_path / "file", num_bytes=num_bytes)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.asked == [None, "bytes=100000-", "bytes=100000-", "bytes=166666-", "bytes=166666-"]
    assert pauses == [1, 7, 1, 7]


def test_an_earlier_process_s_beginning_is_used(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(CONTENT[:1234])
    fetch(server.url, SHA256, tmp_path / "file", num_bytes=len(CONTENT))
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.asked == ["bytes=1234-"]


def test_a_server_without_ranges_sends_it_all_again(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    (tmp_path / "file.part").write_bytes(CONTENT[:1234])
    fetch(server.url, SHA256, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_beginning_longer_than_the_file_is_thrown_away(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(CONTENT + b"more")
    fetch(server.url, SHA256, tmp_path / "file", num_bytes=len(CONTENT))
    assert (tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize("beginning", [b"", b"of another file"])
def test_a_wrong_hash_is_told_and_nothing_stays(server: Server, tmp_path: Path, beginning: bytes) -> None:
    if beginning:
        (tmp_path / "file.part").write_bytes(beginning)
    else:
        server.content = CONTENT[:-1] + b"?"
    with pytest.raises(InputError, match=f"not the pinned {SHA256[:16]}"):
        fetch(server.url, SHA256, tmp_path / "file", num_bytes=len(CONTENT))
    assert names(tmp_path) == []


def test_a_file_of_that_name_with_other_content_is_not_replaced(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(InputError, match="remove it to download it again"):
        fetch(server.url, SHA256, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"mine"


@pytest.mark.parametrize(("faults", "num_asked"), [(["404"], 1), (["503"] * 20, 6)])
def test_it_gives_up_with_the_address(server: Server, tmp_path: Path, faults: list[str], num_asked: int) -> None:
    server.faults = faults
    with pytest.raises(InputError, match=server.url):
        fetch(server.url, SHA256, tmp_path / "file")
    assert len(server.asked) == num_asked


@pytest.mark.parametrize(
    ("retry_after", "rate_limit", "seconds"),
    [
        (None, None, None),
        ("", None, None),
        ("7", None, 7),
        (" 120 ", None, 120),
        ("soon", None, None),
        ("Wed, 21 Oct 2015 07:28:00 GMT", None, 0),  # RFC 9110's example, long past
        (None, '"api";r=0;t=55', 56),
        ("7", '"resolvers"; r=0; t=280', 281),
        ("7", '"api";r=12;t=55', 7),  # every answer has it; here it is not the reason
        (None, "50", None),
    ],
)
def test_what_headers_ask(retry_after: str | None, rate_limit: str | None, seconds: float | None) -> None:
    assert asked_seconds(retry_after, rate_limit) == seconds


def test_a_date_to_come_is_waited_for() -> None:
    then = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=90)
    asked = asked_seconds(email.utils.format_datetime(then, usegmt=True))
    assert asked is not None and 80 < asked <= 90


def test_no_network_is_told_soon(tmp_path: Path, pauses: list[float]) -> None:
    with pytest.raises(InputError, match="give it with --input"):
        fetch("http://127.0.0.1:9/file", SHA256, tmp_path / "file")
    assert sum(pauses) <= 2


@pytest.fixture
def preset(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs `textfiles.py tales ...` in tmp_path, tales being what the server sends."""
    server.content = b"once\n--\nupon a time\n--\n" * 500
    sha256 = hashlib.sha256(server.content).hexdigest()
    tales = Corpus((RemoteFile(server.url, sha256, len(server.content)),), tokenizer="char", split_documents_on="--")
    monkeypatch.setitem(corpora.CORPORA, "tales", tales)
    unknown = RemoteFile(server.url + ".2", None)
    monkeypatch.setitem(corpora.CORPORA, "unknown", Corpus((*tales.train, unknown)))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        try:
            main(list(arguments))
        except SystemExit as ending:
            assert ending.code == 2
            return "refused"
        return "done"

    return run


def test_a_preset_downloads_checks_and_prepares(
    server: Server, preset: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert preset("tales") == "done"
    assert names(tmp_path / "data") == ["downloads", "tales"]
    assert decoded(tmp_path / "data" / "tales") == server.content.replace(b"--", b"")
    copy = tmp_path / "copy.txt"
    copy.write_bytes(server.content)
    assert preset("tales", "--input", str(copy), "--out", "data/copied", "--shard-tokens", "900") == "done"
    assert decoded(tmp_path / "data" / "copied") == server.content.replace(b"--", b"")
    copy.write_bytes(server.content + b"?")
    assert preset("tales", "--input", str(copy), "--out", "data/other") == "refused"
    assert "copy.txt: its sha256 is " in capsys.readouterr().err
    assert len(server.asked) == 1


def test_without_a_pinned_hash_nothing_is_downloaded(
    server: Server, preset: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert preset("unknown") == "refused"
    line = capsys.readouterr().err
    assert line.startswith(f"textfiles: no sha256 is pinned for {server.url}.2; fetch ")
    assert line.count("\n") == 1
    assert server.asked == []
    assert names(tmp_path) == []


def test_a_preset_takes_its_own_kinds_of_files(preset: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    assert preset("tales", "--val-input", "x") == "refused"
    assert "tales takes --input alone, or neither" in capsys.readouterr().err
    assert preset("tinystories", "--input", "x") == "refused"
    assert "tinystories takes both --input and --val-input, or neither" in capsys.readouterr().err


def test_an_unknown_preset_is_refused_with_those_there_are(
    preset: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert preset("tinyshakespear") == "refused"
    assert "no preset 'tinyshakespear', only tinyshakespeare, tinystories" in capsys.readouterr().err


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
