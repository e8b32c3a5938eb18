"""The same run at every world size and after every resume: one group per world size runs every case."""

import hashlib
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data_prep.manifest import open_split, read_manifest
from model.gpt import build_model
from model.trained import list_checkpoints
from tests.groups import run_on_ranks
from tests.runs import assert_same_tensors, curve, final_tensors, losses, status, tiny_config, validations
from train.batches import Prefetcher, Windows
from train.config import Config, with_vocabulary
from train.main import run
from train.mesh import Mesh

WORLDS = (1, 2, 3, 4)


def train_and_interrupt(mesh: Mesh, config: Config, accumulating: Config, resumed: Config) -> str:
    """Two whole runs; then a copy of the first that has lost all after step 20. Returns this rank's initial weights."""
    run(config, mesh)
    run(accumulating, mesh)
    if mesh.is_main:
        cut_back(config.directory, resumed.directory, step=20)
    mesh.barrier()
    run(resumed, mesh)
    return initial_hash(with_vocabulary(config, read_manifest(config.data.dir).vocab_size))


def continue_elsewhere(mesh: Mesh, configs: list[Config]) -> None:
    for config in configs:
        run(config, mesh)


def cut_back(source: Path, copy: Path, step: int) -> None:
    """As a kill between two checkpoints leaves it: later metrics rows are there, later checkpoints are not."""
    shutil.copytree(source, copy)
    for checkpoint in list_checkpoints(copy):
        if int(checkpoint.name.removeprefix("step_")) > step:
            shutil.rmtree(checkpoint)


def initial_hash(config: Config) -> str:
    model = build_model(config.model, seed=config.seed)
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode() + parameter.detach().numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """RUNS/wN and RUNS/wN_resumed for every world size, and the distinct initial weights over all ranks."""
    folder = tmp_path_factory.mktemp("exact")
    hashes = set()
    for world in WORLDS:
        config = tiny_config(tiny_data, folder / f"w{world}")
        resumed = tiny_config(tiny_data, folder / f"w{world}_resumed")
        accumulating = tiny_config(tiny_data, folder / f"w{world}_accumulating", micro_batch=1)
        hashes.update(run_on_ranks(world, train_and_interrupt, config, accumulating, resumed))
    return folder, hashes


def test_initial_weights_are_the_same_on_every_rank_of_every_world(trained: tuple[Path, set[str]]) -> None:
    assert len(trained[1]) == 1


def test_two_micro_batches_and_two_ranks_agree_bitwise_over_50_steps(trained: tuple[Path, set[str]]) -> None:
    folder, _ = trained
    one, two = curve(folder / "w1"), curve(folder / "w2")
    assert len(one) == 50
    assert sum(norm > 0.3 for _, _, norm, _ in one) > 25, "clipping must be active for this to say much"
    assert one == two
    assert_same_tensors(final_tensors(folder / "w1"), final_tensors(folder / "w2"))


@pytest.mark.parametrize("world", WORLDS[1:])
def test_every_world_trains_the_same_run(trained: tuple[Path, set[str]], world: int) -> None:
    folder, _ = trained
    difference = (losses(folder / f"w{world}") - losses(folder / "w1")).abs()
    assert difference[0] <= 2e-6
    assert difference[:6].max() <= 4e-6
    assert difference.max() <= 1e-5


@pytest.mark.parametrize("world", WORLDS)
def test_accumulation_is_the_same_run(trained: tuple[Path, set[str]], world: int) -> None:
    """micro_batch 1: 12, 6, 4 and 3 micro-batches a step on each rank, gradients reduced after the last."""
    folder, _ = trained
    difference = (losses(folder / f"w{world}_accumulating") - losses(folder / "w1")).abs()
    assert difference[0] <= 2e-6
    assert difference[:6].max() <= 4e-6
    assert difference.max() <= 1e-5


