"""The same run at every number of processes and after every stop. test_modes.py compares the parallel modes."""

import math
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data_prep.manifest import open_split
from model.checkpoint import list_checkpoints
from tests.helpers.groups import kill_on_ranks, leaving_no_group, run_on_ranks
from tests.helpers.runs import assert_same_tensors, curve, final_tensors, losses, status, tiny_config, validations
from train.config import Config, ParallelConfig
from train.data import Batch, Prefetcher, TrainingSequences
from train.main import run
from train.processes.group import ProcessGroup


def train_all(group: ProcessGroup, configs: list[Config]) -> None:
    for config in configs:
        run(config, group)


def cut_back(source: Path, copy: Path, step: int) -> None:
    """Copy a run as a kill after `step` leaves it: later metrics rows exist, later checkpoints do not."""
    shutil.copytree(source, copy)
    for checkpoint in list_checkpoints(copy):
        if int(checkpoint.name.removeprefix("step_")) > step:
            shutil.rmtree(checkpoint)


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process without a stop."""
    folder = tmp_path_factory.mktemp("exact")
    run_on_ranks(1, train_all, [tiny_config(tiny_data, folder / "w1")])
    return folder / "w1"


def assert_close_losses(run_dir: Path, reference: Path) -> None:
    """The tolerances of a run whose sums are added in another order."""
    difference = (losses(run_dir) - losses(reference)).abs()
    assert difference[0] <= 2e-6 and difference[:6].max() <= 4e-6 and difference.max() <= 1e-5
    torch.testing.assert_close(
        torch.tensor(validations(run_dir)), torch.tensor(validations(reference)), rtol=0, atol=1e-5
    )


THREE_ARE_LONG = pytest.mark.long(
    reason="50 steps by three processes; test_modes.py has their gradients in `make test`"
)


@pytest.mark.parametrize("world", [1, pytest.param(3, marks=THREE_ARE_LONG)])
def test_accumulation_is_the_same_run(trained: Path, tiny_data: Path, tmp_path: Path, world: int) -> None:
    """A micro-batch of 1 makes 12 or 4 micro-batches a step, with gradients reduced after the last."""
    run_on_ranks(world, train_all, [tiny_config(tiny_data, tmp_path / "accumulating", micro_batch=1)])
    assert_close_losses(tmp_path / "accumulating", trained)


def train_until_stopped(group: ProcessGroup, config: Config, num_steps: int) -> list[tuple[int, list[bytes]]]:
    """Train until the last rank takes its `num_steps`-th batch and is sent SIGTERM.

    Return the position of every step that this rank trained, and the sequences that it read for the step.
    """
    served: list[tuple[int, list[bytes]]] = []
    take = Prefetcher.take

    def recording_take(batches: Prefetcher, position: int) -> list[Batch]:
        batch = take(batches, position)
        served.append((position, [content for tensors in batch for content in contents(*tensors)]))
        if len(served) == num_steps and group.rank == group.world - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch

    with pytest.MonkeyPatch.context() as patch, leaving_no_group(group):
        patch.setattr(Prefetcher, "take", recording_take)
        run(config, group)
    return served


def contents(inputs_BT: Tensor, targets_BT: Tensor) -> list[bytes]:
    """Return each row's T + 1 ids as bytes."""
    return [
        bytes([*inputs_T, targets_T[-1]])
        for inputs_T, targets_T in zip(inputs_BT.tolist(), targets_BT.tolist(), strict=True)
    ]


AUTO, FSDP, HSDP = ParallelConfig(), ParallelConfig(mode="fsdp"), ParallelConfig(mode="hsdp", shard_size=2)
Starts = tuple[tuple[int, ParallelConfig], ...]
UP_AND_DOWN: Starts = ((1, AUTO), (2, FSDP), (4, HSDP), (3, AUTO), (1, AUTO))
EVERY_LAYOUT: Starts = (
    *((1, AUTO), (2, FSDP), (3, AUTO), (4, HSDP), (1, FSDP), (3, FSDP), (2, AUTO)),
    *((1, AUTO), (4, FSDP), (2, AUTO), (4, HSDP), (3, FSDP), (1, AUTO)),
)


