"""DDP, FSDP2 and HSDP train the same model, and go on from each other's checkpoints.

One group of processes per world size runs every case of it.
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
from tests.distributed.test_exact import cut_back
from tests.helpers.groups import leaving_no_group, run_on_ranks
from tests.helpers.runs import (
    assert_same_tensors,
    curve,
    final_tensors,
    losses,
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
from train.run.resume import load

pytestmark = pytest.mark.timeout(600)  # one group of processes runs all its cases before the first test
STEPS = 50
SAVED, GOES_ON = 15, 6  # the learning rate is high there: what was not restored would show


@dataclass(frozen=True)
class Case:
    """A layout by name: mode and number of processes."""

    mode: Literal["none", "ddp", "fsdp", "hsdp"]
    world: int
    shard_size: int | None = None

    def __str__(self) -> str:
        return f"{self.mode}{self.world}"


ONE = Case("none", 1)
CASES = (
    ONE,
    Case("fsdp", 1),
    *(Case("ddp", world) for world in (2, 3, 4)),
    *(Case("fsdp", world) for world in (2, 3, 4)),
    Case("hsdp", 4, shard_size=2),
)
WORLDS = (1, 2, 3, 4)
OF_THREE = [case for case in CASES if case.world == 3]
THREE_IS_LONG = pytest.mark.long(reason="three processes; test_exact.py has three in `make test`")
ALL_CASES = [pytest.param(case, marks=[THREE_IS_LONG] if case in OF_THREE else []) for case in CASES]
SAME = {"none1", "fsdp1", "ddp2", "fsdp2"}  # 12 sequences as 2 x 6: what is added up, is added in one order


def configured(case: Case, data: Path, run_dir: Path, **train: Any) -> Config:
    config = with_save(tiny_config(data, run_dir, steps=STEPS, **train), every=15)
    config = with_vocabulary(config, read_manifest(data).vocab_size)
    return replace(config, parallel=replace(config.parallel, mode=case.mode, shard_size=case.shard_size))


def train_all(group: ProcessGroup, data: Path, folder: Path) -> None:
    """Each case of this world: a whole run, and one that lost all after step 30 and went on."""
    for case in [case for case in CASES if case.world == group.world]:
        run_here(group, configured(case, data, folder / str(case)))
        again = configured(case, data, folder / f"{case}_resumed")
        group.on_main(partial(cut_back, folder / str(case), again.directory, step=30))
        run_here(group, again)


def continue_all(
    group: ProcessGroup, data: Path, folder: Path, pairs: list[tuple[Case, Case]]
) -> dict[str, list[tuple[float, float]]]:
    """Each pair's checkpoint of the first read in the second, of this world, and trained on: losses and norms by names.

    What was read is, on each rank, bit for bit its part of what one process without a process group reads.
    """
    found = {}
    for case in [case for case in CASES if case.world == group.world]:
        config = configured(case, data, folder / f"{case}_continued")
        with leaving_no_group(group), opened_run(config, group) as (this, _):
            for source in [source for source, other in pairs if other == case]:
                checkpoint = folder / str(source) / "checkpoints" / f"step_{SAVED:08d}"
                state = load(checkpoint, model=this.state.model, optimizer=this.state.optimizer, group=group)
                read = checkpoint_tensors(this.state.model, this.state.optimizer)
                assert_parts_of(torch.load(folder / f"{source}.pt", mmap=True), read)
                this.state.progress = Progress(**state["progress"])
                found[f"{source} in {case}"] = [loss_and_norm(this) for _ in range(GOES_ON)]
    return found


def loss_and_norm(this: Run) -> tuple[float, float]:
    """Of the next step, as metrics.jsonl would have them."""
    report = take_step(this)
    read_result(this, report)
    this.state.progress = report.progress
    return report.numbers[0].item(), report.numbers[1].item()


def assert_parts_of(wanted: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Each tensor is this rank's part of the whole one of its name; without a word to the other ranks."""
    parts = {
        name: distribute_tensor(wanted[name], tensor.device_mesh, tensor.placements, src_data_rank=None).to_local()
        if isinstance(tensor, DTensor)
        else wanted[name]
        for name, tensor in found.items()
    }
    assert wanted.keys() == found.keys()
    assert_same_tensors(parts, {name: local(tensor) for name, tensor in found.items()})


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def first_gradients(group: ProcessGroup, data: Path, folder: Path) -> dict[str, dict[str, Tensor]]:
    """Of the first step, whole, by case and name; on rank 0. Before it, initial weights are what they must be."""
    found = {}
    for case in [case for case in CASES if case.world == group.world]:
        for micro_batch in (6 if case.world < 3 else 12 // case.world, 1):
            config = configured(case, data, folder / f"{case}_gradients_{micro_batch}", micro_batch=micro_batch)
            with leaving_no_group(group), opened_run(config, group) as (this, _):
                assert_initial(this)
                accumulate_gradients(this, this.data.batches.take(0), this.state.mean)
                found[f"{case}/{micro_batch}"] = {
                    name: whole(gradient)
                    for name, parameter in this.state.model.named_parameters()
                    if (gradient := parameter.grad) is not None
                }
                assert isinstance(this.state.model, GPT)
                assert this.state.model.lm_head.weight is this.state.model.transformer["wte"].weight, "untied"
    return found if group.is_main else {}


def assert_initial(this: Run) -> None:
    """The weights are, on each rank, its part of those that one process makes of the seed."""
    plain = build_model(this.config.model, seed=this.config.seed).state_dict()
    assert_parts_of(dict(plain), dict(this.state.model.state_dict()))


def run_here(group: ProcessGroup, config: Config) -> None:
    with leaving_no_group(group):
        run(config, group)


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of one, two and four processes."""
    folder = tmp_path_factory.mktemp("modes")
    for world in (1, 2, 4):
        run_on_ranks(world, train_all, tiny_data, folder)
    return folder


@pytest.fixture(scope="module")
def trained_by_three(trained: Path, tiny_data: Path) -> Path:
    """Those of three beside them."""
    run_on_ranks(3, train_all, tiny_data, trained)
    return trained


@pytest.fixture
def runs(request: pytest.FixtureRequest, case: Case) -> Path:
    """Where the case's runs are, and that of one process."""
    folder: Path = request.getfixturevalue("trained_by_three" if case in OF_THREE else "trained")
    return folder


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_every_mode_trains_the_same_run(runs: Path, case: Case) -> None:
    difference = (losses(runs / str(case)) - losses(runs / str(ONE))).abs()
    assert len(difference) == STEPS
    assert difference[0] <= 2e-6
    assert difference[:6].max() <= 4e-6
    assert difference.max() <= 1e-5
    found, wanted = validations(runs / str(case)), validations(runs / str(ONE))
    assert [step for step, *_ in found] == [0, 25, 50]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=0, atol=1e-5)
    assert f"\nparallel  {case.mode}" in (runs / str(case) / "log.txt").read_text()


