"""What becomes of a job, as a table; and what is read of a run directory and of squeue."""

import dataclasses
import json
import os
import re
from pathlib import Path

import pytest

from common.errors import InputError
from launch import requeue
from launch.requeue import Facts, begin, decide, seconds_of
from tests.helpers.runs import called

FACTS = Facts(
    state="running",
    reason=None,
    step_before=100,
    step=100,
    asked=None,
    job_state="RUNNING",
    seconds_left=36_000,
    restarts=0,
    max_requeues=50,
    exit_status=1,
)
STOPPED = {"state": "stopped", "reason": "STOP file", "step": 130}
CRASHED = {"state": "failed", "reason": "rank 3 on n2: RuntimeError: CUDA error", "step": 130}

BACK = [
    ({**STOPPED, "asked": "USR1"}, "stopped by SIGUSR1 at step 130"),
    ({**STOPPED, "asked": "TERM", "step": 100}, "stopped by SIGTERM at step 100"),
    ({**STOPPED, "asked": "USR1", "seconds_left": 200}, "stopped by SIGUSR1 at step 130"),
    ({**STOPPED, "asked": "USR1", "step": 100, "seconds_left": None}, "stopped by SIGUSR1 at step 100"),
    ({**STOPPED, "asked": "USR1", "restarts": 49}, "stopped by SIGUSR1 at step 130"),
    # The trainer was signalled itself, by `scancel --signal` or where signals reach every process of a step.
    ({**STOPPED, "reason": "SIGUSR1"}, "stopped by SIGUSR1 at step 130"),
    ({**STOPPED, "reason": "SIGTERM"}, "stopped by SIGTERM at step 130"),
    # Asked, but killed before it could save, or before it had begun.
    ({"asked": "TERM"}, "stopped by SIGTERM at step 100"),
    ({"asked": "USR1", "state": None}, "stopped by SIGUSR1 at step 100"),
    (CRASHED, "failed: rank 3 on n2: RuntimeError: CUDA error; its checkpoints moved on from step 100 to 130"),
    ({"step": 101}, "ended as running; its checkpoints moved on from step 100 to 101"),
    (
        {**STOPPED, "reason": "launcher died"},
        "stopped: launcher died; its checkpoints moved on from step 100 to 130",
    ),
    # A full disk; if it still is when the job starts again, there is no progress.
    (
        {**CRASHED, "reason": "InputError: /runs: cannot be written"},
        "failed: InputError: /runs: cannot be written; its ",
    ),
    ({**CRASHED, "reason": "hang: rank 1 on n1 gave no sign"}, "failed: hang: rank 1 on n1 gave no sign; its "),
]
ENDS = [
    ({"state": "done", "step": 500}, 0, "done at step 500"),
    ({"state": "done", "step": 500, "asked": "USR1"}, 0, "done at step 500"),
    ({"state": "done", "step": 500, "job_state": "COMPLETING"}, 0, "done at step 500"),
    # Requeueing any of these would undo what Slurm or a person did.
    ({**STOPPED, "asked": "TERM", "job_state": "COMPLETING"}, 1, "left to Slurm: the job is COMPLETING"),
    ({**STOPPED, "asked": "TERM", "job_state": "CANCELLED"}, 1, "left to Slurm: the job is CANCELLED"),
    ({**CRASHED, "job_state": "NODE_FAIL"}, 1, "left to Slurm: the job is NODE_FAIL"),
    ({**STOPPED, "asked": "USR1", "job_state": "PENDING"}, 1, "left to Slurm: the job is PENDING"),
    ({**STOPPED, "asked": "USR1", "job_state": "GONE"}, 1, "left to Slurm: the job is GONE"),
    (STOPPED, 0, "stopped at step 130 as a person asked (STOP file); sbatch again to go on"),
    ({**STOPPED, "reason": "SIGINT"}, 0, "stopped at step 130 as a person asked (SIGINT); sbatch again to go on"),
    (
        {**STOPPED, "reason": "--stop-after 3h50m"},
        0,
        "stopped at step 130 as a person asked (--stop-after 3h50m); sbatch again to go on",
    ),
    (
        {**STOPPED, "asked": "USR1", "step": 100, "seconds_left": 290},
        1,
        "no step was done before the time limit (SIGUSR1); give a longer --time",
    ),
    ({}, 1, "no new checkpoint since step 100; ended as running"),
    ({"exit_status": 137}, 137, "no new checkpoint since step 100; ended as running"),
    ({**CRASHED, "step": 100}, 1, "no new checkpoint since step 100; failed: rank 3 on n2: RuntimeError: CUDA error"),
    # A damaged checkpoint was passed over, and what was trained again did not come as far.
    ({**CRASHED, "step": 90}, 1, "no new checkpoint since step 100; failed: rank 3 on n2: RuntimeError: CUDA error"),
    ({"state": None, "exit_status": 2}, 2, "training did not begin; the first error above says why"),
    (
        {**CRASHED, "reason": "NonFiniteError: step 131: loss nan"},
        1,
        "it would fail again: NonFiniteError: step 131: loss nan",
    ),
    ({**CRASHED, "reason": "NonFiniteError: step 131", "asked": "USR1"}, 1, "it would fail again: NonFiniteError"),
    (
        {**STOPPED, "asked": "USR1", "restarts": 50},
        1,
        "restarted 50 times (MAX_REQUEUES 50); stopped by SIGUSR1 at step 130",
    ),
    ({**STOPPED, "asked": "USR1", "max_requeues": 0}, 1, "restarted 0 times (MAX_REQUEUES 0); stopped by SIGUSR1 at "),
]


