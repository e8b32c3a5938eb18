"""Time and memory of attention written out against torch's fused kernel, over context lengths.

    python benchmarks/bench_attention.py                          # up to 4,096 tokens; 1 to 2 minutes, 3 GB, 2 cores
    python benchmarks/bench_attention.py --seq-lens 1024 4096 16384 --dtype bf16        # on a GPU

Each case is a forward and a backward pass of one block's attention, without its matrices, on random queries, keys and
values of the same number of tokens; the two kinds run in turn. Memory is what the allocator hands out at the peak
beyond the operands, on a CPU by torch.profiler's account. A length whose scores would not fit is left out, and said.
Last line: JSON. Expect written-out attention's memory to grow with the square of the length, sdpa's with the length.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from common.errors import InputError, one_line_errors
from model.gpt import naive_attention

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
USABLE = 0.8  # of the memory that is free


@dataclass(frozen=True)
class Options:
    """Time and memory of attention written out against torch's fused kernel."""

    seq_lens: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    """Context lengths."""
    num_heads: int = 12
    """Heads."""
    head_size: int = 64
    """Elements of a head."""
    batch: int = 1
    """Sequences."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of queries, keys and values."""
    rounds: int = 3
    """Times that each case is run and timed, after one that is not counted."""


def fused_attention(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True)


KINDS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"naive": naive_attention, "sdpa": fused_attention}


def peak_of_naive(options: Options, seq_len: int) -> int:
    """Bytes: scores before and after the mask and their softmax in fp32, and as many again in the operands' dtype."""
    itemsize = DTYPES[options.dtype].itemsize
    return options.batch * options.num_heads * seq_len**2 * (3 * 4 + (0 if itemsize == 4 else 2 * itemsize))


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def measure(options: Options, seq_len: int, kinds: list[str], device: torch.device) -> dict[str, Any]:
    """Median seconds of both passes and the peak's bytes, of each kind."""
    shape = (3, options.batch, options.num_heads, seq_len, options.head_size)
    generator = torch.Generator(device).manual_seed(1)
    operands = torch.randn(shape, generator=generator, device=device, dtype=DTYPES[options.dtype]).unbind()
    leaves = [operand.requires_grad_() for operand in operands]

    def both_passes(kind: str) -> None:
        torch.autograd.grad(KINDS[kind](*leaves).sum(), leaves)

    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for index in range(options.rounds + 1):
        for kind in kinds:
            synchronize(device)
            started = time.perf_counter()
            both_passes(kind)
            synchronize(device)
            if index:
                seconds[kind].append(time.perf_counter() - started)
    return {
        kind: {
            "seconds": round(statistics.median(seconds[kind]), 6),
            "least_seconds": round(min(seconds[kind]), 6),
            "largest_seconds": round(max(seconds[kind]), 6),
            "peak_bytes": peak_bytes(lambda kind=kind: both_passes(kind), device),  # type: ignore[misc]
        }
        for kind in kinds
    }


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(run: Callable[[], None], device: torch.device) -> int:
    """The most that is allocated at once, beyond what there was."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    now = peak = 0
    assert profiled.profiler is not None and profiled.profiler.kineto_results is not None
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def line_of(seq_len: int, found: dict[str, Any]) -> str:
    sdpa = found["sdpa"]
    text = f"{seq_len:>8,}{sdpa['seconds'] * 1e3:>12.2f}{sdpa['peak_bytes'] / 1e6:>12.1f}"
    if "naive" not in found:
        return f"{text}   naive left out: its scores do not fit"
    naive = found["naive"]
    text += f"{naive['seconds'] * 1e3:>12.2f}{naive['peak_bytes'] / 1e6:>12.1f}"
    return f"{text}{naive['seconds'] / sdpa['seconds']:>9.2f}{naive['peak_bytes'] / sdpa['peak_bytes']:>9.1f}"


def main(args: list[str] | None = None) -> None:
    with one_line_errors("bench_attention"):
        options = tyro.cli(Options, args=args, description=__doc__)
        for flag in ("num_heads", "head_size", "batch", "rounds"):
            if getattr(options, flag) < 1:
                raise InputError(f"--{flag.replace('_', '-')} {getattr(options, flag)} must be at least 1")
        if not options.seq_lens or min(options.seq_lens) < 1:
            raise InputError(f"--seq-lens {' '.join(map(str, options.seq_lens))}: give lengths of at least 1")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        print(f"{'tokens':>8}{'sdpa ms':>12}{'MB':>12}{'naive ms':>12}{'MB':>12}{'slower':>9}{'larger':>9}")
        lengths = dict[str, dict[str, Any]]()
        for seq_len in options.seq_lens:
            fits = peak_of_naive(options, seq_len) <= USABLE * free_bytes(device)
            lengths[str(seq_len)] = measure(options, seq_len, list(KINDS) if fits else ["sdpa"], device)
            print(line_of(seq_len, lengths[str(seq_len)]), flush=True)
        conditions = {
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "dtype": options.dtype,
            "batch": options.batch,
            "num_heads": options.num_heads,
            "head_size": options.head_size,
        }
        print(json.dumps(conditions | {"seq_lens": lengths}))


if __name__ == "__main__":
    main()
