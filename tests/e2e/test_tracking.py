"""Real wandb, offline: what it recorded is read back from its own files. Its server is played where one is needed."""

import http.server
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from train.metrics import wandb_process
from train.metrics.wandb_process import Tracking, open_tracking

ROOT = Path(__file__).resolve().parents[2]
ID = "abcd1234"
BLOCK_BYTES = 32_768
ROWS = [
    {"step": 1, "tokens": 10, "seconds": 0.5, "loss": 4.0, "mfu": None, "flops": 60},
    {"step": 2, "tokens": 20, "seconds": 0.9, "loss": 3.5, "mfu": None, "flops": 120},
    {"step": 2, "tokens": 20, "val_loss": 3.75, "val_bits_per_byte": 2.5},
    {"step": 5, "tokens": 50, "seconds": 2.5, "loss": 3.0, "mfu": 0.25, "flops": 300},
]


@pytest.fixture(autouse=True)
def nobody_logged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., tuple[Tracking, list[str]]]]:
    """Open tracking of RUN = tmp_path / "run"; what it says is in the list. Left-over helpers are ended."""
    opened: list[Tracking] = []

    def started(mode: Any = "offline", **options: Any) -> tuple[Tracking, list[str]]:
        said: list[str] = []
        defaults: dict[str, Any] = {
            "run_dir": tmp_path / "run",
            "run_id": ID,
            "name": "tiny",
            "project": "ladder",
            "group": None,
            "tags": (),
            "config": {"seed": 1337},
            "provenance": {},
            "log": said.append,
        }
        tracked = open_tracking(mode=mode, **(defaults | options))
        assert tracked is not None
        opened.append(tracked)
        return tracked, said

    yield started
    for tracked in opened:
        if tracked._helper is not None:
            tracked._release()


def chunks(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(type, payload) of each part of a LevelDB log, which a .wandb file is after its first seven bytes."""
    place = 7
    while place < len(data):
        if BLOCK_BYTES - place % BLOCK_BYTES < 7:
            place += BLOCK_BYTES - place % BLOCK_BYTES
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        yield kind, data[place + 7 : place + 7 + length]
        place += 7 + length


def records(attempt: Path) -> list[Any]:
    from wandb.proto import wandb_internal_pb2

    found, whole = [], b""
    for kind, part in chunks((attempt / f"run-{ID}.wandb").read_bytes()):
        whole += part
        if kind in (1, 4):  # all of a record, or the last part of one
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(whole)
            found.append(record)
            whole = b""
    return found


def attempts(run_dir: Path) -> list[Path]:
    """The directories that wandb made, oldest first; attempts of one second by their suffix."""
    return sorted(run_dir.glob("wandb/offline-run-*"), key=lambda path: path.stat().st_mtime_ns)


def logged(attempt: Path) -> list[dict[str, Any]]:
    """History rows, without what wandb adds, and each under wandb's own step."""
    rows = []
    for record in records(attempt):
        if record.HasField("history"):
            row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            assert row["_step"] == row["step"]
            rows.append({key: value for key, value in row.items() if not key.startswith("_")})
    return rows


def exit_codes(attempt: Path) -> list[int]:
    return [record.exit.exit_code for record in records(attempt) if record.HasField("exit")]


def sync(line: str, cwd: Path, *more: str) -> str:
    """Do what the line says; what that prints."""
    program, *args = line.split("`")[1].split()
    command = [program, *args, *more]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True, timeout=30).stderr


def service_of(tracked: Tracking) -> int:
    """Process id of wandb's own service, once the helper has started it."""
    assert tracked._helper is not None
    children = Path(f"/proc/{tracked._helper.pid}/task/{tracked._helper.pid}/children")
    return wait_for(lambda: children.read_text().split())


