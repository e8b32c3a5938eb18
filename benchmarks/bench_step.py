"""Our training step against a bare loop of the same model: forward, backward, clip, AdamW, nothing else.

    python benchmarks/bench_step.py                                        # a minute and a half on 2 CPU cores
    torchrun --standalone --nproc_per_node=2 benchmarks/bench_step.py      # two processes, DDP on both sides
    python benchmarks/bench_step.py --preset gpt2-small --windows 64 --vocab-size 50257      # on a GPU

The two run in turn, in blocks of steps after a warm-up, and the bare loop runs twice in each round: its ratio to
itself (the A/A control) tells how far the machine can be trusted. Last line: JSON. Expect the 95 % interval of
ours / bare below 1.05, and that of bare / bare around 1.
"""

import dataclasses
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
import tyro
from torch.nn.parallel import DistributedDataParallel

from data_prep.errors import InputError, one_line_errors
from data_prep.manifest import read_manifest
from data_prep.textfiles import Options as TextOptions
from data_prep.textfiles import prepare
from model.gpt import build_model
from train.assemble import assemble
from train.batches import plan_batches
from train.config import (
    Config,
    DataConfig,
    ParallelConfig,
    SampleConfig,
    TrackConfig,
    TrainConfig,
    resolve,
    with_vocabulary,
)
from train.loop import Run, garbage_collected_by_hand, record, take_step, warm_up
from train.mesh import Mesh, open_mesh
from train.meters import Startup
from train.numerics import compute_dtype, set_numerics
from train.presets import PRESETS
from train.run_dir import RunDirectory
from train.stops import Stops
from train.watchdog import Watchdog


@dataclass(frozen=True)
class Options:
    """Our training step against a bare loop of the same model."""

    preset: str = "quickstart"
    """Model, batch and precision to time."""
    windows: int = 32
    """Windows per step of all processes (a process's micro-batch is at most the preset's)."""
    vocab_size: int = 256
    """The model's vocabulary. The tokens that are read are bytes, whatever it is."""
    loss: Literal["plain", "chunked"] = "plain"
    """Our side's cross-entropy; the bare loop's is always plain."""
    rounds: int = 12
    """Rounds of: bare, ours, bare."""
    block: int = 5
    """Steps timed together."""


