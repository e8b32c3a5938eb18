"""Time our step with DDP and FSDP2 against a bare loop of the same model with the same parallelism.

    OMP_NUM_THREADS=1 torchrun --local-addr=127.0.0.1 --nproc_per_node=2 benchmarks/bench_parallel.py  # minutes, CPU
    python benchmarks/bench_parallel.py --parallel fsdp --preset gpt2-small --sequences 64 --vocab-size 50257 # on a GPU
    torchrun --local-addr=127.0.0.1 --nproc_per_node=8 benchmarks/bench_parallel.py --preset gpt2-xl \
        --sequences 128 --micro-batch 4 --vocab-size 50257 --parallel fsdp

For each parallel mode both run in turn, in blocks of steps after a warm-up. The bare loop runs twice in each round; its
ratio to itself (the A/A control) tells how far the machine can be trusted. FSDP2 reduces gradients once a step (step)
or after every micro-batch (micro_batch), as --parallel.reduce-gradients says. If the preset compiles, the first losses
are compared with those of eager mode. Last line: JSON. Expect the 95 % interval of ours / bare below 1.05 in each mode,
and that of bare / bare around 1. On a shared machine, read the ratio of CPU seconds instead.
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

COMPARED_STEPS = 10  # steps whose losses are compared with those of eager mode


@dataclass(frozen=True)
class Options:
    """Options of the benchmark."""

    preset: str = "quickstart"
    """Preset whose model, batch and precision are timed."""
    sequences: int = 64
    """Sequences per step, over all processes."""
    micro_batch: int | None = None
    """Sequences in one forward pass of one process; None: the preset's micro-batch."""
    vocab_size: int = 256
    """Size of the model's vocabulary. The text is read as bytes, whatever the size."""
    optim: Literal["adamw", "muon"] = "adamw"
    """Optimizer of both; muon is torch.optim.Muon in the bare loop."""
    loss: Literal["plain", "chunked"] = "plain"
    """Cross-entropy of our step; that of the bare loop is always plain."""
    parallel: tuple[Literal["ddp", "fsdp"], ...] = ("ddp", "fsdp")
    """Parallel modes to time; one process can only use fsdp."""
    reduce_gradients: tuple[Literal["step", "micro_batch"], ...] = ("step", "micro_batch")
    """When fsdp reduces gradients: once a step, or after every micro-batch."""
    rounds: int = 12
    """Rounds of bare, ours, bare for each mode."""
    block: int = 5
    """Steps that are timed together."""


def ways_of(options: Options, folder: Path) -> dict[str, Config]:
    """Return the configurations to time, by name."""
    config = configured(
        folder, preset=options.preset, sequences=options.sequences, vocab_size=options.vocab_size, optim=options.optim
    )
    micro_batch = options.micro_batch or config.train.micro_batch
    train = dataclasses.replace(config.train, micro_batch=micro_batch, loss=options.loss)
    plans = dict[str, ParallelConfig]()
    for mode in options.parallel:
        if mode == "fsdp":
            plans |= {
                f"fsdp {when}": ParallelConfig(mode=mode, reduce_gradients=when) for when in options.reduce_gradients
            }
        else:
            plans[mode] = ParallelConfig(mode=mode)
    return {
        name: dataclasses.replace(config, run_dir=folder / name, train=train, parallel=plan)
        for name, plan in plans.items()
    }


def measure(options: Options, config: Config, group: ProcessGroup) -> dict[str, Any]:
    """Return the ratios of our step to the bare one in one mode, and our rate, MFU and peak memory."""
    is_on_gpu, peak_flops = group.device.type == "cuda", device_peak_flops(config, group.device)
    with opened_run(config, group) as (run, ours):
        if is_on_gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds_of(ours, options.block, group)
        memory = peak_memory_gib(group.device) if is_on_gpu else None  # read before the bare model exists
        bare = bare_step(run.config, run.processes.parallel_plan, group)
        result = compare(ours, bare, rounds=options.rounds, block=options.block, group=group)
    tokens_per_second = config.train.batch_tokens / result["ours_step_ms"] * 1e3
    flops_per_second = tokens_per_second * model_cost(config.model).flops_per_token
    return result | {
        "tokens_per_second": round(tokens_per_second),
        "mfu": None if peak_flops is None else round(flops_per_second / peak_flops / group.world, 4),
        "peak_memory_gib": None if memory is None else round(max(group.gather(memory)), 3),
    }


