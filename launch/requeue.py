"""Decide whether a Slurm job may train, and whether it goes back to the queue when its training has ended.

    python3 launch/requeue.py begin RUN_DIR                # prints "ATTEMPT STEP": where the run is now
    python3 launch/requeue.py end RUN_DIR --before "ATTEMPT STEP" --asked USR1 --exit-status 1 --max-requeues 50
    python3 launch/requeue.py preempted RUN_DIR --before "ATTEMPT STEP" --asked "" --max-requeues 50

slurm/body.sh calls these in the batch shell; each takes well under a second. They run with the Python of the node, also
where a container holds everything else, so they need Python 3.9 and no packages. `end` writes its decision as one line
of the job's log.

`preempted` is for the moment when the batch shell gets SIGTERM. Where a site preempts by PreemptMode=CANCEL, Slurm has
ended the job by then and kills it KillWait seconds later. A job in this state can still be requeued, and only now is
its own shell there to do it. So `preempted` decides at once, like `end`, and its exit status is 0. If Slurm did not
cancel the job for another one (a person's scancel, the time limit), it does nothing, and its exit status is 1.
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
from typing import Any, NoReturn

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.errors import InputError, one_line_errors, warn, writing_to
from common.files import remove
from common.names import require_printable
from common.reading import read_own_json
from train.processes.ranks import number_in, slurm_job
from train.run import lock
from train.run.status import UNKNOWN_ATTEMPT, find_status

# Reasons in status.json that come from a person: a STOP file that this job did not make, W&B's stop button, a flag.
STOPPED_BY_PEOPLE = ("STOP file", "SIGINT", "--stop-after")
NEEDS_A_PERSON = ("NonFiniteError", "DivergedError")  # these save first, and would come again at the same step
NEAR_THE_LIMIT_SECONDS = 400  # --signal=B:USR1@300 comes up to a minute early
NO_STATUS: dict[str, Any] = {"state": None, "step": 0, "reason": None, "attempt": 0}  # of a run that never began
JOB_ID = re.compile("[0-9]+(_[0-9]+)?")
PREEMPTED = "PREEMPTED"  # squeue's state of a job that Slurm has cancelled for another one
PATIENCE_SECONDS = 120  # with a Slurm controller that does not answer


@dataclass(frozen=True)
class AttemptEnd:
    """The end of an attempt, and what Slurm reports about its job."""

    state: str | None  # in status.json; None if this attempt ended before it wrote one
    reason: str | None  # in status.json
    step_before: int  # of the newest checkpoint when the attempt began
    step: int  # of the newest checkpoint now
    signal: str | None  # that the batch shell received, after which it asked the run to stop
    job_state: str  # RUNNING until Slurm itself or scancel ends the job; PREEMPTED, also while it is being killed
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
    if end.job_state not in ("RUNNING", PREEMPTED):  # requeueing now would undo a scancel
        return Decision(False, f"left to Slurm: the job is {end.job_state}", failure)
    if end.state == "failed" and reason.startswith(NEEDS_A_PERSON):
        return Decision(False, f"it would fail again: {reason}", failure)

    if end.state == "stopped" and end.signal is None and reason.startswith(STOPPED_BY_PEOPLE):
        return Decision(False, f"stopped at step {end.step} as a person asked ({reason}); sbatch again to go on", 0)
    if end.job_state == PREEMPTED:
        explanation = f"Slurm cancels the job for another one (preemption); newest checkpoint at step {end.step}"
    elif end.signal is not None or (end.state == "stopped" and reason.startswith("SIG")):
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
    and a damaged lock are left to the trainer's own lock.
    """
    require_printable("--run-dir", str(run_dir))
    holder = read_holder(run_dir)
    if holder not in (None, job) and job_state(holder)[0] in ("RUNNING", "SUSPENDED", "STOPPED"):
        raise InputError(f"{run_dir}: job {holder} is training here; wait for it, or choose another --run-dir")
    with writing_to(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        remove(run_dir / "STOP")
    status = warned_status(run_dir)
    return f"{status['attempt']} {status['step']}"


def read_attempt_end(run_dir: Path, job: str, before: tuple[int, int], **known: Any) -> AttemptEnd:
    """Return how the attempt ended, from status.json, Slurm and the `known` fields.

    `before` is what `begin` printed. status.json of an earlier attempt does not count.
    """
    attempt_before, step_before = before
    status = warned_status(run_dir)
    is_ours = status["attempt"] != attempt_before
    state, seconds_left = job_state(job)
    if state == "COMPLETING" and is_cancelled_for_another(ask_slurm("scontrol", "show", "job", "--oneliner", job)):
        state = PREEMPTED
    return AttemptEnd(
        state=status["state"] if is_ours else None,
        reason=status["reason"] if is_ours else None,
        step_before=step_before,
        step=status["step"],
        job_state=state,
        seconds_left=seconds_left,
        **known,
    )


def warned_status(run_dir: Path) -> dict[str, Any]:
    """Return `find_status`, NO_STATUS for a run that never began; warn if the file is damaged."""
    status = find_status(run_dir) or NO_STATUS
    if status["attempt"] == UNKNOWN_ATTEMPT:
        warn("slurm", status["reason"])
    return status


def read_holder(run_dir: Path) -> str | None:
    """Return the Slurm job that lock.json names, None without one; warn if the file is damaged."""
    path = run_dir / lock.FILE_NAME
    try:
        content = read_own_json(path, lock.FORM, remedy="the trainer finds out whether somebody holds the run")
    except InputError as error:
        warn("slurm", str(error))
        return None
    holder = None if content is None else content["job"]
    return holder if holder is not None and JOB_ID.fullmatch(holder) else None


def is_cancelled_for_another(record: str) -> bool:
    """Return whether Slurm has ended the job for another one, by scontrol's record of a job that is completing.

    The state in it is COMPLETING for every kind of end. But PreemptTime is the end itself after a preemption; it is
    earlier if a person cancels the job within the time of grace, None or missing if nobody preempts it, and missing if
    Slurm has requeued it already.
    """
    moment = r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)"
    end = re.search(rf" StartTime=\S+ EndTime={moment} ", record)
    preempted = re.search(rf" PreemptEligibleTime=\S+ PreemptTime={moment} ", record)
    if end is None or preempted is None:
        return False
    return abs((datetime.fromisoformat(end[1]) - datetime.fromisoformat(preempted[1])).total_seconds()) <= 1


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


