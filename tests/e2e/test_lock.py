"""The lock of a run directory between real processes; unit/train/test_directory.py has it within one process."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from common.errors import InputError
from tests.helpers.runs import ROOT, rows, status, tiny_flags, torchrun
from train.run import lock
from train.run.lock import RunLock

HOLD = """
import sys, time
from pathlib import Path
from train.run import lock
lock.HEARTBEAT_SECONDS = float(sys.argv[2])
try:
    lock.RunLock(Path(sys.argv[1])).acquire()
    print("held", flush=True)
except ValueError:
    print("refused", flush=True)
time.sleep(float(sys.argv[3]))
"""


def start_holder(run_dir: Path, *, heartbeat_seconds: float = 10, seconds: float = 60) -> "subprocess.Popen[str]":
    """Start a process that takes the lock, prints whether it has it, and lives for some seconds."""
    command = [sys.executable, "-c", HOLD, str(run_dir), str(heartbeat_seconds), str(seconds)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def first_line_of(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_the_lock_of_a_living_process_is_refused_and_of_a_dead_one_taken(tmp_path: Path) -> None:
    holder = start_holder(tmp_path)
    assert first_line_of(holder) == "held"
    with pytest.raises(InputError, match=rf"another process is training here \(pid {holder.pid} on "):
        RunLock(tmp_path).acquire()
    holder.kill()
    holder.communicate()
    mine = RunLock(tmp_path)
    mine.acquire()
    assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()
    mine.release()
    assert list(tmp_path.iterdir()) == []


def test_a_holder_whose_lock_was_taken_over_exits_and_leaves_the_lock(tmp_path: Path) -> None:
    holder = start_holder(tmp_path, heartbeat_seconds=0.05)
    assert first_line_of(holder) == "held"
    (tmp_path / "other").write_text("another's lock")
    (tmp_path / "other").rename(tmp_path / "lock.json")
    _, errors = holder.communicate(timeout=20)
    assert holder.returncode == 1 and "taken over by another process" in errors
    RunLock(tmp_path).release()
    assert (tmp_path / "lock.json").read_text() == "another's lock"


def test_only_one_of_several_processes_takes_a_dead_lock(tmp_path: Path) -> None:
    dead = {"host": os.uname().nodename, "pid": 2**22, "started": "1", "job": None}
    (tmp_path / "lock.json").write_text(json.dumps(dead))
    takers = [start_holder(tmp_path, seconds=3) for _ in range(4)]
    assert sorted(taker.communicate()[0].strip() for taker in takers) == ["held", "refused", "refused", "refused"]


def test_a_living_lock_is_never_gone_while_a_rival_removes_a_dead_one(tmp_path: Path) -> None:
    mine, rival = RunLock(tmp_path), RunLock(tmp_path)
    mine.acquire()
    moments: list[bool] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            moments.append((tmp_path / "lock.json").exists())

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(2000):
        rival._remove_dead("the lock that was dead when the rival read it")
    done.set()
    watcher.join()
    mine.release()
    assert len(moments) > 100 and all(moments)


@pytest.mark.timeout(600)
def test_of_two_starts_at_once_one_is_refused_or_continues_the_other(tiny_data: Path, tmp_path: Path) -> None:
    """Both may end well: one after the other, on the same run."""
    flags = [*tiny_flags(tiny_data, tmp_path / "run"), "--train.steps", "60", "--track.wandb", "disabled"]
    starts = [torchrun(2, *flags) for _ in range(2)]
    outputs = [start.communicate()[0] for start in starts]
    statuses = [start.returncode for start in starts]
    claims = [output for output in outputs if "another process is training here" not in output]
    assert [row["step"] for row in rows(tmp_path / "run") if "loss" in row] == list(range(1, 61)), outputs
    assert statuses.count(0) == len(claims) == status(tmp_path / "run")["attempt"], outputs
    if len(claims) == 2:
        assert sum("continuing from" in output and "step_00000060" in output for output in claims) == 1, outputs


@pytest.mark.parametrize("value", ["1e999", "-1", "1e400", "[]", "null", "true", '"1"', "9" * 4000, "4194305"])
@pytest.mark.parametrize("key", ["host", "pid", "started", "job"])
def test_a_lock_of_another_form_is_that_of_nobody_here(key: str, value: str, tmp_path: Path) -> None:
    holder = {"host": f'"{os.uname().nodename}"', "pid": str(os.getpid()), "started": '"1"', "job": "null"}
    lines = ", ".join(f'"{name}": {text}' for name, text in (holder | {key: value}).items())
    (tmp_path / "lock.json").write_text(f"{{{lines}}}")
    os.utime(tmp_path / "lock.json", (0, 0))
    assert lock.living_holder(tmp_path) is None
    mine = RunLock(tmp_path)
    mine.acquire()
    mine.release()


def test_the_heartbeat_decides_about_a_holder_on_another_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "lock.json"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": "5", "job": "77"}))
    monkeypatch.setattr(lock, "SECONDS_BETWEEN_CHECKS", 0.01)
    threading.Timer(0.3, lambda: os.utime(path)).start()
    with pytest.raises(InputError, match="pid 1 on elsewhere, job 77"):
        RunLock(tmp_path).acquire()
    assert "waiting to see whether pid 1 on elsewhere, job 77 lives" in capsys.readouterr().err
    monkeypatch.setattr(lock, "DEAD_AFTER_SECONDS", 0.5)
    mine = RunLock(tmp_path)
    mine.acquire()  # after half a second without a heartbeat
    mine.release()


def test_a_lock_of_the_future_blocks_no_longer_than_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lock.json").write_text("junk")
    ahead = time.time() + 86_400
    os.utime(tmp_path / "lock.json", (ahead, ahead))
    assert lock.living_holder(tmp_path) is None
    monkeypatch.setattr(lock, "SECONDS_BETWEEN_CHECKS", 0.01)
    monkeypatch.setattr(lock, "DEAD_AFTER_SECONDS", 0.3)
    began = time.monotonic()
    mine = RunLock(tmp_path)
    mine.acquire()
    assert 0.3 <= time.monotonic() - began < 5
    mine.release()


def test_a_holder_renews_its_heartbeat_and_a_lock_that_was_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.02)
    held = RunLock(tmp_path)
    held.acquire()
    os.utime(tmp_path / "lock.json", (0, 0))
    end = time.monotonic() + 20
    while (tmp_path / "lock.json").stat().st_mtime == 0:
        assert time.monotonic() < end
        time.sleep(0.01)
    (tmp_path / "lock.json").unlink()
    while not held.reads(held.text):
        assert time.monotonic() < end
        time.sleep(0.01)
    held.release()
    assert not (tmp_path / "lock.json").exists()
