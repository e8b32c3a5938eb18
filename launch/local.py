"""Train runs on this machine: through submitit's local executor, or in this process for a debugger."""

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from common.errors import InputError, writing_to
from common.files import remove
from launch.grid import Point
from launch.options import Options, parse_minutes
from launch.runs import record_submission
from launch.slurm_jobs import NOTICE_SECONDS, import_submitit, submit_points
from train.processes.stop_requests import FILE_NAME as STOP_FILE
from train.run.status import find_status


def train_here(options: Options, base: Path, code: Path, points: Sequence[Point]) -> None:
    """Train the runs, --max-parallel at a time, and return when all have ended.

    No more runs begin once a person has stopped one. Ctrl-C asks the running ones to save and stop, and waits for
    them. Raises InputError at the end if a run did not begin.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun and the Slurm jobs have it: bits depend on it
    folder, num_parallel = Path.cwd(), options.max_parallel or 1
    free = [local_executor(options, base, gpus) for gpus in split_gpus(options.gpus_per_node, num_parallel)]
    waiting = list(points)
    running: list[tuple[Any, Point, Any]] = []
    attempts = {point.run_dir: read_attempt(point.run_dir) for point in points}
    not_begun: list[str] = []
    for point in points:
        record_submission(point, None)
        with writing_to(point.run_dir):
            remove(point.run_dir / STOP_FILE)
    try:
        while waiting or running:
            while waiting and free:
                point, executor = waiting.pop(0), free.pop()
                with writing_to(base / "submitit"), contextlib.chdir(code), ignoring_interrupts(options.cluster):
                    (job,) = submit_points(executor, [point], folder)
                running.append((job, point, executor))
                print(f"training {point.run_dir}; log {job.paths.stdout}", flush=True)
            for entry in [entry for entry in running if entry[0].done()]:
                job, point, executor = entry
                running.remove(entry)
                free.append(executor)
                if read_attempt(point.run_dir) == attempts[point.run_dir]:
                    not_begun.append(f"{point.run_dir} did not begin, {job.paths.stdout} says why")
                elif is_stopped_by_a_person(point.run_dir):
                    waiting.clear()
            time.sleep(0.2)
    except KeyboardInterrupt:
        for _, point, _ in running:
            (point.run_dir / STOP_FILE).touch()
        print("interrupted: waiting for checkpoints", file=sys.stderr, flush=True)
        while not all(job.done() for job, _, _ in running):
            time.sleep(0.2)
        raise
    if not_begun:
        raise InputError("; ".join(not_begun))


def read_attempt(run_dir: Path) -> int:
    """Return the number of the run's last attempt, 0 before the first."""
    status = find_status(run_dir)
    return 0 if status is None else int(status["attempt"])


def local_executor(options: Options, base: Path, gpus: tuple[int, ...]) -> Any:
    """Return submitit's executor for one run at a time, on these GPUs."""
    submitit = import_submitit()
    if options.cluster == "debug":
        return submitit.DebugExecutor(base / "submitit")
    executor = submitit.LocalExecutor(base / "submitit")
    minutes = parse_minutes(options.time) or 10**6  # 0 means no limit, as for Slurm
    executor.update_parameters(
        tasks_per_node=options.gpus_per_node,
        gpus_per_node=len(gpus),
        visible_gpus=gpus,
        timeout_min=minutes,
        signal_delay_s=min(NOTICE_SECONDS, 30 * minutes),
        stderr_to_stdout=True,
    )
    return executor


def split_gpus(gpus_per_run: int, num_parallel: int) -> list[tuple[int, ...]]:
    """Return the GPUs of each run that trains at the same time; () for each where there is no GPU.

    Only the GPUs in CUDA_VISIBLE_DEVICES are used. Raises InputError if they are too few.
    """
    if not torch.cuda.is_available():
        return [()] * num_parallel
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
    if not re.fullmatch(r"\d+(,\d+)*", visible):
        raise InputError(f"CUDA_VISIBLE_DEVICES={visible}: --cluster local needs GPUs by number, like 0,1")
    gpus = tuple(int(number) for number in visible.split(","))
    if len(gpus) < gpus_per_run * num_parallel:
        raise InputError(
            f"{num_parallel} runs at a time with --gpus-per-node {gpus_per_run} need {gpus_per_run * num_parallel} "
            f"GPUs; there are {len(gpus)}; use a smaller --max-parallel or --gpus-per-node"
        )
    return [gpus[index * gpus_per_run : (index + 1) * gpus_per_run] for index in range(num_parallel)]


@contextlib.contextmanager
def ignoring_interrupts(cluster: str) -> Iterator[None]:
    """Start processes that ignore Ctrl-C, which reaches all processes of a terminal.

    Without this, submitit would kill its tasks a second after Ctrl-C.
    """
    if cluster == "debug":
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def is_stopped_by_a_person(run_dir: Path) -> bool:
    status = find_status(run_dir)
    return status is not None and status["state"] == "stopped" and status["reason"] in ("STOP file", "SIGINT")
