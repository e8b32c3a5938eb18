"""Real wandb, mostly offline: its records are read back from its own files. One test plays its server."""

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

from tests.helpers.names import LONG
from tests.helpers.runs import ROOT
from train.metrics import wandb_process
from train.metrics.wandb_process import Tracking, open_tracking

ID = "abcd1234"
BLOCK_BYTES = 32_768
ROWS: list[dict[str, Any]] = [
    {"step": 1, "tokens": 10, "seconds": 0.5, "loss": 4.0, "mfu": None, "flops": 60},
    {"step": 2, "tokens": 20, "seconds": 0.9, "loss": 3.5, "mfu": None, "flops": 120},
    {"step": 2, "tokens": 20, "val_loss": 3.75, "val_bits_per_byte": 2.5},
    {"step": 5, "tokens": 50, "seconds": 2.5, "loss": 3.0, "mfu": 0.25, "flops": 300},
]

OPTIONS: dict[str, Any] = {
    **{"run_id": ID, "name": "tiny", "project": "ladder", "group": None, "tags": ()},
    **{"config": {"seed": 1337}, "provenance": {}},
}


@pytest.fixture(autouse=True)
def nobody_logged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., tuple[Tracking, list[str]]]]:
    """Return a function that opens tracking of tmp_path / "run" and returns it with its messages."""
    opened: list[Tracking] = []

    def started(mode: Any = "offline", **options: Any) -> tuple[Tracking, list[str]]:
        messages: list[str] = []
        tracked = open_tracking(mode=mode, **OPTIONS | {"run_dir": tmp_path / "run", "log": messages.append} | options)
        assert tracked is not None
        opened.append(tracked)
        return tracked, messages

    yield started
    for tracked in opened:
        if tracked._helper is not None:
            tracked._release()


