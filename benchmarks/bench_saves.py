"""Measure what a checkpoint costs: steps beside an asynchronous one, waiting for one, and stopping a run.

    python benchmarks/bench_saves.py                                       # a small model; 2 minutes on 2 CPU cores
    python benchmarks/bench_saves.py --preset gpt2-small --sequences 1 --vocab-size 50257 --on-cpu --rounds 3
    python benchmarks/bench_saves.py --preset gpt2-small --sequences 64 --vocab-size 50257     # on a GPU
    torchrun --local-addr=127.0.0.1 --nproc_per_node=8 benchmarks/bench_saves.py --preset gpt2-medium --sequences 512

A round has three parts: the steps beside an asynchronous save, until the checkpoint has its name; as many steps without
a save, twice (the second over the first is the A/A control); one save that is waited for. With one process, a real run
with a vocabulary of bytes is then started three times. It is sent SIGTERM in a step, in validation and while it starts.
The time is taken until the process has ended with its checkpoint; a run stopped at its start writes none, since it has
trained nothing. Last line: JSON. The aim on a GPU: steps beside a save take below 1.05 of steps without, and a signal
is obeyed within 60 s.
"""

import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.steps import configured, opened_run, seconds_of, summary
from common.errors import InputError, one_line_errors
from model.checkpoint import list_checkpoints
from train.config import Config, ParallelConfig, SaveConfig
from train.processes.group import ProcessGroup, open_process_group
from train.run.status import read_status
from train.state import Run

MAX_STEPS = 500  # that may pass during one save
STOPS = ("in a step", "in validation", "at the start")


@dataclass(frozen=True)
class Options:
    """Options of the benchmark."""

    preset: str = "quickstart"
    """Preset whose model, batch and precision are timed."""
    sequences: int = 32
    """Sequences per step, over all processes."""
    vocab_size: int = 256
    """Size of the model's vocabulary. The text is read as bytes, whatever the size."""
    on_cpu: bool = False
    """Use fp32, no torch.compile and one micro-batch, whatever the preset says; bf16 is slow on a CPU."""
    rounds: int = 8
    """Rounds of steps beside an asynchronous save, steps without one (twice), and a save that is waited for."""


def steps_beside_a_save(run: Run, step: Callable[[], None]) -> int:
    """Begin a save, take steps until its checkpoint has its name, and return the number of steps."""
    schedule = run.reports.checkpoints
    schedule.save(run.state.progress)
    for count in range(1, MAX_STEPS + 1):
        step()
        if schedule.is_written:
            schedule.advance(run.state.progress)
        if not schedule.writer.is_under_way:
            return count
    raise InputError(f"the save took more than {MAX_STEPS} steps; choose larger --sequences")


def wait_for_a_save(run: Run) -> None:
    """Save a checkpoint and wait for it."""
    run.reports.checkpoints.save(run.state.progress)
    run.reports.checkpoints.finish(run.state.progress)


def measure(options: Options, config: Config, group: ProcessGroup) -> dict[str, Any]:
    """Return the conditions and the costs of a save."""
    ratios, controls, waits = list[float](), list[float](), list[float]()
    counts = list[int]()
    with opened_run(config, group) as (run, step):
        steps_beside_a_save(run, step)  # the first save allocates the staging buffers
        for _ in range(options.rounds):
            beside, _ = seconds_of(lambda: counts.append(steps_beside_a_save(run, step)), 1, group)
            (first, _), (second, _) = (seconds_of(step, counts[-1], group) for _ in range(2))
            ratios.append(2 * beside / (first + second))
            controls.append(second / first)
            waits.append(seconds_of(lambda: wait_for_a_save(run), 1, group)[0])
    size = sum(path.stat().st_size for path in list_checkpoints(config.directory)[-1].iterdir())
    return {
        "preset": options.preset,
        "processes": group.world,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "checkpoint_gb": round(size / 1e9, 3),
        "steps_beside_over_without": summary(ratios),
        "without_over_without": summary(controls),
        "steps_while_writing": [min(counts), max(counts)],
        "waited_for_seconds": [round(f(waits), 3) for f in (min, statistics.median, max)],
    }


def seconds_to_stop(options: Options, config: Config, folder: Path, where: str) -> float:
    """Return the seconds from SIGTERM to the end of a real run, its checkpoint included."""
    run_dir = folder / where.replace(" ", "_")
    train = config.train
    command = [sys.executable, "train/main.py", options.preset, "--data.dir", str(config.data.dir)]
    command += ["--run-dir", str(run_dir), "--train.batch-tokens", str(train.batch_tokens)]
    command += ["--train.micro-batch", str(train.micro_batch)]
    command += ["--train.dtype", train.dtype, "--train.compile" if train.compile else "--train.no-compile"]
    command += ["--validate.every", "3", "--validate.tokens", str(30 * train.batch_tokens), "--sample.every", "None"]
    command += ["--track.every", "1", "--track.wandb", "disabled", "--train.steps", "1000000"]
    with subprocess.Popen(
        command, cwd=Path(__file__).resolve().parents[1], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        mark = {"in a step": "step       4 ", "in validation": "step       3 ", "at the start": "device "}[where]
        for line in process.stdout:
            if line.startswith(mark):
                break
        os.kill(process.pid, signal.SIGTERM)
        sent = time.perf_counter()
        process.communicate()
        seconds = time.perf_counter() - sent
    status = read_status(run_dir)
    assert status is not None and status["state"] == "stopped", status
    return round(seconds, 2)


def main(args: list[str] | None = None) -> None:
    import tyro  # here, because benchmarks/gpu_parts.py imports this module

    with one_line_errors("bench_saves"):
        options = tyro.cli(Options, args=args, description=__doc__)
        with (
            tempfile.TemporaryDirectory() as folder,
            open_process_group(ParallelConfig.init_timeout_seconds, Path(folder)) as group,
        ):
            config = group.on_main(lambda: config_of(options, Path(folder)))
            result = measure(options, config, group)
            if group.world == 1:
                torch.cuda.empty_cache()
                result["stop_seconds"] = {
                    where: seconds_to_stop(options, config, Path(folder), where) for where in STOPS
                }
            if group.is_main:
                print(json.dumps(result))
            group.barrier()


def config_of(options: Options, folder: Path) -> Config:
    """Return the preset's configuration with checkpoints only where the benchmark asks for them."""
    config = configured(folder, preset=options.preset, sequences=options.sequences, vocab_size=options.vocab_size)
    train = config.train
    if options.on_cpu:
        train = dataclasses.replace(train, compile=False, dtype="fp32", micro_batch=options.sequences)
    save = SaveConfig(every=10**9, keep=1, mode="async")
    return dataclasses.replace(config, train=train, save=save)


if __name__ == "__main__":
    main()
