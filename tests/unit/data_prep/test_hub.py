"""Files of the Hub from a server that plays it, and that refuses, breaks off and lies."""

import contextlib
import fcntl
import hashlib
import json
import os
import random
import re
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
# The library writes 10 MiB at a time, so that less than that of a broken transfer is lost.
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
    """status: what is answered. Else `broken`: closed, reset or stalled after two thirds of the body."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    broken: str = ""


@dataclass
class FakeHub:
    """files: what it has. faults: what goes wrong with the next requests of each kind. asked: all, as (kind, what)."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=lambda: dict(FILES))
    sent: dict[str, bytes] = field(default_factory=dict)  # in place of what it says that it has
    faults: dict[str, list[Fault]] = field(default_factory=lambda: defaultdict(list))
    asked: list[tuple[str, str]] = field(default_factory=list)
    tokens: list[tuple[str, str]] = field(default_factory=list)
    page: int = 1000
    released: threading.Event = field(default_factory=threading.Event)

    def of(self, kind: str) -> list[str]:
        return [what for asked, what in self.asked if asked == kind]


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """The requests that the library makes: info, tree, head, place (a GET of that) and get, from another host."""

    hub: FakeHub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.send_place("head")

    def send_place(self, kind: str) -> None:
        """What a file is, and where its bytes are: a HEAD is asked for the first, a GET goes on to the second."""
        revision, _, path = self.path.split("/resolve/")[1].partition("/")
        if not self.goes_well(kind, path):
            return
        content = self.hub.files[path]
        about = {
            "X-Repo-Commit": revision,
            "X-Linked-Etag": f'"{sha256(content)}"',
            "X-Linked-Size": str(len(content)),
            "X-Xet-Hash": sha256(content),  # as the Hub has it, of files that Xet could fetch too
            "X-Xet-Refresh-Route": f"{self.hub.url}/xet-read-token",
            "Location": f"{self.hub.url.replace('127.0.0.1', 'localhost')}/cdn/{path}?signature=x",
            "Content-Length": "0",
        }
        self.send_response(302)
        for name, value in about.items():
            self.send_header(name, value)
        self.end_headers()

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        if path.startswith("/cdn/"):
            self.send_file(path.removeprefix("/cdn/"))
        elif "/resolve/" in path:
            self.send_place("place")
        elif "/tree/" in path:
            self.send_tree(urllib.parse.unquote(path.split("/tree/")[1]), query)
        elif "/revision/" not in path:
            self.goes_well("other", path)
            self.send_error(404)
        else:
            revision = path.split("/revision/")[1]
            if self.goes_well("info", revision):
                self.send_json({"id": DATASET, "sha": MAIN if revision == "main" else revision})

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
            entries.append(entry | ({"lfs": lfs, "xetHash": lfs["oid"]} if path.endswith(".parquet") else {}))
        more = begin + self.hub.page < len(below)
        link = f'<{self.hub.url}{self.path.partition("?")[0]}?cursor={begin + self.hub.page}>; rel="next"'
        self.send_json(entries, **({"Link": link} if more else {}))

    def send_file(self, path: str) -> None:
        asked = self.headers.get("Range", "")
        if not self.goes_well("get", f"{path} {asked}".strip()):
            return
        content = self.hub.sent.get(path, self.hub.files[path])
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
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        # As the environment would have them, were the library not imported yet.
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        yield state
        running.shutdown()
    huggingface_hub.close_session()


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long we and the library would have waited."""
    slept: list[float] = []
    really = time.sleep
    # Below a second it is one thread that waits for another's lock on a file.
    monkeypatch.setattr(time, "sleep", lambda seconds: slept.append(seconds) if seconds >= 1 else really(seconds))
    return slept


def sample() -> HubListing:
    return list_files(DATASET, "sample-10BT", None)


def assert_whole(paths: list[Path], folder: Path, names: tuple[str, ...] = (FIRST, SECOND)) -> None:
    assert paths == [folder / name for name in names]
    assert [path.read_bytes() for path in paths] == [FILES[name] for name in names]


def test_the_listing_is_of_the_pinned_commit(server: FakeHub) -> None:
    server.page = 1
    listing = sample()
    assert listing == HubListing(
        DATASET, COMMIT, tuple(HubFile(path, len(FILES[path]), sha256(FILES[path])) for path in (FIRST, SECOND))
    )
    assert server.asked == [("info", COMMIT), *[("tree", f"{COMMIT}/sample/10BT")] * 3]
    assert set(server.tokens) == {("info", "Bearer hf_test"), ("tree", "Bearer hf_test")}


@pytest.mark.parametrize(
    ("dataset", "revision", "asked", "commit"),
    [
        ("HuggingFaceFW/fineweb", None, "main", MAIN),
        (DATASET, "main", "main", MAIN),
        (DATASET, "a" * 40, "a" * 40, "a" * 40),
    ],
)
def test_a_revision_becomes_a_commit(
    server: FakeHub, dataset: str, revision: str | None, asked: str, commit: str
) -> None:
    assert list_files(dataset, "sample-10BT", revision).revision == commit
    assert server.asked == [("info", asked), ("tree", f"{commit}/sample/10BT")]


@pytest.mark.parametrize(
    ("name", "folder", "num_files"),
    [
        ("sample-10BT", "sample/10BT", 2),
        ("sample-100BT", "sample/100BT", 1),
        ("default", "data", 2),
        ("CC-MAIN-2024-10", "data/CC-MAIN-2024-10", 1),
    ],
)
def test_a_name_is_a_folder(server: FakeHub, name: str, folder: str, num_files: int) -> None:
    listing = list_files(DATASET, name, None)
    assert len(listing.files) == num_files
    assert {file.path.startswith(f"{folder}/") for file in listing.files} == {True}


@pytest.mark.parametrize("name", ["sample-10bt", "CC-MAIN-2024", "", "../data"])
def test_another_name_is_refused_with_those_there_are(server: FakeHub, name: str) -> None:
    with pytest.raises(InputError, match=re.escape(f"--name {name}: must be sample-10BT, ")):
        list_files(DATASET, name, None)
    assert server.asked == []


def test_a_name_without_files_and_a_path_that_leads_outside_are_refused(server: FakeHub) -> None:
    with pytest.raises(InputError, match=r"no .parquet file in sample/350BT \(--name sample-350BT\)"):
        list_files(DATASET, "sample-350BT", None)
    server.files["sample/10BT/../../../x.parquet"] = b"!"
    with pytest.raises(InputError, match="which is not in sample/10BT"):
        sample()


def test_files_are_fetched_once(server: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listing = sample()
    asked = tuple(reversed(listing.files))
    for _ in range(2):
        assert_whole(download(listing, asked, tmp_path / "downloads"), tmp_path / "downloads", (SECOND, FIRST))
    assert sorted(server.of("get")) == [FIRST, SECOND]
    assert {token for kind, token in server.tokens if kind == "get"} == {""}  # another host must never see it
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == f"downloading 2 files, 0.0 MB, to {tmp_path / 'downloads'}\n"


def test_without_a_network_what_is_there_is_enough(
    server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = sample()
    download(listing, listing.files, tmp_path)
    num_asked = len(server.asked)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert_whole(download(listing, listing.files, tmp_path), tmp_path)
    (tmp_path / hub.RECORD).write_text("[]")  # hashed again
    assert_whole(download(listing, listing.files, tmp_path), tmp_path)
    assert len(server.asked) == num_asked


def test_files_brought_by_hand_are_hashed_and_not_fetched(server: FakeHub, tmp_path: Path) -> None:
    listing = sample()
    (tmp_path / FIRST).parent.mkdir(parents=True)
    (tmp_path / FIRST).write_bytes(FILES[FIRST])
    (tmp_path / SECOND).write_bytes(FILES[SECOND][:-1])
    assert_whole(download(listing, listing.files, tmp_path), tmp_path)
    assert server.of("get") == [SECOND]


TOO_MANY = Fault(429, {"Retry-After": "7"})
LIMITED = Fault(429, {"RateLimit": '"resolvers";r=0;t=55', "RateLimit-Policy": '"fixed window";"resolvers";q=3;w=300'})
DOWN = Fault(503, {"Retry-After": "3"})
SILENT = Fault(502)


@pytest.mark.parametrize(
    ("kind", "faults", "waited"),
    [
        # The library asks for this once: all waiting is ours.
        ("info", [TOO_MANY, LIMITED, DOWN, SILENT], [7, 56, 3, 2.0**4]),
        # Here it waits itself, a second more than it was asked to; 1 s, 2 s, ... where nobody asked.
        ("tree", [TOO_MANY, LIMITED, DOWN, SILENT], [8, 56, 4, 8]),
        # The first refusal of a HEAD it does not heed: it asks again at once.
        ("head", [TOO_MANY, LIMITED, DOWN, SILENT], [56, 4, 4]),
        # It gives up on a GET's 5xx: then that waiting is ours.
        ("place", [TOO_MANY, LIMITED, DOWN, SILENT], [8, 56, 3, 4]),
        ("get", [TOO_MANY, LIMITED, DOWN, SILENT], [8, 56, 3, 4]),
    ],
)
def test_refusals_are_waited_out_as_the_headers_say(
    server: FakeHub,
    tmp_path: Path,
    pauses: list[float],
    capsys: pytest.CaptureFixture[str],
    kind: str,
    faults: list[Fault],
    waited: list[float],
) -> None:
    server.faults[kind] = list(faults)
    listing = sample()
    assert_whole(download(listing, listing.files[:1], tmp_path), tmp_path, (FIRST,))
    assert pauses == waited
    lines = capsys.readouterr().err.splitlines()
    assert all(re.match("download(ing)?  ?", line) for line in lines)
    assert len([line for line in lines if " in " in line or "aiting" in line]) == len(waited)
    assert "signature" not in "".join(lines)


def test_a_file_s_own_refusals_have_their_own_patience(server: FakeHub, tmp_path: Path) -> None:
    server.faults["get"] = [SILENT] * 5
    listing = sample()
    assert_whole(download(listing, listing.files[:1], tmp_path), tmp_path, (FIRST,))
    server.faults["get"] = [SILENT] * 100
    with pytest.raises(InputError, match=r"502 Bad Gateway, 6 times; the same command goes on from the files"):
        download(listing, listing.files, tmp_path)
    assert len(server.of("get")) == 6 + 6
    server.faults["get"] = []
    assert_whole(download(listing, listing.files, tmp_path), tmp_path)
    assert server.of("get").count(FIRST) == 6


@pytest.mark.parametrize(
    ("broken", "asked_again"),
    [("closed", " bytes=10485760-"), ("reset", "")],  # of a reset connection the library keeps nothing
)
def test_a_broken_transfer_goes_on(
    server: FakeHub, tmp_path: Path, broken: str, asked_again: str, pauses: list[float]
) -> None:
    server.files[FIRST] = LARGE
    server.faults["get"] = [Fault(broken=broken)]
    listing = sample()
    (path,) = download(listing, listing.files[:1], tmp_path)
    assert path.read_bytes() == LARGE
    assert server.of("get") == [FIRST, FIRST + asked_again]
    assert pauses == [1 if broken == "closed" else 2]


def test_a_long_transfer_is_reported_line_by_line(
    server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hub, "WATCH_SECONDS", 0.02)
    monkeypatch.setattr(workers, "REPORT_SECONDS", 0.0)
    server.files[FIRST] = LARGE
    server.faults["get"] = [Fault(broken="stalled")]
    listing = sample()
    threading.Timer(0.5, server.released.set).start()
    download(listing, listing.files[:1], tmp_path)
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("download  10.5 of 25.2 MB  ") for line in lines)
    assert any(line.startswith("check  25.2 of 25.2 MB  ") for line in lines)


def test_wrong_content_is_removed_and_named_and_fetched_again(server: FakeHub, tmp_path: Path) -> None:
    listing = sample()
    server.sent[FIRST] = FILES[FIRST][::-1]
    server.sent[SECOND] = FILES[SECOND][::-1]
    with pytest.raises(InputError, match=f"{FIRST} has sha256 .*{SECOND} has sha256 .* the same command fetches"):
        download(listing, listing.files, tmp_path)
    assert list(tmp_path.rglob("*.parquet")) == []
    server.sent.clear()
    assert_whole(download(listing, listing.files, tmp_path), tmp_path)


def test_a_file_damaged_later_is_fetched_again(
    server: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listing = sample()
    paths = download(listing, listing.files, tmp_path)
    paths[0].write_bytes(FILES[FIRST][::-1])
    paths[1].unlink()
    server.asked.clear()
    assert_whole(download(listing, listing.files, tmp_path), tmp_path)
    assert sorted(server.of("get")) == [FIRST, SECOND]
    assert f"download  removed {paths[0]} has sha256 " in capsys.readouterr().err


def test_a_sound_file_of_another_revision_is_not_removed(server: FakeHub, tmp_path: Path) -> None:
    listing = sample()
    download(listing, listing.files, tmp_path)
    server.files[FIRST] = b"later"
    later = list_files(DATASET, "sample-10BT", "main")
    with pytest.raises(InputError, match="is whole, but of another revision"):
        download(later, later.files, tmp_path)
    assert_whole(download(listing, listing.files, tmp_path), tmp_path)
    later = list_files(DATASET, "sample-10BT", "main")
    assert download(later, later.files[1:], tmp_path) == [tmp_path / SECOND]  # which is the same in both


@pytest.mark.parametrize(
    ("kind", "fault", "said"),
    [
        ("info", Fault(401, {"X-Error-Code": "RepoNotFound"}), "401, no such data set for you (--dataset)"),
        ("info", Fault(401, {"X-Error-Message": "Invalid credentials"}), "401, no such data set for you (--dataset)"),
        ("info", Fault(404, {"X-Error-Code": "RepoNotFound"}), "404, no such data set for you (--dataset)"),
        ("info", Fault(404, {"X-Error-Code": "RevisionNotFound"}), "404, no such revision of it (--revision)"),
        ("tree", Fault(404, {"X-Error-Code": "EntryNotFound"}), "no sample/10BT in it (--name sample-10BT)"),
        ("info", Fault(403, {"X-Error-Code": "GatedRepo"}), "403, gated: accept its terms"),
        ("tree", Fault(403, {"X-Error-Message": "No, not you"}), "403, No, not you (--dataset, HF_TOKEN)"),
        ("get", Fault(403, {"X-Error-Message": "No, not you"}), "403, No, not you (--dataset, HF_TOKEN)"),
        ("head", Fault(404, {"X-Error-Code": "EntryNotFound"}), f"404, no longer has {FIRST}"),
    ],
)
def test_what_stays_refused_is_told_at_once(
    server: FakeHub, tmp_path: Path, pauses: list[float], kind: str, fault: Fault, said: str
) -> None:
    server.faults[kind] = [fault]
    with pytest.raises(InputError) as raised:
        listing = sample()
        download(listing, listing.files[:1], tmp_path)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(server.of(kind)) == 1
    assert pauses == []


def test_a_refused_listing_is_told_though_the_folder_holds_files(
    server: FakeHub, tmp_path: Path, pauses: list[float]
) -> None:
    """The library would return the folder as it is."""
    (tmp_path / "other").write_text("")
    listing = sample()
    server.faults["tree"] = [Fault(403)]
    assert_whole(download(listing, listing.files, tmp_path), tmp_path)
    assert pauses == [2]


def test_no_server_is_told_soon(server: FakeHub, monkeypatch: pytest.MonkeyPatch, pauses: list[float]) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9/")
    with pytest.raises(InputError, match=r"refused, 2 times; .* --source local --data-files GLOB works without") as r:
        sample()
    assert "\n" not in str(r.value)
    assert pauses == [2]


def test_offline_mode_and_a_login_page_are_told(
    server: FakeHub, monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    server.faults["info"] = [Fault(200)]
    with pytest.raises(InputError, match=r"what answers is not the Hub \(HF_ENDPOINT"):
        sample()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set; --source local"):
        sample()
    assert pauses == []


def test_what_is_no_name_and_a_missing_library_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="--dataset, like OWNER/NAME"):
        list_files("a/b/c", "default", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"pip install -e '.\[data\]' \(--source local"):
        sample()


def test_a_killed_process_leaves_nothing_behind_and_its_whole_files_count(server: FakeHub, tmp_path: Path) -> None:
    server.files[SECOND] = LARGE
    listing = sample()
    download(listing, listing.files[:1], tmp_path)
    server.faults["get"] = [Fault(broken="stalled")]
    server.asked.clear()
    code = (
        "import pathlib, sys; from data_prep.hub.files import *; "
        f"listing = list_files({DATASET!r}, 'sample-10BT', None); download(listing, listing.files, pathlib.Path('.'))"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=env, stderr=subprocess.PIPE) as process:
        while not [path for path in tmp_path.rglob("*.incomplete") if path.stat().st_size]:
            assert not threading.Event().wait(0.02) and process.poll() is None
        process.kill()
    server.released.set()
    assert len(list(tmp_path.rglob("*.incomplete"))) == 1
    assert download(listing, listing.files, tmp_path)[1].read_bytes() == LARGE
    assert list(tmp_path.rglob("*.incomplete")) == []
    assert server.of("get") == [SECOND, SECOND]
    assert {kind for kind, _ in server.asked} == {"info", "tree", "head", "place", "get"}


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
    assert_whole(download(listing, listing.files, tmp_path), tmp_path)


def test_a_full_disk_is_told_before_anything_is_fetched(
    server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = sample()
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    vast = HubFile(FIRST, free + 2**40, listing.files[0].sha256)
    with pytest.raises(InputError, match="GB to download, only"):
        download(listing, [vast], tmp_path)
    assert server.of("get") == []


def test_many_files_are_asked_for_in_parts(server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "FILES_PER_CALL", 1)
    server.sent[SECOND] = b"?" * len(FILES[SECOND])
    listing = sample()
    with contextlib.suppress(InputError):
        download(listing, listing.files, tmp_path)
    server.sent.clear()
    assert_whole(download(listing, listing.files, tmp_path), tmp_path)
    assert server.of("get") == [FIRST, SECOND, SECOND]