def chunks(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (type, payload) of each part of a LevelDB log, which a .wandb file is after seven bytes."""
    offset = 7
    while offset < len(data):
        if BLOCK_BYTES - offset % BLOCK_BYTES < 7:
            offset += BLOCK_BYTES - offset % BLOCK_BYTES
            continue
        _, length, kind = struct.unpack_from("<IHB", data, offset)
        yield kind, data[offset + 7 : offset + 7 + length]
        offset += 7 + length


def records(attempt: Path) -> list[Any]:
    from wandb.proto import wandb_internal_pb2

    parsed, whole = [], b""
    for kind, part in chunks((attempt / f"run-{ID}.wandb").read_bytes()):
        whole += part
        if kind in (1, 4):  # all of a record, or the last part of one
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(whole)
            parsed.append(record)
            whole = b""
    return parsed


def attempts(run_dir: Path) -> list[Path]:
    """Return the directories that wandb made, oldest first."""
    return sorted(run_dir.glob("wandb/offline-run-*"), key=lambda path: path.stat().st_mtime_ns)


def logged(attempt: Path) -> list[dict[str, Any]]:
    """Return the history rows without wandb's additions, after comparing their steps with wandb's."""
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
    """Run the command of a message, and return what it prints."""
    program, *args = line.split("`")[1].split()
    command = [program, *args, *more]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True, timeout=30).stderr


def wait_for(condition: Callable[[], Any]) -> Any:
    """Return the first true value of `condition`, within 20 s."""
    end = time.monotonic() + 20
    while not (value := condition()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return value


def test_a_long_name_is_cut_to_what_the_server_takes(start: Any, tmp_path: Path) -> None:
    tracked, _ = start(name=LONG, group=LONG, run_dir=tmp_path / LONG)
    tracked.row(ROWS[0])
    tracked.close(exit_code=0)
    (attempt,) = attempts(tmp_path / LONG)
    run = next(record.run for record in records(attempt) if record.HasField("run"))
    assert (run.display_name, run.run_group) == (LONG[:128], LONG[:128])


def test_the_run_is_recorded_and_a_later_attempt_is_the_same_run(start: Any, tmp_path: Path) -> None:
    config: dict[str, Any] = {"seed": 1337, "model": {"width": 32, "tokens": None}}
    provenance: dict[str, Any] = {"commit": "c0ffee", "changes": "+" * 20_000}
    first, messages = start(group="sweep 1", tags=("a", "b"), config=config, provenance=provenance)
    for row in ROWS:
        first.row(row)
    first.row({"step": 5, "samples": [{"prompt": "To <b>", "text": "be\nor"}]})
    first.close(exit_code=0)
    program, (one,) = Path(sys.executable).with_name("wandb"), attempts(tmp_path / "run")
    line = f"{program} sync --id {ID} {one}"
    assert messages == [f"W&B: upload every attempt as one run with `{line}` (after `wandb login`)"]

    second, messages = start()
    second.row({"step": 6, "tokens": 60, "loss": 2.0})
    second.close(exit_code=1)
    one, two = attempts(tmp_path / "run")
    assert messages == [f"W&B: upload every attempt as one run with `{line} {two}` (after `wandb login`)"]

    run = next(record.run for record in records(one) if record.HasField("run"))
    assert (run.run_id, run.project, run.display_name, run.run_group) == (ID, "ladder", "tiny", "sweep 1")
    assert list(run.tags) == ["a", "b"]
    recorded = {item.key: json.loads(item.value_json) for item in run.config.update}
    provenance["changes"] = "(20000 characters, see the run directory)"
    assert {name: recorded[name] for name in ("seed", "model", "provenance")} == config | {"provenance": provenance}

    rows = logged(one)
    page = (one / "files" / rows[2]["samples/path"]).read_text(encoding="utf-8")
    rows[2] = {key: value for key, value in rows[2].items() if not key.startswith("samples/")}
    sent = [{key: value for key, value in row.items() if value is not None} for row in ROWS]
    assert rows == [sent[0], sent[1] | sent[2], sent[3]]  # one row a step, without nulls
    assert "<b>To &lt;b&gt;</b>be\nor" in page

    metrics = [record.metric for record in records(one) if record.HasField("metric")]
    assert {m.name for m in metrics if m.name} == {"step", "tokens", "seconds", "flops"}
    assert [m.step_metric for m in metrics if m.glob_name == "*"] == ["step"]
    assert exit_codes(one) == [0]

    assert next(record.run for record in records(two) if record.HasField("run")).run_id == ID
    assert logged(two) == [{"step": 6, "tokens": 60, "loss": 2.0}]
    assert exit_codes(two) == [1]

    assert "Would sync 2 run(s)" in sync(messages[0], tmp_path, "--dry-run")


def test_a_run_that_begins_anew_in_its_directory_is_not_uploaded_with_the_one_before(
    start: Any, tmp_path: Path
) -> None:
    """The first dies before its first checkpoint, so that nothing keeps its id. It is not lost."""
    died, messages = start(run_id="older123")
    died.row(ROWS[0])
    died.leave()
    wandb_process.LEFT[-1].wait(timeout=20)
    (older,) = attempts(tmp_path / "run")
    (old_line,) = messages

    anew, messages = start()
    for row in ROWS:
        anew.row(row)
    anew.close(exit_code=0)
    (attempt,) = attempts(tmp_path / "run")
    moved = tmp_path / "run" / "wandb" / "aside" / older.name
    first, last = messages
    assert first == f"W&B: {older} is of a run that began here before this one; moved to {moved.parent}"
    assert "Would sync 1 run(s)" in (dry := sync(last, tmp_path, "--dry-run")) and attempt.name in dry
    assert older.name not in last and f"--id {ID}" in last
    assert (moved / "run-older123.wandb").is_file()
    assert attempt.name not in old_line, "nor does the older line name the newer run"


@pytest.mark.parametrize(("key", "message"), [(None, "No API key configured"), ("a" * 40, "connection refused")])
def test_without_a_login_or_a_server_it_records_offline(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str | None, message: str
) -> None:
    monkeypatch.setattr(wandb_process, "INIT_SECONDS", 1.0)
    if key is not None:
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the discard port: nothing listens
        monkeypatch.setenv("WANDB_API_KEY", key)
    tracked, messages = start("online")
    for row in ROWS:
        tracked.row(row)
    tracked.close(exit_code=0)
    assert len(messages) == 2 and message in messages[0] and "recording offline" in messages[0]
    assert [row["step"] for row in logged(attempts(tmp_path / "run")[0])] == [1, 2, 5]


class Server(http.server.BaseHTTPRequestHandler):
    """The part of W&B's server that one run needs: create it, find it again, append to its history."""

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
    """Log in to a server of our own, and return the history that it receives."""
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
        tracked, messages = start(mode)
        for step in steps:
            tracked.row({"step": step, "tokens": 10 * step, "loss": 1 / step})
        tracked.close(exit_code=0)
        assert len(messages) == 1
        line: str = messages[0]
        return line

    url = attempt("online", range(1, 8))
    assert url.startswith("W&B: http://127.0.0.1:") and url.endswith(f"/someone/ladder/runs/{ID}")
    assert attempt("online", range(5, 11)) == url  # continues from a checkpoint of step 4
    attempt("offline", range(11, 14))
    line = attempt("offline", range(14, 17))
    sync(line, tmp_path)
    assert [(row["_step"], row["step"]) for row in server.values()] == [(step, step) for step in range(1, 17)]


def test_a_service_that_dies_is_reported_once_and_training_goes_on(start: Any) -> None:
    tracked, messages = start()
    tracked.row(ROWS[0])
    helper = tracked._helper.pid
    children = Path(f"/proc/{helper}/task/{helper}/children")
    os.kill(int(wait_for(lambda: children.read_text().split())[0]), signal.SIGKILL)
    wait_for(lambda: tracked.row(ROWS[0]) or messages)
    tracked.row(ROWS[1])
    tracked.close(exit_code=0)
    (message,) = messages
    assert message.startswith("warning: W&B tracking is off: ") and "wandb sync" in message


def test_a_failed_trainer_does_not_wait_and_its_run_is_ended_as_failed(start: Any, tmp_path: Path) -> None:
    tracked, messages = start()
    for row in ROWS:
        tracked.row(row)
    tracked.leave()
    assert "wandb sync" in messages[-1]
    helper = wandb_process.LEFT[-1]
    assert helper.poll() is None, "nobody waited"
    helper.wait(timeout=20)
    (attempt,) = attempts(tmp_path / "run")
    assert exit_codes(attempt) == [1] and [row["step"] for row in logged(attempt)] == [1, 2, 5]


@pytest.mark.parametrize(("max_bytes", "message"), [(10_000, "unread"), (2**24, "had not ended")])
def test_a_helper_that_hangs_delays_nothing_and_its_rows_are_not_kept_for_ever(
    start: Any, monkeypatch: pytest.MonkeyPatch, max_bytes: int, message: str
) -> None:
    """A blocking write would hang here, since the rows are more than the pipe takes."""
    monkeypatch.setattr(wandb_process, "CLOSE_SECONDS", 0.5)
    monkeypatch.setattr(wandb_process, "MAX_UNSENT_BYTES", max_bytes)
    tracked, messages = start()
    os.kill(tracked._helper.pid, signal.SIGSTOP)
    for step in range(10_000):
        tracked.row({"step": step, "loss": 1.0})
    tracked.close(exit_code=0)
    assert len(messages) == 1 and message in messages[0]


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
    command = [sys.executable, "-c", code]
    trainer = subprocess.run(command, cwd=tmp_path, start_new_session=True, capture_output=True, text=True, timeout=30)
    assert trainer.returncode == -signal.SIGKILL, trainer.stderr
    wait_for(lambda: [code for attempt in attempts(tmp_path / "run") for code in exit_codes(attempt)])
    (attempt,) = attempts(tmp_path / "run")
    assert [row["step"] for row in logged(attempt)] == [1, 2]
    assert exit_codes(attempt) == [1]


def test_a_tracker_that_cannot_start_warns(start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    options = OPTIONS | {"log": messages.append}
    (tmp_path / "file").touch()
    assert open_tracking(mode="offline", run_dir=tmp_path / "file", **options) is None
    assert len(messages) == 1 and messages[0].startswith("warning: no W&B tracking: ")
    assert open_tracking(mode="disabled", run_dir=tmp_path / "run", **options) is None
    assert not (tmp_path / "run").exists()

    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracked, messages = start(project="a/b")
    tracked.close(exit_code=0)
    assert messages[0] == "warning: WANDB_MODE=disabled has no effect: --track.wandb offline decides"
    assert "Invalid project name" in messages[1]
    assert len(messages) == 2
