"""--train.micro-batch auto: find the largest micro-batch that fits this GPU by trying, before step 0.

Two small micro-batches tell what a sequence costs. The largest that should fit is then tried, and the next smaller one
if it does not. A run does this once: the result is kept in its config.json, where a resumed run reads it.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from common.errors import InputError
from train.config import Config
from train.data import BatchPlan, plan_batches, zero_batch
from train.losses import LossModel
from train.parallel import apply, fp8
from train.parallel.plan import ParallelPlan
from train.processes.group import ProcessGroup

# Usable part of the GPU's memory. The rest is for NCCL's buffers, samples and fragmentation over a long run.
USABLE = 0.92
OTHER_WORDS = "out of memory|ALLOC_FAILED"


def check_device(config: Config, device: torch.device) -> None:
    """Raise InputError if the config needs a GPU and there is none."""
    if config.train.micro_batch == "auto" and device.type != "cuda":
        raise InputError("--train.micro-batch auto measures a GPU's memory; give a number on a CPU, such as 16")
    if config.train.cuda_graphs and device.type != "cuda":
        raise InputError("--train.cuda-graphs needs a GPU; train without it on a CPU")
    if config.model.attention == "flex" and device.type != "cuda":
        raise InputError(
            f"--model.attention flex: FlexAttention of torch {torch.__version__} has no backward pass on a CPU; "
            "train with --model.attention sdpa there, or on a GPU"
        )
    fp8.check_device(config.train, device)


def settle_micro_batch(
    config: Config,
    batch_plan: BatchPlan,
    kept: dict[str, Any],
    *,
    loss_model: LossModel,
    parallel_plan: ParallelPlan,
    group: ProcessGroup,
) -> tuple[Config, BatchPlan, dict[str, Any]]:
    """Return config and batch plan with the largest micro-batch that fits in place of auto, and what to keep of it.

    Collective. `kept`: rank 0's measurement of an earlier attempt, which stays under the same conditions. DDP with
    another number of processes takes the next smaller micro-batch that the processes can share.
    """
    shares = batch_plan.micro_batches_that_fit
    conditions = conditions_of(config, parallel_plan, group)
    largest = group.on_main(lambda: kept_micro_batch(kept, conditions))
    if largest is None:
        largest = search(config, loss_model, parallel_plan, shares, group)
    micro_batch = max(share for share in shares if share <= largest)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, micro_batch=micro_batch))
    return config, plan_batches(config, group.world), {"micro_batch": largest, "conditions": conditions}


def conditions_of(config: Config, parallel_plan: ParallelPlan, group: ProcessGroup) -> dict[str, Any]:
    """Return what decides how much memory a sequence takes, and how much there is."""
    train = config.train
    return {
        "device": torch.cuda.get_device_name(group.device),
        "dtype": train.dtype,
        "compile": train.compile,
        "compile_mode": train.compile_mode,
        "loss": train.loss,
        "loss_chunk_tokens": train.loss_chunk_tokens,
        "fp8": train.fp8,
        "attention_backend": train.attention_backend,
        "activation_checkpointing": train.activation_checkpointing,
        "mode": parallel_plan.mode,
        "shards": parallel_plan.shards,
        "reshard_after_forward": parallel_plan.reshard_after_forward,
        "whole_gradients": parallel_plan.whole_gradients,
        **({"replicas": parallel_plan.replicas} if config.optim.name == "muon" else {}),  # share the optimizer's state
    }


def kept_micro_batch(kept: dict[str, Any], conditions: dict[str, Any]) -> int | None:
    """Return the micro-batch that config.json keeps for the same conditions; None if it keeps none."""
    return kept["micro_batch"] if kept.get("conditions") == conditions else None


def search(
    config: Config, loss_model: LossModel, parallel_plan: ParallelPlan, shares: Sequence[int], group: ProcessGroup
) -> int:
    """Return the largest of `shares` that fits every rank's GPU, and leave the GPU's allocator as it was.

    Collective: all ranks try the same sizes, and a size that is too large for one is too large for all.
    """
    device = group.device
    free, total = torch.cuda.mem_get_info(device)
    budget = min(group.gather(int(free + torch.cuda.memory_reserved(device) - (1 - USABLE) * total)))

    def measure(sequences: int) -> int | None:
        peaks = group.gather(peak_bytes(loss_model, parallel_plan, sequences, config.train.seq_len, device))
        return None if None in peaks else max(peaks)

    try:
        return largest_that_fits(shares, measure, budget, may_fail=not parallel_plan.is_sharded)
    finally:
        torch.compiler.reset()  # the shapes that were tried count towards Dynamo's limit of recompilations
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.reset_accumulated_memory_stats(device)


def largest_that_fits(
    sizes: Sequence[int], measure: Callable[[int], int | None], budget: int, *, may_fail: bool = True
) -> int:
    """Return the largest of `sizes` (ascending) whose measured peak is within `budget` bytes.

    `measure` returns None where memory ran out. Without `may_fail` the second size is tried only if it must fit, even
    if the first took nothing but activations. Raise InputError if not even the smallest fits.
    """
    smallest = measure(sizes[0])
    if smallest is None or smallest > budget:
        raise InputError(
            f"not even --train.micro-batch {sizes[0]} fits this GPU ({budget / 2**30:.1f} GiB usable); set "
            "--train.activation-checkpointing, --train.loss chunked, a smaller --train.seq-len or a smaller model"
        )
    if not may_fail and len(sizes) > 1 and smallest * sizes[1] > budget * sizes[0]:
        return sizes[0]
    if len(sizes) == 1 or (second := measure(sizes[1])) is None or second > budget:
        return sizes[0]
    per_sequence = max(1.0, (second - smallest) / (sizes[1] - sizes[0]))
    candidates = [size for size in sizes[2:] if second + per_sequence * (size - sizes[1]) <= budget]
    for size in reversed(candidates):
        peak = measure(size)
        if peak is not None and peak <= budget:
            return size
    return sizes[1]


def peak_bytes(
    loss_model: LossModel, parallel_plan: ParallelPlan, sequences: int, seq_len: int, device: torch.device
) -> int | None:
    """Return the most memory allocated during the last two micro-batches of a step; None if memory ran out.

    A sharded model raises then, since the other ranks wait for this one in the middle of a pass.
    """
    torch.cuda.empty_cache()
    inputs_BT, targets_BT, *seeds = zero_batch(
        (sequences, seq_len), has_dropout=loss_model.config.dropout > 0, device=device
    )
    scale = torch.ones((), device=device)
    try:
        apply.set_gradient_sync(loss_model, parallel_plan, is_last=False)
        loss_model(inputs_BT, targets_BT, scale, *seeds)[0].backward()  # compiles, which takes memory of its own
        torch.cuda.reset_peak_memory_stats(device)
        apply.set_gradient_sync(loss_model, parallel_plan, is_last=True)
        loss_model(inputs_BT, targets_BT, scale, *seeds)[0].backward()  # finds the first one's gradients in place
        return torch.cuda.max_memory_allocated(device)
    except RuntimeError as error:  # OutOfMemoryError is one; cuBLAS and Triton say it in their own words
        is_memory = isinstance(error, torch.OutOfMemoryError) or re.search(OTHER_WORDS, str(error), re.IGNORECASE)
        if parallel_plan.is_sharded or not is_memory:
            raise
        return None
    finally:
        loss_model.zero_grad(set_to_none=True)