def wait_for(look: Callable[[], list[str]]) -> int:
    end = time.monotonic() + 20
    while not (found := look()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return int(found[0])


def test_the_run_is_recorded_and_a_later_attempt_is_the_same_run(start: Any, tmp_path: Path) -> None:
    first, said = start(
        group="sweep 1",
        tags=("a", "b"),
        config={"seed": 1337, "model": {"width": 32, "tokens": None}},
        provenance={"commit": "c0ffee", "changes": "+" * 20_000},
    )
    for row in ROWS:
        first.row(row)
    first.row({"step": 5, "samples": [{"prompt": "To <b>", "text": "be\nor"}]})
    first.close(exit_code=0)
    program = Path(sys.executable).with_name("wandb")
    line = f"{program} sync --id {ID} {tmp_path}/run/wandb"
    assert said == [f"W&B: upload every attempt as one run with `{line}` (after `wandb login`)"]

    second, said = start()
    second.row({"step": 6, "tokens": 60, "loss": 2.0})
    second.close(exit_code=1)
    assert len(said) == 1

    one, two = attempts(tmp_path / "run")
    run = next(record.run for record in records(one) if record.HasField("run"))
    assert (run.run_id, run.project, run.display_name, run.run_group) == (ID, "ladder", "tiny", "sweep 1")
    assert list(run.tags) == ["a", "b"]
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["seed"] == 1337
    assert config["model"] == {"width": 32, "tokens": None}
    assert config["provenance"] == {"commit": "c0ffee", "changes": "(20000 characters, see the run directory)"}

    rows = logged(one)
    page = (one / "files" / rows[2]["samples/path"]).read_text(encoding="utf-8")
    rows[2] = {key: value for key, value in rows[2].items() if not key.startswith("samples/")}
    assert rows == [
        {"step": 1, "tokens": 10, "seconds": 0.5, "loss": 4.0, "flops": 60},
        {
            "step": 2,
            "tokens": 20,
            "seconds": 0.9,
            "loss": 3.5,
            "flops": 120,
            "val_loss": 3.75,
            "val_bits_per_byte": 2.5,
        },
        {"step": 5, "tokens": 50, "seconds": 2.5, "loss": 3.0, "mfu": 0.25, "flops": 300},
    ]
    assert "<b>To &lt;b&gt;</b>be\nor" in page

    metrics = [record.metric for record in records(one) if record.HasField("metric")]
    assert {m.name for m in metrics if m.name} == {"step", "tokens", "seconds", "flops"}
    assert [m.step_metric for m in metrics if m.glob_name == "*"] == ["step"]
    assert exit_codes(one) == [0]

    assert next(record.run for record in records(two) if record.HasField("run")).run_id == ID
    assert logged(two) == [{"step": 6, "tokens": 60, "loss": 2.0}]
    assert exit_codes(two) == [1]

    assert "Would sync 2 run(s)" in sync(said[0], tmp_path, "--dry-run")


def test_without_a_login_it_says_so_and_records_offline(start: Any, tmp_path: Path) -> None:
    tracked, said = start("online")
    for row in ROWS:
        tracked.row(row)
    tracked.close(exit_code=0)
    assert len(said) == 2
    assert "No API key configured" in said[0] and "recording offline" in said[0]
    assert [row["step"] for row in logged(attempts(tmp_path / "run")[0])] == [1, 2, 5]


def test_without_a_server_it_records_offline(start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_process, "INIT_SECONDS", 1.0)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the discard port: nothing listens
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    before = time.monotonic()
    tracked, said = start("online")
    for row in ROWS:
        tracked.row(row)
    assert time.monotonic() - before < 1
    tracked.close(exit_code=0)
    assert time.monotonic() - before < 15
    assert len(said) == 2
    assert "connection refused" in said[0] and "recording offline" in said[0]
    assert [row["step"] for row in logged(attempts(tmp_path / "run")[0])] == [1, 2, 5]


class Server(http.server.BaseHTTPRequestHandler):
    """As much of W&B's server as one run needs: it is made, found again, and its history grows line by line."""

    protocol_version = "HTTP/1.1"
    history: dict[int, dict[str, Any]] = {}  # noqa: RUF012  # by line, of the whole server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:  # the name that http.server looks for
        body = self.rfile.read(int(self.headers["Content-Length"]))
        is_for_us = self.path.endswith(("/graphql", "/file_stream"))  # the rest is wandb's telemetry
        answer = json.dumps(self.answer(json.loads(body)) if is_for_us else {}).encode()
        self.send_response(400 if b'"errors"' in answer else 200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        query = request.get("query", "")
        project = {"id": "P", "name": "ladder", "entity": {"id": "E", "name": "someone"}}
        run: dict[str, Any] = {"id": "R", "name": ID, "config": "{}", "summaryMetrics": "{}", "tags": []}
        if "UpsertBucket" in query:
            return {"data": {"upsertBucket": {"bucket": run | {"project": project}, "inserted": not self.history}}}
        if "RunResumeStatus" in query:
            tail = [json.dumps(self.history[max(self.history)])] if self.history else []
            counts = {"historyLineCount": len(self.history), "eventsLineCount": 0, "logLineCount": 0}
            run |= counts | {"historyTail": json.dumps(tail), "eventsTail": "[]", "wandbConfig": '{"t": 1}'}
            return {"data": {"model": project | {"bucket": run if self.history else None}}}
        if chunk := request.get("files", {}).get("wandb-history.jsonl"):
            for line, text in enumerate(chunk["content"], start=chunk["offset"]):
                self.history[line] = json.loads(text)
        if "query" not in request:
            return {}
        return {"errors": [{"message": "not played"}]}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, dict[str, Any]]]:
    """Somebody is logged in, to a server of their own; the history it has received."""
    Server.history.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listening.server_port}")
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        yield Server.history
        listening.shutdown()
        thread.join()


