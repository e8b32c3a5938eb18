"""Inspect many run directories from outside: how far each run is, whether a job trains it, and how to stop it."""

import shutil
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common.errors import InputError, reading_from, warn, writing_to
from common.files import write_json_atomically
from common.reading import NATURAL, read_own_json
from launch.grid import Point
from launch.requeue import JOB_ID, ask_slurm
from train.metrics.rows import METRICS_FILE, read_lines
from train.processes.stop_requests import FILE_NAME as STOP_FILE
from train.run.lock import living_holder
from train.run.status import STATUS_FILE, find_status

SUBMITTED_FILE = "submitted.json"
PATIENCE_SECONDS = 600.0  # with a run that was asked to stop: a long step, a big checkpoint
SECONDS_BETWEEN_POLLS = 1.0
JOB_FORM = {"job": (str, None)}  # of submitted.json and provenance.json
ABSENT = "-"
CONFIG_FORM = {"config": {"train": {"steps": NATURAL}}}
MENDED = "the next start writes it again"
# squeue's states of a job that has started and not yet ended.
STARTED = ("RUNNING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "COMPLETING")

State = Literal["new", "queued", "running", "done", "stopped", "failed", "killed"]
BUSY = ("queued", "running")


@dataclass(frozen=True)
class RunInfo:
    """A run directory at one moment."""

    run_dir: Path
    state: State  # killed: status.json says running, but no process holds the run
    status: dict[str, Any] | None  # content of status.json; None if there is none
    job: str | None  # the last that was submitted for the run, or trained it
    holder: str | None  # the process that trains the run now

    @property
    def step(self) -> int:
        return self.status["step"] if self.status is not None else 0

    @property
    def is_busy(self) -> bool:
        return self.state in BUSY


def inspect_runs(run_dirs: Iterable[Path]) -> list[RunInfo]:
    """Return the state of each run. Slurm is asked once for all, and not at all if no run ever had a job."""
    jobs = {run_dir: read_job(run_dir) for run_dir in run_dirs}
    queue = queued_jobs({job for job in jobs.values() if job is not None})
    return [_inspect_run(run_dir, job, queue) for run_dir, job in jobs.items()]


def _inspect_run(run_dir: Path, job: str | None, queue: dict[str, str]) -> RunInfo:
    with reading_from(run_dir):
        status, holder = find_status(run_dir), living_holder(run_dir)
    state: State = "new" if status is None else status["state"]
    job_state = queue.get(job or "")
    if holder is not None:
        state = "running"
    elif state != "done" and job_state is not None and job_state not in STARTED:
        state = "queued"
    elif job_state is not None and (state == "running" or (state != "done" and is_submitted_for(run_dir, job))):
        state = "running"  # the job is starting or ending
    elif state == "running":
        state = "killed"
    return RunInfo(run_dir, state, status, job, holder)


def read_job(run_dir: Path) -> str | None:
    """Return the job in submitted.json (launch/submit.py) or provenance.json (any start), whichever is newer."""
    with reading_from(run_dir):
        files = [run_dir / name for name in (SUBMITTED_FILE, "provenance.json") if (run_dir / name).is_file()]
        newest = max(files, key=lambda path: path.stat().st_mtime, default=None)
    return None if newest is None else _job_in(newest)


def _job_in(path: Path) -> str | None:
    """Return the job that a file names; None if it names none that Slurm could know, or with a warning is damaged."""
    try:
        job = (read_own_json(path, JOB_FORM, remedy=MENDED) or {"job": None})["job"]
    except InputError as error:
        warn("submit", str(error))
        return None
    return job if job is not None and JOB_ID.fullmatch(job) else None


def record_submission(point: Point, job: str | None) -> None:
    """Write submitted.json into the run directory."""
    with writing_to(point.run_dir):
        point.run_dir.mkdir(parents=True, exist_ok=True)
        write_json_atomically(point.run_dir / SUBMITTED_FILE, {"job": job, "args": point.args})


def is_submitted_for(run_dir: Path, job: str | None) -> bool:
    """Return whether the job was submitted for this run alone.

    Another job may be the shell in which a person started the run; it goes on when the run has ended.
    """
    return _job_in(run_dir / SUBMITTED_FILE) == job


def queued_jobs(jobs: Collection[str]) -> dict[str, str]:
    """Return {job: state} of the jobs that have not ended; empty where there is no Slurm.

    A task of an array has a name of its own, like 12_0.
    """
    if not jobs or shutil.which("squeue") is None:
        return {}
    # squeue knows no tasks that have ended, so whole arrays are asked for.
    ids = ",".join(sorted({job.partition("_")[0] for job in jobs}))
    answer = ask_slurm("squeue", "--noheader", "--array", "--jobs", ids, "--format", "%i %T")
    return dict(line.split(maxsplit=1) for line in answer.splitlines())


def find_runs(folder: Path) -> list[Path]:
    """Return the folder itself if it is a run directory, else the run directories in it."""

    def is_run(path: Path) -> bool:
        return any((path / name).is_file() for name in (STATUS_FILE, SUBMITTED_FILE))

    with reading_from(folder):
        run_dirs = [folder] if is_run(folder) else sorted(path for path in folder.glob("*") if is_run(path))
    if not run_dirs:
        raise InputError(f"{folder}: no run here, and no folder with runs; give a run directory or a sweep's folder")
    return run_dirs


def table(runs: Sequence[RunInfo]) -> str:
    """Return a line per run: state, step, last training and validation loss, job, and the reason of its end."""
    rows: list[tuple[str, ...]] = [("run", "", "step", "of", "loss", "val loss", "job", "")]
    for run in runs:
        reason = (run.status or {}).get("reason") or ""
        try:
            content = read_own_json(run.run_dir / "config.json", CONFIG_FORM, remedy=MENDED)
            steps = ABSENT if content is None else str(content["config"]["train"]["steps"])
        except InputError as error:  # one damaged file must not hide the other runs
            steps, reason = ABSENT, str(error)
        losses = [last_metric(run.run_dir, key) for key in ("loss", "val_loss")]
        rows.append((str(run.run_dir), run.state, str(run.step), steps, *losses, run.job or ABSENT, reason))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    justify = (*[str.ljust] * 2, *[str.rjust] * 4, *[str.ljust] * 2)
    cells = [[side(cell, width) for side, cell, width in zip(justify, row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join(line).rstrip() for line in cells)


def last_metric(run_dir: Path, key: str) -> str:
    """Return the last value of `key` in metrics.jsonl, with four decimals."""
    values = [row[key] for row in read_lines(run_dir / METRICS_FILE).rows if key in row]
    return ABSENT if not values or values[-1] is None else f"{values[-1]:.4f}"


def stop(run_dirs: Sequence[Path]) -> None:
    """Stop the runs that train, with a checkpoint, and cancel those in the queue. Returns when all have ended."""
    holders: dict[Path, str] = {}  # the process that was already asked to stop, by run
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        runs = inspect_runs(run_dirs)
        for run in runs:
            if run.state == "queued" and run.job is not None:
                ask_slurm("scancel", run.job)
            elif run.holder is not None and run.holder != holders.get(run.run_dir):
                # A job that begins removes the file, so it is written once there is a holder. It is written once per
                # holder, because a second file would outlive the run.
                holders[run.run_dir] = run.holder
                with writing_to(run.run_dir):
                    (run.run_dir / STOP_FILE).touch()
                print(f"{run.run_dir}: asked to save and stop ({run.holder})", flush=True)
        if not any(run.is_busy for run in runs):
            print(table(runs))
            return
        if time.monotonic() > deadline:
            busy = ", ".join(str(run.run_dir) for run in runs if run.state == "running")
            raise InputError(f"{busy}: not stopped after {PATIENCE_SECONDS:.0f} s; its log says where it is")
        time.sleep(SECONDS_BETWEEN_POLLS)
