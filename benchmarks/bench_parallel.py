"""Our step with DDP and with FSDP2 against a bare loop of the same model, spread the same way.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node=2 benchmarks/bench_parallel.py   # minutes on 2 CPU cores
    python benchmarks/bench_parallel.py --parallel fsdp --preset gpt2-small --sequences 64 --vocab-size 50257 # on a GPU
    torchrun --standalone --nproc_per_node=8 benchmarks/bench_parallel.py --preset gpt2-xl --sequences 128 \
        --micro-batch 4 --vocab-size 50257 --parallel fsdp

For each way to spread the model, the two run in turn, in blocks of steps after a warm-up, and the bare loop runs twice
in each round: its ratio to itself (the A/A control) tells how far the machine can be trusted. whole and sharded are
FSDP2's two ways to reduce gradients (--parallel.reduce-gradients). Where the preset compiles, the losses of the first
steps are held against those without. Last line: JSON. Expect the 95 % interval of ours / bare below 1.05 with every
way, and that of bare / bare around 1; on a machine that others use, look at the ratio of CPU seconds.
"""

import dataclasses
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import tyro

from benchmarks.steps import bare_step, compare, conditions, configured, opened_run, seconds_of
from common.errors import InputError, one_line_errors
from model.cost import model_cost
from train.config import Config, ParallelConfig
from train.loop import take_step
from train.metrics.meters import device_peak_flops, peak_memory_gib
from train.processes.group import ProcessGroup, open_process_group

COMPARED_STEPS = 10  # whose losses are held against those of eager mode


@dataclass(frozen=True)
class Options:
    """Our step with DDP and with FSDP2 against a bare loop of the same model, spread the same way."""

    preset: str = "quickstart"
    """Model, batch and precision to time."""
    sequences: int = 64
    """Sequences per step of all processes."""
    micro_batch: int | None = None
    """Sequences of one process's forward pass; None: the preset's."""
    vocab_size: int = 256
    """The model's vocabulary. The tokens that are read are bytes, whatever it is."""
    loss: Literal["plain", "chunked"] = "plain"
    """Our side's cross-entropy; the bare loop's is always plain."""
    parallel: tuple[Literal["ddp", "fsdp"], ...] = ("ddp", "fsdp")
    """How the model is spread; one process has fsdp alone."""
    reduce_gradients: tuple[Literal["step", "micro_batch"], ...] = ("step", "micro_batch")
    """fsdp: gradients added up whole and reduced once a step, or reduced after every micro-batch."""
    rounds: int = 12
    """Rounds of: bare, ours, bare, for each way."""
    block: int = 5
    """Steps timed together."""


def ways_of(options: Options, folder: Path) -> dict[str, Config]:
    """What to time, by name."""
    config = configured(folder, preset=options.preset, sequences=options.sequences, vocab_size=options.vocab_size)
    micro_batch = options.micro_batch or config.train.micro_batch
    if micro_batch == "auto":
        raise InputError(f"--preset {options.preset} fills the GPU, which holds two models here: give --micro-batch")
    train = dataclasses.replace(config.train, micro_batch=micro_batch, loss=options.loss)
    spreads = dict[str, ParallelConfig]()
    for mode in options.parallel:
        if mode == "fsdp":
            spreads |= {
                f"fsdp {way}": ParallelConfig(mode=mode, reduce_gradients=way) for way in options.reduce_gradients
            }
        else:
            spreads[mode] = ParallelConfig(mode=mode)
    return {
        name: dataclasses.replace(config, run_dir=folder / name, train=train, parallel=spread)
        for name, spread in spreads.items()
    }


