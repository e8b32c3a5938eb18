"""launch/submit.py's runs on this machine: through submitit's local executor, or in this process for a debugger."""

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
from launch.grid import Point
from launch.options import Options, minutes_of
from launch.runs import note_submission
from launch.slurm_jobs import NOTICE_SECONDS, import_submitit, map_points
from train.processes.stop_requests import FILE_NAME as STOP_FILE
from train.run.directory import read_status


def train_here(options: Options, base: Path, code: Path, points: Sequence[Point]) -> None:
    """At most so many at a time, until all have ended, or one was stopped by a person: then no more are begun.

    Ctrl-C asks those under way to save and stop, and waits for them. InputError at the end if any did not begin.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun and the Slurm jobs do: bits depend on it
    folder, num_parallel = Path.cwd(), options.max_parallel or 1
    free = [local_executor(options, base, gpus) for gpus in shares_of_gpus(options.gpus_per_node, num_parallel)]
    waiting = list(points)
    going: list[tuple[Any, Point, Any]] = []
    attempts = {point.run_dir: attempt_of(point.run_dir) for point in points}
    not_begun: list[str] = []
    for point in points:
        note_submission(point, None)
        with writing_to(point.run_dir):
            (point.run_dir / STOP_FILE).unlink(missing_ok=True)
    try:
        while waiting or going:
            while waiting and free:
                point, executor = waiting.pop(0), free.pop()
                with writing_to(base / "submitit"), contextlib.chdir(code), ignoring_interrupts(options.cluster):
                    (job,) = map_points(executor, [point], folder)
                going.append((job, point, executor))
                print(f"training {point.run_dir}; log {job.paths.stdout}", flush=True)
            for ended in [this for this in going if this[0].done()]:
                job, point, executor = ended
                going.remove(ended)
                free.append(executor)
                if attempt_of(point.run_dir) == attempts[point.run_dir]:
                    not_begun.append(f"{point.run_dir} did not begin, {job.paths.stdout} says why")
                elif is_stopped_by_a_person(point.run_dir):
                    waiting.clear()
            time.sleep(0.2)
    except KeyboardInterrupt:
        for _, point, _ in going:
            (point.run_dir / STOP_FILE).touch()
        print("interrupted: waiting for checkpoints", file=sys.stderr, flush=True)
        while not all(job.done() for job, _, _ in going):
            time.sleep(0.2)
        raise
    if not_begun:
        raise InputError("; ".join(not_begun))


def attempt_of(run_dir: Path) -> int:
    status = read_status(run_dir)
    return 0 if status is None else int(status["attempt"])


def local_executor(options: Options, base: Path, gpus: tuple[int, ...]) -> Any:
    submitit = import_submitit()
    if options.cluster == "debug":
        return submitit.DebugExecutor(base / "submitit")
    executor = submitit.LocalExecutor(base / "submitit")
    minutes = minutes_of(options.time) or 10**6  # 0 is no limit, as with Slurm
    executor.update_parameters(
        tasks_per_node=options.gpus_per_node,
        gpus_per_node=len(gpus),
        visible_gpus=gpus,
        timeout_min=minutes,
        signal_delay_s=min(NOTICE_SECONDS, 30 * minutes),
        stderr_to_stdout=True,
    )
    return executor


def shares_of_gpus(per_run: int, num_parallel: int) -> list[tuple[int, ...]]:
    """The GPUs that each of the runs at a time has to itself, out of those this process may use; () without any."""
    if not torch.cuda.is_available():
        return [()] * num_parallel
    named = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
    if not re.fullmatch(r"\d+(,\d+)*", named):
        raise InputError(f"CUDA_VISIBLE_DEVICES={named}: --cluster local needs GPUs by number, like 0,1")
    gpus = tuple(int(number) for number in named.split(","))
    if len(gpus) < per_run * num_parallel:
        raise InputError(
            f"{num_parallel} runs at a time with --gpus-per-node {per_run} need {per_run * num_parallel} GPUs; there "
            f"are {len(gpus)}; use a smaller --max-parallel or --gpus-per-node"
        )
    return [gpus[place * per_run : (place + 1) * per_run] for place in range(num_parallel)]


@contextlib.contextmanager
def ignoring_interrupts(cluster: str) -> Iterator[None]:
    """What starts in here never hears Ctrl-C, which reaches all processes of a terminal: submitit would kill its tasks
    a second later."""
    if cluster == "debug":
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def is_stopped_by_a_person(run_dir: Path) -> bool:
    status = read_status(run_dir)
    return status is not None and status["state"] == "stopped" and status["reason"] in ("STOP file", "SIGINT")
