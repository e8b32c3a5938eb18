"""Where the speed comes from: a plain training loop, and one improvement after the other on top of it.

    python benchmarks/bench_speedups.py --without bf16        # 2 layers of GPT-2 small on a CPU; 7 minutes of 2 cores
    python benchmarks/bench_speedups.py --layers 12 --seq-len 1024 --sequences 64 --micro-batch 4 --larger 32  # GPU

Each row adds one thing to the row above and runs in a process of its own: the same model, the same tokens in a step,
a warm-up, then blocks of steps. Memory is the peak of those steps, the model and its optimizer included: torch's count
of allocated bytes on a GPU, the growth of the resident set on a CPU. The first row runs again at the end: how far that
is from 1 tells how far the others can be trusted. Last line: JSON. Published elsewhere, for GPT-2-sized models on
GPUs: a factor of 7 over a naive start, and 337, 513 and 560 thousand tokens/s by bf16, fused attention and compile. On
a CPU without bf16 instructions that row is slower than the one above: leave it out by --without.
"""

import contextlib
import dataclasses
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import tyro

from benchmarks.bench_memory import begin_peak, give_memory_back_at_once, peak_bytes
from benchmarks.steps import configured
from common.errors import InputError, one_line_errors
from data_prep.manifest import open_split
from model.config import NAMED_SHAPES
from train.config import Config, TrainConfig, resolve
from train.config_checks import faults_of
from train.data import Prefetcher, TrainingSequences, plan_batches
from train.parallel.apply import build_loss_model
from train.parallel.plan import agree_on_parallel_plan
from train.parallel.precision import set_numerics
from train.processes.group import ProcessGroup

ROOT = Path(__file__).resolve().parents[1]
START = "fp32, attention written out"


@dataclass(frozen=True)
class Setup:
    """What a row has. The first one: what a first script has."""

    dtype: Literal["fp32", "bf16"] = "fp32"
    attention: Literal["naive", "sdpa"] = "naive"
    compile: bool = False
    fused_adamw: bool = False
    vocab_multiple: int = 1
    is_larger: bool = False
    prefetch: bool = False
    loss: Literal["plain", "chunked"] = "plain"


IMPROVEMENTS: dict[str, dict[str, Any]] = {
    "bf16": {"dtype": "bf16"},
    "fused attention": {"attention": "sdpa"},
    "compile": {"compile": True},
    "fused AdamW": {"fused_adamw": True},
    "padded vocabulary": {"vocab_multiple": 64},
    "larger micro-batch": {"is_larger": True},
    "prefetch": {"prefetch": True},
    "chunked loss": {"loss": "chunked"},
}


@dataclass(frozen=True)
class Options:
    """Where the speed comes from: a plain training loop, and one improvement after the other on top of it."""

    layers: int = 2
    """Blocks of GPT-2 small."""
    seq_len: int = 256
    """Tokens in a sequence."""
    sequences: int = 4
    """In a step."""
    micro_batch: int = 1
    """Sequences in a forward pass, at first."""
    larger: int = 4
    """And from the row "larger micro-batch" on."""
    vocab_size: int = 50_257
    """The model's vocabulary. The tokens that are read are bytes, whatever it is."""
    blocks: int = 3
    """Blocks of steps that are timed."""
    block: int = 2
    """Steps in each."""
    without: tuple[str, ...] = ()
    """Improvements to leave out."""
    row: str | None = None
    """The one that this process is for (the script starts itself)."""
    found: Path | None = None
    """Where it writes what it found."""


def setups(without: Sequence[str]) -> dict[str, Setup]:
    """Each row's setup, each with all that the rows above have."""
    unknown = set(without) - set(IMPROVEMENTS)
    if unknown:
        raise InputError(f"--without {', '.join(sorted(unknown))}: there are {', '.join(IMPROVEMENTS)}")
    rows = {START: Setup()}
    for name, change in IMPROVEMENTS.items():
        if name not in without:
            rows[f"+ {name}"] = replace(list(rows.values())[-1], **change)
    return rows


def config_of(options: Options, setup: Setup, folder: Path) -> Config:
    config = configured(folder, preset="gpt2-small", sequences=options.sequences, vocab_size=options.vocab_size)
    model = replace(
        NAMED_SHAPES["gpt2-small"],
        num_layers=options.layers,
        vocab_size=options.vocab_size,
        vocab_multiple=setup.vocab_multiple,
        attention=setup.attention,
        eot_id=None,
    )
    train = TrainConfig(
        seq_len=options.seq_len,
        batch_tokens=options.sequences * options.seq_len,
        micro_batch=options.larger if setup.is_larger else options.micro_batch,
        dtype=setup.dtype,
        compile=setup.compile,
        loss=setup.loss,
    )
    config = resolve(replace(config, model=model, train=train))
    faults = faults_of(config)
    if faults:
        raise InputError("; ".join(faults))
    return config


