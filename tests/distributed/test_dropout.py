"""Dropout, in a model with a window, is the same run for any processes, micro-batches, restarts and layouts."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.test_exact import assert_close_losses, cut_back
from tests.distributed.test_modes import ONE, STEPS, Layout, configured, run_here
from tests.helpers.groups import run_on_ranks
from tests.helpers.runs import assert_same_tensors, called, curve, final_tensors, losses, tiny_flags, validations
from train import main as train_main
from train.config import Config
from train.processes.group import ProcessGroup

DDP, FSDP, HSDP = Layout("ddp", 2), Layout("fsdp", 2), Layout("hsdp", 4, shard_size=2)
LAYOUTS = (ONE, DDP, FSDP, HSDP)
P, WINDOW = 0.2, 9
SINGLE: dict[str, Any] = {"micro_batch": 1, "activation_checkpointing": True, "loss": "chunked"}


def with_dropout(layout: Layout, data: Path, run_dir: Path, *, dropout: float = P, **train: Any) -> Config:
    config = configured(layout, data, run_dir, **train)
    return replace(config, model=replace(config.model, dropout=dropout, window=WINDOW))


def train_all(group: ProcessGroup, data: Path, folder: Path) -> None:
    """Train each layout of this world without a stop and from step 30, and with single sequences recomputed."""
    for layout in [layout for layout in LAYOUTS if layout.world == group.world]:
        run_here(group, with_dropout(layout, data, folder / str(layout)))
        resumed = with_dropout(layout, data, folder / f"{layout}_resumed")
        group.on_main(lambda path=resumed.directory, of=folder / str(layout): cut_back(of, path, step=30))  # type: ignore[misc]
        run_here(group, resumed)
        if layout in (ONE, FSDP):
            run_here(group, with_dropout(layout, data, folder / f"{layout}_single", **SINGLE))


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dropout")
    for world in (1, 2, 4):
        run_on_ranks(world, train_all, tiny_data, folder)
    return folder


@pytest.mark.timeout(300)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_trains_and_resumes_the_same_run(trained: Path, layout: Layout) -> None:
    path, one = trained / str(layout), trained / str(ONE)
    assert len(curve(path)) == STEPS and losses(path)[-5:].mean() < losses(path)[:5].mean() - 0.3
    assert_close_losses(path, one)
    if layout in (ONE, FSDP):
        assert_close_losses(trained / f"{layout}_single", one)
    if layout != HSDP:  # 12 sequences as 2 x 6: these add in one order
        assert curve(path) == curve(one)
        assert_same_tensors(final_tensors(path), final_tensors(one))
    assert curve(trained / f"{layout}_resumed") == curve(path)
    assert validations(trained / f"{layout}_resumed") == validations(path)
    assert_same_tensors(final_tensors(trained / f"{layout}_resumed"), final_tensors(path))


def test_it_differs_from_the_run_without_it_and_is_another_run(trained: Path, tiny_data: Path, tmp_path: Path) -> None:
    """The first validation, of the same initial weights, has no dropout."""
    plain = with_dropout(ONE, tiny_data, tmp_path / "plain", dropout=0.0)
    run_here(ProcessGroup(0, 1, torch.device("cpu")), plain)
    first, *_ = zip(validations(tmp_path / "plain"), validations(trained / str(ONE)), strict=True)
    assert first[0] == first[1] and math.isfinite(first[0][1])
    assert curve(tmp_path / "plain")[0] != curve(trained / str(ONE))[0]
    flags = [*tiny_flags(tiny_data, tmp_path / "plain"), "--train.steps", str(STEPS), "--model.dropout", str(P)]
    done = called(train_main.main, *flags)
    assert done.returncode == 2
    assert f"--model.dropout {P} (was 0.0)" in done.stderr and f"--model.window None (was {WINDOW})" in done.stderr