def measure(options: Options, config: Config, group: ProcessGroup) -> dict[str, Any]:
    """One way: ours against bare; and ours' rate, share of the GPUs' peak and memory."""
    is_on_gpu, peak_flops = group.device.type == "cuda", device_peak_flops(config, group.device)
    with opened_run(config, group) as (run, ours):
        if is_on_gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds_of(ours, options.block, group)
        memory = peak_memory_gib(group.device) if is_on_gpu else None  # before there is a bare model beside ours
        bare = bare_step(run.config, run.processes.parallel_plan, group)
        found = compare(ours, bare, rounds=options.rounds, block=options.block, group=group)
    tokens_per_second = config.train.batch_tokens / found["ours_step_ms"] * 1e3
    flops_per_second = tokens_per_second * model_cost(config.model).flops_per_token
    return found | {
        "tokens_per_second": round(tokens_per_second),
        "mfu": None if peak_flops is None else round(flops_per_second / peak_flops / group.world, 4),
        "peak_memory_gib": None if memory is None else round(max(group.gather(memory)), 3),
    }


def largest_difference(config: Config, group: ProcessGroup) -> float:
    """Between the compiled and the eager losses of the first steps."""
    compiled = first_losses(config, group)
    eager = dataclasses.replace(
        config,
        run_dir=config.directory.with_name(f"{config.directory.name} eager"),
        train=dataclasses.replace(config.train, compile=False),
    )
    return max(abs(one - other) for one, other in zip(compiled, first_losses(eager, group), strict=True))


def first_losses(config: Config, group: ProcessGroup) -> list[float]:
    losses = list[float]()
    with opened_run(config, group) as (run, _):
        for _ in range(COMPARED_STEPS):
            report = take_step(run)
            run.state.progress = report.progress
            if report.ready is not None:
                report.ready.synchronize()
            losses.append(report.numbers[0].item())
    return losses


def table(ways: dict[str, dict[str, Any]]) -> str:
    titles = ("ours / bare (95 %)", "bare / bare (95 %)", "ours / bare in CPU s")
    heads = "".join(f"{title:<24}" for title in titles)
    lines = [f"{'':<14}{'bare ms':>9}{'ours ms':>9}  {heads}{'tokens/s':>9}{'MFU':>7}{'GiB':>8}"]
    for name, found in ways.items():
        ratios = "".join(
            f"{interval(found[key]):<24}" for key in ("ours_over_bare", "bare_over_bare", "cpu_ours_over_bare")
        )
        mfu = "-" if found["mfu"] is None else f"{found['mfu']:.3f}"
        memory = "-" if found["peak_memory_gib"] is None else f"{found['peak_memory_gib']:.2f}"
        lines.append(
            f"{name:<14}{found['bare_step_ms']:>9.2f}{found['ours_step_ms']:>9.2f}  {ratios}"
            f"{found['tokens_per_second']:>9}{mfu:>7}{memory:>8}"
        )
        if (difference := found.get("compiled_minus_eager")) is not None:
            lines.append(f"{'':<14}compiled and eager losses of {COMPARED_STEPS} steps differ by {difference} at most")
    return "\n".join(lines)


def interval(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"


def main(args: list[str] | None = None) -> None:
    with one_line_errors("bench_parallel"):
        options = tyro.cli(Options, args=args, description=__doc__)
        with (
            tempfile.TemporaryDirectory() as own,
            open_process_group(ParallelConfig.init_timeout_seconds, Path(own)) as group,
        ):
            if group.world == 1 and "ddp" in options.parallel:
                raise InputError(
                    "ddp needs several processes: torchrun --standalone --nproc_per_node=2 "
                    "benchmarks/bench_parallel.py; or set --parallel fsdp"
                )
            ways = dict[str, dict[str, Any]]()
            for name, config in group.on_main(lambda: ways_of(options, Path(own))).items():
                ways[name] = measure(options, config, group)
                if config.train.compile:
                    ways[name]["compiled_minus_eager"] = round(largest_difference(config, group), 6)
            if group.is_main:
                print(table(ways))
                print(json.dumps(conditions(config, group) | {"ways": ways}))
            group.barrier()


if __name__ == "__main__":
    main()
