"""What one optimizer step makes a rank communicate, counted from the model's shape and the layout."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig
from model.ladder import make_model
from train.parallel.plan import ParallelPlan

REDUCED_BYTES = 4  # gradients are reduced in fp32
AGREED_BYTES = 5 * 8  # loss, squared norm, stops, saves wanted, saves written: fp64 (train/loop.py)
FIRST_BUCKET_BYTES, BUCKET_BYTES = 2**20, 25 * 2**20  # DistributedDataParallel's; small first, so as to start early


@dataclass(frozen=True)
class Collectives:
    """So many of one kind, and the bytes of the tensors they are about, whole: as gathered, before they are scattered,
    as reduced. Padding of uneven shards is in them."""

    count: int
    num_bytes: int


@dataclass(frozen=True)
class Communication:
    """What one rank takes part in during one optimizer step."""

    all_gathers: Collectives
    reduce_scatters: Collectives
    all_reduces: Collectives


def step_communication(
    config: ModelConfig, parallel_plan: ParallelPlan, *, micro_batches: int, compute_dtype: torch.dtype
) -> Communication:
    """Of a step of `micro_batches`, beside what validation, sampling and saves take.

    L blocks of b elements and the rest (token embedding, head, positions, last norm) of r; M micro-batches; S shards
    of R replicas; c bytes of compute_dtype. |x| is x with the rows of each parameter rounded up to a multiple of S.

                        how many                                        bytes
        all-gathers     2 M (L - 1) + M + 1  resharding                 (2 M (L - 1) + M) c |b| + 4 |r|
                        M L + 1              not, sharded gradients     M L c |b| + 4 |r|
                        L + 1                not, whole gradients       L c |b| + 4 |r|
        reduce-scatters M (L + 1)            sharded gradients          4 M (L |b| + |r|)
                        L + 1                whole gradients            4 (L |b| + |r|)
        all-reduces     L + 1                R > 1                      4 (L |b| + |r|) / S
                        the buckets          DDP                        4 (L b + r)
                        + 1                  of more than one rank      + 40

    All-gathers: a block is gathered for its forward and again for its backward pass, in the dtype that it computes
    with. The backward pass begins with the last block, which therefore stays gathered between the two; without
    resharding every block does, and with whole gradients too until the step's last backward pass. The rest is used
    first and last of all and stays for the whole step; it is gathered in fp32.
    Reduce-scatters: fp32; whole gradients are added up without them until the last micro-batch.
    All-reduces: of the shards' sums over replicas, or DDP's of whole gradients, after the last micro-batch in any case;
    and the one in which ranks agree on loss, norm and what is asked for. One shard is neither gathered nor scattered,
    one replica not reduced.
    In DDP a gradient joins the open bucket when it is ready, the last parameter's first, and a bucket is full as soon
    as it holds 1 MiB (the first) or 25 MiB. A compiled block's gradients may become ready in another order, which can
    shift a bucket's end.

    A ring sends (S - 1) / S of the first two kinds' bytes from each rank, and 2 (R - 1) / R of what is all-reduced over
    R ranks (Patarasuk & Yuan 2009).
    """
    with torch.device("meta"):
        model = make_model(config)
    *blocks, last = [padded_numel(block.parameters(), parallel_plan.shards) for block in model.blocks] or [0]
    rest = padded_numel((p for name, p in model.named_parameters() if ".h." not in name), parallel_plan.shards)
    held = sum(blocks) + last + rest
    num_groups = len(blocks) + 2

    all_gathers = reduce_scatters = Collectives(0, 0)
    if parallel_plan.shards > 1:
        stays = parallel_plan.whole_gradients and not parallel_plan.reshard_after_forward
        per_last = 1 if stays else micro_batches
        per_block = 2 * per_last if parallel_plan.reshard_after_forward else per_last
        gathered = per_block * sum(blocks) + per_last * last
        all_gathers = Collectives(
            per_block * len(blocks) + per_last + 1, compute_dtype.itemsize * gathered + REDUCED_BYTES * rest
        )
        scatters = 1 if parallel_plan.whole_gradients else micro_batches
        reduce_scatters = Collectives(scatters * num_groups, scatters * REDUCED_BYTES * held)

    count, num_bytes = 0, 0
    if parallel_plan.replicas > 1:
        count = count_buckets(model.parameters()) if parallel_plan.mode == "ddp" else num_groups
        num_bytes = REDUCED_BYTES * held // parallel_plan.shards
    if parallel_plan.shards * parallel_plan.replicas > 1:
        count, num_bytes = count + 1, num_bytes + AGREED_BYTES
    return Communication(all_gathers, reduce_scatters, Collectives(count, num_bytes))


def padded_numel(parameters: Iterable[Tensor], shards: int) -> int:
    """Elements of all, each with as many rows as give every shard the same number."""
    return sum(math.ceil(len(p) / shards) * shards * (p.numel() // len(p)) for p in parameters)


def count_buckets(parameters: Iterable[Tensor]) -> int:
    """In how many pieces DDP reduces these gradients, which become ready from the last to the first."""
    count, filled, limit = 0, 0, FIRST_BUCKET_BYTES
    for parameter in reversed(list(parameters)):
        filled += REDUCED_BYTES * parameter.numel()
        if filled >= limit:
            count, filled, limit = count + 1, 0, BUCKET_BYTES
    return count + (filled > 0)