@pytest.mark.parametrize("name", sorted(SAME - {str(ONE)}))
def test_where_the_order_of_addition_is_the_same_so_are_the_bits(trained: Path, name: str) -> None:
    one = curve(trained / str(ONE))
    assert sum(norm > 0.3 for _, _, norm, _ in one) > 25, "clipping must be active for this to say much"
    assert curve(trained / name) == one
    assert_same_tensors(final_tensors(trained / name), final_tensors(trained / str(ONE)))


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(runs: Path, case: Case) -> None:
    whole, resumed = runs / str(case), runs / f"{case}_resumed"
    assert "step_00000030" in (resumed / "log.txt").read_text()
    assert curve(resumed) == curve(whole)
    assert validations(resumed) == validations(whole)
    assert_same_tensors(final_tensors(resumed), final_tensors(whole))


Continued = dict[str, list[tuple[float, float]]]


def continued_of(trained: Path, data: Path, pairs: list[tuple[Case, Case]]) -> Continued:
    for source in {source for source, _ in pairs}:
        checkpoint = trained / str(source) / "checkpoints" / f"step_{SAVED:08d}"
        torch.save(tensors_of(checkpoint), trained / f"{source}.pt")
    found = {}
    for world in {case.world for _, case in pairs}:
        found.update(run_on_ranks(world, continue_all, data, trained, pairs)[0])
    return found


# Each layout to one process and from it, and to the next in the list; then all others, and those of three.
FEWER = [case for case in CASES if case not in OF_THREE]
FIRST_PAIRS = [
    (source, case)
    for source, case in itertools.product(FEWER, FEWER)
    if ONE in (source, case) or (source, case) in itertools.pairwise(FEWER)
]
OTHER_PAIRS = [pair for pair in itertools.product(CASES, CASES) if pair not in FIRST_PAIRS]


@pytest.fixture(scope="module")
def continued(trained: Path, tiny_data: Path) -> Continued:
    return continued_of(trained, tiny_data, FIRST_PAIRS)


@pytest.fixture(scope="module")
def continued_elsewhere(trained_by_three: Path, tiny_data: Path) -> Continued:
    return continued_of(trained_by_three, tiny_data, OTHER_PAIRS)


@pytest.mark.parametrize(("source", "case"), FIRST_PAIRS, ids=str)
def test_every_checkpoint_goes_on_in_another_mode(
    trained: Path, continued: Continued, source: Case, case: Case
) -> None:
    check_continued(trained, continued, source, case)


@pytest.mark.long(reason="all other pairs of layouts, six steps each")
@pytest.mark.parametrize(("source", "case"), OTHER_PAIRS, ids=str)
def test_every_checkpoint_goes_on_in_every_mode(
    trained: Path, continued_elsewhere: Continued, source: Case, case: Case
) -> None:
    check_continued(trained, continued_elsewhere, source, case)


def check_continued(trained: Path, continued: Continued, source: Case, case: Case) -> None:
    wanted = [(loss, norm) for _, loss, norm, _ in curve(trained / str(source))[SAVED : SAVED + GOES_ON]]
    found = continued[f"{source} in {case}"]
    if source == case or {str(source), str(case)} <= SAME:
        assert found == wanted
    differences = [abs(loss - other) for (loss, _), (other, _) in zip(found, wanted, strict=True)]
    assert differences[0] <= 2e-6 and max(differences) <= 4e-6


def test_gradients_are_the_same_tensor_by_tensor(tiny_data: Path, tmp_path: Path) -> None:
    """After one step, at every world size and mode, in one micro-batch a rank and in sequences one by one."""
    found = {}
    for world in WORLDS:
        found.update(run_on_ranks(world, first_gradients, tiny_data, tmp_path)[0])
    assert len(found) == 2 * len(CASES)
    wanted = found.pop(f"{ONE}/6")
    assert len(wanted) == 28
    for case, gradients in found.items():
        assert gradients.keys() == wanted.keys()
        for name, gradient in gradients.items():
            allowed = 0.0 if case in {f"{name}/6" for name in SAME} else 2e-6 * wanted[name].abs().max().item()
            assert (gradient - wanted[name]).abs().max() <= allowed, f"{case}: {name}"
