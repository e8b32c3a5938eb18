"""The decision whether a job is requeued, as a table; the facts that it rests on."""

import json
import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.errors import InputError
from launch import requeue
from launch.requeue import AttemptEnd, begin, decide, parse_time_left, read_attempt_end
from tests.helpers.runs import called

ATTEMPT: dict[str, Any] = {
    **{"state": "running", "reason": None, "step_before": 100, "step": 100, "signal": None, "job_state": "RUNNING"},
    **{"seconds_left": 36_000, "restarts": 0, "max_requeues": 50, "exit_status": 1},
}
STOPPED = {"state": "stopped", "reason": "STOP file", "step": 130}
CRASH = "rank 3 on n2: RuntimeError: CUDA error"
CRASHED = {"state": "failed", "reason": CRASH, "step": 130}

NO_STEP = "no step was done before the time limit"

REQUEUED: list[tuple[dict[str, Any], str]] = [
    ({**STOPPED, "signal": "USR1"}, "stopped by SIGUSR1 at step 130"),
    ({**STOPPED, "signal": "TERM", "step": 100}, "stopped by SIGTERM at step 100"),
    ({**STOPPED, "signal": "USR1", "seconds_left": 200}, "stopped by SIGUSR1 at step 130"),
    ({**STOPPED, "signal": "USR1", "step": 100, "seconds_left": None}, "stopped by SIGUSR1 at step 100"),
    ({**STOPPED, "signal": "USR1", "restarts": 49}, "stopped by SIGUSR1 at step 130"),
    # The trainer itself got the signal, by `scancel --signal` or where signals reach every process of a step.
    ({**STOPPED, "reason": "SIGTERM"}, "stopped by SIGTERM at step 130"),
    # Asked to stop, but killed before it could save, or before it had begun.
    ({"signal": "TERM"}, "stopped by SIGTERM at step 100"),
    ({"signal": "USR1", "state": None}, "stopped by SIGUSR1 at step 100"),
    (CRASHED, f"failed: {CRASH}; its checkpoints moved on from step 100 to 130"),
    ({"step": 101}, "ended as running; its checkpoints moved on from step 100 to 101"),
    ({**STOPPED, "reason": "launcher died"}, "stopped: launcher died; its checkpoints moved on from step 100 to 130"),
    # A disk that is still full when the job starts again gives no progress, which ends the job then.
    ({**CRASHED, "reason": "InputError: /runs: cannot be written"}, "failed: InputError: /runs: cannot be written; "),
    ({**CRASHED, "reason": "hang: rank 1 on n1 gave no sign"}, "failed: hang: rank 1 on n1 gave no sign; its "),
]
ENDED: list[tuple[dict[str, Any], int, str]] = [
    ({"state": "done", "step": 500}, 0, "done at step 500"),
    ({"state": "done", "step": 500, "signal": "USR1"}, 0, "done at step 500"),
    ({"state": "done", "step": 500, "job_state": "COMPLETING"}, 0, "done at step 500"),
    # Requeueing any of these would undo what Slurm or a person did.
    ({**STOPPED, "signal": "TERM", "job_state": "COMPLETING"}, 1, "left to Slurm: the job is COMPLETING"),
    ({**CRASHED, "job_state": "NODE_FAIL"}, 1, "left to Slurm: the job is NODE_FAIL"),
    ({**STOPPED, "signal": "USR1", "job_state": "PENDING"}, 1, "left to Slurm: the job is PENDING"),
    ({**STOPPED, "signal": "USR1", "job_state": "GONE"}, 1, "left to Slurm: the job is GONE"),
    *(
        ({**STOPPED, "reason": reason}, 0, f"stopped at step 130 as a person asked ({reason}); sbatch again to go on")
        for reason in ("STOP file", "SIGINT", "--stop-after 3h50m")
    ),
    ({**STOPPED, "signal": "USR1", "step": 100, "seconds_left": 290}, 1, f"{NO_STEP} (SIGUSR1); give a longer --time"),
    ({"exit_status": 137}, 137, "no new checkpoint since step 100; ended as running"),
    ({**CRASHED, "step": 100}, 1, f"no new checkpoint since step 100; failed: {CRASH}"),
    # A damaged checkpoint was passed over, and the attempt did not come as far again.
    ({**CRASHED, "step": 90}, 1, f"no new checkpoint since step 100; failed: {CRASH}"),
    ({"state": None, "exit_status": 2}, 2, "training did not begin; the first error above says why"),
    ({**CRASHED, "reason": "NonFiniteError: step 131", "signal": "USR1"}, 1, "it would fail again: NonFiniteError"),
    ({**CRASHED, "reason": "DivergedError: step 131"}, 1, "it would fail again: DivergedError"),
    ({**STOPPED, "signal": "USR1", "restarts": 50}, 1, "restarted 50 times (MAX_REQUEUES 50); stopped by SIGUSR1 at "),
    ({**STOPPED, "signal": "USR1", "max_requeues": 0}, 1, "restarted 0 times (MAX_REQUEUES 0); stopped by SIGUSR1 at "),
]


