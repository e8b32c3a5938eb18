"""A batch that grows: the same run in every layout and after every stop, with the numbers of each step's own size."""

import itertools
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from data_prep.manifest import open_split, read_manifest
from model.checkpoint import load_model
from tests.distributed.test_exact import AUTO, FSDP, HSDP, assert_close_losses, contents, cut_back, train_until_stopped
from tests.distributed.test_modes import ONE, Layout, run_here
from tests.helpers.groups import run_on_ranks
from tests.helpers.runs import assert_same_tensors, curve, final_tensors, rows, status, tiny_config, with_save
from train.config import Config, with_vocabulary
from train.data import TrainingSequences
from train.processes.group import ProcessGroup

SIZES = [12] * 6 + [24] * 4 + [36] * 4  # sequences of each step
STARTS = [0, *itertools.accumulate(SIZES)]
LAYOUTS = (ONE, Layout("ddp", 2), Layout("fsdp", 2), Layout("fsdp", 3))
RESUMED = (Layout("ddp", 2), Layout("fsdp", 2))
AROUND = (4, 6, 8)  # steps done, before, at and after a border


def configured(layout: Layout, data: Path, run_dir: Path) -> Config:
    stages = ("6:768", "10:1152")
    config = with_save(tiny_config(data, run_dir, steps=len(SIZES), batch_stages=stages, micro_batch=4), every=2)
    config = with_vocabulary(config, read_manifest(data).vocab_size)
    return replace(config, parallel=replace(config.parallel, mode=layout.mode, shard_size=layout.shard_size))


def train_all(group: ProcessGroup, data: Path, folder: Path) -> None:
    for layout in [layout for layout in LAYOUTS if layout.world == group.world]:
        config = configured(layout, data, folder / str(layout))
        if layout.world == 2:
            config = replace(config, train=replace(config.train, micro_batch=6))
        run_here(group, config)
        for step in AROUND if layout in RESUMED else ():
            resumed = replace(with_save(config, every=100), run_dir=folder / f"{layout}_from_{step}")
            group.on_main(partial(cut_back, folder / str(layout), resumed.directory, step=step))
            run_here(group, resumed)


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    for world in (1, 2, 3):
        run_on_ranks(world, train_all, tiny_data, folder)
    return folder


def test_losses_gradients_and_tokens_are_those_of_each_steps_own_sequences(trained: Path, tiny_data: Path) -> None:
    run_dir = trained / str(ONE)
    sequences = TrainingSequences(open_split(tiny_data, "train"), 32, 1337)
    vocab_size = read_manifest(tiny_data).vocab_size  # without padding
    train_rows = [row for row in rows(run_dir) if "loss" in row]
    assert [row["tokens"] for row in train_rows] == [32 * start for start in STARTS[1:]]
    assert {row["flops"] / row["tokens"] for row in train_rows} == {train_rows[0]["flops"] / 384}
    for step, row in enumerate(train_rows):
        assert row["tokens_per_second"] * row["step_seconds"] == pytest.approx(32 * SIZES[step], rel=0.02)
        if step and step % 2 == 0:  # weights are saved
            inputs_BT, targets_BT = sequences.read(sequences.ids_at(STARTS[step], SIZES[step]))
            model = load_model(f"{run_dir}@{step}").model
            loss = F.cross_entropy(model(inputs_BT)[..., :vocab_size].flatten(0, 1), targets_BT.flatten())
            loss.backward()
            norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()
            assert row["loss"] == pytest.approx(loss.item(), abs=2e-6), step
            assert row["grad_norm"] == pytest.approx(norm, rel=1e-4), step
    left = [row["eta_seconds"] * row["tokens_per_second"] for row in train_rows]
    assert left == pytest.approx([32 * (STARTS[-1] - start) for start in STARTS[1:]], rel=0.02, abs=50)


@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
def test_every_layout_trains_the_same_run(trained: Path, layout: Layout) -> None:
    assert_close_losses(trained / str(layout), trained / str(ONE))


@pytest.mark.parametrize("layout", RESUMED, ids=str)
@pytest.mark.parametrize("step", AROUND)
def test_a_run_resumed_around_a_border_is_bitwise_the_same(trained: Path, layout: Layout, step: int) -> None:
    resumed = trained / f"{layout}_from_{step}"
    assert f"step_{step:08d}" in (resumed / "log.txt").read_text()
    assert curve(resumed) == curve(trained / str(layout))
    assert_same_tensors(final_tensors(resumed), final_tensors(trained / str(layout)))


def test_a_run_moved_between_layouts_reads_each_sequence_once(trained: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Each start has another number of processes or another mode, and ends by a signal to one rank."""
    config = configured(ONE, tiny_data, tmp_path / "run")
    config = replace(config, train=replace(config.train, micro_batch=1))
    read: dict[int, list[bytes]] = {}
    starts = ((1, AUTO), (2, FSDP), (4, HSDP), (3, AUTO), (1, AUTO))
    for attempt, (world, parallel) in enumerate(starts, start=1):
        num_steps = 3 if attempt < len(starts) else len(SIZES)
        for steps in zip(
            *run_on_ranks(world, train_until_stopped, replace(config, parallel=parallel), num_steps), strict=True
        ):
            (position,) = {position for position, _ in steps}
            assert position not in read
            read[position] = [content for _, own in steps for content in own]
    assert status(config.directory) == {"state": "done", "step": len(SIZES), "reason": None, "attempt": len(starts)}
    assert list(read) == STARTS[:-1] and [len(own) for own in read.values()] == SIZES
    sequences = TrainingSequences(open_split(tiny_data, "train"), 32, config.seed)
    number = {content: index for index, content in enumerate(contents(*sequences.read(list(range(sequences.count)))))}
    assert [number[content] for own in read.values() for content in own] == sequences.ids_at(0, STARTS[-1])
    assert_close_losses(config.directory, trained / str(ONE))