class OneLineParser(argparse.ArgumentParser):
    """A parser that raises InputError, without the usage, for arguments that it does not understand."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{' '.join(message.split())}; `python3 launch/requeue.py --help` shows the arguments")


def whole_number(text: str) -> int:
    if re.fullmatch(r"[0-9]{1,9}", text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def max_requeues(text: str) -> int:
    try:
        return whole_number(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}; MAX_REQUEUES where sbatch was called sets it") from error


def attempt_and_step(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(-1|[0-9]{1,18}) ([0-9]{1,18})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f'{text!r} is not "ATTEMPT STEP", which begin prints')
    return int(match[1]), int(match[2])


def parse(args: list[str] | None) -> argparse.Namespace:
    """Return the options; InputError if they are not complete."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("when", choices=("begin", "end", "preempted"))
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--before", type=attempt_and_step, metavar='"ATTEMPT STEP"', help="the line that begin printed")
    parser.add_argument(
        "--asked", default="", choices=("", "USR1", "TERM"), help="the signal that the batch shell received earlier"
    )
    parser.add_argument("--exit-status", type=whole_number, default=0, help="end: the exit status of srun")
    parser.add_argument(
        "--max-requeues", type=max_requeues, default=50, help="restarts after which the job is left to end"
    )
    options = parser.parse_args(args)
    if options.when != "begin" and options.before is None:
        parser.error(f'{options.when}: --before is missing; give it the line "ATTEMPT STEP" that begin printed')
    return options


def main(args: list[str] | None = None) -> None:
    with one_line_errors("slurm"):
        options = parse(args)
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
        if options.when == "preempted" and attempt_end.job_state != PREEMPTED:
            sys.exit(1)
        decision = decide(attempt_end)
        verb, now = "back to the queue" if decision.is_requeued else "ends", datetime.now()
        print(f"[job {job}.{restarts} {now.isoformat(timespec='milliseconds')}] {verb}: {decision.reason}", flush=True)
        if decision.is_requeued:
            ask_slurm("scontrol", "requeue", job)
    sys.exit(0 if options.when == "preempted" else decision.exit_status)


if __name__ == "__main__":
    main()
