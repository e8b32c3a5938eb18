"""The peak memory of a rank, measured, against what model/costs/memory.py counts; for every way to spread the model.

    OMP_NUM_THREADS=1 python benchmarks/bench_memory.py            # every case; 20 minutes of 2 CPU cores, 3 GB
    python benchmarks/bench_memory.py --only "fsdp sharded"        # one of them
    python benchmarks/bench_memory.py --preset gpt2-small --vocab-size 50257 --seq-len 1024 --sequences 16 --processes 8

Each case is a run of its own, from its assembly over the warm-up to the end of its second step, in processes of its
own. On a GPU the peak is torch's count of allocated bytes. On a CPU it is the resident set, less what it was before the
model was made but after a tiny run of the same kind (code, threads, connections); glibc is told to give memory back
at once, so that what is resident is what is held. Last line: JSON. Expect every ratio within 0.90 to 1.10.
"""

import ctypes
import dataclasses
import gc
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import tyro

from benchmarks.steps import configured, opened_run
from common.errors import InputError, one_line_errors
from model.config import ModelConfig
from train.config import Config, ParallelConfig, resolve
from train.processes.group import ProcessGroup, open_process_group
from train.run.card import step_memory

ROOT = Path(__file__).resolve().parents[1]
TINY = ModelConfig(num_layers=2, num_heads=1, width=32)
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # malloc.h
SMALLEST_MAPPED = 65_536  # bytes: what is as large is mapped by itself and given back when it is freed


@dataclass(frozen=True)
class Case:
    """One way: in how many processes, in units of --processes (0: one alone), and what is set."""

    processes: int
    parallel: ParallelConfig
    accumulation: int = 2
    shorter: int = 1  # sequences, by this factor: bf16 is slow on a CPU
    train: tuple[tuple[str, Any], ...] = ()


DDP, FSDP = ParallelConfig(mode="ddp"), ParallelConfig(mode="fsdp")
BF16, RECOMPUTED, CHUNKED = ("dtype", "bf16"), ("activation_checkpointing", True), ("loss", "chunked")
WHOLE, SHARDED = replace(FSDP, reduce_gradients="step"), replace(FSDP, reduce_gradients="micro_batch")
CASES = {
    "none": Case(0, ParallelConfig(mode="none")),
    "none, 1 micro-batch": Case(0, ParallelConfig(mode="none"), accumulation=1),
    "none, checkpointing": Case(0, ParallelConfig(mode="none"), train=(RECOMPUTED,)),
    "none, chunked": Case(0, ParallelConfig(mode="none"), train=(CHUNKED,)),
    "none, bf16": Case(0, ParallelConfig(mode="none"), shorter=4, train=(BF16,)),
    "ddp": Case(1, DDP),
    "ddp, bf16": Case(1, DDP, shorter=4, train=(BF16,)),
    "fsdp, 1 micro-batch": Case(1, FSDP, accumulation=1),
    "fsdp whole": Case(1, WHOLE),
    "fsdp sharded": Case(1, SHARDED, accumulation=3),
    "fsdp whole, not resharded": Case(1, replace(WHOLE, reshard_after_forward=False)),
    "fsdp sharded, not resharded": Case(1, replace(SHARDED, reshard_after_forward=False)),
    "fsdp sharded, bf16": Case(1, SHARDED, shorter=4, train=(BF16,)),
    "fsdp sharded, checkpointing, chunked": Case(1, SHARDED, train=(RECOMPUTED, CHUNKED)),
    "fsdp sharded, twice the processes": Case(2, SHARDED),
    "hsdp sharded": Case(2, replace(SHARDED, mode="hsdp")),
}


@dataclass(frozen=True)
class Options:
    """The peak memory of a rank, measured, against what model/costs/memory.py counts."""

    preset: str | None = None
    """Model and precision, for GPUs; None: GPT-2 small's width, few layers and a small vocabulary, in fp32."""
    layers: int = 4
    """Without a preset: blocks."""
    width: int = 768
    """Without a preset: of the model."""
    vocab_size: int = 8192
    """The model's vocabulary. The tokens that are read are bytes, whatever it is."""
    sequences: int = 2
    """Sequences in a micro-batch."""
    seq_len: int = 256
    """Tokens in a sequence."""
    processes: int = 2
    """Of the cases of several; some take twice as many."""
    only: tuple[str, ...] = ()
    """Cases; none given: all."""
    case: str | None = None
    """The one that this process is part of (the script starts itself)."""
    found: Path | None = None
    """Where its first process writes what it found."""


