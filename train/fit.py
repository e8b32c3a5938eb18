"""--train.micro-batch auto: the largest that fits this GPU, found by trying it before step 0.

Two small micro-batches tell what a window costs; the largest that should fit is then tried, and the next smaller
one where it does not. A run does this once: what was found stands in its config.json, and resuming reads it there.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence

import torch

from data_prep.errors import InputError
from train.batches import plan_batches
from train.config import Config
from train.losses import Objective
from train.mesh import Mesh

# Of the GPU's memory. The rest is for NCCL's buffers, samples and what fragmentation costs over a long run.
USABLE = 0.92


def recorded_micro_batch(config: Config, world: int) -> Config:
    """`config` with the micro-batch that this run found earlier, or the next that `world` processes can share."""
    path = config.directory / "config.json"
    if config.train.micro_batch != "auto" or not path.is_file():
        return config
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["config"]["train"]["micro_batch"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        return config  # a damaged file is reported where the run is compared with it
    if not isinstance(found, int):
        return config
    shares = divisors(plan_batches(config, world).windows_per_rank)
    return with_micro_batch(config, max(share for share in shares if share <= max(1, found)))


def find_micro_batch(config: Config, objective: Objective, mesh: Mesh) -> Config:
    """`config` with the largest micro-batch that fits on every rank. Collective. InputError without a GPU."""
    if mesh.device.type != "cuda":
        raise InputError("--train.micro-batch auto measures a GPU's memory; give a number on a CPU, such as 16")
    free, total = torch.cuda.mem_get_info(mesh.device)
    held = torch.cuda.memory_reserved(mesh.device)
    budget = int(free + held - (1 - USABLE) * total)

    def measure(windows: int) -> int | None:
        return peak_bytes(objective, windows, config.train.seq_len, mesh.device)

    shares = divisors(plan_batches(config, mesh.world).windows_per_rank)
    found = mesh.on_all(lambda: largest_that_fits(shares, measure, budget))
    torch.cuda.reset_peak_memory_stats(mesh.device)
    return with_micro_batch(config, min(mesh.gather(found)))


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
