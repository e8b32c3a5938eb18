"""The order of the sequences: each one once an epoch, whatever the number of processes."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import InputError
from data_prep.manifest import open_split
from tests.helpers.runs import tiny_config
from train.data import Batch, BatchPlan, Prefetcher, TrainingSequences, dropout_seeds, permute, plan_batches, zero_batch

CPU = torch.device("cpu")


def permuted(count: int, key: int) -> list[int]:
    return list(permute(np.arange(count, dtype=np.uint64), count, key).tolist())


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 17, 1000, 4096, 4097, 100_003])
def test_the_permutation_is_a_permutation(count: int) -> None:
    assert sorted(permuted(count, key=7)) == list(range(count))


def test_the_permutation_seeks_and_depends_on_its_key() -> None:
    whole = permuted(5000, key=1)
    positions = np.array([4999, 0, 77], dtype=np.uint64)
    assert permute(positions, 5000, 1).tolist() == [whole[4999], whole[0], whole[77]]
    assert whole != permuted(5000, key=2)
    assert permute(np.array([2**40], dtype=np.uint64), 2**41, 3)[0] < 2**41


def test_every_bit_of_a_seed_counts_and_small_seeds_keep_their_order(tiny_data: Path) -> None:
    stream = open_split(tiny_data, "train")
    orders = {seed: TrainingSequences(stream, 32, seed=seed).ids_at(0, 40) for seed in (7, 1337, 2**32 - 1)}
    assert orders[7][:8] == [421, 503, 92, 115, 436, 43, 56, 210]
    assert orders[1337][:8] == [239, 50, 82, 513, 216, 34, 29, 258]
    assert orders[2**32 - 1][:8] == [211, 139, 156, 130, 415, 301, 116, 362]
    seeds = [7 + (1 << bit) for bit in range(3, 63)] + [2**63 - 1]
    assert len({tuple(TrainingSequences(stream, 32, seed=seed).ids_at(0, 40)) for seed in (7, *seeds)}) == 62


def test_the_permutation_looks_random() -> None:
    """Fixed points, kept neighbours and correlation are those of random permutations, over 200 keys."""
    count, keys = 1000, 200
    orders = np.array([permuted(count, key) for key in range(keys)])
    fixed = (orders == np.arange(count)).sum(axis=1).mean()
    neighbours = (np.abs(np.diff(orders, axis=1)) == 1).sum(axis=1).mean()
    assert abs(fixed - 1) < 0.4  # Poisson(1), standard error 0.07
    assert abs(neighbours - 2) < 0.5  # mean 2, standard error 0.1
    correlations = [np.corrcoef(order, np.arange(count))[0, 1] for order in orders]
    assert abs(np.mean(correlations)) < 0.012  # standard error 1 / sqrt(1000 * 200)
    assert np.std(correlations) == pytest.approx(1 / count**0.5, rel=0.25)
    first = np.bincount(orders[:, 0] // 100, minlength=10)
    assert ((first - keys / 10) ** 2 / (keys / 10)).sum() < 30  # chi-square, 9 degrees of freedom


def test_sequences_share_one_token_and_lose_none(tiny_data: Path) -> None:
    stream = open_split(tiny_data, "train")
    sequences = TrainingSequences(stream, seq_len=32, seed=1)
    inputs_BT, targets_BT = sequences.read(list(range(sequences.count)))
    tokens = torch.from_numpy(stream.read(0, len(stream)).astype(np.int64))
    assert sequences.count == (len(stream) - 1) // 32
    assert torch.equal(inputs_BT.flatten(), tokens[: sequences.count * 32])
    assert torch.equal(targets_BT.flatten(), tokens[1 : sequences.count * 32 + 1])


@pytest.mark.parametrize("micro_batch", [1, 2, 12])
@pytest.mark.parametrize("world", [1, 2, 3, 6, 12])
def test_every_world_reads_the_same_sequences_in_the_same_order(tiny_data: Path, world: int, micro_batch: int) -> None:
    sequences = TrainingSequences(open_split(tiny_data, "train"), 32, seed=1)
    config = tiny_config(tiny_data, Path("unused"), micro_batch=micro_batch)
    plan = plan_batches(config, world)
    for position in (0, 12, 552, 5520):  # 552 crosses the end of an epoch
        alone = torch.cat([x for x, _ in sequences.micro_batches(position, BatchPlan(12, 12, 12, 1), 0)])
        ranks = [sequences.micro_batches(position, plan, rank) for rank in range(world)]
        assert all(len(batches) == plan.accumulation for batches in ranks)
        assert torch.equal(torch.cat([x for batches in ranks for x, _ in batches]), alone)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_an_epoch_holds_each_sequence_once_over_all_ranks(tiny_data: Path, world: int) -> None:
    sequences = TrainingSequences(open_split(tiny_data, "train"), 32, seed=1)
    per_rank = 4 // world
    seen: list[int] = []
    for position in range(0, 2 * sequences.count, 4):
        for rank in range(world):
            seen += sequences.ids_at(position + rank * per_rank, per_rank)
    first, second = seen[: sequences.count], seen[sequences.count : 2 * sequences.count]
    assert sorted(first) == sorted(second) == list(range(sequences.count))
    assert first != second


@pytest.mark.parametrize("world", [1, 2, 4])
def test_skipped_sequences_are_replaced_where_they_stood(tiny_data: Path, world: int) -> None:
    """Two neighbours, one alone, and the last one, whose follower (the first) is skipped too."""
    stream, per_rank = open_split(tiny_data, "train"), 4 // world
    whole = TrainingSequences(stream, 32, seed=1)
    last = whole.count - 1
    stand_ins = {5: 7, 6: 7, 100: 101, last: 1, 0: 1}
    sequences = TrainingSequences(stream, 32, seed=1, skip_sequences=(100, 6, 0, 5, last, 5))
    seen = [
        sequence
        for rank_start in range(0, whole.count, per_rank)
        for sequence in sequences.ids_at(rank_start, per_rank)
    ]
    assert seen == [stand_ins.get(sequence, sequence) for sequence in whole.ids_at(0, len(seen))]
    assert set(seen[: whole.count]) == {*range(whole.count)} - {*stand_ins}
    position = seen.index(101)
    ((inputs_BT, _),) = sequences.micro_batches(position, BatchPlan(1, 1, 1, 1), rank=0)
    assert torch.equal(inputs_BT[0], torch.from_numpy(stream.read(101 * 32, 102 * 32).astype(np.int64)))


def test_skipped_sequences_must_exist_and_not_be_all(tiny_data: Path) -> None:
    stream = open_split(tiny_data, "train")
    with pytest.raises(
        InputError, match=r"--data.skip-sequences -1 562: the training split has 562 sequences, numbered from"
    ):
        TrainingSequences(stream, 32, seed=1, skip_sequences=(562, 3, -1))
    with pytest.raises(InputError, match=r"--data.skip-sequences names all 2 sequences"):
        TrainingSequences(stream, 8000, seed=1, skip_sequences=(1, 0))
    assert set(TrainingSequences(stream, 8000, seed=1, skip_sequences=(1,)).ids_at(0, 10)) == {0}


@pytest.mark.parametrize(
    ("micro_batch", "world", "message"),
    [
        (6, 5, r"12 sequences of 32, which 5 processes .* try 4 processes, .* 320 or 480"),
        (5, 1, r"micro_batch 5 x seq_len 32 x 1 ranks = 160; try --train.micro-batch 4"),
    ],
)
def test_batches_that_do_not_divide_are_refused_with_numbers_that_do(
    tiny_data: Path, micro_batch: int, world: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        plan_batches(tiny_config(tiny_data, Path("unused"), micro_batch=micro_batch), world)


def test_a_split_shorter_than_one_sequence_is_refused(tiny_data: Path) -> None:
    with pytest.raises(InputError, match=r"2000 tokens, less than one sequence of --train.seq-len 2000"):
        TrainingSequences(open_split(tiny_data, "val"), 2000, seed=1)


@pytest.mark.parametrize("micro_batch", [1, 3])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_sequence_has_its_seed_of_dropout_in_every_world(tiny_data: Path, world: int, micro_batch: int) -> None:
    sequences = TrainingSequences(open_split(tiny_data, "train"), 32, seed=1, has_dropout=True)
    plan = plan_batches(tiny_config(tiny_data, Path("unused"), micro_batch=micro_batch), world)
    for position in (0, 552, 12 * 10**12):
        batches = [batch for rank in range(world) for batch in sequences.micro_batches(position, plan, rank)]
        assert all(seeds_B.shape == inputs_BT.shape[:1] for inputs_BT, _, seeds_B in batches)
        assert torch.equal(torch.cat([seeds_B for *_, seeds_B in batches]), dropout_seeds(1, position, 12))


def test_seeds_of_dropout_differ_between_sequences_epochs_and_runs(tiny_data: Path) -> None:
    runs = [set(dropout_seeds(seed, 0, 2000).tolist()) for seed in (0, 1, 2, 2**32, 2**63 - 1)]
    assert len(set.union(*runs)) == 5 * 2000
    assert dropout_seeds(0, 1, 1).tolist() == [6238072747940578789], "they are part of a run"
    sequences = TrainingSequences(open_split(tiny_data, "train"), 32, seed=1, has_dropout=True)
    ids, count = sequences.ids_at(0, 2 * sequences.count), sequences.count
    again = ids.index(ids[3], count)
    one = BatchPlan(1, 1, 1, 1)
    ((first_BT, _, first_B),), ((second_BT, _, second_B),) = (
        sequences.micro_batches(position, one, 0) for position in (3, again)
    )
    assert torch.equal(first_BT, second_BT) and not torch.equal(first_B, second_B)


def test_what_cannot_be_read_is_replaced_by_a_batch_of_the_same_form(tiny_data: Path) -> None:
    for has_dropout in (False, True):
        sequences = TrainingSequences(open_split(tiny_data, "train"), 32, seed=7, has_dropout=has_dropout)
        (batch,) = sequences.micro_batches(0, BatchPlan(3, 3, 3, 1), 0)
        zeros = zero_batch((3, 32), has_dropout=has_dropout)
        assert [(t.shape, t.dtype) for t in zeros] == [(t.shape, t.dtype) for t in batch]
        assert not any(tensor.any() for tensor in zeros) and len({t.data_ptr() for t in zeros}) == len(zeros)


def same_batches(left: list[Batch], right: list[Batch]) -> bool:
    pairs = zip(left, right, strict=True)
    return all(torch.equal(a, b) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True))


def test_reading_ahead_changes_nothing(tiny_data: Path) -> None:
    """Positions in order, then jumps back and forth, since the loop owns the position."""
    sequences = TrainingSequences(open_split(tiny_data, "train"), 32, seed=7, has_dropout=True)
    plan = BatchPlan(12, 6, 3, 2)
    batches = Prefetcher(sequences, plan, rank=1, device=CPU)
    for position in (0, 12, 24, 240, 252, 0, 12, 12):
        assert same_batches(batches.take(position), sequences.micro_batches(position, plan, rank=1))
    batches.close()


def test_the_next_step_is_read_while_this_one_computes(tiny_data: Path) -> None:
    sequences, plan = TrainingSequences(open_split(tiny_data, "train"), 32, seed=7), BatchPlan(12, 12, 12, 1)
    read, was_read = sequences.micro_batches, threading.Event()

    def recording_read(position: int, plan: BatchPlan, rank: int) -> list[Batch]:
        result = read(position, plan, rank)
        if position == 12:
            was_read.set()
        return result

    sequences.micro_batches = recording_read  # type: ignore[method-assign]
    batches = Prefetcher(sequences, plan, rank=0, device=CPU)
    batches.take(0)
    assert was_read.wait(10), "nobody has asked for the sequences at position 12 yet"
    batches.close()


def test_an_error_while_reading_ahead_reaches_the_loop(tiny_data: Path) -> None:
    sequences, plan = TrainingSequences(open_split(tiny_data, "train"), 32, seed=7), BatchPlan(12, 12, 12, 1)

    def failing(ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        raise OSError("stale file handle")

    sequences.read = failing  # type: ignore[method-assign]
    batches = Prefetcher(sequences, plan, rank=0, device=CPU)
    with pytest.raises(OSError, match="stale file handle"):
        batches.take(0)
    batches.close()
