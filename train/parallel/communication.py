"""Count what one optimizer step makes a rank communicate, from the model's shape and the parallel plan.

The run card prints these counts before step 0. Tests hold them against the collectives of real steps.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.base import LanguageModel
from model.config import ModelConfig
from model.ladder import make_model
from train.muon import make_owners
from train.optim import kind_of
from train.parallel.plan import ParallelPlan
from train.parallel.state_slices import Grid

FP32_BYTES = 4
STEP_RESULT_BYTES = 5 * 8  # fp64: loss, squared norm, stops, checkpoints wanted, checkpoints written (train/loop.py)
LINK_BYTES_PER_SECOND = 50e9  # of each GPU to other hosts: one port of 400 Gb/s (NVIDIA DGX H100 datasheet, 2023)
FIRST_BUCKET_BYTES, BUCKET_BYTES = 2**20, 25 * 2**20  # DistributedDataParallel's; a small first bucket starts early


@dataclass(frozen=True)
class Collectives:
    """The number of collectives of one kind, and the bytes of the tensors that they handle.

    The tensors are counted whole: as gathered, as they are before they are scattered, as reduced, as sent in an
    all-to-all. The bytes include the padding of uneven shards.
    """

    count: int
    num_bytes: int

    def __add__(self, other: "Collectives") -> "Collectives":
        return Collectives(self.count + other.count, self.num_bytes + other.num_bytes)


@dataclass(frozen=True)
class Communication:
    """The collectives that one rank takes part in during one optimizer step."""

    all_gathers: Collectives
    reduce_scatters: Collectives
    all_reduces: Collectives
    all_to_alls: Collectives = Collectives(0, 0)


def step_communication(
    config: ModelConfig,
    parallel_plan: ParallelPlan,
    *,
    micro_batches: int,
    compute_dtype: torch.dtype,
    update_dtype: torch.dtype | None = None,
    rank: int = 0,
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

    With Muon, which computes in `update_dtype` (None: AdamW alone), `muon_communication` of `rank` is added.

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
    step = Communication(all_gathers, reduce_scatters, Collectives(count, num_bytes))
    if update_dtype is None or shards * replicas == 1:
        return step
    more_gathers, all_to_alls = muon_communication(model, Grid(replicas, shards), update_dtype, rank)
    return replace(step, all_gathers=all_gathers + more_gathers, all_to_alls=all_to_alls)


def muon_communication(
    model: LanguageModel, grid: Grid, update_dtype: torch.dtype, rank: int
) -> tuple[Collectives, Collectives]:
    """Return the all-gathers and all-to-alls of Muon's update. Their bytes differ between ranks where rows do.

    In each round of the matrices' exchange, an all-to-all brings the ranks' slices to the owners, another brings the
    owners' results to the shards of a replica (if S > 1), and an all-gather to the other replicas (if R > 1). With
    several replicas, one more all-gather hands round the slices of the parameters that AdamW updates, in fp32.
    """
    weights, others = dict[str, Tensor](), list[Tensor]()
    for name, parameter in model.named_parameters():
        if kind_of(name, parameter, model) == "matrix":
            weights[name] = parameter
        else:
            others.append(parameter)
    owners, shard = make_owners(weights, grid), rank % grid.shards
    gathered = sent = 0
    for number, owned in enumerate(owners.rounds):
        sent += sum(owners.slice_numel(index, rank) for indices in owned for index in indices)
        if grid.shards > 1:
            sent += sum(owners.shapes[index][0] * owners.shapes[index][1] for index in owned[rank])
        if grid.replicas > 1:
            gathered += grid.replicas * owners.gathered_numel(number, shard)
    num_rounds = len(owners.rounds)
    all_to_alls = Collectives(num_rounds * (1 + (grid.shards > 1)), update_dtype.itemsize * sent)
    if grid.replicas == 1:
        return Collectives(0, 0), all_to_alls
    shared = sum(math.ceil(len(grid.shard_rows(len(p), shard)) / grid.replicas) * (p.numel() // len(p)) for p in others)
    num_bytes = update_dtype.itemsize * gathered + FP32_BYTES * grid.replicas * shared
    return Collectives(num_rounds + 1, num_bytes), all_to_alls


def seconds_between_hosts(communication: Communication, parallel_plan: ParallelPlan) -> float:
    """Return the least time in which a rank sends to other hosts what it sends in a step, by rings; 0 on one host.

    HSDP gathers and scatters within its groups, which are taken to be of one host each; what Muon gathers over them is
    left out. All-to-alls are taken to go to other hosts whole.
    """
    if parallel_plan.hosts == 1:
        return 0.0
    shards, replicas = parallel_plan.shards, parallel_plan.replicas
    sent = communication.all_to_alls.num_bytes + 2 * (replicas - 1) / replicas * communication.all_reduces.num_bytes
    if parallel_plan.mode != "hsdp":
        whole = communication.all_gathers.num_bytes + communication.reduce_scatters.num_bytes
        sent += (1 - 1 / (shards * replicas)) * whole
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
