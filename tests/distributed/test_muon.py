"""Muon in every layout: the same run, resumed and moved bitwise or within its tolerance; what a rank keeps of it."""

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from common.errors import InputError
from data_prep.manifest import read_manifest
from model.config import ModelConfig
from tests.distributed.test_exact import cut_back
from tests.distributed.test_modes import ONE, Layout, run_here
from tests.helpers.groups import kill_on_ranks, run_on_ranks
from tests.helpers.runs import assert_same_tensors, curve, final_tensors, losses, status, tiny_config
from train.config import Config, OptimConfig, with_vocabulary
from train.optim import build_optimizer
from train.parallel.apply import build_loss_model, local
from train.parallel.plan import choose_parallel_plan, saved_bytes
from train.processes.group import ProcessGroup

pytestmark = pytest.mark.timeout(600)
STEPS = 50
MUON = OptimConfig(
    name="muon",
    lr_peak=0.02,
    embedding_lr=1e-2,
    head_lr=5e-3,
    vector_lr=2e-3,
    warmup_steps=5,
    clip_norm=0.3,
    momentum_warmup_steps=20,
)
# Some rows divide by neither 3 nor 4, and one parameter has one element. On two ranks slices are multiples of 16
# elements, since at the ends of others a CPU's kernels round in another way.
MODEL = ModelConfig(
    num_layers=2,
    num_heads=1,
    width=32,
    mlp_width=48,
    mlp="relu2",
    norm="rmsnorm",
    position_embedding="rope",
    qk_norm=True,
    value_residual=True,
    zero_init_projections=True,
    bias=False,
    tie=False,
)
LAYOUTS = (
    *(ONE, Layout("fsdp", 1), Layout("ddp", 2), Layout("fsdp", 2), Layout("ddp", 3)),
    *(Layout("fsdp", 4), Layout("hsdp", 4, shard_size=2)),
)
BITWISE = ("fsdp1", "ddp2", "fsdp2")  # with 12 sequences as 2 x 6, they add in one order


def configured(layout: Layout, data: Path, run_dir: Path) -> Config:
    config = tiny_config(data, run_dir, steps=STEPS)
    config = with_vocabulary(replace(config, model=replace(MODEL, context_len=32), optim=MUON), vocab_size_of(data))
    return replace(config, parallel=replace(config.parallel, mode=layout.mode, shard_size=layout.shard_size))


def vocab_size_of(data: Path) -> int:
    return read_manifest(data).vocab_size


def train_all(group: ProcessGroup, data: Path, folder: Path) -> None:
    """Train each layout of this world without a stop, from its own checkpoint of step 30, and from one process's."""
    for layout in [layout for layout in LAYOUTS if layout.world == group.world]:
        run_here(group, configured(layout, data, folder / str(layout)))
        for source in dict.fromkeys((layout, ONE)):
            moved = configured(layout, data, folder / f"{layout}_from_{source}")
            group.on_main(partial(cut_back, folder / str(source), moved.directory, step=30))
            run_here(group, moved)


def finish_all(group: ProcessGroup, data: Path, folder: Path) -> None:
    """Let one process finish each layout's run from step 30."""
    for layout in LAYOUTS:
        config = configured(ONE, data, folder / f"{ONE}_from_{layout}")
        if not config.directory.exists():
            cut_back(folder / str(layout), config.directory, step=30)
            run_here(group, config)


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("muon")
    for world in (1, 2, 3, 4):
        run_on_ranks(world, train_all, tiny_data, folder)
    run_on_ranks(1, finish_all, tiny_data, folder)
    return folder


def assert_close(run_dir: Path, reference: Path, first: int = 0) -> None:
    """The tolerances of sums in another order. Muon brings small singular values, and their errors, to 1."""
    difference = (losses(run_dir) - losses(reference)).abs()
    assert not difference[:first].any()
    assert difference[first] <= 2e-6 and difference[first : first + 6].max() <= 4e-6 and difference.max() <= 1e-4


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_trains_the_same_run(trained: Path, layout: Layout) -> None:
    assert len(curve(trained / str(layout))) == STEPS
    assert losses(trained / str(layout))[-5:].mean() < 2.2
    assert_close(trained / str(layout), trained / str(ONE))


