"""What becomes of a Slurm job that trains: may it begin, and once its torchrun has ended, does it go back to the queue?

    python3 launch/requeue.py begin RUN_DIR                              # prints "ATTEMPT STEP", where the run stands
    python3 launch/requeue.py end RUN_DIR --before "ATTEMPT STEP" --asked USR1 --exit-status 1 --max-requeues 50

slurm/body.sh calls both in the batch shell; they take no time, and run with the Python of a node whose container holds
all the rest: 3.9 is enough, and nothing needs to be installed. `end` says its decision in a line of the job's log.
"""

from __future__ import annotations

import argparse
import json
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

from common.errors import InputError, one_line_errors, reading_from, writing_to
from train.processes.ranks import slurm_job

# Reasons in status.json that came from a person: a STOP file that is not this job's, W&B's stop button, --stop-after.
ASKED_BY_PEOPLE = ("STOP file", "SIGINT", "--stop-after")
NEEDS_A_PERSON = ("NonFiniteError", "DivergedError")  # which save first, and would come again at the same step
NEAR_THE_LIMIT_SECONDS = 400  # --signal=B:USR1@300 comes up to a minute early
PATIENCE_SECONDS = 120  # with a Slurm controller that does not answer


@dataclass(frozen=True)
class Facts:
    """How an attempt ended, and what Slurm says."""

    state: str | None
    """Of status.json; None if this attempt did not come so far as to write one."""
    reason: str | None
    step_before: int
    """Of the newest checkpoint when the attempt began."""
    step: int
    """Of the newest checkpoint now."""
    asked: str | None
    """The signal that the batch shell heard, after which it asked the run to stop."""
    job_state: str
    """squeue's word: RUNNING until Slurm itself, or a scancel, ends the job."""
    seconds_left: int | None
    """Until the time limit; None without one."""
    restarts: int
    max_requeues: int
    exit_status: int
    """srun's."""


@dataclass(frozen=True)
class Decision:
    is_requeued: bool
    why: str
    exit_status: int


def decide(facts: Facts) -> Decision:
    """Back to the queue, or not. Of a run that is done, or stopped by a person, the exit status is 0."""
    reason, moved = facts.reason or "", facts.step > facts.step_before
    failure = facts.exit_status or 1
    if facts.state == "done":
        return Decision(False, f"done at step {facts.step}", 0)
    if facts.job_state != "RUNNING":  # requeueing it now would undo a scancel
        return Decision(False, f"left to Slurm: the job is {facts.job_state}", failure)
    if facts.state == "failed" and reason.startswith(NEEDS_A_PERSON):
        return Decision(False, f"it would fail again: {reason}", failure)

    if facts.state == "stopped" and facts.asked is None and reason.startswith(ASKED_BY_PEOPLE):
        return Decision(False, f"stopped at step {facts.step} as a person asked ({reason}); sbatch again to go on", 0)
    if facts.asked is not None or (facts.state == "stopped" and reason.startswith("SIG")):
        by = f"SIG{facts.asked}" if facts.asked is not None else reason
        is_near = facts.seconds_left is not None and facts.seconds_left < NEAR_THE_LIMIT_SECONDS
        if is_near and not moved:
            return Decision(False, f"no step was done before the time limit ({by}); give a longer --time", failure)
        why = f"stopped by {by} at step {facts.step}"
    elif facts.state is None:
        return Decision(False, "training did not begin; the first error above says why", failure)
    else:  # a crash, a hang, or processes killed, of which status.json still says running
        what = f"{facts.state}: {reason}" if reason else f"ended as {facts.state}"
        if not moved:
            return Decision(False, f"no new checkpoint since step {facts.step_before}; {what}", failure)
        why = f"{what}; its checkpoints moved on from step {facts.step_before} to {facts.step}"
    if facts.restarts >= facts.max_requeues:
        return Decision(False, f"restarted {facts.restarts} times (MAX_REQUEUES {facts.max_requeues}); {why}", failure)
    return Decision(True, why, 0)