@pytest.mark.parametrize(("changes", "why"), BACK, ids=[why for _, why in BACK])
def test_back_to_the_queue(changes: dict[str, object], why: str) -> None:
    decision = decide(dataclasses.replace(FACTS, **changes))  # type: ignore[arg-type]
    assert decision.is_requeued and decision.exit_status == 0
    assert decision.why.startswith(why)


@pytest.mark.parametrize(("changes", "status", "why"), ENDS, ids=[why for *_, why in ENDS])
def test_left_to_end(changes: dict[str, object], status: int, why: str) -> None:
    decision = decide(dataclasses.replace(FACTS, **changes))  # type: ignore[arg-type]
    assert not decision.is_requeued and decision.exit_status == status
    assert decision.why.startswith(why)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0:45", 45),
        ("12:03", 723),
        ("3:00:01", 10_801),
        ("2-01:00:00", 176_400),
        ("UNLIMITED", None),
        ("NOT_SET", None),
        ("INVALID", None),
        ("", None),
    ],
)
def test_squeues_time_left(text: str, seconds: int | None) -> None:
    assert seconds_of(text) == seconds


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A squeue that says what its file says; tests/cluster asks a real one."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "squeue").write_text(f'#!/bin/sh\n. "{folder}/answer"\n')
    (folder / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder / "answer"


def test_a_run_begins_where_it_stands_and_without_the_stop_that_ended_it(tmp_path: Path) -> None:
    assert begin(tmp_path / "runs" / "new", "7") == "0 0"
    (tmp_path / "status.json").write_text(json.dumps({"state": "stopped", "step": 30, "reason": None, "attempt": 2}))
    (tmp_path / "STOP").touch()
    (tmp_path / "lock.json").write_text(json.dumps({"host": "n1", "pid": 5, "job": "7"}))  # left by a crash of ours
    assert begin(tmp_path, "7") == "2 30"
    assert not (tmp_path / "STOP").exists()


@pytest.mark.parametrize(
    "answer", ["echo COMPLETING 1:00", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"]
)
def test_a_lock_of_a_job_that_is_over_is_left_to_the_trainer(tmp_path: Path, squeue: Path, answer: str) -> None:
    squeue.write_text(answer)
    (tmp_path / "lock.json").write_text(json.dumps({"host": "n1", "pid": 5, "job": "6"}))
    assert begin(tmp_path, "7") == "0 0"


def test_a_run_that_another_job_trains_is_refused_and_not_touched(tmp_path: Path, squeue: Path) -> None:
    squeue.write_text("echo RUNNING 1:00")
    (tmp_path / "lock.json").write_text(json.dumps({"host": "n1", "pid": 5, "job": "6"}))
    (tmp_path / "STOP").touch()
    with pytest.raises(InputError, match="job 6 is training here; wait for it, or choose another --run-dir"):
        begin(tmp_path, "7")
    assert (tmp_path / "STOP").exists()


@pytest.mark.parametrize(
    ("attempt", "why"), [(2, "training did not begin"), (3, "no new checkpoint since step 30; ended as running")]
)
def test_what_an_earlier_attempt_wrote_is_not_taken_for_this_ones(
    tmp_path: Path, squeue: Path, attempt: int, why: str
) -> None:
    squeue.write_text("echo RUNNING 1:00")
    (tmp_path / "status.json").write_text(
        json.dumps({"state": "running", "step": 30, "reason": None, "attempt": attempt})
    )
    given = ("end", str(tmp_path), "--before", "2 30", "--exit-status", "3")
    done = called(requeue.main, *given, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1")
    assert done.returncode == 3
    assert re.fullmatch(rf"\[job 7\.1 \d{{4}}-\d\d-\d\dT[\d:.]+\] ends: {why}.*\n", done.stdout), done.stdout


def test_bad_input_is_one_line(tmp_path: Path, squeue: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert called(requeue.main, "begin", str(tmp_path)).stderr.startswith("slurm: SLURM_JOB_ID is not set")
    (tmp_path / "status.json").write_text("{")
    damaged = called(requeue.main, "begin", str(tmp_path), SLURM_JOB_ID="7")
    assert damaged.returncode == 2 and damaged.stderr.count("\n") == 1 and "status.json: damaged" in damaged.stderr
    squeue.write_text("echo 'squeue: error: something new' >&2; exit 1")
    (tmp_path / "lock.json").write_text(json.dumps({"host": "n1", "pid": 5, "job": "6"}))
    strange = called(requeue.main, "begin", str(tmp_path), SLURM_JOB_ID="7")
    assert (strange.returncode, strange.stderr) == (2, "slurm: squeue: squeue: error: something new\n")