def make_step(config: Config, setup: Setup, group: ProcessGroup, closing: contextlib.ExitStack) -> Callable[[], None]:
    """A step as a short script has it: read, forward, backward, clip, AdamW."""
    loss_model = build_loss_model(config, agree_on_parallel_plan(config, group), group)
    optimizer = torch.optim.AdamW(
        loss_model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=setup.fused_adamw
    )
    plan = plan_batches(config, group.world)
    sequences = TrainingSequences(open_split(config.data.dir, "train"), config.train.seq_len, config.seed)
    ahead = Prefetcher(sequences, plan, rank=0, device=group.device) if setup.prefetch else None
    if ahead is not None:
        closing.callback(ahead.close)
    scale = torch.full((), 1 / config.train.batch_tokens, device=group.device)
    position = 0

    def step() -> None:
        nonlocal position
        if ahead is not None:
            batches = ahead.take(position)
        else:
            pairs = sequences.micro_batches(position, plan, rank=0)
            batches = [(inputs.to(group.device), targets.to(group.device)) for inputs, targets in pairs]
        position += plan.sequences
        for inputs_BT, targets_BT in batches:
            loss_model(inputs_BT, targets_BT, scale)[0].backward()
        torch.nn.utils.clip_grad_norm_(loss_model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(options: Options, setup: Setup, folder: Path) -> dict[str, Any]:
    """Seconds of a step, block by block, and the peak's bytes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    group, config = ProcessGroup(0, 1, device), config_of(options, setup, folder)
    set_numerics(config.train, device)
    gc.collect()
    before = begin_peak(device)
    with contextlib.ExitStack() as closing:
        step = make_step(config, setup, group, closing)
        step()  # compiles, and makes the optimizer's state
        begin_peak(device)
        seconds = [timed(step, options.block, device) for _ in range(options.blocks)]
        peak = peak_bytes(device) - before
    return {"step_seconds": seconds, "peak_bytes": peak, "tokens": config.train.batch_tokens}


def timed(step: Callable[[], None], count: int, device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    for _ in range(count):
        step()
    synchronize(device)
    return (time.perf_counter() - started) / count


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def start(options: Options, row: str) -> dict[str, Any]:
    """One row, in a process of its own, so that nothing of the one before is left."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        line = [sys.executable, __file__]
        for field in dataclasses.fields(Options):
            value = getattr(options, field.name)
            if field.name not in ("row", "found") and value != field.default:
                line += [f"--{field.name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else [value])]
        done = subprocess.run([*line, "--row", row, "--found", str(found)], cwd=ROOT, capture_output=True, text=True)
        if done.returncode != 0:
            raise InputError(f"{row} failed:\n{done.stdout}\n{done.stderr}")
        result: dict[str, Any] = json.loads(found.read_text(encoding="ascii"))
        return result


def tokens_per_second(found: dict[str, Any]) -> float:
    rate: float = found["tokens"] / statistics.median(found["step_seconds"])
    return rate


def line_of(name: str, found: dict[str, Any], above: dict[str, Any], first: dict[str, Any]) -> str:
    rate = tokens_per_second(found)
    steps = found["step_seconds"]
    return (
        f"{name:<30}{rate:>12,.0f}{min(steps) * 1e3:>10,.0f}{max(steps) * 1e3:>9,.0f}{found['peak_bytes'] / 1e9:>9.2f}"
        f"{rate / tokens_per_second(above):>9.2f}{rate / tokens_per_second(first):>9.2f}"
    )


def main(args: list[str] | None = None) -> None:
    with one_line_errors("bench_speedups"):
        options = tyro.cli(Options, args=args, description=__doc__)
        for flag in ("layers", "seq_len", "sequences", "micro_batch", "larger", "blocks", "block"):
            if getattr(options, flag) < 1:
                raise InputError(f"--{flag.replace('_', '-')} {getattr(options, flag)} must be at least 1")
        for flag in ("micro_batch", "larger"):
            if options.sequences % getattr(options, flag):
                name = flag.replace("_", "-")
                raise InputError(f"--{name} {getattr(options, flag)} must divide --sequences {options.sequences}")
        rows = setups(options.without)
        if options.row is not None:
            give_memory_back_at_once()
            with tempfile.TemporaryDirectory() as folder:
                found = measure(options, rows[options.row], Path(folder))
            assert options.found is not None
            options.found.write_text(json.dumps(found), encoding="ascii")
            return
        print(f"{'':<30}{'tokens/s':>12}{'ms, least':>10}{'most':>9}{'GB':>9}{'factor':>9}{'in all':>9}")
        measured = dict[str, dict[str, Any]]()
        for name in [*rows, "the first again"]:
            measured[name] = start(options, START if name not in rows else name)
            above = list(measured.values())[-2 if len(measured) > 1 and name in rows else 0]
            print(line_of(name, measured[name], above, measured[START]), flush=True)
        conditions = {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "layers": options.layers,
            "seq_len": options.seq_len,
            "sequences": options.sequences,
        }
        print(json.dumps(conditions | {"rows": measured}))


if __name__ == "__main__":
    main()
