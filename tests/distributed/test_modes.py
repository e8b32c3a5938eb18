"""DDP, FSDP2 and HSDP train the same model, and go on from each other's checkpoints.

One group of processes per world size runs all cases of that size. test_exact.py has one run that passes through every
layout, those of three processes included.
"""

import itertools
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from benchmarks.steps import opened_run
from data_prep.manifest import read_manifest
from model.gpt import GPT, build_model
from tests.distributed.test_exact import assert_close_losses, cut_back
from tests.helpers.groups import leaving_no_group, run_on_ranks
from tests.helpers.runs import (
    assert_same_tensors,
    curve,
    final_tensors,
    tensors_of,
    tiny_config,
    validations,
    with_save,
)
from train.config import Config, with_vocabulary
from train.loop import Run, accumulate_gradients, read_result, take_step
from train.main import run
from train.parallel.apply import local
from train.processes.group import ProcessGroup
from train.run.checkpoints import Progress, checkpoint_tensors
from train.run.resume import SoundCheckpoint, load, open_together

pytestmark = pytest.mark.timeout(600)  # one group of processes runs all its cases before the first test
STEPS = 50
SAVED, MORE_STEPS = 15, 6  # the learning rate is high here, so that state which was not restored would show


@dataclass(frozen=True)
class Layout:
    """A parallel mode and a number of processes."""

    mode: Literal["none", "ddp", "fsdp", "hsdp"]
    world: int
    shard_size: int | None = None

    def __str__(self) -> str:
        return f"{self.mode}{self.world}"


ONE = Layout("none", 1)
LAYOUTS = (
    ONE,
    Layout("fsdp", 1),
    *(Layout("ddp", world) for world in (2, 4)),
    *(Layout("fsdp", world) for world in (2, 4)),
    Layout("hsdp", 4, shard_size=2),
)
WITH_THREE = (*LAYOUTS, Layout("ddp", 3), Layout("fsdp", 3))
BITWISE = {"none1", "fsdp1", "ddp2", "fsdp2"}  # 12 sequences as 2 x 6: these add in one order
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=str)


def configured(layout: Layout, data: Path, run_dir: Path, **train: Any) -> Config:
    config = with_save(tiny_config(data, run_dir, steps=STEPS, **train), every=15)
    config = with_vocabulary(config, read_manifest(data).vocab_size)
    return replace(config, parallel=replace(config.parallel, mode=layout.mode, shard_size=layout.shard_size))


def train_all(group: ProcessGroup, data: Path, folder: Path) -> None:
    """Train each layout of this world once without a stop, and once from its checkpoint of step 30."""
    for layout in [layout for layout in LAYOUTS if layout.world == group.world]:
        run_here(group, configured(layout, data, folder / str(layout)))
        resumed = configured(layout, data, folder / f"{layout}_resumed")
        group.on_main(partial(cut_back, folder / str(layout), resumed.directory, step=30))
        run_here(group, resumed)


def run_here(group: ProcessGroup, config: Config) -> None:
    with leaving_no_group(group):
        run(config, group)


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("modes")
    for world in (1, 2, 4):
        run_on_ranks(world, train_all, tiny_data, folder)
    return folder


@every_layout
def test_every_layout_trains_the_same_run(trained: Path, layout: Layout) -> None:
    assert len(curve(trained / str(layout))) == STEPS
    assert_close_losses(trained / str(layout), trained / str(ONE))
    assert [step for step, *_ in validations(trained / str(layout))] == [0, 25, 50]
    assert f"\nparallel  {layout.mode}" in (trained / str(layout) / "log.txt").read_text()


@pytest.mark.parametrize("name", sorted(BITWISE - {str(ONE)}))
def test_runs_that_add_in_the_same_order_are_bitwise_equal(trained: Path, name: str) -> None:
    one = curve(trained / str(ONE))
    assert sum(norm > 0.3 for _, _, norm, _ in one) > 25, "clipping must be active in many steps"
    assert curve(trained / name) == one
    assert_same_tensors(final_tensors(trained / name), final_tensors(trained / str(ONE)))


@every_layout
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(trained: Path, layout: Layout) -> None:
    whole, resumed = trained / str(layout), trained / f"{layout}_resumed"
    assert "step_00000030" in (resumed / "log.txt").read_text()
    assert curve(resumed) == curve(whole)
    assert validations(resumed) == validations(whole)
    assert_same_tensors(final_tensors(resumed), final_tensors(whole))


# A chain through all layouts, and each of them to and from one process.
PAIRS = [
    (source, layout)
    for source, layout in itertools.product(LAYOUTS, LAYOUTS)
    if ONE in (source, layout) or (source, layout) in itertools.pairwise(LAYOUTS)
]
Continued = dict[tuple[Layout, Layout], list[tuple[float, float]]]


def checkpoint_of(trained: Path, layout: Layout) -> Path:
    return trained / str(layout) / "checkpoints" / f"step_{SAVED:08d}"