@pytest.mark.long(reason="five starts of W&B's service; one attempt after another is in `make test`")
def test_attempts_online_and_offline_become_one_run_on_the_server(
    start: Any, server: dict[int, dict[str, Any]], tmp_path: Path
) -> None:
    def attempt(mode: str, steps: range) -> str:
        tracked, said = start(mode)
        for step in steps:
            tracked.row({"step": step, "tokens": 10 * step, "loss": 1 / step})
        tracked.close(exit_code=0)
        assert len(said) == 1
        line: str = said[0]
        return line

    url = attempt("online", range(1, 8))
    assert url.startswith("W&B: http://127.0.0.1:") and url.endswith(f"/someone/ladder/runs/{ID}")
    assert attempt("online", range(5, 11)) == url  # continues from a checkpoint of step 4
    attempt("offline", range(11, 14))
    line = attempt("offline", range(14, 17))
    sync(line, tmp_path)
    assert [(row["_step"], row["step"]) for row in server.values()] == [(step, step) for step in range(1, 17)]


def test_when_the_service_dies_it_is_said_once_and_training_goes_on(start: Any) -> None:
    tracked, said = start()
    tracked.row(ROWS[0])
    os.kill(service_of(tracked), signal.SIGKILL)
    end = time.monotonic() + 20
    while not said:
        assert time.monotonic() < end
        tracked.row(ROWS[0])
        time.sleep(0.05)
    tracked.row(ROWS[1])
    before = time.monotonic()
    tracked.close(exit_code=0)
    assert time.monotonic() - before < 1
    assert len(said) == 1
    assert said[0].startswith("warning: W&B tracking is off: ")
    assert "wandb sync" in said[0]


def test_a_failed_trainer_does_not_wait_and_its_run_is_ended_as_failed(start: Any, tmp_path: Path) -> None:
    tracked, said = start()
    for row in ROWS:
        tracked.row(row)
    started = time.monotonic()
    tracked.leave()
    assert time.monotonic() - started < 1.0
    assert "wandb sync" in said[-1]
    wait_for(lambda: [str(len(wandb_process.LEFT))] if wandb_process.LEFT[-1].poll() is not None else [])
    (attempt,) = attempts(tmp_path / "run")
    assert exit_codes(attempt) == [1] and [row["step"] for row in logged(attempt)] == [1, 2, 5]


def test_a_helper_that_hangs_delays_nothing(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_process, "CLOSE_SECONDS", 0.5)
    tracked, said = start()
    os.kill(tracked._helper.pid, signal.SIGSTOP)
    before = time.monotonic()
    for step in range(5_000):
        tracked.row({"step": step, "loss": 1.0})
    tracked.close(exit_code=0)
    assert time.monotonic() - before < 2
    assert len(said) == 1
    assert "had not ended" in said[0]


def test_rows_that_nobody_takes_are_not_kept_for_ever(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_process, "MAX_UNSENT_BYTES", 10_000)
    tracked, said = start()
    os.kill(tracked._helper.pid, signal.SIGSTOP)
    for step in range(10_000):
        tracked.row({"step": step, "loss": 1.0})
    assert len(said) == 1
    assert "unread" in said[0]


TRAINER = """
import os, signal, sys, time
sys.path[0] = {root!r}
from pathlib import Path
from train.metrics.wandb_process import open_tracking
signal.signal(signal.SIGINT, lambda number, frame: None)
tracked = open_tracking(mode="offline", run_dir=Path("run"), run_id={id!r}, name="tiny", project="ladder", group=None,
                        tags=(), config={{}}, provenance={{}}, log=print)
tracked.row({{"step": 1}})
while not list(Path("run").glob("wandb/offline-run-*/*.wandb")):
    time.sleep(0.02)
os.killpg(0, signal.SIGINT)
tracked.row({{"step": 2}})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_ctrl_c_does_not_reach_it_and_the_run_of_a_killed_trainer_is_ended(tmp_path: Path) -> None:
    code = TRAINER.format(root=str(ROOT), id=ID)
    trainer = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, start_new_session=True, capture_output=True, text=True, timeout=30
    )
    assert trainer.returncode == -signal.SIGKILL, trainer.stderr
    wait_for(lambda: [str(code) for attempt in attempts(tmp_path / "run") for code in exit_codes(attempt)])
    (attempt,) = attempts(tmp_path / "run")
    assert [row["step"] for row in logged(attempt)] == [1, 2]
    assert exit_codes(attempt) == [1]


def test_what_stops_it_from_starting_is_said(start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    options: dict[str, Any] = {"run_id": ID, "name": "n", "project": "p", "group": None, "tags": (), "config": {}}
    options |= {"provenance": {}, "log": said.append}
    (tmp_path / "file").touch()
    assert open_tracking(mode="offline", run_dir=tmp_path / "file", **options) is None
    assert len(said) == 1 and said[0].startswith("warning: no W&B tracking: ")
    assert open_tracking(mode="disabled", run_dir=tmp_path / "run", **options) is None
    assert not (tmp_path / "run").exists()

    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracked, said = start(project="a/b")
    tracked.close(exit_code=0)
    assert said[0] == "warning: WANDB_MODE=disabled has no effect: --track.wandb offline decides"
    assert "Invalid project name" in said[1]
    assert len(said) == 2
