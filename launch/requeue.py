"""Decide whether a Slurm job may train, and whether it goes back to the queue when its training has ended.

    python3 launch/requeue.py begin RUN_DIR                # prints "ATTEMPT STEP": where the run is now
    python3 launch/requeue.py end RUN_DIR --before "ATTEMPT STEP" --asked USR1 --exit-status 1 --max-requeues 50

slurm/body.sh calls both in the batch shell; each takes well under a second. They run with the Python of the node, also
where a container holds everything else, so they need Python 3.9 and no packages. `end` writes its decision as one line
of the job's log.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.errors import InputError, one_line_errors, reading_from, warn, writing_to
from common.names import require_printable
from common.reading import NATURAL, Form, read_own_json
from train.processes.ranks import number_in, slurm_job

# Reasons in status.json that come from a person: a STOP file that this job did not make, W&B's stop button, a flag.
STOPPED_BY_PEOPLE = ("STOP file", "SIGINT", "--stop-after")
NEEDS_A_PERSON = ("NonFiniteError", "DivergedError")  # these save first, and would come again at the same step
NEAR_THE_LIMIT_SECONDS = 400  # --signal=B:USR1@300 comes up to a minute early
UNKNOWN = "?"  # instead of the attempt of a status.json that is damaged
STATUS_FORM: Form = {"state": str, "reason": (str, None), "attempt": NATURAL, "step": NATURAL}
NO_STATUS: dict[str, Any] = {"attempt": 0, "step": 0}  # of a run that never began
PATIENCE_SECONDS = 120  # with a Slurm controller that does not answer


@dataclass(frozen=True)
class AttemptEnd:
    """The end of an attempt, and what Slurm reports about its job."""

    state: str | None  # in status.json; None if this attempt ended before it wrote one
    reason: str | None  # in status.json
    step_before: int  # of the newest checkpoint when the attempt began
    step: int  # of the newest checkpoint now
    signal: str | None  # that the batch shell received, after which it asked the run to stop
    job_state: str  # from squeue: RUNNING until Slurm itself or scancel ends the job
    seconds_left: int | None  # until the time limit; None without a limit
    restarts: int  # times that the job was requeued so far
    max_requeues: int  # restarts after which the job is left to end
    exit_status: int  # of srun


@dataclass(frozen=True)
class Decision:
    """The decision about a job: requeued or not, the reason for the log, the exit status of the job script."""

    is_requeued: bool
    reason: str
    exit_status: int


def decide(end: AttemptEnd) -> Decision:
    """Return whether the job goes back to the queue.

    A run that is done, or that a person stopped, ends with exit status 0.
    """
    reason, has_progress = end.reason or "", end.step > end.step_before
    failure = end.exit_status or 1
    if end.state == "done":
        return Decision(False, f"done at step {end.step}", 0)
    if end.job_state != "RUNNING":  # requeueing now would undo a scancel
        return Decision(False, f"left to Slurm: the job is {end.job_state}", failure)
    if end.state == "failed" and reason.startswith(NEEDS_A_PERSON):
        return Decision(False, f"it would fail again: {reason}", failure)

    if end.state == "stopped" and end.signal is None and reason.startswith(STOPPED_BY_PEOPLE):
        return Decision(False, f"stopped at step {end.step} as a person asked ({reason}); sbatch again to go on", 0)
    if end.signal is not None or (end.state == "stopped" and reason.startswith("SIG")):
        signal = f"SIG{end.signal}" if end.signal is not None else reason
        is_near = end.seconds_left is not None and end.seconds_left < NEAR_THE_LIMIT_SECONDS
        if is_near and not has_progress:
            return Decision(False, f"no step was done before the time limit ({signal}); give a longer --time", failure)
        explanation = f"stopped by {signal} at step {end.step}"
    elif end.state is None:
        return Decision(False, "training did not begin; the first error above says why", failure)
    else:  # a crash, a hang, or killed processes whose status.json still says running
        event = f"{end.state}: {reason}" if reason else f"ended as {end.state}"
        if not has_progress:
            return Decision(False, f"no new checkpoint since step {end.step_before}; {event}", failure)
        explanation = f"{event}; its checkpoints moved on from step {end.step_before} to {end.step}"
    if end.restarts >= end.max_requeues:
        explanation = f"restarted {end.restarts} times (MAX_REQUEUES {end.max_requeues}); {explanation}"
        return Decision(False, explanation, failure)
    return Decision(True, explanation, 0)


def begin(run_dir: Path, job: str) -> str:
    """Return where the run is as "ATTEMPT STEP", and remove a STOP file.

    Raises InputError, before anything is touched, if Slurm says that another job trains there. Holders outside Slurm
    are left to the trainer's own lock.
    """
    require_printable("--run-dir", str(run_dir))
    holder = (read_if_sound(run_dir / "lock.json", {"job": (str, None)}) or {}).get("job")
    if holder is not None and not re.fullmatch(r"[0-9]+(_[0-9]+)?", holder):
        warn("slurm", f"{run_dir / 'lock.json'}: {holder!r} is no job of Slurm's; the trainer looks at it")
    elif holder not in (None, job) and job_state(holder)[0] in ("RUNNING", "SUSPENDED", "STOPPED"):
        raise InputError(f"{run_dir}: job {holder} is training here; wait for it, or choose another --run-dir")
    with writing_to(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "STOP").unlink(missing_ok=True)
    status = read_status(run_dir) or NO_STATUS
    return f"{UNKNOWN if status['attempt'] is None else status['attempt']} {status['step']}"


def read_if_sound(path: Path, form: Form) -> dict[str, Any] | None:
    """Return a JSON file's object; None without one, or with a warning if it is damaged: the trainer mends it."""
    try:
        return read_own_json(path, form)
    except InputError as error:
        warn("slurm", str(error))
        return None