def continue_all(group: ProcessGroup, data: Path, trained: Path) -> Continued:
    """Read each pair's checkpoint in its second layout, if of this world, and return the next losses and norms.

    Every rank's tensors must be bitwise its part of those that one process without a process group reads.
    """
    continued = {}
    for layout in [layout for layout in LAYOUTS if layout.world == group.world]:
        config = configured(layout, data, trained / f"{layout}_continued")
        with leaving_no_group(group), opened_run(config, group) as (run, _):
            for source in [source for source, target in PAIRS if target == layout]:
                checkpoint = open_together(checkpoint_of(trained, source), group)
                assert isinstance(checkpoint, SoundCheckpoint)
                state = load(checkpoint, model=run.state.model, optimizer=run.state.optimizer, group=group)
                tensors = checkpoint_tensors(run.state.model, run.state.optimizer)
                assert_parts_of(torch.load(trained / f"{source}.pt", mmap=True), tensors)
                run.state.progress = Progress(**state["progress"])
                continued[source, layout] = [loss_and_norm(run) for _ in range(MORE_STEPS)]
    return continued


def loss_and_norm(run: Run) -> tuple[float, float]:
    """Take a step and return its loss and norm as metrics.jsonl would have them."""
    result = take_step(run)
    read_result(run, result)
    run.state.progress = result.progress
    return result.numbers[0].item(), result.numbers[1].item()


def assert_parts_of(whole: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Compare each tensor with this rank's part of the whole one, without communication."""
    assert whole.keys() == tensors.keys()
    parts = {
        name: distribute_tensor(whole[name], tensor.device_mesh, tensor.placements, src_data_rank=None).to_local()
        if isinstance(tensor, DTensor)
        else whole[name]
        for name, tensor in tensors.items()
    }
    assert_same_tensors(parts, {name: local(tensor) for name, tensor in tensors.items()})


@pytest.fixture(scope="module")
def continued(trained: Path, tiny_data: Path) -> Continued:
    for layout in LAYOUTS:
        torch.save(tensors_of(checkpoint_of(trained, layout)), trained / f"{layout}.pt")
    results: Continued = {}
    for world in (1, 2, 4):
        results.update(run_on_ranks(world, continue_all, tiny_data, trained)[0])
    return results


@pytest.mark.parametrize(("source", "layout"), PAIRS, ids=str)
def test_a_checkpoint_continues_in_another_layout(
    trained: Path, continued: Continued, source: Layout, layout: Layout
) -> None:
    uninterrupted = [(loss, norm) for _, loss, norm, _ in curve(trained / str(source))[SAVED : SAVED + MORE_STEPS]]
    if source == layout or {str(source), str(layout)} <= BITWISE:
        assert continued[source, layout] == uninterrupted
    pairs = zip(continued[source, layout], uninterrupted, strict=True)
    differences = [abs(loss - expected) for (loss, _), (expected, _) in pairs]
    assert differences[0] <= 2e-6 and max(differences) <= 4e-6


def first_gradients(group: ProcessGroup, data: Path, folder: Path) -> dict[str, dict[str, Tensor]]:
    """Return the whole gradients of the first step by layout and name, on rank 0, after comparing initial weights."""
    gradients = {}
    for layout in [layout for layout in WITH_THREE if layout.world == group.world]:
        for micro_batch in (6 if layout.world < 3 else 12 // layout.world, 1):
            config = configured(layout, data, folder / f"{layout}_gradients_{micro_batch}", micro_batch=micro_batch)
            with leaving_no_group(group), opened_run(config, group) as (run, _):
                model = run.state.model
                one_process = build_model(config.model, seed=config.seed).state_dict()
                assert_parts_of(dict(one_process), dict(model.state_dict()))
                accumulate_gradients(run, run.data.batches.take(0), run.token_weight(0))
                gradients[f"{layout}/{micro_batch}"] = {
                    name: gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
                    for name, parameter in model.named_parameters()
                    if (gradient := parameter.grad) is not None
                }
                assert isinstance(model, GPT)
                assert model.lm_head.weight is model.transformer["wte"].weight, "untied"
    return gradients if group.is_main else {}


def test_initial_weights_and_gradients_are_the_same_in_every_layout(tiny_data: Path, tmp_path: Path) -> None:
    """Gradients are compared tensor by tensor, with one micro-batch on each rank and with single sequences."""
    layouts = {}
    for world in (1, 2, 3, 4):
        layouts.update(run_on_ranks(world, first_gradients, tiny_data, tmp_path)[0])
    assert len(layouts) == 2 * len(WITH_THREE)
    expected = layouts.pop(f"{ONE}/6")
    assert len(expected) == 28
    for layout, gradients in layouts.items():
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            allowed = 0.0 if layout in {f"{name}/6" for name in BITWISE} else 2e-6 * expected[name].abs().max().item()
            assert (gradient - expected[name]).abs().max() <= allowed, f"{layout}: {name}"
