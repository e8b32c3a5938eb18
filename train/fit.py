"""--train.micro-batch auto: the largest that fits this GPU, found by trying it before step 0.

Two small micro-batches tell what a window costs; the largest that should fit is then tried, and the next smaller
one where it does not. A run does this once: what was found stands in its config.json, and resuming reads it there.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from data_prep.errors import InputError
from train.batches import plan_batches
from train.config import Config
from train.losses import Objective
from train.mesh import Mesh
from train.run_dir import RunDirectory

# Of the GPU's memory. The rest is for NCCL's buffers, samples and what fragmentation costs over a long run.
USABLE = 0.92


def settle_micro_batch(config: Config, objective: Objective, directory: RunDirectory, mesh: Mesh) -> Config:
    """`config` with the largest micro-batch that fits on every rank, in place of auto. Collective.

    What this run found on this kind of GPU stays; other numbers of processes take the next one that they can share.
    InputError without a GPU.
    """
    if mesh.device.type != "cuda":
        raise InputError("--train.micro-batch auto measures a GPU's memory; give a number on a CPU, such as 16")
    shares = divisors(plan_batches(config, mesh.world).windows_per_rank)
    name = torch.cuda.get_device_name(mesh.device)
    found = mesh.on_main(lambda: kept_micro_batch(directory.found, name))
    if found is None:
        found = min(mesh.gather(mesh.on_all(lambda: search(config, objective, shares, mesh.device))))
        directory.record({"micro_batch": found, "device": name})
    return with_micro_batch(config, max(share for share in shares if share <= found))


def kept_micro_batch(found: dict[str, Any], device_name: str) -> int | None:
    """What config.json says was found on such a GPU; None for nothing."""
    return found["micro_batch"] if found.get("device") == device_name else None


def search(config: Config, objective: Objective, shares: Sequence[int], device: torch.device) -> int:
    free, total = torch.cuda.mem_get_info(device)
    budget = int(free + torch.cuda.memory_reserved(device) - (1 - USABLE) * total)

    def measure(windows: int) -> int | None:
        return peak_bytes(objective, windows, config.train.seq_len, device)

    try:
        return largest_that_fits(shares, measure, budget)
    finally:
        torch.cuda.reset_peak_memory_stats(device)


def largest_that_fits(sizes: Sequence[int], measure: Callable[[int], int | None], budget: int) -> int:
    """The largest of `sizes` (ascending) whose measured peak is within `budget` bytes.

    `measure` returns None where memory ran out. InputError if even the smallest does not fit.
    """
    smallest = measure(sizes[0])
    if smallest is None or smallest > budget:
        raise InputError(
            f"not even --train.micro-batch {sizes[0]} fits this GPU ({budget / 2**30:.1f} GiB usable); set "
            "--train.activation-checkpointing, --train.loss chunked, a smaller --train.seq-len or a smaller model"
        )
    if len(sizes) == 1 or (second := measure(sizes[1])) is None or second > budget:
        return sizes[0]
    per_window = max(1.0, (second - smallest) / (sizes[1] - sizes[0]))
    candidates = [size for size in sizes[2:] if second + per_window * (size - sizes[1]) <= budget]
    for size in reversed(candidates):
        peak = measure(size)
        if peak is not None and peak <= budget:
            return size
    return sizes[1]


def peak_bytes(objective: Objective, windows: int, seq_len: int, device: torch.device) -> int | None:
    """Most memory allocated during two training passes of so many windows; None where it ran out."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    zeros_BT = torch.zeros((windows, seq_len), dtype=torch.int64, device=device)
    scale = torch.ones((), device=device)
    try:
        for _ in range(2):  # the second finds the gradients of the first in place
            objective(zeros_BT, zeros_BT, scale)[0].backward()
        return torch.cuda.max_memory_allocated(device)
    except torch.OutOfMemoryError:
        return None
    finally:
        objective.zero_grad(set_to_none=True)


def divisors(count: int) -> list[int]:
    return [n for n in range(1, count + 1) if count % n == 0]


def with_micro_batch(config: Config, micro_batch: int) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, micro_batch=micro_batch))
