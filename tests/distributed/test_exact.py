"""The same run at every world size and after every stop. test_modes.py varies how the model is spread."""

import math
import os
import shutil
import signal
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data_prep.manifest import open_split
from model.checkpoint import list_checkpoints
from tests.helpers.groups import leaving_no_group, run_on_ranks, start_on_ranks
from tests.helpers.runs import assert_same_tensors, curve, final_tensors, losses, status, tiny_config, validations
from train.config import Config, ParallelConfig
from train.data import Prefetcher, TrainingSequences
from train.main import run
from train.processes.group import ProcessGroup


def train_all(group: ProcessGroup, configs: list[Config]) -> None:
    for config in configs:
        run(config, group)


def cut_back(source: Path, copy: Path, step: int) -> None:
    """As a kill between two checkpoints leaves it: later metrics rows are there, later checkpoints are not."""
    shutil.copytree(source, copy)
    for checkpoint in list_checkpoints(copy):
        if int(checkpoint.name.removeprefix("step_")) > step:
            shutil.rmtree(checkpoint)


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RUNS/w1, whole."""
    folder = tmp_path_factory.mktemp("exact")
    run_on_ranks(1, train_all, [tiny_config(tiny_data, folder / "w1")])
    return folder


ALSO = pytest.mark.long(reason="50 steps of several micro-batches; test_modes.py has their gradients in `make test`")


@pytest.mark.parametrize("world", [1, *(pytest.param(world, marks=ALSO) for world in (2, 3, 4))])
def test_accumulation_is_the_same_run(trained: Path, tiny_data: Path, tmp_path: Path, world: int) -> None:
    """micro_batch 1: 12, 6, 4 and 3 micro-batches a step on each rank, gradients reduced after the last."""
    run_on_ranks(world, train_all, [tiny_config(tiny_data, tmp_path / "accumulating", micro_batch=1)])
    difference = (losses(tmp_path / "accumulating") - losses(trained / "w1")).abs()
    assert difference[0] <= 2e-6
    assert difference[:6].max() <= 4e-6
    assert difference.max() <= 1e-5


def train_until_stopped(group: ProcessGroup, config: Config, num_steps: int) -> list[tuple[int, list[bytes]]]:
    """The run until the last rank, which takes its `num_steps`-th batch, is sent SIGTERM.

    Returns the position of every step this rank trained, and the sequences that it was given for it.
    """
    served: list[tuple[int, list[bytes]]] = []
    take = Prefetcher.take

    def noticed(batches: Prefetcher, position: int) -> list[tuple[Tensor, Tensor]]:
        taken = take(batches, position)
        served.append(
            (position, [content for inputs_BT, targets_BT in taken for content in contents(inputs_BT, targets_BT)])
        )
        if len(served) == num_steps and group.rank == group.world - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return taken

    with pytest.MonkeyPatch.context() as patch, leaving_no_group(group):
        patch.setattr(Prefetcher, "take", noticed)
        run(config, group)
    return served


def contents(inputs_BT: Tensor, targets_BT: Tensor) -> list[bytes]:
    """Each row's sequence of characters, its T + 1 ids as bytes."""
    return [
        bytes([*inputs_T, targets_T[-1]])
        for inputs_T, targets_T in zip(inputs_BT.tolist(), targets_BT.tolist(), strict=True)
    ]


AUTO, FSDP, HSDP = ParallelConfig(), ParallelConfig(mode="fsdp"), ParallelConfig(mode="hsdp", shard_size=2)
Starts = tuple[tuple[int, ParallelConfig], ...]
UP_AND_DOWN: Starts = ((1, AUTO), (2, FSDP), (4, HSDP), (3, AUTO), (1, AUTO))
FROM_EACH_TO_EACH: Starts = (
    *((1, AUTO), (2, FSDP), (3, AUTO), (4, HSDP), (1, FSDP), (3, FSDP), (2, AUTO)),
    *((1, AUTO), (4, FSDP), (2, AUTO), (4, HSDP), (3, FSDP), (1, AUTO)),
)


@pytest.mark.parametrize(
    "starts",
    [
        pytest.param(UP_AND_DOWN, id="up and down"),
        pytest.param(FROM_EACH_TO_EACH, id="each to each", marks=pytest.mark.long(reason="13 starts")),
    ],
)
def test_one_run_in_every_world_in_turn_reads_each_sequence_once(
    trained: Path, tiny_data: Path, tmp_path: Path, starts: Starts
) -> None:
    """The same configuration at each start but for how the model is spread, stopped by a signal to one rank, with more
    processes or fewer."""
    config, whole = tiny_config(tiny_data, tmp_path / "run"), trained / "w1"
    read: dict[int, list[bytes]] = {}
    for attempt, (world, parallel) in enumerate(starts, start=1):
        this = replace(config, parallel=parallel)
        ranks = run_on_ranks(world, train_until_stopped, this, 2 if attempt < len(starts) else 50)
        for steps in zip(*ranks, strict=True):  # the ranks' parts of one step
            (position,) = {position for position, _ in steps}
            assert position not in read, f"trained again, now by {world} processes"
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

    difference = (losses(config.directory) - losses(whole)).abs()
    assert difference[0] <= 2e-6 and difference[:6].max() <= 4e-6 and difference.max() <= 1e-5
    found, wanted = validations(config.directory), validations(whole)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=0, atol=1e-5)


def test_killed_it_goes_on_to_the_bits_of_the_run_that_never_was(
    trained: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """kill -9 of both processes, wherever they are after twenty steps; tests/e2e/test_soak.py aims."""
    config = tiny_config(tiny_data, tmp_path / "run")
    with tempfile.TemporaryDirectory() as folder:
        processes = start_on_ranks(2, folder, train_all, [config])
        metrics = config.directory / "metrics.jsonl"
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < 20:
            time.sleep(0.01)
        for process in processes.processes:
            process.kill()
            process.join()
    assert status(config.directory)["state"] == "running"
    run_on_ranks(2, train_all, [config])
    assert status(config.directory) == {"state": "done", "step": 50, "reason": None, "attempt": 2}
    assert curve(config.directory) == curve(trained / "w1")
    assert_same_tensors(final_tensors(config.directory), final_tensors(trained / "w1"))


def test_the_loss_falls(trained: Path) -> None:
    found = losses(trained / "w1")
    assert abs(found[0] - math.log(33)) < 0.1  # 33 characters, none of them learnt yet
    assert found[-5:].mean() < 2.0