def bare_step(config: Config, mesh: Mesh) -> Callable[[], None]:
    """A step of a loop without anything of ours around the model, on fixed random tokens."""
    plain = build_model(config.model, seed=1, device=mesh.device, compute_dtype=compute_dtype(config.train))
    score = F.cross_entropy
    if config.train.compile:
        for block in plain.blocks:
            block.compile()
        score = torch.compile(score)
    model = DistributedDataParallel(plain, gradient_as_bucket_view=True) if mesh.world > 1 else plain
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    plan = plan_batches(config, mesh.world)
    shape = (plan.accumulation, plan.micro_batch, config.train.seq_len + 1)
    tokens = torch.randint(config.model.vocab_size, shape, device=mesh.device)

    def step() -> None:
        for index, rows in enumerate(tokens):
            if isinstance(model, DistributedDataParallel):
                model.require_backward_grad_sync = index == len(tokens) - 1
            logits = model(rows[:, :-1])[..., : config.model.vocab_size].float()
            loss = score(logits.flatten(0, 1), rows[:, 1:].flatten())
            (loss / len(tokens)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def our_step(run: Run) -> Callable[[], None]:
    """A step of train/loop.py as `train` takes it, its results read one step late and logged when it is their turn."""
    reports = []

    def step() -> None:
        reports.append(take_step(run))
        run.progress = reports[-1].progress
        if len(reports) > 1:
            record(run, reports.pop(0))

    run.meters.start()
    warm_up(run)
    return step


def seconds_of(step: Callable[[], None], count: int, mesh: Mesh) -> float:
    mesh.barrier()
    started = time.perf_counter()
    for _ in range(count):
        step()
    if mesh.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def summary(ratios: list[float]) -> dict[str, float]:
    """Median, and the 95 % interval of the mean of the log ratios (normal approximation)."""
    logs = [math.log(ratio) for ratio in ratios]
    half = 1.96 * statistics.stdev(logs) / math.sqrt(len(logs))
    mean = statistics.mean(logs)
    return {
        "median": round(statistics.median(ratios), 4),
        "low": round(math.exp(mean - half), 4),
        "high": round(math.exp(mean + half), 4),
    }


def configured(options: Options, folder: Path) -> Config:
    """The preset on generated text of its own, with the asked-for windows in a step."""
    text = folder / "text.txt"
    text.write_text("A line of text that stands for any other.\n" * 20_000, encoding="utf-8")
    prepare(TextOptions(input=(str(text),), out=folder / "data", tokenizer="byte"))
    if options.vocab_size < 256:
        raise InputError(f"--vocab-size {options.vocab_size} must be at least 256: the text is read as bytes")
    if options.preset not in PRESETS:
        raise InputError(f"--preset {options.preset}: there are {', '.join(PRESETS)}")
    preset = PRESETS[options.preset]
    train: TrainConfig = dataclasses.replace(
        preset.train, batch_tokens=options.windows * preset.train.seq_len, steps=10**6, loss=options.loss
    )
    config = dataclasses.replace(
        preset,
        run_dir=folder / "run",
        data=DataConfig(folder / "data"),
        train=train,
        sample=SampleConfig(every=None),
        track=TrackConfig(wandb="disabled"),
    )
    return with_vocabulary(resolve(config), options.vocab_size)


def measure(options: Options, config: Config, mesh: Mesh) -> dict[str, object]:
    manifest = read_manifest(config.data.dir)
    set_numerics(config.train, mesh.device)
    with (
        Stops(config.directory, is_main=mesh.is_main) as stops,
        RunDirectory(config, manifest.fingerprint, mesh) as directory,
        Watchdog(config.parallel, mesh, directory) as watchdog,
    ):
        run = assemble(config, mesh, manifest, directory, stops, watchdog, Startup(time.perf_counter()))
        with run.saver, run.sinks, garbage_collected_by_hand():
            ours, bare = our_step(run), bare_step(run.config, mesh)
            seconds_of(ours, options.block, mesh), seconds_of(bare, options.block, mesh)
            rounds = [
                [seconds_of(step, options.block, mesh) for step in (bare, ours, bare)] for _ in range(options.rounds)
            ]
        run.batches.close()
    milliseconds = [statistics.median(column) / options.block * 1e3 for column in zip(*rounds, strict=True)]
    if mesh.is_main:
        print(f"bare {milliseconds[0]:.2f} ms, ours {milliseconds[1]:.2f} ms, again {milliseconds[2]:.2f} ms per step")
    return {
        "preset": options.preset,
        "processes": mesh.world,
        "vocab_size": config.model.vocab_size,
        "loss": config.train.loss,
        "tokens_per_step": config.train.batch_tokens,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "ours_over_bare": summary([2 * ours / (first + second) for first, ours, second in rounds]),
        "bare_over_bare": summary([second / first for first, _, second in rounds]),
        "bare_step_ms": round(milliseconds[0], 3),
        "ours_step_ms": round(milliseconds[1], 3),
    }


def main(args: list[str] | None = None) -> None:
    with one_line_errors("bench_step"):
        options = tyro.cli(Options, args=args, description=__doc__)
        with (
            tempfile.TemporaryDirectory() as own,
            open_mesh(ParallelConfig.init_timeout_seconds, Path(own)) as mesh,
        ):
            config = mesh.on_main(lambda: configured(options, Path(own)))
            found = measure(options, config, mesh)
            if mesh.is_main:
                print(json.dumps(found))
            mesh.barrier()


if __name__ == "__main__":
    main()
