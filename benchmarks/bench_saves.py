"""What a checkpoint costs: the steps beside an asynchronous one, waiting for one, and a stop.

    python benchmarks/bench_saves.py                                       # a small model; 2 minutes on 2 CPU cores
    python benchmarks/bench_saves.py --preset gpt2-small --sequences 1 --vocab-size 50257 --on-cpu --rounds 3
    python benchmarks/bench_saves.py --preset gpt2-small --sequences 64 --vocab-size 50257     # on a GPU
    torchrun --standalone --nproc_per_node=8 benchmarks/bench_saves.py --preset gpt2-medium --sequences 512

A round is: the steps beside an asynchronous save, from its beginning to its name; as many without a save, twice (the
second over the first is the A/A control); one save that is waited for. In a world of one a real run, with a vocabulary
of bytes, is then started three times and sent SIGTERM: in a step, in validation and as it starts; timed is to the end
of the process, its checkpoint made (none at the start: nothing was trained). Last line: JSON. The aim on a GPU: steps
beside a save below 1.05 of steps without, and below 60 s from any signal.
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

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import tyro

from benchmarks.steps import configured, opened_run, seconds_of, summary
from common.errors import InputError, one_line_errors
from model.checkpoint import list_checkpoints
from train.config import Config, ParallelConfig, SaveConfig
from train.processes.group import ProcessGroup, open_process_group
from train.run.directory import read_status
from train.state import Run

MOST_STEPS = 500  # that a save may last
STOPS = ("in a step", "in validation", "at the start")


@dataclass(frozen=True)
class Options:
    """What a checkpoint costs: the steps beside an asynchronous one, waiting for one, and a stop."""

    preset: str = "quickstart"
    """Model, batch and precision to time."""
    sequences: int = 32
    """Sequences per step of all processes."""
    vocab_size: int = 256
    """The model's vocabulary. The tokens that are read are bytes, whatever it is."""
    on_cpu: bool = False
    """In fp32 and without torch.compile, whatever the preset says: bf16 is slow there."""
    rounds: int = 8
    """Rounds of: steps beside an asynchronous save, without, without, and a save waited for."""


def steps_beside_a_save(run: Run, step: Callable[[], None]) -> int:
    """Take steps until the save that this begins has its name; their number."""
    schedule = run.reports.checkpoints
    schedule.save(run.state.progress)
    for count in range(1, MOST_STEPS + 1):
        step()
        if schedule.is_written:
            schedule.finish(run.state.progress)
            return count
    raise InputError(f"the save took more than {MOST_STEPS} steps; choose a larger --sequences")


def wait_for_a_save(run: Run) -> None:
    run.reports.checkpoints.save(run.state.progress)
    run.reports.checkpoints.finish(run.state.progress)


def measure(options: Options, config: Config, group: ProcessGroup) -> dict[str, object]:
    ratios, controls, whole = list[float](), list[float](), list[float]()
    counts = list[int]()
    with opened_run(config, group) as (run, step):
        steps_beside_a_save(run, step)  # allocates what it stages into, once
        for _ in range(options.rounds):
            beside, _ = seconds_of(lambda: counts.append(steps_beside_a_save(run, step)), 1, group)
            (first, _), (second, _) = (seconds_of(step, counts[-1], group) for _ in range(2))
            ratios.append(2 * beside / (first + second))
            controls.append(second / first)
            whole.append(seconds_of(lambda: wait_for_a_save(run), 1, group)[0])
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
        "waited_for_seconds": [round(f(whole), 3) for f in (min, statistics.median, max)],
    }


def seconds_to_stop(options: Options, config: Config, folder: Path, where: str) -> float:
    """From SIGTERM to the end of a real process, its checkpoint made."""
    run_dir = folder / where.replace(" ", "_")
    train = config.train
    line = [sys.executable, "train/main.py", options.preset, "--data.dir", str(config.data.dir)]
    line += ["--run-dir", str(run_dir), "--train.batch-tokens", str(train.batch_tokens)]
    line += ["--train.dtype", train.dtype, "--train.compile" if train.compile else "--train.no-compile"]
    line += ["--validate.every", "3", "--validate.tokens", str(30 * train.batch_tokens), "--sample.every", "None"]
    line += ["--track.every", "1", "--track.wandb", "disabled", "--train.steps", "1000000"]
    with subprocess.Popen(line, cwd=Path(__file__).resolve().parents[1], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        sign = {"in a step": "step       4 ", "in validation": "step       3 ", "at the start": "device "}[where]
        for text in process.stdout:
            if text.startswith(sign):
                break
        os.kill(process.pid, signal.SIGTERM)
        asked = time.perf_counter()
        process.communicate()
        seconds = time.perf_counter() - asked
    status = read_status(run_dir)
    assert status is not None and status["state"] == "stopped", status
    return round(seconds, 2)


def main(args: list[str] | None = None) -> None:
    with one_line_errors("bench_saves"):
        options = tyro.cli(Options, args=args, description=__doc__)
        with (
            tempfile.TemporaryDirectory() as own,
            open_process_group(ParallelConfig.init_timeout_seconds, Path(own)) as group,
        ):
            config = group.on_main(lambda: config_of(options, Path(own)))
            found = measure(options, config, group)
            if group.world == 1:
                torch.cuda.empty_cache()
                found["stop_seconds"] = {where: seconds_to_stop(options, config, Path(own), where) for where in STOPS}
            if group.is_main:
                print(json.dumps(found))
            group.barrier()


def config_of(options: Options, folder: Path) -> Config:
    config = configured(folder, preset=options.preset, sequences=options.sequences, vocab_size=options.vocab_size)
    train = dataclasses.replace(config.train, compile=False, dtype="fp32") if options.on_cpu else config.train
    save = SaveConfig(every=10**9, keep=1, mode="async")
    return dataclasses.replace(config, train=train, save=save)


if __name__ == "__main__":
    main()
