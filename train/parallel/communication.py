"""Count what one optimizer step makes a rank communicate, from the model's shape and the parallel plan.

The run card prints these counts before step 0. Tests hold them against the collectives of real steps.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig
from model.ladder import make_model
from train.parallel.plan import ParallelPlan

FP32_BYTES = 4
STEP_RESULT_BYTES = 5 * 8  # fp64: loss, squared norm, stops, checkpoints wanted, checkpoints written (train/loop.py)
LINK_BYTES_PER_SECOND = 50e9  # of each GPU to other hosts: one port of 400 Gb/s (NVIDIA DGX H100 datasheet, 2023)
FIRST_BUCKET_BYTES, BUCKET_BYTES = 2**20, 25 * 2**20  # DistributedDataParallel's; a small first bucket starts early


@dataclass(frozen=True)
class Collectives:
    """The number of collectives of one kind, and the bytes of the tensors that they handle.

    The tensors are counted whole: as gathered, as they are before they are scattered, as reduced. The bytes include
    the padding of uneven shards.
    """

    count: int
    num_bytes: int


@dataclass(frozen=True)
class Communication:
    """The collectives that one rank takes part in during one optimizer step."""

    all_gathers: Collectives
    reduce_scatters: Collectives
    all_reduces: Collectives


def step_communication(
    config: ModelConfig, parallel_plan: ParallelPlan, *, micro_batches: int, compute_dtype: torch.dtype
) -> Communication:
    """Return the collectives of a step of `micro_batches`, without those of validation, sampling and checkpoints.

    The model has L blocks of b elements each. The root (token embedding, head, positions, last norm) has r elements.
    A step has M micro-batches. The plan has S shards and R replicas. compute_dtype has c bytes, the plan's
    reduce_dtype g. |x| is x with the rows of each parameter rounded up to a multiple of S.

                        count                                           bytes
        all-gathers     2 M (L - 1) + M + 1  resharding                 (2 M (L - 1) + M) c |b| + 4 |r|
                        M L + 1              kept, sharded gradients    M L c |b| + 4 |r|
                        L + 1                kept, whole gradients      L c |b| + 4 |r|
        reduce-scatters M (L + 1)            sharded gradients          g M (L |b| + |r|)
                        L + 1                whole gradients            g (L |b| + |r|)
        all-reduces     L + 1                R > 1                      g (L |b| + |r|) / S
                        number of buckets    DDP                        g (L b + r)
                        + 1                  more than one rank         + 40

    All-gathers: a block is gathered for its forward pass and again for its backward pass, in the compute dtype. The
    backward pass begins with the last block, so that block stays gathered between its passes. Without resharding every
    block stays gathered between its passes; with whole gradients it stays until the step's last backward pass. The root
    is used first and last, so it stays gathered for the whole step; it is gathered in fp32.

    Reduce-scatters: whole gradients are added up locally until the last micro-batch.

    All-reduces: over replicas, of the shards' sums, or in DDP of whole gradients; both after the last micro-batch. One
    more agrees on loss, norm and requests to stop or save. A single shard is not gathered or scattered, and a single
    replica is not reduced.

    In DDP a gradient joins the open bucket when it is ready, the last parameter's first. A bucket is full as soon as
    it holds 1 MiB (the first) or 25 MiB. The gradients of a compiled block may become ready in another order, which can
    shift the end of a bucket.

    In a ring each rank sends (S - 1) / S of the bytes that are gathered or scattered, and 2 (R - 1) / R of the bytes
    that are all-reduced over R ranks (Patarasuk & Yuan 2009).
    """
    shards, replicas, reduced_bytes = parallel_plan.shards, parallel_plan.replicas, parallel_plan.reduce_dtype.itemsize
    with torch.device("meta"):
        model = make_model(config)
    *blocks, last = [padded_numel(block.parameters(), shards) for block in model.blocks] or [0]
    root = padded_numel((p for name, p in model.named_parameters() if ".h." not in name), shards)
    total = sum(blocks) + last + root
    num_groups = len(blocks) + 2  # FSDP2 communicates by blocks, and the root

    all_gathers = reduce_scatters = Collectives(0, 0)
    if shards > 1:
        stays_gathered = parallel_plan.whole_gradients and not parallel_plan.reshard_after_forward
        per_last = 1 if stays_gathered else micro_batches
        per_block = 2 * per_last if parallel_plan.reshard_after_forward else per_last
        gathered = per_block * sum(blocks) + per_last * last
        all_gathers = Collectives(
            per_block * len(blocks) + per_last + 1, compute_dtype.itemsize * gathered + FP32_BYTES * root
        )
        scatters = 1 if parallel_plan.whole_gradients else micro_batches
        reduce_scatters = Collectives(scatters * num_groups, scatters * reduced_bytes * total)

    count, num_bytes = 0, 0
    if replicas > 1:
        count = count_buckets(model.parameters()) if parallel_plan.mode == "ddp" else num_groups
        num_bytes = reduced_bytes * total // shards
    if shards * replicas > 1:
        count, num_bytes = count + 1, num_bytes + STEP_RESULT_BYTES
    return Communication(all_gathers, reduce_scatters, Collectives(count, num_bytes))


def seconds_between_hosts(communication: Communication, parallel_plan: ParallelPlan) -> float:
    """Return the least time in which a rank sends to other hosts what it sends in a step, by rings; 0 on one host.

    HSDP gathers and scatters within its groups, which are taken to be of one host each.
    """
    if parallel_plan.hosts == 1:
        return 0.0
    shards, replicas = parallel_plan.shards, parallel_plan.replicas
    sent = 2 * (replicas - 1) / replicas * communication.all_reduces.num_bytes
    if replicas == 1:
        whole = communication.all_gathers.num_bytes + communication.reduce_scatters.num_bytes
        sent = (shards - 1) / shards * whole
    return sent / LINK_BYTES_PER_SECOND


def padded_numel(parameters: Iterable[Tensor], shards: int) -> int:
    """Return the elements of all parameters, with rows rounded up so that every shard has the same number."""
    return sum(math.ceil(len(p) / shards) * shards * (p.numel() // len(p)) for p in parameters)


def count_buckets(parameters: Iterable[Tensor]) -> int:
    """Return the number of buckets in which DDP reduces the gradients, the last parameter's first."""
    count, filled, limit = 0, 0, FIRST_BUCKET_BYTES
    for parameter in reversed(list(parameters)):
        filled += FP32_BYTES * parameter.numel()
        if filled >= limit:
            count, filled, limit = count + 1, 0, BUCKET_BYTES
    return count + (filled > 0)