def begin(run_dir: Path, job: str) -> str:
    """Where the run stands, as "ATTEMPT STEP"; a STOP file is removed. InputError if another job trains there.

    That is asked of Slurm before anything is touched; of holders outside Slurm the trainer's lock knows.
    """
    holder = (read_json(run_dir / "lock.json") or {}).get("job")
    if holder not in (None, job):
        state = job_state(holder)[0]
        if state in ("RUNNING", "SUSPENDED", "STOPPED"):
            raise InputError(f"{run_dir}: job {holder} is training here; wait for it, or choose another --run-dir")
    with writing_to(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "STOP").unlink(missing_ok=True)
    status = read_json(run_dir / "status.json") or {"attempt": 0, "step": 0}
    return f"{status['attempt']} {status['step']}"


def gather(run_dir: Path, job: str, before: str, **known: Any) -> Facts:
    attempt_before, step_before = (int(word) for word in before.split())
    status = read_json(run_dir / "status.json")
    is_ours = status is not None and status["attempt"] > attempt_before
    state, seconds_left = job_state(job)
    return Facts(
        state=status["state"] if status is not None and is_ours else None,
        reason=status["reason"] if status is not None and is_ours else None,
        step_before=step_before,
        step=status["step"] if status is not None else 0,
        job_state=state,
        seconds_left=seconds_left,
        **known,
    )


def read_json(path: Path) -> dict[str, Any] | None:
    """A small file of the run directory, None if it is not there; those files are replaced whole."""
    with reading_from(path):
        try:
            value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: damaged ({error}); remove it") from error
    return value


def job_state(job: str) -> tuple[str, int | None]:
    """(squeue's state, seconds left) of a job; GONE for one that Slurm has forgotten."""
    answer = ask_slurm("squeue", "--noheader", "--states=all", "--jobs", job, "--format", "%T %L")
    state, left = answer.split() if answer else ("GONE", "")
    return state, seconds_of(left)


def seconds_of(text: str) -> int | None:
    """Seconds of squeue's [[DAYS-]HOURS:]MINUTES:SECONDS; None for UNLIMITED, NOT_SET and INVALID."""
    match = re.fullmatch(r"(?:(?:(\d+)-)?(\d+):)?(\d+):(\d+)", text)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def ask_slurm(*command: str) -> str:
    """What the command prints, "" of a job that Slurm does not know. A controller that is away is waited for."""
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            raise InputError(f"no Slurm here: {error}") from error
        if done.returncode == 0:
            return done.stdout.strip()
        said = done.stderr.strip().splitlines()
        if any("Invalid job id" in line for line in said):
            return ""
        is_away = any(word in line for line in said for word in ("contact slurm controller", "timed out"))
        if not is_away or time.monotonic() > end:
            raise InputError(f"{command[0]}: {said[-1] if said else f'exit status {done.returncode}'}")
        time.sleep(5)


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("when", choices=("begin", "end"))
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--before", metavar='"ATTEMPT STEP"', help="what begin printed")
    parser.add_argument("--asked", default="", help="the signal that the batch shell heard, without SIG")
    parser.add_argument("--exit-status", type=int, default=0, help="srun's")
    parser.add_argument("--max-requeues", type=int, default=50, help="restarts after which the job is left to end")
    given = parser.parse_args(args)
    job, restarts = slurm_job(os.environ), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    with one_line_errors("slurm"):
        if job is None:
            raise InputError("SLURM_JOB_ID is not set: this is for slurm/body.sh, in a job")
        if given.when == "begin":
            print(begin(given.run_dir, job))
            return
        facts = gather(
            given.run_dir,
            job,
            given.before,
            asked=given.asked or None,
            restarts=restarts,
            max_requeues=given.max_requeues,
            exit_status=given.exit_status,
        )
        decision = decide(facts)
        verb = "back to the queue" if decision.is_requeued else "ends"
        print(
            f"[job {job}.{restarts} {datetime.now().isoformat(timespec='milliseconds')}] {verb}: {decision.why}",
            flush=True,
        )
        if decision.is_requeued:
            ask_slurm("scontrol", "requeue", job)
    sys.exit(decision.exit_status)


if __name__ == "__main__":
    main()
