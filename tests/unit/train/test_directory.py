"""The run directory's own files: lock, status, metrics, provenance, stop file, curves."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import InputError
from model.checkpoint import list_checkpoints
from tests.helpers.runs import ROOT, called, rows, status, tiny_config, tiny_flags
from train import curves
from train.evals import validation
from train.main import run
from train.metrics.logger import RunLogger
from train.processes.group import ProcessGroup
from train.processes.stop_requests import StopRequests
from train.run import lock
from train.run.directory import differing
from train.run.lock import RunLock

ALONE = ProcessGroup(0, 1, torch.device("cpu"))
HOLD = "import sys, time; from pathlib import Path; from train.run.lock import RunLock; "
HOLD += "RunLock(Path(sys.argv[1])).acquire(); print('held', flush=True); time.sleep(60)"


def hold_elsewhere(run_dir: Path) -> "subprocess.Popen[str]":
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run_dir)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    return holder


def test_the_lock_is_kept_by_the_living_and_taken_from_the_dead(tmp_path: Path) -> None:
    holder = hold_elsewhere(tmp_path)
    with pytest.raises(InputError, match=rf"another process is training here \(pid {holder.pid} on "):
        RunLock(tmp_path).acquire()
    holder.kill()
    holder.communicate()
    mine = RunLock(tmp_path)
    mine.acquire()
    assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()
    mine.release()
    assert list(tmp_path.iterdir()) == []


def test_a_pid_used_again_is_not_the_holder(tmp_path: Path) -> None:
    holder = RunLock(tmp_path)
    holder.acquire()
    text = json.loads((tmp_path / "lock.json").read_text())
    (tmp_path / "lock.json").write_text(json.dumps(text | {"started": "1"}))  # this pid, another process
    second = RunLock(tmp_path)
    second.acquire()
    second.release()
    holder.release()


def test_on_another_host_the_heartbeat_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "lock.json"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": "5", "job": "77"}))
    monkeypatch.setattr(lock, "SECONDS_BETWEEN_CHECKS", 0.01)
    beating = threading.Timer(0.3, lambda: os.utime(path))
    beating.start()
    with pytest.raises(InputError, match="pid 1 on elsewhere, job 77"):
        RunLock(tmp_path).acquire()
    assert "waiting to see whether pid 1 on elsewhere, job 77 lives" in capsys.readouterr().err
    monkeypatch.setattr(lock, "DEAD_AFTER_SECONDS", 0.5)
    mine = RunLock(tmp_path)
    mine.acquire()  # when nothing has beaten for so long
    mine.release()


def test_a_holder_that_was_taken_over_leaves_and_leaves_the_lock(tmp_path: Path) -> None:
    script = "import sys, time; from pathlib import Path; from train.run import lock; lock.HEARTBEAT_SECONDS = 0.05; "
    script += "lock.RunLock(Path(sys.argv[1])).acquire(); print('held', flush=True); time.sleep(30)"
    line = [sys.executable, "-c", script, str(tmp_path)]
    holder = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    other = tmp_path / "other"
    other.write_text("another's lock")
    other.rename(tmp_path / "lock.json")
    _, said = holder.communicate(timeout=20)
    assert holder.returncode == 1 and "taken over by another process" in said
    assert (tmp_path / "lock.json").read_text() == "another's lock"
    mine = RunLock(tmp_path)
    mine.release()
    assert (tmp_path / "lock.json").exists()


def test_of_many_takers_of_a_dead_lock_one_wins(tmp_path: Path) -> None:
    (tmp_path / "lock.json").write_text(
        json.dumps({"host": os.uname().nodename, "pid": 2**22, "started": "1", "job": None})
    )
    script = "import sys; from pathlib import Path; from train.run.lock import RunLock\n"
    script += "try: RunLock(Path(sys.argv[1])).acquire(); print('won')\n"
    script += "except ValueError: print('lost')\nimport time; sys.stdout.flush(); time.sleep(3)"
    line = [sys.executable, "-c", script, str(tmp_path)]
    takers = [subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    assert sorted(taker.communicate()[0].strip() for taker in takers) == ["lost"] * 5 + ["won"]


def test_the_heart_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.02)
    held = RunLock(tmp_path)
    held.acquire()
    os.utime(tmp_path / "lock.json", (0, 0))
    end = time.monotonic() + 5
    while (tmp_path / "lock.json").stat().st_mtime == 0:
        assert time.monotonic() < end
        time.sleep(0.01)
    (tmp_path / "lock.json").unlink()
    while not held.reads(held.text):  # put back
        assert time.monotonic() < end
        time.sleep(0.01)
    held.release()
    assert not (tmp_path / "lock.json").exists()


def test_rows_after_the_restored_step_are_dropped_and_half_a_line_with_them(tmp_path: Path) -> None:
    full = [{"step": n, "loss": float(n)} for n in range(1, 6)] + [{"step": 5, "val_loss": 2.0}]
    lines = "".join(json.dumps(row) + "\n" for row in full)
    (tmp_path / "metrics.jsonl").write_text(lines + '{"step": 6, "lo')
    with RunLogger(tmp_path, step=5, group=ALONE, stop_requests=StopRequests(tmp_path, is_main=True)) as logger:
        assert logger.validated_steps == {5}
    assert rows(tmp_path) == full
    with RunLogger(tmp_path, step=3, group=ALONE, stop_requests=StopRequests(tmp_path, is_main=True)):
        assert rows(tmp_path) == full[:3]
    with RunLogger(tmp_path, step=None, group=ALONE, stop_requests=StopRequests(tmp_path, is_main=True)):
        assert rows(tmp_path) == []


def test_metrics_rows_have_the_promised_keys(tiny_data: Path, tmp_path: Path) -> None:
    run(tiny_config(tiny_data, tmp_path / "run", steps=5), ALONE)
    trained = [row for row in rows(tmp_path / "run") if "loss" in row]
    validated = [row for row in rows(tmp_path / "run") if "val_loss" in row]
    axes = ["step", "tokens", "seconds", "flops"]
    keys = "loss lr grad_norm tokens_per_second mfu step_seconds data_wait_fraction peak_memory_gib"
    assert list(trained[0]) == [*axes, *keys.split(), "memory_retries", "eta_seconds"]
    assert list(validated[0]) == [*axes, "val_loss", "val_loss_stderr", "val_bits_per_byte"]
    assert [row["eta_seconds"] > 0 for row in trained] == [True] * 4 + [False]
    assert validated[-1]["seconds"] == pytest.approx(trained[-1]["seconds"], abs=0.1)
    assert [row["tokens"] for row in trained] == [384 * n for n in range(1, 6)]
    assert all(row["mfu"] is None and 0 <= row["data_wait_fraction"] <= 1 for row in trained)
    assert trained[-1]["seconds"] == pytest.approx(sum(row["step_seconds"] for row in trained), abs=1e-3)
    for row in trained:
        assert row["tokens_per_second"] == pytest.approx(384 / row["step_seconds"], rel=0.02)


def test_the_run_directory_holds_what_is_promised(tiny_data: Path, tmp_path: Path) -> None:
    run(tiny_config(tiny_data, tmp_path / "run", steps=5), ALONE)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    files = "config.json metrics.jsonl log.txt checkpoints status.json provenance.json tokenizer"
    assert names == set(files.split())
    made_by = json.loads((tmp_path / "run" / "provenance.json").read_text())
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert made_by["commit"] == (head.stdout.strip() or None)
    assert made_by["torch"] == torch.__version__ and made_by["threads"] == 1
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert config["model"]["context_len"] == 32 and config["model"]["vocab_size"] == 33


def test_a_stop_file_made_before_the_start_is_honoured_and_the_next_start_runs(tiny_data: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_data, tmp_path / "run", steps=5)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "STOP").touch()
    run(config, ALONE)
    assert status(tmp_path / "run") == {"state": "stopped", "step": 0, "reason": "STOP file", "attempt": 1}
    run(config, ALONE)
    assert status(tmp_path / "run") == {"state": "done", "step": 5, "reason": None, "attempt": 2}
    assert [row["step"] for row in rows(tmp_path / "run")] == [0, 1, 2, 3, 4, 5, 5]


def test_a_stop_in_the_last_validation_is_no_end(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, sound = tiny_config(tiny_data, tmp_path / "run", steps=5), validation.validate

    def stopping(*args: Any, stop_requests: StopRequests, **kwargs: Any) -> Any:
        if any(row["step"] == 5 for row in rows(tmp_path / "run")):
            stop_requests.reason = "test"
        return sound(*args, stop_requests=stop_requests, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(validation, "validate", stopping)
        run(config, ALONE)
    assert status(tmp_path / "run")["state"] == "stopped" and status(tmp_path / "run")["step"] == 5
    run(config, ALONE)
    assert status(tmp_path / "run")["state"] == "done"
    assert [row["step"] for row in rows(tmp_path / "run") if "val_loss" in row] == [0, 5]


@pytest.mark.long(reason="an interpreter of its own")
def test_a_console_that_goes_away_does_not_end_the_run(tiny_data: Path, tmp_path: Path) -> None:
    flags = [*tiny_flags(tiny_data, tmp_path / "run"), "--train.steps", "30"]
    train = subprocess.Popen([sys.executable, "train/main.py", *flags], cwd=ROOT, stdout=subprocess.PIPE)
    assert train.stdout is not None
    train.stdout.readline()
    train.stdout.close()
    assert train.wait(timeout=60) == 0
    assert status(tmp_path / "run")["state"] == "done"
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "the console is gone" in log and "done at step 30" in log


def test_a_damaged_row_in_the_middle_is_refused_not_cut_off(tmp_path: Path) -> None:
    content = '{"step": 1, "loss": 1.0}\n{"step": 2, "lo\n{"step": 3, "loss": 1.0}\n'
    (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(InputError, match=r"metrics.jsonl:2: damaged"):
        RunLogger(tmp_path, step=3, group=ALONE, stop_requests=StopRequests(tmp_path, is_main=True))
    assert (tmp_path / "metrics.jsonl").read_text() == content


def test_two_signals_are_one_stop_and_handlers_come_back(tiny_data: Path, tmp_path: Path) -> None:
    import signal

    before = signal.getsignal(signal.SIGTERM)

    def send() -> None:
        path = tmp_path / "run" / "metrics.jsonl"
        while not path.exists() or path.read_bytes().count(b"\n") < 10:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send)
    sender.start()
    run(tiny_config(tiny_data, tmp_path / "run", steps=2000), ALONE)
    sender.join()
    found = status(tmp_path / "run")
    assert found["state"] == "stopped" and found["reason"] in ("SIGHUP", "SIGTERM")
    assert list_checkpoints(tmp_path / "run")[-1].name == f"step_{found['step']:08d}"
    assert signal.getsignal(signal.SIGTERM) is before


def test_only_the_main_rank_looks_for_the_stop_file(tmp_path: Path) -> None:
    (tmp_path / "STOP").touch()
    assert StopRequests(tmp_path, is_main=True).wanted()
    assert not StopRequests(tmp_path, is_main=False).wanted()


def test_differences_are_named_as_flags() -> None:
    old = {"seed": 1, "model": {"width": 8}, "train": {"steps": 5, "compile": True}, "optim": {"lr_peak": 0.1}}
    new = {"seed": 1, "model": {"width": 16}, "train": {"steps": 5, "compile": False}, "optim": {"lr_peak": 0.2}}
    assert differing(old, new) == ["--model.width 16 (was 8)", "--optim.lr-peak 0.2 (was 0.1)"]


def test_curves_draws_a_picture(tiny_data: Path, tmp_path: Path) -> None:
    run(tiny_config(tiny_data, tmp_path / "run", steps=5), ALONE)
    line = [sys.executable, "train/curves.py", str(tmp_path / "run"), "--x", "tokens"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    picture = (tmp_path / "run" / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    refused = called(curves.main, str(tmp_path))
    assert refused.returncode == 2 and "no metrics.jsonl" in refused.stderr
