"""The decision whether a job is requeued, as a table; the facts that it rests on."""

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.errors import InputError
from launch import requeue
from launch.requeue import AttemptEnd, begin, decide, parse_time_left
from tests.helpers.runs import called

ATTEMPT: dict[str, Any] = {
    **{"state": "running", "reason": None, "step_before": 100, "step": 100, "signal": None, "job_state": "RUNNING"},
    **{"seconds_left": 36_000, "restarts": 0, "max_requeues": 50, "exit_status": 1},
}
STOPPED = {"state": "stopped", "reason": "STOP file", "step": 130}
CRASH = "rank 3 on n2: RuntimeError: CUDA error"
CRASHED = {"state": "failed", "reason": CRASH, "step": 130}

NO_STEP = "no step was done before the time limit"
PREEMPTED = "Slurm cancels the job for another one (preemption)"

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
    # Slurm cancels the job for another one. The run was asked to stop before, or not, or has not begun.
    ({"job_state": "PREEMPTED"}, f"{PREEMPTED}; newest checkpoint at step 100"),
    ({"job_state": "PREEMPTED", "seconds_left": 200}, f"{PREEMPTED}; newest checkpoint at step 100"),
    ({**STOPPED, "job_state": "PREEMPTED", "signal": "USR1"}, f"{PREEMPTED}; newest checkpoint at step 130"),
    ({"job_state": "PREEMPTED", "state": None, "step_before": 0, "step": 0}, f"{PREEMPTED}; newest "),
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
    ({"job_state": "PREEMPTED", "restarts": 50}, 1, f"restarted 50 times (MAX_REQUEUES 50); {PREEMPTED}"),
    ({"job_state": "PREEMPTED", "state": "done", "step": 500}, 0, "done at step 500"),
    ({**STOPPED, "job_state": "PREEMPTED"}, 0, "stopped at step 130 as a person asked (STOP file)"),
    ({**CRASHED, "job_state": "PREEMPTED", "reason": "DivergedError: x"}, 1, "it would fail again: DivergedError: x"),
]


def test_which_attempts_are_requeued() -> None:
    cases = [(changes, True, 0, reason) for changes, reason in REQUEUED]
    cases += [(changes, False, exit_status, reason) for changes, exit_status, reason in ENDED]
    for changes, requeued, exit_status, reason in cases:
        decision = decide(AttemptEnd(**ATTEMPT | changes))
        assert (decision.is_requeued, decision.exit_status) == (requeued, exit_status), changes
        assert decision.reason.startswith(reason), changes


def test_an_end_by_preemption_is_told_from_others() -> None:
    """The parts of records that a real Slurm 22.05 showed while the batch shell handled SIGTERM."""
    end, start = "2026-11-29T12:51:37", "2026-11-29T12:51:17"
    cases = {
        f"EndTime={end} Deadline=N/A PreemptEligibleTime={start} PreemptTime={end} SuspendTime=None": True,
        # The controller's clock moved on between the two.
        f"EndTime={end} Deadline=N/A PreemptEligibleTime={start} PreemptTime={end[:-1]}6 SuspendTime=None": True,
        # A person cancelled the job in its time of grace.
        f"EndTime={end} Deadline=N/A PreemptEligibleTime={start} PreemptTime={start} SuspendTime=None": False,
        # A person cancelled it, or its time was over: where jobs can be preempted, and where they cannot.
        f"EndTime={end} Deadline=N/A PreemptEligibleTime={start} PreemptTime=None SuspendTime=None": False,
        f"EndTime={end} Deadline=N/A SuspendTime=None": False,
        # PreemptMode=REQUEUE
        "EndTime=Unknown Deadline=N/A SuspendTime=None": False,
        "": False,
    }
    for rest, expected in cases.items():
        record = f"JobId=3 JobName=PreemptTime={end} JobState=COMPLETING StartTime={start} {rest} Command=x"
        assert requeue.is_cancelled_for_another(record) == expected, rest


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
            if command[:2] == ("scontrol", "requeue"):
                return subprocess.CompletedProcess(command, 0, "", "")
            assert command[0] == "squeue"
            return subprocess.CompletedProcess(command, returncode, stdout, stderr)

        monkeypatch.setattr(requeue.subprocess, "run", run)

    return answer


def write_lock(run_dir: Path, job: str) -> None:
    (run_dir / "lock.json").write_text(json.dumps({"host": "n1", "pid": 5, "started": "1", "job": job}))


def write_status(run_dir: Path, **status: Any) -> None:
    (run_dir / "status.json").write_text(json.dumps({"reason": None, **status}))