def config_of(options: Options, case: Case, world: int, folder: Path) -> Config:
    sequences = options.sequences * case.accumulation * world
    config = configured(
        folder, preset=options.preset or "gpt2-small", sequences=sequences, vocab_size=options.vocab_size
    )
    seq_len = options.seq_len // case.shorter
    train = replace(config.train, seq_len=seq_len, batch_tokens=sequences * seq_len)
    train = replace(train, micro_batch=options.sequences, **dict(case.train))
    parallel = replace(case.parallel, shard_size=world // 2) if case.parallel.mode == "hsdp" else case.parallel
    if options.preset is None:
        model = replace(config.model, num_layers=options.layers, width=options.width, num_heads=options.width // 64)
        config = replace(config, model=model)
        train = replace(train, dtype=dict(case.train).get("dtype", "fp32"))
    train = replace(train, compile=False)  # what is counted is eager
    return resolve(replace(config, train=train, parallel=parallel, validate=replace(config.validate, every=None)))


def measure(config: Config, group: ProcessGroup) -> dict[str, Any]:
    """What the rank that holds most had at its peak, and what is counted."""
    tiny = replace(
        config, run_dir=config.directory.with_name("tiny"), model=replace(TINY, context_len=config.train.seq_len)
    )
    run_two_steps(replace(tiny, model=replace(tiny.model, vocab_size=256)), group)
    gc.collect()
    before = begin_peak(group.device)
    counted = run_two_steps(config, group)
    measured = group.gather(peak_bytes(group.device) - before)
    return counted | {"processes": group.world, "measured_bytes": max(measured), "least_measured_bytes": min(measured)}


def run_two_steps(config: Config, group: ProcessGroup) -> dict[str, Any]:
    with opened_run(config, group) as (run, step):
        for _ in range(2):
            step()
        memory = step_memory(
            run.config, run.data.batch_plan, run.processes.parallel_plan, on_cpu=group.device.type == "cpu"
        )
        return {"counted_bytes": memory.peak_bytes, "phase": memory.peak_phase, "parts": memory.peak}


def begin_peak(device: torch.device) -> int:
    """Bytes held now; from now on `peak_bytes` is the most that is."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")  # proc_pid_clear_refs(5): the peak becomes what is resident now
    return status_bytes("VmRSS")


def peak_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else status_bytes("VmHWM")


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def give_memory_back_at_once() -> None:
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, SMALLEST_MAPPED)
    libc.mallopt(M_TRIM_THRESHOLD, SMALLEST_MAPPED)


def be_a_rank(options: Options, name: str) -> None:
    give_memory_back_at_once()
    with (
        tempfile.TemporaryDirectory() as own,
        open_process_group(ParallelConfig.init_timeout_seconds, Path(own)) as group,
    ):
        config = group.on_main(lambda: config_of(options, CASES[name], group.world, Path(own)))
        found = measure(config, group)
        if group.is_main and options.found is not None:
            options.found.write_text(json.dumps(found), encoding="ascii")
        group.barrier()


def start(options: Options, name: str, world: int) -> dict[str, Any]:
    """One case, in processes of its own."""
    given = dataclasses.asdict(options) | {"case": name}
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        line = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", __file__]
        for field in ("preset", "layers", "width", "vocab_size", "sequences", "seq_len", "case"):
            if given[field] is not None:
                line += [f"--{field.replace('_', '-')}", str(given[field])]
        done = subprocess.run([*line, "--found", str(found)], cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise InputError(f"{name} failed:\n{done.stdout}\n{done.stderr}")
        result: dict[str, Any] = json.loads(found.read_text(encoding="ascii"))
        return result


def has_room(case: Case, world: int) -> bool:
    """Are there GPUs enough, where there are any, and processes enough for the mode?"""
    fewest = {"ddp": 2, "hsdp": 4}.get(case.parallel.mode, 1)
    return world >= fewest and not 0 < torch.cuda.device_count() < world


def line_of(name: str, found: dict[str, Any]) -> str:
    parts = sorted(found["parts"].items(), key=lambda item: -item[1])[:4]
    largest = ", ".join(f"{part} {size / 1e6:.0f}" for part, size in parts)
    return (
        f"{name:<38}{found['processes']:>3} {found['measured_bytes'] / 1e6:>9.1f} {found['counted_bytes'] / 1e6:>9.1f} "
        f"{found['measured_bytes'] / found['counted_bytes']:>6.3f}  {found['phase']}: {largest}"
    )


def main(args: list[str] | None = None) -> None:
    with one_line_errors("bench_memory"):
        options = tyro.cli(Options, args=args, description=__doc__)
        unknown = {*options.only, *([options.case] if options.case else [])} - set(CASES)
        if unknown:
            raise InputError(f"no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
        if options.case is not None:
            be_a_rank(options, options.case)
            return
        print(f"{'megabytes':<41} {'measured':>9} {'counted':>9} {'ratio':>6}  where the peak is")
        cases = dict[str, dict[str, Any]]()
        for name in options.only or CASES:
            world = max(1, CASES[name].processes * options.processes)
            if not has_room(CASES[name], world):
                print(f"{name:<38}{world:>3} left out: {CASES[name].parallel.mode} in so many processes here")
                continue
            cases[name] = start(options, name, world)
            print(line_of(name, cases[name]), flush=True)
        ratios = [case["measured_bytes"] / case["counted_bytes"] for case in cases.values()]
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        spread = {"least_ratio": round(min(ratios), 4), "largest_ratio": round(max(ratios), 4)}
        print(json.dumps({"device": device, "torch": torch.__version__, **spread, "cases": cases}))


if __name__ == "__main__":
    main()