@pytest.mark.parametrize(
    "starts",
    [
        pytest.param(UP_AND_DOWN, id="up and down"),
        pytest.param(EVERY_LAYOUT, id="every layout", marks=pytest.mark.long(reason="13 starts")),
    ],
)
def test_a_run_moved_between_layouts_reads_each_sequence_once(
    trained: Path, tiny_data: Path, tmp_path: Path, starts: Starts
) -> None:
    """Each start has another number of processes or another mode, and ends by a signal to one rank."""
    config = tiny_config(tiny_data, tmp_path / "run")
    read: dict[int, list[bytes]] = {}
    for attempt, (world, parallel) in enumerate(starts, start=1):
        num_steps = 2 if attempt < len(starts) else 50
        ranks = run_on_ranks(world, train_until_stopped, replace(config, parallel=parallel), num_steps)
        for steps in zip(*ranks, strict=True):  # the ranks' parts of one step
            (position,) = {position for position, _ in steps}
            assert position not in read, f"{world} processes trained it again"
            read[position] = [content for _, sequences in steps for content in sequences]
    assert status(config.directory) == {"state": "done", "step": 50, "reason": None, "attempt": len(starts)}
    assert list(read) == list(range(0, 600, 12))

    sequences = TrainingSequences(open_split(tiny_data, "train"), 32, config.seed)
    number = {
        content: sequence for sequence, content in enumerate(contents(*sequences.read(list(range(sequences.count)))))
    }
    assert len(number) == sequences.count == 562, "sequences must be told apart by their text"
    order = [number[content] for position in read for content in read[position]]
    assert sorted(order[:562]) == list(range(562))
    assert order == sequences.ids_at(0, 600)

    assert_close_losses(config.directory, trained)


def test_a_killed_run_goes_on_bitwise_as_if_it_had_not_been(trained: Path, tiny_data: Path, tmp_path: Path) -> None:
    """kill -9 of both processes somewhere after twenty steps; tests/e2e/test_soak.py aims at chosen moments."""
    config = tiny_config(tiny_data, tmp_path / "run")
    kill_on_ranks(2, config.directory / "metrics.jsonl", b'"lr"', 20, train_all, [config])
    assert status(config.directory)["state"] == "running"
    run_on_ranks(2, train_all, [config])
    assert status(config.directory) == {"state": "done", "step": 50, "reason": None, "attempt": 2}
    assert curve(config.directory) == curve(trained)
    assert_same_tensors(final_tensors(config.directory), final_tensors(trained))


def test_the_loss_falls(trained: Path) -> None:
    curve_losses = losses(trained)
    assert abs(curve_losses[0] - math.log(33)) < 0.1  # 33 characters, none of them learnt yet
    assert curve_losses[-5:].mean() < 2.0


def test_a_longer_list_of_skipped_sequences_changes_only_later_steps(tiny_data: Path, tmp_path: Path) -> None:
    """One sequence of step 3 is skipped from the start, one of step 15 only after the resume at step 10."""
    alone = ProcessGroup(0, 1, torch.device("cpu"))
    whole, resumed = (tiny_config(tiny_data, tmp_path / name, steps=20) for name in ("whole", "resumed"))
    order = TrainingSequences(open_split(tiny_data, "train"), 32, whole.seed)
    early, late = order.ids_at(2 * 12 + 1, 1)[0], order.ids_at(14 * 12 + 5, 1)[0]
    run(replace(whole, data=replace(whole.data, skip_sequences=(early,))), alone)
    cut_back(whole.directory, resumed.directory, step=10)
    run(replace(resumed, data=replace(resumed.data, skip_sequences=(early, late))), alone)
    log = (resumed.directory / "log.txt").read_text()
    assert "continuing from" in log and "training tokens, 2 sequences left out, vocabulary" in log
    before, after = curve(whole.directory), curve(resumed.directory)
    assert before[:14] == after[:14]
    assert all(ours[1] != theirs[1] for ours, theirs in zip(before[14:], after[14:], strict=True))