def largest_difference(config: Config, group: ProcessGroup) -> float:
    """Return the largest difference between the compiled and the eager losses of the first steps."""
    compiled = first_losses(config, group)
    eager = dataclasses.replace(
        config,
        run_dir=config.directory.with_name(f"{config.directory.name} eager"),
        train=dataclasses.replace(config.train, compile=False),
    )
    return max(abs(one - other) for one, other in zip(compiled, first_losses(eager, group), strict=True))


def first_losses(config: Config, group: ProcessGroup) -> list[float]:
    """Return the losses of the first COMPARED_STEPS steps of a new run."""
    losses = list[float]()
    with opened_run(config, group) as (run, _):
        for _ in range(COMPARED_STEPS):
            result = take_step(run)
            run.state.progress = result.progress
            if result.ready is not None:
                result.ready.synchronize()
            losses.append(result.numbers[0].item())
    return losses


def table(ways: dict[str, dict[str, Any]]) -> str:
    """Return the printed table of the results by name."""
    titles = ("ours / bare (95 %)", "bare / bare (95 %)", "ours / bare in CPU s")
    header = "".join(f"{title:<24}" for title in titles)
    lines = [f"{'':<14}{'bare ms':>9}{'ours ms':>9}  {header}{'tokens/s':>9}{'MFU':>7}{'GiB':>8}"]
    for name, result in ways.items():
        ratios = "".join(
            f"{interval(result[key]):<24}" for key in ("ours_over_bare", "bare_over_bare", "cpu_ours_over_bare")
        )
        mfu = "-" if result["mfu"] is None else f"{result['mfu']:.3f}"
        memory = "-" if result["peak_memory_gib"] is None else f"{result['peak_memory_gib']:.2f}"
        lines.append(
            f"{name:<14}{result['bare_step_ms']:>9.2f}{result['ours_step_ms']:>9.2f}  {ratios}"
            f"{result['tokens_per_second']:>9}{mfu:>7}{memory:>8}"
        )
        if (difference := result.get("compiled_minus_eager")) is not None:
            lines.append(f"{'':<14}compiled and eager losses of {COMPARED_STEPS} steps differ by {difference} at most")
    return "\n".join(lines)


def interval(ratio: dict[str, float]) -> str:
    """Return the printed median and 95 % interval."""
    return f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"


def main(args: list[str] | None = None) -> None:
    with one_line_errors("bench_parallel"):
        options = tyro.cli(Options, args=args, description=__doc__)
        with (
            tempfile.TemporaryDirectory() as folder,
            open_process_group(ParallelConfig.init_timeout_seconds, Path(folder)) as group,
        ):
            if group.world == 1 and "ddp" in options.parallel:
                raise InputError(
                    "ddp needs several processes: torchrun --local-addr=127.0.0.1 --nproc_per_node=2 "
                    "benchmarks/bench_parallel.py; or set --parallel fsdp"
                )
            ways = dict[str, dict[str, Any]]()
            for name, config in group.on_main(lambda: ways_of(options, Path(folder))).items():
                ways[name] = measure(options, config, group)
                if config.train.compile:
                    ways[name]["compiled_minus_eager"] = round(largest_difference(config, group), 6)
            if group.is_main:
                print(table(ways))
                print(json.dumps(conditions(config, group) | {"ways": ways}))
            group.barrier()


if __name__ == "__main__":
    main()