def test_a_run_begins_at_its_newest_checkpoint_and_without_a_stop_file(tmp_path: Path) -> None:
    assert begin(tmp_path / "runs" / "new", "7") == "0 0"
    write_status(tmp_path, state="stopped", step=30, attempt=2)
    (tmp_path / "STOP").touch()
    write_lock(tmp_path, "7")  # a crash of this job left it
    assert begin(tmp_path, "7") == "2 30"
    assert not (tmp_path / "STOP").exists()


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
    squeue(stderr="squeue: error: something new\n", returncode=1)
    write_lock(tmp_path, "6")
    unknown = called(requeue.main, "begin", str(tmp_path), SLURM_JOB_ID="7")
    assert (unknown.returncode, unknown.stderr) == (2, "slurm: squeue: squeue: error: something new\n")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["end", "RUN"], 'end: --before is missing; give it the line "ATTEMPT STEP" that begin printed'),
        (["preempted", "RUN"], "preempted: --before is missing"),
        (["end"], "the following arguments are required: run_dir"),
        ([], "the following arguments are required: when, run_dir"),
        (["ende", "RUN"], "argument when: invalid choice: 'ende'"),
        (["end", "RUN", "--before", "2"], "argument --before: '2' is not \"ATTEMPT STEP\", which begin prints"),
        (["end", "RUN", "--before", "two 30"], "argument --before: 'two 30' is not"),
        (["end", "RUN", "--before", "2 30\n"], "argument --before: '2 30\\n' is not"),
        (["end", "RUN", "--before", "2 \u0663"], "argument --before: "),
        (["end", "RUN", "--before", "2 " + "9" * 5000], "argument --before: "),
        (["end", "RUN", "--before", "2 30", "--exit-status", "-1"], "argument --exit-status: "),
        (["end", "RUN", "--before", "2 30", "--exit-status", "x"], "argument --exit-status: 'x' is not a whole number"),
        (["end", "RUN", "--before", "2 30", "--asked", "KILL"], "argument --asked: invalid choice: 'KILL'"),
        (["end", "RUN", "--before", "2 30", "a\nb"], "unrecognized arguments: a b"),
        (
            ["begin", "RUN", "--max-requeues", "many"],
            "'many' is not a whole number; MAX_REQUEUES where sbatch was called",
        ),
        (["begin", "RUN", "--max-requeues=-1"], "'-1' is not a whole number; MAX_REQUEUES"),
    ],
)
def test_a_garbled_argument_is_one_line(words: list[str], expected: str) -> None:
    done = called(requeue.main, *words, SLURM_JOB_ID="7")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith("slurm: ") and expected in done.stderr, done.stderr


def make_damage(path: Path, kind: str) -> None:
    """Put something else in the place of a JSON file."""
    contents = {
        "binary": b"\xff\x00\x80",
        "empty": b"",
        "torn": b'{"state": "running", "step": 1',
        "an empty object": b"{}",
        "a list": b"[]",
        "a number": b"5",
        "nested": b"[" * 100_000,
        "long digits": b'{"attempt": ' + b"9" * 5000 + b"}",
        "wrong types": b'{"state": 3, "step": "x", "reason": [], "attempt": null, "job": {}}',
        "other names": b'{"state": "asleep", "step": -1, "reason": null, "attempt": 2, "job": 7}',
    }
    path.unlink(missing_ok=True)
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a directory":
        path.mkdir()
    elif kind == "a link to itself":
        path.symlink_to(path)
    else:
        path.write_bytes(contents[kind])


DAMAGES = ["binary", "empty", "torn", "an empty object", "a list", "a number", "nested", "long digits", "wrong types"]
DAMAGES += ["other names", "a FIFO", "a directory", "a link to itself"]


def end_of(run_dir: Path, before: str, *more: str) -> "subprocess.CompletedProcess[str]":
    words = ("end", str(run_dir), "--before", before, "--exit-status", "1", *more)
    return called(requeue.main, *words, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_status_keeps_no_job_from_coming_back(tmp_path: Path, squeue: Answer, damage: str) -> None:
    """The checkpoints' names tell the progress, and one line of warning names the file."""
    squeue("RUNNING 10:00:00")
    for step in (20, 30):
        (tmp_path / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_00000099").write_text("junk")
    make_damage(tmp_path / "status.json", damage)
    make_damage(tmp_path / "lock.json", damage)
    begun = called(requeue.main, "begin", str(tmp_path), SLURM_JOB_ID="7")
    assert (begun.returncode, begun.stdout) == (0, "-1 30\n"), begun.stderr
    assert re.fullmatch(r"slurm: warning: .*lock\.json: .*\nslurm: warning: .*status\.json: .*\n", begun.stderr)

    # Damaged while an attempt ran: a signal and a crash after progress bring the job back, a crash without does not.
    for before, more, word in (
        ("2 30", ["--asked", "USR1"], "back to the queue: stopped by SIGUSR1"),
        ("2 20", [], "back to the queue: running: "),
        ("2 30", [], "ends: no new checkpoint since step 30; running: "),
    ):
        done = end_of(tmp_path, before, *more)
        assert f"] {word}" in done.stdout and done.stdout.count("\n") == 1, done.stdout + done.stderr
        assert done.stderr.count("\n") == 1 and f"{tmp_path}/status.json: " in done.stderr, done.stderr
    # Damaged before it, and nothing of it since: the trainer refused to begin.
    assert "] ends: training did not begin" in end_of(tmp_path, "-1 30").stdout
    # Damaged before it, and made anew by it.
    path = tmp_path / "status.json"
    path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    write_status(tmp_path, state="failed", step=40, attempt=1)
    done = end_of(tmp_path, "-1 30")
    assert "] back to the queue: ended as failed; its checkpoints moved on from step 30 to 40" in done.stdout
    assert not done.stderr


def test_a_status_that_is_gone_is_damaged(tmp_path: Path, squeue: Answer) -> None:
    squeue("RUNNING 10:00:00")
    (tmp_path / "checkpoints" / "step_00000030").mkdir(parents=True)
    done = end_of(tmp_path, "2 20")
    assert "its checkpoints moved on from step 20 to 30" in done.stdout and "status.json: gone; " in done.stderr