@pytest.mark.parametrize("name", BITWISE)
def test_runs_that_add_in_the_same_order_are_bitwise_equal(trained: Path, name: str) -> None:
    assert curve(trained / name) == curve(trained / str(ONE))
    assert_same_tensors(final_tensors(trained / name), final_tensors(trained / str(ONE)))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(trained: Path, layout: Layout) -> None:
    resumed = trained / f"{layout}_from_{layout}"
    assert "step_00000030" in (resumed / "log.txt").read_text()
    assert curve(resumed) == curve(trained / str(layout))
    assert_same_tensors(final_tensors(resumed), final_tensors(trained / str(layout)))


@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
def test_checkpoints_of_one_layout_are_read_by_another(trained: Path, layout: Layout) -> None:
    assert_close(trained / f"{layout}_from_{ONE}", trained / str(ONE), first=30)
    assert_close(trained / f"{ONE}_from_{layout}", trained / str(layout), first=30)


def test_a_killed_run_goes_on_bitwise(trained: Path, tiny_data: Path, tmp_path: Path) -> None:
    """kill -9 of both processes somewhere after twenty steps, with DDP and its sliced state."""
    config = configured(Layout("ddp", 2), tiny_data, tmp_path / "run")
    kill_on_ranks(2, config.directory / "metrics.jsonl", b'"lr"', 20, run_here, config)
    assert status(config.directory)["state"] == "running"
    run_on_ranks(2, run_here, config)
    assert curve(config.directory) == curve(trained / "ddp2")
    assert_same_tensors(final_tensors(config.directory), final_tensors(trained / "ddp2"))


def test_a_run_of_one_optimizer_is_not_continued_by_the_other(trained: Path, tiny_data: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / str(ONE), tmp_path / "run")
    config = configured(ONE, tiny_data, tmp_path / "run")
    with pytest.raises(InputError, match=r"--optim.name adamw.*muon"):
        run_on_ranks(1, run_here, replace(config, optim=replace(MUON, name="adamw")))


def state_bytes(group: ProcessGroup, config: Config) -> int:
    """Return the bytes of this rank's optimizer state."""
    parallel_plan = choose_parallel_plan(config, world=group.world, local_world=group.world, memory_bytes=10**12)
    loss_model = build_loss_model(config, parallel_plan, group)
    optimizer = build_optimizer(loss_model.model, config.optim, parallel_plan, group)
    tensors = [local(tensor) for state in optimizer.state.values() for tensor in state.values()]
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)
    return sum(tensor.nbytes for tensor in tensors if tensor.dim())


def test_under_ddp_a_ranks_state_falls_with_the_world(tiny_data: Path, tmp_path: Path) -> None:
    sizes = {}
    for world in (1, 2, 4):
        config = configured(Layout("ddp" if world > 1 else "none", world), tiny_data, tmp_path)
        sizes[world] = run_on_ranks(world, state_bytes, config)
    assert sum(sizes[2]) == sum(sizes[4]) == sizes[1][0], "each element is kept once"
    assert max(sizes[2]) < 0.54 * sizes[1][0] and max(sizes[4]) < 0.3 * sizes[1][0]


def test_the_whole_state_is_a_half_where_muon_takes_the_matrices(tiny_data: Path, tmp_path: Path) -> None:
    """One tensor for a matrix instead of AdamW's two."""
    config = configured(ONE, tiny_data, tmp_path)
    (muon,) = run_on_ranks(1, state_bytes, config)
    (adamw,) = run_on_ranks(1, state_bytes, replace(config, optim=replace(MUON, name="adamw")))
    matrices = adamw - muon
    assert 0.3 * adamw < matrices < 0.5 * adamw


@pytest.mark.parametrize("optim", [MUON, replace(MUON, average_fraction=0.5), OptimConfig(average_fraction=0.5)])
def test_the_size_of_a_checkpoint_is_known_before(tiny_data: Path, tmp_path: Path, optim: OptimConfig) -> None:
    """No table of --model.value-embeddings is a matrix of the blocks."""
    config = replace(configured(ONE, tiny_data, tmp_path / "run"), optim=optim)
    config = replace(config, model=replace(config.model, value_embeddings=1), train=replace(config.train, steps=2))
    run_on_ranks(1, run_here, config)
    saved = sum(tensor.nbytes for tensor in final_tensors(config.directory).values() if tensor.dim())
    assert 0.99 * saved < saved_bytes(config) <= saved