def test_which_attempts_are_requeued() -> None:
    cases = [(changes, True, 0, reason) for changes, reason in REQUEUED]
    cases += [(changes, False, exit_status, reason) for changes, exit_status, reason in ENDED]
    for changes, requeued, exit_status, reason in cases:
        decision = decide(AttemptEnd(**ATTEMPT | changes))
        assert (decision.is_requeued, decision.exit_status) == (requeued, exit_status), changes
        assert decision.reason.startswith(reason), changes


def test_times_left_of_squeue() -> None:
    times = {"0:45": 45, "12:03": 723, "3:00:01": 10_801, "2-01:00:00": 176_400}
    assert {text: parse_time_left(text) for text in times} == times
    assert {parse_time_left(text) for text in ("UNLIMITED", "NOT_SET", "INVALID", "")} == {None}


Answer = Callable[..., None]


@pytest.fixture
def squeue(monkeypatch: pytest.MonkeyPatch) -> Answer:
    """Set the answer of squeue; tests/cluster asks a real one."""

    def answer(stdout: str = "", stderr: str = "", returncode: int = 0) -> None:
        def run(command: tuple[str, ...], **_: Any) -> "subprocess.CompletedProcess[str]":
            assert command[0] == "squeue"
            return subprocess.CompletedProcess(command, returncode, stdout, stderr)

        monkeypatch.setattr(requeue.subprocess, "run", run)

    return answer


def write_lock(run_dir: Path, job: str) -> None:
    (run_dir / "lock.json").write_text(json.dumps({"host": "n1", "pid": 5, "job": job}))


def write_status(run_dir: Path, **status: Any) -> None:
    (run_dir / "status.json").write_text(json.dumps({"reason": None, **status}))


def test_a_run_begins_at_its_newest_checkpoint_and_without_a_stop_file(tmp_path: Path) -> None:
    assert begin(tmp_path / "runs" / "new", "7") == "0 0"
    write_status(tmp_path, state="stopped", step=30, attempt=2)
    (tmp_path / "STOP").touch()
    write_lock(tmp_path, "7")  # a crash of this job left it
    assert begin(tmp_path, "7") == "2 30"
    assert not (tmp_path / "STOP").exists()


DAMAGE: tuple[bytes, ...] = (
    b"",
    b"{}",
    b"[]",
    b"5",
    b'{"state": "run',
    b"\xff\x00",
    b"[" * 100_000,
    b'{"attempt": ' + b"9" * 5000,
)


@pytest.mark.parametrize(
    "content", [*DAMAGE, b'{"state": "running", "reason": null, "attempt": "2", "step": -1}', None]
)
def test_damaged_files_stop_no_job(content: bytes | None, tmp_path: Path, squeue: Answer) -> None:
    """The trainer mends them. Checkpoints tell the progress, and whether an attempt was made at all. None: a FIFO."""
    squeue("RUNNING 1:00:00")
    (tmp_path / "checkpoints" / "step_00000040").mkdir(parents=True)

    def damage(name: str) -> None:
        (tmp_path / name).unlink(missing_ok=True)
        os.mkfifo(tmp_path / name) if content is None else (tmp_path / name).write_bytes(content)

    damage("lock.json")
    write_status(tmp_path, state="running", step=30, attempt=2)
    before = begin(tmp_path, "7")
    assert before == "2 30"
    damage("status.json")
    end = end_of(tmp_path, before)
    assert (end.state, end.reason, end.step_before, end.step) == ("running", "status.json is damaged", 30, 40)
    assert decide(end).is_requeued and not decide(replace(end, step=30)).is_requeued

    before = begin(tmp_path, "7")
    assert before == "? 40"
    assert end_of(tmp_path, before).state is None, "nobody mended it, so training did not begin"
    (tmp_path / "status.json").unlink()
    write_status(tmp_path, state="done", step=50, attempt=1)
    assert (end_of(tmp_path, before).state, end_of(tmp_path, before).step) == ("done", 50)


