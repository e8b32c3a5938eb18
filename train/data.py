"""The stream of tokens and a position -> this rank's batches.

A split is one stream. Sequence i is its tokens [iT, iT+T], so neighbours share one token and none is lost. Each epoch
is a permutation of the sequences that is computed, not stored: O(1) to seek, no table on any rank. The position is the
loop's; nothing here remembers it.

A skipped sequence is replaced by the next one of the data, not removed. Removing it would move every later sequence, so
the list could not be changed in the middle of a run.
"""

import functools
import itertools
import math
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.errors import InputError
from data_prep.manifest import Manifest
from data_prep.shards import TokenStream
from train.config import Config, Stage, with_vocabulary

Indices = npt.NDArray[np.uint64]
Batch = tuple[Tensor, ...]  # inputs_BT and targets_BT; with dropout also a seed for each row, seeds_B; all int64
NUM_ROUNDS = 6  # of the Feistel network; Luby & Rackoff 1988 need 4 for a strong pseudorandom permutation


@dataclass(frozen=True)
class BatchPlan:
    """The shares of one step's sequences: sequences = world x accumulation x micro_batch.

    `later`: the plans of --train.batch-stages, each with the position from which on it holds. All have one micro-batch.
    """

    sequences: int
    sequences_per_rank: int
    micro_batch: int
    accumulation: int
    later: tuple[tuple[int, "BatchPlan"], ...] = ()

    def at(self, position: int) -> "BatchPlan":
        """Return the plan of the step that begins at `position`."""
        return [self, *(plan for start, plan in self.later if start <= position)][-1]

    @property
    def all(self) -> list["BatchPlan"]:
        return [self, *(plan for _, plan in self.later)]

    @property
    def largest_accumulation(self) -> int:
        return max(plan.accumulation for plan in self.all)

    @property
    def micro_batches_that_fit(self) -> list[int]:
        """Return the micro-batches that divide a rank's share in every stage, ascending."""
        return divisors(math.gcd(*(plan.sequences_per_rank for plan in self.all)))


def resolve_with_data(config: Config, manifest: Manifest | None, world: int) -> tuple[Config, BatchPlan]:
    """Return the config with the data's vocabulary, and how `world` processes share its global batch.

    Everything after this reads both and changes neither, but for --train.micro-batch auto, which a GPU's memory
    settles (train/parallel/auto_micro_batch.py). `manifest` None: the data is not there yet.
    """
    if manifest is not None:
        config = with_vocabulary(config, manifest.vocab_size, manifest.eot_id)
    return config, plan_batches(config, world)