def read_status(run_dir: Path) -> dict[str, Any] | None:
    """Return status.json; None without one. For a damaged one, the attempt is None, and checkpoints tell the step."""
    path = run_dir / "status.json"
    status = read_if_sound(path, STATUS_FORM)
    if status is None and os.path.lexists(path):
        with reading_from(run_dir):
            names = [folder.name for folder in (run_dir / "checkpoints").glob("step_*")]
        steps = [int(name[5:]) for name in names if re.fullmatch(r"step_[0-9]{8,18}", name)]
        return {"state": "running", "reason": "status.json is damaged", "attempt": None, "step": max([0, *steps])}
    return status


def read_attempt_end(run_dir: Path, job: str, before: str, **known: Any) -> AttemptEnd:
    """Return how the attempt ended, from status.json, squeue and the `known` fields.

    `before` is what `begin` printed. status.json of an earlier attempt does not count, nor one that was damaged then
    and still is.
    """
    attempt_before, _, step_before = before.partition(" ")
    if not re.fullmatch(rf"([0-9]{{1,18}}|{re.escape(UNKNOWN)}) [0-9]{{1,18}}", before):
        raise InputError(f"--before {before!r}: give the line that `begin` printed, like --before '3 1000'")
    status = read_status(run_dir) or NO_STATUS
    if status["attempt"] is None or attempt_before == UNKNOWN:
        is_ours = (status["attempt"] is None) != (attempt_before == UNKNOWN)
    else:
        is_ours = status["attempt"] > int(attempt_before)
    state, seconds_left = job_state(job)
    return AttemptEnd(
        state=status["state"] if is_ours else None,
        reason=status["reason"] if is_ours else None,
        step_before=int(step_before),
        step=status["step"],
        job_state=state,
        seconds_left=seconds_left,
        **known,
    )


def job_state(job: str) -> tuple[str, int | None]:
    """Return (squeue's state, seconds left) of a job; the state is GONE if Slurm has forgotten it."""
    answer = ask_slurm("squeue", "--noheader", "--states=all", "--jobs", job, "--format", "%T %L")
    state, left = answer.split()[:2] if answer else ("GONE", "")
    return state, parse_time_left(left)


def parse_time_left(text: str) -> int | None:
    """Return the seconds of squeue's [[DAYS-]HOURS:]MINUTES:SECONDS; None for UNLIMITED, NOT_SET and INVALID."""
    match = re.fullmatch(r"(?:(?:(\d+)-)?(\d+):)?(\d+):(\d+)", text)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def ask_slurm(*command: str) -> str:
    """Return what the command prints, "" for a job that Slurm does not know.

    A controller that does not answer is asked again for PATIENCE_SECONDS.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            raise InputError(f"no Slurm here: {error}") from error
        if done.returncode == 0:
            return done.stdout.strip()
        lines = done.stderr.strip().splitlines()
        if any("Invalid job id" in line for line in lines):
            return ""
        is_away = any(phrase in line for line in lines for phrase in ("contact slurm controller", "timed out"))
        if not is_away or time.monotonic() > deadline:
            raise InputError(f"{command[0]}: {lines[-1] if lines else f'exit status {done.returncode}'}")
        time.sleep(5)


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("when", choices=("begin", "end"))
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--before", metavar='"ATTEMPT STEP"', default="", help="end: the line that begin printed")
    parser.add_argument("--asked", default="", help="end: the signal that the batch shell received, without SIG")
    parser.add_argument("--exit-status", type=int, default=0, help="end: the exit status of srun")
    parser.add_argument("--max-requeues", type=int, default=50, help="end: restarts after which the job is left to end")
    options = parser.parse_args(args)
    with one_line_errors("slurm"):
        job, restarts = slurm_job(os.environ), number_in(os.environ, "SLURM_RESTART_COUNT", 0)
        if job is None:
            raise InputError("SLURM_JOB_ID is not set: this command is for slurm/body.sh, in a job")
        if options.when == "begin":
            print(begin(options.run_dir, job))
            return
        attempt_end = read_attempt_end(
            options.run_dir,
            job,
            options.before,
            signal=options.asked or None,
            restarts=restarts,
            max_requeues=options.max_requeues,
            exit_status=options.exit_status,
        )
        decision = decide(attempt_end)
        verb, now = "back to the queue" if decision.is_requeued else "ends", datetime.now()
        print(f"[job {job}.{restarts} {now.isoformat(timespec='milliseconds')}] {verb}: {decision.reason}", flush=True)
        if decision.is_requeued:
            ask_slurm("scontrol", "requeue", job)
    sys.exit(decision.exit_status)


if __name__ == "__main__":
    main()