def end_of(run_dir: Path, before: str) -> AttemptEnd:
    return read_attempt_end(run_dir, "7", before, signal=None, restarts=0, max_requeues=50, exit_status=1)


@pytest.mark.parametrize("before", [None, "", "7", "x y", "1 2 3", "-1 5", "1 2\n"])
def test_end_without_what_begin_printed_is_one_line(before: str | None, tmp_path: Path) -> None:
    words = ["end", str(tmp_path), *(["--before", before] if before is not None else [])]
    done = called(requeue.main, *words, SLURM_JOB_ID="7")
    line = f"slurm: --before {before or ''!r}: give the line that `begin` printed, like --before '3 1000'\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)


@pytest.mark.parametrize("value", ["", "x", "-1", "1.5"])
def test_a_garbled_restart_count_is_one_line(value: str, tmp_path: Path) -> None:
    done = called(requeue.main, "begin", str(tmp_path), SLURM_JOB_ID="7", SLURM_RESTART_COUNT=value)
    assert done.returncode == 2 and done.stderr.startswith(
        f"slurm: SLURM_RESTART_COUNT={value!r}: not a whole number; "
    )
    assert done.stderr.count("\n") == 1


def test_a_name_that_does_not_print_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    for name in ("two\nlines", "\x1b[31m", os.fsdecode(b"\xff")):
        with pytest.raises(InputError, match=r"--run-dir .*: it has characters that do not print"):
            begin(tmp_path / name, "7")
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_another_job_trains_is_refused_and_not_touched(tmp_path: Path, squeue: Answer) -> None:
    write_lock(tmp_path, "6")
    (tmp_path / "STOP").touch()
    squeue("RUNNING 1:00")
    with pytest.raises(InputError, match="job 6 is training here; wait for it, or choose another --run-dir"):
        begin(tmp_path, "7")
    assert (tmp_path / "STOP").exists()
    # The lock of a job that is over is left to the trainer.
    for stdout, stderr in (("COMPLETING 1:00", ""), ("", "slurm_load_jobs error: Invalid job id specified")):
        squeue(stdout, stderr, 1 if stderr else 0)
        assert begin(tmp_path, "7") == "0 0"


def test_a_status_of_an_earlier_attempt_does_not_count(tmp_path: Path, squeue: Answer) -> None:
    squeue("RUNNING 1:00")
    for attempt, reason in ((2, "training did not begin"), (3, "no new checkpoint since step 30; ended as running")):
        write_status(tmp_path, state="running", step=30, attempt=attempt)
        words = ("end", str(tmp_path), "--before", "2 30", "--exit-status", "3")
        done = called(requeue.main, *words, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1")
        assert done.returncode == 3
        assert re.fullmatch(rf"\[job 7\.1 \d{{4}}-\d\d-\d\dT[\d:.]+\] ends: {reason}.*\n", done.stdout), done.stdout


def test_bad_input_is_one_line(tmp_path: Path, squeue: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert called(requeue.main, "begin", str(tmp_path)).stderr.startswith("slurm: SLURM_JOB_ID is not set")
    (tmp_path / "status.json").write_text("{")
    damaged = called(requeue.main, "begin", str(tmp_path), SLURM_JOB_ID="7")
    assert damaged.returncode == 0 and damaged.stderr.count("\n") == 1
    assert damaged.stderr.startswith(f"slurm: warning: {tmp_path}/status.json: damaged (")
    squeue(stderr="squeue: error: something new\n", returncode=1)
    write_lock(tmp_path, "6")
    unknown = called(requeue.main, "begin", str(tmp_path), SLURM_JOB_ID="7")
    assert (unknown.returncode, unknown.stderr) == (2, "slurm: squeue: squeue: error: something new\n")
