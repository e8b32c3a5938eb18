"""Files of the Hub from a server that plays it, and that refuses, breaks off and lies."""

import fcntl
import hashlib
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import SO_LINGER, SOL_SOCKET

import huggingface_hub
import pytest
from huggingface_hub import constants

from common.errors import InputError
from data_prep.hub import files as hub
from data_prep.hub.files import PINNED, HubFile, HubListing, download, list_files
from data_prep.pipeline import workers
from tests.helpers.runs import ROOT

DATASET = "HuggingFaceFW/fineweb-edu"
COMMIT = PINNED[DATASET]
MAIN = "1" * 40
LARGE = random.Random(0).randbytes(24 * 2**20)
FILES = {
    "sample/10BT/001_00000.parquet": b"second" * 1000,
    "sample/10BT/000_00000.parquet": b"first" * 1000,
    "sample/10BT/README.md": b"no parquet",
    "sample/100BT/000_00000.parquet": b"of the larger sample",
    "data/CC-MAIN-2024-10/train-00000.parquet": b"a crawl",
    "data/CC-MAIN-2013-20/train-00000.parquet": b"another",
}
FIRST, SECOND = (f"sample/10BT/00{number}_00000.parquet" for number in (0, 1))


@dataclass(frozen=True)
class Fault:
    """status: of the answer. Else `broken`: closed, reset or stalled after two thirds of the body."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    broken: str = ""


@dataclass
class FakeHub:
    """files: what it has. faults: what goes wrong with the next requests of each kind. asked: all, as (kind, what)."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=lambda: dict(FILES))
    faults: dict[str, list[Fault]] = field(default_factory=lambda: defaultdict(list))
    asked: list[tuple[str, str]] = field(default_factory=list)
    tokens: list[tuple[str, str]] = field(default_factory=list)
    page: int = 1000
    main: str = MAIN
    sha: str = ""  # that it names in place of the commit asked for
    released: threading.Event = field(default_factory=threading.Event)

    def of(self, kind: str) -> list[str]:
        return [what for asked, what in self.asked if asked == kind]


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Answer the requests for the commit (info), the files (tree), a file's place and, from another host, it (get)."""

    hub: FakeHub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def send_place(self) -> None:
        """Send where a file's bytes are, on another host."""
        path = self.path.split("/resolve/")[1].partition("/")[2]
        if self.goes_well("place", path):
            self.send_response(302)
            self.send_header("Location", f"{self.hub.url.replace('127.0.0.1', 'localhost')}/cdn/{path}?signature=x")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        if path.startswith("/cdn/"):
            self.send_file(path.removeprefix("/cdn/"))
        elif "/resolve/" in path:
            self.send_place()
        elif "/tree/" in path:
            self.send_tree(urllib.parse.unquote(path.split("/tree/")[1]), query)
        elif "/revision/" not in path:
            self.goes_well("other", path)
            self.send_error(404)
        else:
            revision = path.split("/revision/")[1]
            commit = self.hub.main if revision == "main" else self.hub.sha or revision
            if self.goes_well("info", revision):
                self.send_json({"id": DATASET, "sha": commit})

    def goes_well(self, kind: str, what: str) -> bool:
        self.hub.asked.append((kind, what))
        self.hub.tokens.append((kind, self.headers.get("Authorization", "")))
        if not self.hub.faults[kind] or self.hub.faults[kind][0].broken:
            return True
        fault = self.hub.faults[kind].pop(0)
        self.send_response(fault.status)
        for name, value in ({"Content-Length": "0"} | fault.headers).items():
            self.send_header(name, value)
        self.end_headers()
        return False

    def send_json(self, value: object, **headers: str) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        for name, text in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(body)

    def send_tree(self, place: str, query: str) -> None:
        if not self.goes_well("tree", place):
            return
        folder = place.partition("/")[2]
        begin = int(urllib.parse.parse_qs(query).get("cursor", ["0"])[0])
        below = [path for path in self.hub.files if path.startswith(f"{folder}/" if folder else "")]
        entries = [{"type": "directory", "path": folder or "data", "oid": "0" * 40, "size": 0}] if not begin else []
        for path in below[begin : begin + self.hub.page]:
            content = self.hub.files[path]
            lfs = {"oid": sha256(content), "size": len(content), "pointerSize": 130}
            entry = {"type": "file", "path": path, "oid": "0" * 40, "size": len(content)}
            entries.append(entry | ({"lfs": lfs, "xetHash": lfs["oid"]} if path.endswith("0.parquet") else {}))
        more = begin + self.hub.page < len(below)
        link = f'<{self.hub.url}{self.path.partition("?")[0]}?cursor={begin + self.hub.page}>; rel="next"'
        self.send_json(entries, **({"Link": link} if more else {}))

    def send_file(self, path: str) -> None:
        asked = self.headers.get("Range", "")
        if not self.goes_well("get", f"{path} {asked}".strip()):
            return
        content = self.hub.files[path]
        begin = int(asked.removeprefix("bytes=").rstrip("-") or 0)
        fault = self.hub.faults["get"].pop(0) if self.hub.faults["get"] else Fault()
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(content) - begin))
        if asked:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        body = content[begin:]
        self.wfile.write(body[: len(body) * 2 // 3] if fault.broken else body)
        if fault.broken == "stalled":
            self.hub.released.wait()
        if fault.broken == "reset":
            self.connection.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    state = FakeHub()
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": state})) as running:
        running.handle_error = lambda *_: None  # type: ignore[method-assign]  # a connection that it reset itself
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        state.url = f"http://127.0.0.1:{running.server_port}"
        monkeypatch.setenv("HF_ENDPOINT", state.url)
        monkeypatch.setattr(constants, "ENDPOINT", state.url)  # as the library would read it in a new process
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        yield state
        running.shutdown()
    huggingface_hub.close_session()


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long we and the library would have waited."""
    slept: list[float] = []
    really = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: slept.append(seconds) if seconds >= 1 else really(seconds))
    return slept


def sample() -> HubListing:
    return list_files(DATASET, "sample-10BT", None)


def assert_whole(folder: Path, *names: str) -> None:
    """Hold what `download` returns, of the sample or the files of it with these names, against the Hub's bytes."""
    listing = sample()
    files = [file for file in listing.files if file.path in (names or FILES)]
    paths = download(listing, files, folder)
    assert [(path, path.read_bytes()) for path in paths] == [(folder / f.path, FILES[f.path]) for f in files]


def test_a_listing_is_of_a_commit_and_of_the_folder_that_a_name_stands_for(server: FakeHub) -> None:
    server.page = 1
    files = tuple(HubFile(path, len(FILES[path]), sha256(FILES[path])) for path in (FIRST, SECOND))
    assert sample() == HubListing(DATASET, COMMIT, files)
    assert server.asked == [("info", COMMIT), *[("tree", f"{COMMIT}/sample/10BT")] * 3]
    assert set(server.tokens) == {("info", "Bearer hf_test"), ("tree", "Bearer hf_test")}
    server.sha = "2" * 40  # a mirror cannot move a pinned commit, only say what another name stands for
    for dataset, revision, wanted, commit in [
        ("HuggingFaceFW/fineweb", None, "main", MAIN),
        (DATASET, "main", "main", MAIN),
        (DATASET, "v1", "v1", "2" * 40),
        (DATASET, "a" * 40, "a" * 40, "a" * 40),
    ]:
        server.asked.clear()
        assert list_files(dataset, "sample-100BT", revision).revision == commit
        assert server.asked[:2] == [("info", wanted), ("tree", f"{commit}/sample/100BT")]
    for name, folder, num_files in [("default", "data/", 2), ("CC-MAIN-2024-10", "data/CC-MAIN-2024-10/", 1)]:
        listed = list_files(DATASET, name, None).files
        assert len([file for file in listed if file.path.startswith(folder)]) == len(listed) == num_files


def test_names_and_answers_that_cannot_be_are_refused(server: FakeHub) -> None:
    for name in ("sample-10bt", "CC-MAIN-2024", "", "../data"):
        with pytest.raises(InputError, match=re.escape(f"--name {name}: must be sample-10BT, ")):
            list_files(DATASET, name, None)
    assert server.asked == []
    with pytest.raises(InputError, match=r"no .parquet file in sample/350BT \(--name sample-350BT\)"):
        list_files(DATASET, "sample-350BT", None)
    for path in ("sample/10BT/../../../0.parquet", "sample/10BT/without_sha256.parquet"):
        server.files = FILES | {path: b"!"}
        with pytest.raises(InputError, match=f"lists '{re.escape(path)}', outside of sample/10BT or without a sha256"):
            sample()
    for kind in ("info", "tree"):
        server.faults[kind] = [Fault(200)]  # an empty body
        with pytest.raises(InputError, match=r"what answers is not the Hub \(HF_ENDPOINT"):
            sample()
    server.main = "../" * 13 + "x"
    with pytest.raises(InputError, match=r"what answers is not the Hub \(HF_ENDPOINT"):
        list_files(DATASET, "sample-10BT", "main")


def test_files_are_fetched_and_hashed_once_and_need_no_network_then(
    server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    listing, folder = sample(), tmp_path / "downloads"
    backwards = [folder / SECOND, folder / FIRST]
    assert download(listing, listing.files[::-1], folder) == backwards
    assert [path.read_bytes() for path in backwards] == [FILES[SECOND], FILES[FIRST]]
    assert sorted(server.of("get")) == [FIRST, SECOND]
    assert {token for kind, token in server.tokens if kind == "place"} == {"Bearer hf_test"}
    assert {token for kind, token in server.tokens if kind == "get"} == {""}  # another host must never see it
    assert "signature" not in capsys.readouterr().err
    server.asked.clear()
    hashed: list[Path] = []

    def hash_of(path: Path) -> str:
        hashed.append(path)
        return sha256(path.read_bytes())

    monkeypatch.setattr("data_prep.hub.download.sha256_of_file", hash_of)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "huggingface_hub", None)
        assert download(listing, listing.files[::-1], folder) == backwards
    assert hashed == []
    whole = (folder / hub.RECORD).read_bytes()
    for damaged in (b"", whole[3:-3], whole.replace(b" ", b"\xff")):
        (folder / hub.RECORD).write_bytes(damaged)
        assert download(listing, listing.files[::-1], folder) == backwards
        assert sorted(hashed) == backwards[::-1]
        hashed.clear()
    assert server.asked == []
    (folder / FIRST).unlink()
    assert download(listing, listing.files[::-1], folder) == backwards
    assert hashed == [folder / f"{FIRST}.part"]  # what did not change is not hashed again beside it


def test_what_is_damaged_cut_or_brought_by_hand_is_found(
    server: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / FIRST).parent.mkdir(parents=True)
    (tmp_path / FIRST).write_bytes(FILES[FIRST])
    (tmp_path / SECOND).write_bytes(FILES[SECOND][:-1])
    assert_whole(tmp_path)
    assert server.of("get") == [SECOND]
    server.asked.clear()
    (tmp_path / FIRST).write_bytes(FILES[FIRST][::-1])
    (tmp_path / SECOND).unlink()
    assert_whole(tmp_path)
    assert sorted(server.of("get")) == [FIRST, SECOND]
    assert f"download  {tmp_path / FIRST}: its sha256 is not " in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["info", "tree", "place", "get"])
def test_refusals_are_waited_out_as_the_headers_say(
    server: FakeHub, tmp_path: Path, pauses: list[float], kind: str
) -> None:
    limited = {"RateLimit": '"resolvers";r=0;t=55', "RateLimit-Policy": '"fixed window";"resolvers";q=3;w=300'}
    refusals = [Fault(429, {"Retry-After": "7"}), Fault(429, limited), Fault(503, {"Retry-After": "3"}), Fault(502)]
    server.faults[kind] = list(refusals)
    assert_whole(tmp_path, FIRST)
    assert pauses == [8, 56, 4, 8]  # a second more, since servers count in whole ones; 2 ** 3 where nothing says
    server.faults[kind] = [Fault(502)] * 100
    (tmp_path / FIRST).unlink()
    server.asked.clear()
    with pytest.raises(InputError, match="502, Bad Gateway; the same command goes on"):
        assert_whole(tmp_path)
    assert server.of(kind).count(server.of(kind)[0]) == 6


def test_a_broken_transfer_goes_on(server: FakeHub, tmp_path: Path, pauses: list[float]) -> None:
    server.files[FIRST] = LARGE
    server.faults["get"] = [Fault(broken="closed"), Fault(broken="reset")] * 3  # as often as each brings something new
    listing = sample()
    (path,) = download(listing, listing.files[:1], tmp_path)
    assert path.read_bytes() == LARGE
    begins = [int(what.partition("bytes=")[2].rstrip("-") or 0) for what in server.of("get")]
    assert len(begins) == 7 and begins == sorted(set(begins)) and begins[1] > len(LARGE) // 3
    assert pauses == [2] * 6


def test_a_killed_process_leaves_what_the_next_one_goes_on_from(server: FakeHub, tmp_path: Path) -> None:
    server.files[SECOND] = LARGE
    listing = sample()
    download(listing, listing.files[:1], tmp_path)
    server.faults["get"] = [Fault(broken="stalled")]
    server.asked.clear()
    code = (
        "import pathlib; from data_prep.hub.files import *; "
        f"listing = list_files({DATASET!r}, 'sample-10BT', None); download(listing, listing.files, pathlib.Path('.'))"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=env, stderr=subprocess.PIPE) as process:
        while sum(path.stat().st_size for path in tmp_path.rglob("*.part")) < len(LARGE) // 2:
            assert not threading.Event().wait(0.02) and process.poll() is None
        process.kill()
    server.released.set()
    assert {kind for kind, _ in server.asked} == {"info", "tree", "place", "get"}  # and no telemetry
    assert download(listing, listing.files, tmp_path)[1].read_bytes() == LARGE
    (first, again) = server.of("get")
    assert first == SECOND and int(again.removeprefix(f"{SECOND} bytes=").rstrip("-")) >= len(LARGE) // 2
    assert list(tmp_path.rglob("*.part")) == []


def test_a_long_transfer_is_reported_line_by_line(
    server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(workers, "REPORT_SECONDS", 0.0)
    server.files[FIRST] = LARGE
    listing = sample()
    download(listing, listing.files[:1], tmp_path)
    assert re.search(r"^download  \d+\.\d of 25.2 MB  .* left$", capsys.readouterr().err, re.MULTILINE)


@pytest.mark.parametrize(
    ("kind", "fault", "reason"),
    [
        ("info", Fault(401, {"X-Error-Code": "RepoNotFound"}), "401, no such data set for you (--dataset)"),
        ("info", Fault(401, {"X-Error-Message": "Invalid credentials"}), "401, Invalid credentials (HF_TOKEN)"),
        ("info", Fault(404, {"X-Error-Code": "RepoNotFound"}), "404, no such data set for you (--dataset)"),
        (
            "info",
            Fault(404, {"X-Error-Code": "RevisionNotFound"}),
            "404, no such revision of the data set (--revision)",
        ),
        ("tree", Fault(404, {"X-Error-Code": "EntryNotFound"}), "404, no such folder or file in the data set (--name)"),
        ("info", Fault(403, {"X-Error-Code": "GatedRepo"}), "403, gated: accept the terms"),
        ("place", Fault(403, {"X-Error-Code": "GatedRepo"}), "403, gated: accept the terms"),
        ("tree", Fault(403, {"X-Error-Message": "No, not you"}), "403, No, not you (HF_TOKEN)"),
        ("get", Fault(403, {"X-Error-Message": "No, not you"}), "403, No, not you (HF_TOKEN)"),
    ],
)
def test_what_stays_refused_is_told_at_once_in_one_line(
    server: FakeHub, tmp_path: Path, pauses: list[float], kind: str, fault: Fault, reason: str
) -> None:
    (tmp_path / "other").touch()  # snapshot_download would take this folder for the answer
    server.faults[kind] = [fault]
    with pytest.raises(InputError) as raised:
        assert_whole(tmp_path, FIRST)
    assert reason in str(raised.value) and "\n" not in str(raised.value)
    assert (len(server.of(kind)), pauses) == (1, [])


def test_no_network_and_offline_mode_are_told_in_one_line(
    server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    listing = sample()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for ask in (sample, lambda: download(listing, listing.files[:1], tmp_path)):
        pauses.clear()
        with pytest.raises(InputError, match=r"refused; .* --data-files work without a network") as raised:
            ask()
        assert "\n" not in str(raised.value)
        assert sum(pauses) <= 31
    pauses.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for ask in (sample, lambda: download(listing, listing.files[:1], tmp_path)):
        with pytest.raises(InputError, match="offline mode is enabled"):
            ask()
    assert pauses == []


def test_one_process_at_a_time_downloads_to_a_folder(
    server: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listing = sample()
    with (tmp_path / hub.LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        other = threading.Thread(target=download, args=(listing, listing.files, tmp_path))
        other.start()
        while "waiting for another process that downloads to" not in capsys.readouterr().err:
            assert server.of("get") == []
            time.sleep(0.01)
        fcntl.flock(lock, fcntl.LOCK_UN)
    other.join()
    assert_whole(tmp_path)
    assert sorted(server.of("get")) == [FIRST, SECOND]


def test_a_disk_too_small_is_told_before_anything_is_fetched(server: FakeHub, tmp_path: Path) -> None:
    listing = sample()
    vast = HubFile(FIRST, shutil.disk_usage(tmp_path).free + 2**40, listing.files[0].sha256)
    with pytest.raises(InputError, match="GB to download, only"):
        download(listing, [vast], tmp_path)
    assert server.of("get") == []
