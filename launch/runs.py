"""Many run directories from outside: how far each is, whether a job trains it, and how to stop it."""

import json
import shutil
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common.errors import InputError, reading_from, writing_to
from common.files import write_json_atomically
from launch.grid import Point
from launch.requeue import ask_slurm, read_json
from train.metrics.logger import METRICS_FILE
from train.processes.stop_requests import FILE_NAME as STOP_FILE
from train.run.directory import STATUS_FILE
from train.run.lock import living_holder

SUBMITTED_FILE = "submitted.json"
PATIENCE_SECONDS = 600.0  # with a run that was asked to stop: a long step, a big checkpoint
SECONDS_BETWEEN_LOOKS = 1.0
ABSENT = "-"
BEGUN = ("RUNNING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "COMPLETING")  # of squeue's states

Doing = Literal["new", "queued", "running", "done", "stopped", "failed", "killed"]


@dataclass(frozen=True)
class Look:
    """A run directory at one moment."""

    run_dir: Path
    doing: Doing
    """killed: status.json says running, and nobody is."""
    status: dict[str, Any] | None
    job: str | None
    """The last that was submitted for it, or trained it."""
    holder: str | None
    """Who trains it now."""

    @property
    def step(self) -> int:
        return self.status["step"] if self.status is not None else 0


def look(run_dirs: Iterable[Path]) -> list[Look]:
    """One question to Slurm for all of them, and none if no job ever had them."""
    jobs = {run_dir: job_of(run_dir) for run_dir in run_dirs}
    queue = queued_jobs({job for job in jobs.values() if job is not None})
    return [_look(run_dir, job, queue) for run_dir, job in jobs.items()]


def _look(run_dir: Path, job: str | None, queue: dict[str, str]) -> Look:
    with reading_from(run_dir):
        status, holder = read_json(run_dir / STATUS_FILE), living_holder(run_dir)
    doing: Doing = "new" if status is None else status["state"]
    state = queue.get(job or "")
    if holder is not None:
        doing = "running"
    elif doing != "done" and state is not None and state not in BEGUN:
        doing = "queued"
    elif state is not None and (doing == "running" or (doing != "done" and is_submitted_for(run_dir, job))):
        doing = "running"  # it starts, or ends
    elif doing == "running":
        doing = "killed"
    return Look(run_dir, doing, status, job, holder)


def job_of(run_dir: Path) -> str | None:
    """Of submitted.json (launch/submit.py) or provenance.json (any start), whichever is newer."""
    with reading_from(run_dir):
        files = [run_dir / name for name in (SUBMITTED_FILE, "provenance.json") if (run_dir / name).is_file()]
        newest = max(files, key=lambda path: path.stat().st_mtime, default=None)
    return None if newest is None else (read_json(newest) or {}).get("job")


def note_submission(point: Point, job: str | None) -> None:
    with writing_to(point.run_dir):
        point.run_dir.mkdir(parents=True, exist_ok=True)
        write_json_atomically(point.run_dir / SUBMITTED_FILE, {"job": job, "args": point.args})


def is_submitted_for(run_dir: Path, job: str | None) -> bool:
    """Is the job this run's alone? Another may be a person's shell in which the run was started, and has ended."""
    return (read_json(run_dir / SUBMITTED_FILE) or {}).get("job") == job


def queued_jobs(jobs: Collection[str]) -> dict[str, str]:
    """{job: state} of those that have not ended, an array's task by its own name; empty where there is no Slurm."""
    if not jobs or shutil.which("squeue") is None:
        return {}
    ids = ",".join(sorted({job.partition("_")[0] for job in jobs}))  # of tasks that have ended squeue does not know
    answer = ask_slurm("squeue", "--noheader", "--array", "--jobs", ids, "--format", "%i %T")
    return dict(line.split(maxsplit=1) for line in answer.splitlines())


def runs_in(folder: Path) -> list[Path]:
    """The folder itself if it is a run's, else those in it."""

    def is_run(path: Path) -> bool:
        return any((path / name).is_file() for name in (STATUS_FILE, SUBMITTED_FILE))

    with reading_from(folder):
        found = [folder] if is_run(folder) else sorted(path for path in folder.glob("*") if is_run(path))
    if not found:
        raise InputError(f"{folder}: no run here, and no folder with runs; give a run directory or a sweep's")
    return found


def table(looks: Sequence[Look]) -> str:
    """One line a run: what it does, its step, last training and validation loss, its job, and why it ended."""
    rows: list[tuple[str, ...]] = [("run", "", "step", "of", "loss", "val loss", "job", "")]
    for run in looks:
        settings = (read_json(run.run_dir / "config.json") or {}).get("config", {})
        steps = str(settings.get("train", {}).get("steps", ABSENT))
        losses = [last_of(run.run_dir, key) for key in ("loss", "val_loss")]
        why = (run.status or {}).get("reason") or ""
        rows.append((str(run.run_dir), run.doing, str(run.step), steps, *losses, run.job or ABSENT, why))
    widths = [max(len(row[column]) for row in rows) for column in range(7)]
    right = (False, False, True, True, True, True, False)
    lines = []
    for row in rows:
        cells = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=False)]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
    return "\n".join(lines)


def last_of(run_dir: Path, key: str) -> str:
    """The last value in metrics.jsonl."""
    path = run_dir / METRICS_FILE
    with reading_from(path):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    for line in reversed(lines):
        if f'"{key}"' in line and line.endswith("\n"):  # not one that is still being written
            value = json.loads(line).get(key)
            return ABSENT if value is None else f"{value:.4f}"
    return ABSENT


def stop(run_dirs: Sequence[Path]) -> None:
    """A checkpoint and an end for what trains; what waits in the queue is cancelled. Waits until that is so."""
    asked: dict[Path, str] = {}
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        runs = look(run_dirs)
        for run in runs:
            if run.doing == "queued" and run.job is not None:
                ask_slurm("scancel", run.job)
            elif run.holder is not None and run.holder != asked.get(run.run_dir):
                # Not before there is a holder: a job that begins removes the file. Not twice: it would stay.
                asked[run.run_dir] = run.holder
                with writing_to(run.run_dir):
                    (run.run_dir / STOP_FILE).touch()
                print(f"{run.run_dir}: asked to save and stop ({run.holder})", flush=True)
        if not any(run.doing in ("queued", "running") for run in runs):
            print(table(runs))
            return
        if time.monotonic() > end:
            busy = ", ".join(str(run.run_dir) for run in runs if run.doing == "running")
            raise InputError(f"{busy}: not stopped after {PATIENCE_SECONDS:.0f} s; its log says where it is")
        time.sleep(SECONDS_BETWEEN_LOOKS)