@pytest.mark.parametrize("world", WORLDS[1:])
def test_validation_does_not_depend_on_the_world(trained: tuple[Path, set[str]], world: int) -> None:
    folder, _ = trained
    one, other = validations(folder / "w1"), validations(folder / f"w{world}")
    assert [step for step, _, _ in one] == [0, 25, 50] == [step for step, _, _ in other]
    torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=0, atol=1e-5)


@pytest.mark.parametrize("world", WORLDS)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(trained: tuple[Path, set[str]], world: int) -> None:
    folder, _ = trained
    whole, resumed = folder / f"w{world}", folder / f"w{world}_resumed"
    assert "continuing from" in (resumed / "log.txt").read_text()
    assert curve(resumed) == curve(whole)
    assert validations(resumed) == validations(whole)
    assert_same_tensors(final_tensors(resumed), final_tensors(whole))


def train_until_stopped(mesh: Mesh, config: Config, num_steps: int) -> list[tuple[int, list[bytes]]]:
    """The run until the last rank, which takes its `num_steps`-th batch, is sent SIGTERM.

    Returns the position of every step this rank trained, and the windows that it was given for it.
    """
    served: list[tuple[int, list[bytes]]] = []
    take = Prefetcher.take

    def noticed(batches: Prefetcher, position: int) -> list[tuple[Tensor, Tensor]]:
        taken = take(batches, position)
        served.append(
            (position, [content for inputs_BT, targets_BT in taken for content in contents(inputs_BT, targets_BT)])
        )
        if len(served) == num_steps and mesh.rank == mesh.world - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return taken

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Prefetcher, "take", noticed)
        run(config, mesh)
    return served


def contents(inputs_BT: Tensor, targets_BT: Tensor) -> list[bytes]:
    """Each row's window of characters, its T + 1 ids as bytes."""
    return [
        bytes([*inputs_T, targets_T[-1]])
        for inputs_T, targets_T in zip(inputs_BT.tolist(), targets_BT.tolist(), strict=True)
    ]


def test_one_run_in_every_world_in_turn_reads_each_window_once(
    trained: tuple[Path, set[str]], tiny_data: Path, tmp_path: Path
) -> None:
    """The same configuration at each start, stopped by a signal to one rank, with more processes or fewer: from each
    world to each other one."""
    config, whole = tiny_config(tiny_data, tmp_path / "run"), trained[0] / "w1"
    worlds = (1, 2, 3, 4, 1, 3, 2, 1, 4, 2, 4, 3, 1)
    read: dict[int, list[bytes]] = {}
    for attempt, world in enumerate(worlds, start=1):
        ranks = run_on_ranks(world, train_until_stopped, config, 2 if attempt < len(worlds) else 50)
        for steps in zip(*ranks, strict=True):  # the ranks' parts of one step
            (position,) = {position for position, _ in steps}
            assert position not in read, f"trained again, now by {world} processes"
            read[position] = [content for _, windows in steps for content in windows]
    assert status(config.directory) == {"state": "done", "step": 50, "reason": None, "attempt": len(worlds)}
    assert list(read) == list(range(0, 600, 12))

    windows = Windows(open_split(tiny_data, "train"), 32, config.seed)
    number = {content: window for window, content in enumerate(contents(*windows.read(list(range(windows.count)))))}
    assert len(number) == windows.count == 562, "windows must be told apart by their text"
    order = [number[content] for position in read for content in read[position]]
    assert sorted(order[:562]) == list(range(562))
    assert order == windows.ids_at(0, 600)

    difference = (losses(config.directory) - losses(whole)).abs()
    assert difference[0] <= 2e-6 and difference[:6].max() <= 4e-6 and difference.max() <= 1e-5
    found, wanted = validations(config.directory), validations(whole)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=0, atol=1e-5)


def test_the_loss_falls(trained: tuple[Path, set[str]]) -> None:
    found = losses(trained[0] / "w1")
    assert abs(found[0] - math.log(33)) < 0.1  # 33 characters, none of them learnt yet
    assert found[-5:].mean() < 2.0