def plan_batches(config: Config, world: int) -> BatchPlan:
    """Return how `world` processes share the global batch. InputError names the nearest values that fit.

    --train.micro-batch auto stands for the most it can become, a rank's whole share (see parallel/auto_micro_batch.py).
    """
    seq_len, stages = config.train.seq_len, config.train.stages
    sequences = [stage.tokens // seq_len for stage in stages]
    for stage, count in zip(stages, sequences, strict=True):
        if count % world:
            nearest_world = min(divisors(math.gcd(*sequences)), key=lambda n: abs(n - world))
            raise InputError(
                f"{stage.flag}{stage.tokens} is {count} sequences of {seq_len}, which {world} processes do not share "
                f"evenly; try {nearest_world} processes, or {near(stage, world * seq_len)}"
            )
    shares = [count // world for count in sequences]
    common = math.gcd(*shares)
    micro_batch = common if config.train.micro_batch == "auto" else min(config.train.micro_batch, *shares)
    for stage, share in zip(stages, shares, strict=True):
        if share % micro_batch:
            nearest = min(divisors(common), key=lambda n: abs(n - micro_batch))
            factor = micro_batch * seq_len * world
            other = f" or {near(stage, factor)}" if len(stages) > 1 else ""
            raise InputError(
                f"{stage.flag}{stage.tokens} is not divisible by micro_batch {micro_batch} x seq_len {seq_len} x "
                f"{world} ranks = {factor}; try --train.micro-batch {nearest}{other}"
            )
    plans = [
        BatchPlan(count, share, micro_batch, share // micro_batch)
        for count, share in zip(sequences, shares, strict=True)
    ]
    steps = [(after.first_step - stage.first_step) for stage, after in itertools.pairwise(stages)]
    starts = itertools.accumulate(num * count for num, count in zip(steps, sequences, strict=False))
    return replace(plans[0], later=tuple(zip(starts, plans[1:], strict=True)))


def near(stage: Stage, factor: int) -> str:
    """Return the flag with the multiples of `factor` next to the stage's tokens."""
    lower = stage.tokens // factor * factor
    return f"{stage.flag}{' or '.join(str(n) for n in (lower, lower + factor) if n)}"


def permute(indices: Indices, count: int, key: int) -> Indices:
    """Evaluate a pseudorandom permutation of range(count) at `indices`: uint64 [n] -> uint64 [n]; 0 <= key < 2^128.

    A balanced Feistel network over the least even number of bits that holds `count`, walked along its cycle until it
    lands inside (Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains"): at most 4 walks on average.
    """
    assert len(indices) == 0 or int(indices.max()) < count
    half_bits = np.uint64(max(1, (max(count - 1, 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half_bits)) - 1)
    low, high = _mix(np.array([key % 2**64, key >> 64], dtype=np.uint64))  # a key below 2^64 has the high half 0
    round_keys = _mix(np.arange(1, NUM_ROUNDS + 1, dtype=np.uint64) + low + high)
    result = indices.copy()
    outside = np.ones(len(result), dtype=bool)
    while outside.any():
        left, right = result[outside] >> half_bits, result[outside] & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right + round_key) & mask)
        result[outside] = (left << half_bits) | right
        outside = result >= np.uint64(count)
    return result


def _mix(x: Indices) -> Indices:
    """Return splitmix64's finaliser (Steele, Lea & Flood 2014, figure 15), modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def divisors(count: int) -> list[int]:
    return [n for n in range(1, count + 1) if count % n == 0]


def substitutes(skip_sequences: Collection[int], count: int) -> dict[int, int]:
    """Map each skipped sequence to the next one that is not skipped, cyclically.

    Raise InputError for a sequence that the split does not have, or if all are skipped.
    """
    outside = sorted(sequence for sequence in skip_sequences if not 0 <= sequence < count)
    if outside:
        raise InputError(
            f"--data.skip-sequences {' '.join(map(str, outside))}: the training split has {count} sequences, "
            "numbered from 0"
        )
    skipped = set(skip_sequences)
    if len(skipped) == count:
        raise InputError(
            f"--data.skip-sequences names all {count} sequences of the training split; leave some to train on"
        )
    next_kept: dict[int, int] = {}
    for sequence in sorted(skipped, reverse=True):  # from the end, so that most sequences need one step
        after = (sequence + 1) % count
        while after in skipped:
            after = next_kept.get(after, (after + 1) % count)
        next_kept[sequence] = after
    return next_kept


def zero_batch(shape: tuple[int, int], *, has_dropout: bool, device: torch.device | str = "cpu") -> Batch:
    """Return a micro-batch of zeros: sequences x tokens, and seeds if the model has dropout."""
    zeros_BT = torch.zeros(shape, dtype=torch.int64, device=device)
    return (zeros_BT, zeros_BT.clone(), *([zeros_BT[:, 0].clone()] if has_dropout else []))


def dropout_seeds(seed: int, position: int, num_sequences: int) -> Tensor:
    """Return a seed for the dropout of each sequence at positions [position, position + num_sequences), int64.

    A position stands for one sequence in one epoch, so the next epoch has other masks, and no two sequences of a step
    have the same.
    """
    positions = np.arange(position, position + num_sequences, dtype=np.uint64)
    return torch.from_numpy(_mix(positions + _mix(np.array([seed], dtype=np.uint64))).view(np.int64))


class TrainingSequences:
    """A split cut into sequences of seq_len + 1 tokens, served in the order of (seed, epoch).

    Each skipped sequence is replaced by the next one of the data; after the last comes the first.
    """

    def __init__(
        self,
        stream: TokenStream,
        seq_len: int,
        seed: int,
        skip_sequences: Collection[int] = (),
        *,
        has_dropout: bool = False,
    ) -> None:
        self._stream = stream
        self.has_dropout = has_dropout
        self.seq_len = seq_len
        self._seed = seed
        self.count = (len(stream) - 1) // seq_len
        if self.count < 1:
            raise InputError(
                f"the training split has {len(stream)} tokens, less than one sequence of --train.seq-len {seq_len} + 1"
            )
        self._substitutes = substitutes(skip_sequences, self.count)

    def ids_at(self, position: int, num_sequences: int) -> list[int]:
        """Return the sequences at positions [position, position + num_sequences), over epochs."""
        ids: list[int] = []
        while num_sequences:
            epoch, offset = divmod(position, self.count)
            taken = min(num_sequences, self.count - offset)
            offsets = np.arange(offset, offset + taken, dtype=np.uint64)
            permuted = permute(offsets, self.count, key=(self._seed << 32) + epoch).tolist()
            ids.extend(self._substitutes.get(sequence, sequence) for sequence in permuted)
            position += taken
            num_sequences -= taken
        return ids

    def read(self, ids: list[int]) -> tuple[Tensor, Tensor]:
        """Read sequences -> inputs_BT and targets_BT (the inputs one token later), int64 on the CPU."""
        T = self.seq_len
        rows_BT1 = torch.from_numpy(self._stream.read_rows([i * T for i in ids], T + 1).astype(np.int64))
        return rows_BT1[:, :-1].contiguous(), rows_BT1[:, 1:].contiguous()

    def micro_batches(self, position: int, plan: BatchPlan, rank: int) -> list[Batch]:
        """Return this rank's contiguous block of the step at `position`, micro-batches in order."""
        plan = plan.at(position)
        first = position + rank * plan.sequences_per_rank
        ids = self.ids_at(first, plan.sequences_per_rank)
        batches: list[Batch] = []
        for start in range(0, len(ids), plan.micro_batch):
            batch = self.read(ids[start : start + plan.micro_batch])
            seeds = [dropout_seeds(self._seed, first + start, plan.micro_batch)] if self.has_dropout else []
            batches.append((*batch, *seeds))
        return batches


class Prefetcher:
    """Reads the next step's sequences in a thread while this step computes, into pinned memory on a GPU machine.

    The position is the loop's: what was read ahead for another position is discarded and read anew. What this rank
    alone cannot read is replaced by zeros, since all ranks take the step. The loop then asks all ranks to stop and
    calls `refuse_fault` on all of them.
    """

    def __init__(self, sequences: TrainingSequences, plan: BatchPlan, *, rank: int, device: torch.device) -> None:
        self._sequences = sequences
        self._plan = plan
        self._rank = rank
        self._device = device
        # Pinned memory belongs to the current device, which each thread has to set.
        initializer = functools.partial(torch.cuda.set_device, device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch", initializer=initializer)
        self._ahead: tuple[int, Future[list[Batch]]] | None = None
        self._fault: InputError | None = None

    @property
    def has_fault(self) -> bool:
        """Return whether `take` has returned zeros in place of tokens."""
        return self._fault is not None

    def refuse_fault(self) -> bool:
        """Raise the InputError for which `take` has returned zeros, if it has; else return True."""
        if self._fault is not None:
            raise self._fault
        return True

    def take(self, position: int) -> list[Batch]:
        """Return this rank's micro-batches of the step at `position`, on its device or on their way to it."""
        if self._ahead is None or self._ahead[0] != position:
            self._ahead = position, self._thread.submit(self._read, position)
        try:
            batches = self._ahead[1].result()
        except InputError as error:
            self._fault = error
            shape = (self._plan.micro_batch, self._sequences.seq_len)
            num_batches = self._plan.at(position).accumulation
            batches = [zero_batch(shape, has_dropout=self._sequences.has_dropout)] * num_batches
        following = position + self._plan.at(position).sequences
        self._ahead = following, self._thread.submit(self._read, following)
        return [tuple(tensor.to(self._device, non_blocking=True) for tensor in batch) for batch in batches]

    def sequence_ids(self, position: int) -> list[int]:
        """Return every rank's sequences of the step at `position`, in order."""
        return self._sequences.ids_at(position, self._plan.at(position).sequences)

    def own_ids(self, position: int) -> list[int]:
        """Return this rank's sequences of the step at `position`, in order."""
        num_own = self._plan.at(position).sequences_per_rank
        return self._sequences.ids_at(position + self._rank * num_own, num_own)

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _read(self, position: int) -> list[Batch]:
        batches = self._sequences.micro_batches(position, self._plan, self._rank)
        return [tuple(pinned(tensor, self._device) for tensor in batch) for batch in batches]


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor in page-locked memory on a GPU machine, so that copying it does not block the host."""
    return tensor.pin_memory() if device.type == "cuda" else tensor
