"""Whole tiny runs on a GPU: compiled, in half precision, saved beside training, resumed, with deterministic kernels."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.config import ModelConfig
from tests.distributed.test_exact import cut_back
from tests.helpers.runs import (
    assert_same_tensors,
    curve,
    final_tensors,
    losses,
    rows,
    tiny_config,
    validations,
    with_save,
)
from train.config import Config
from train.data import Prefetcher, plan_batches
from train.main import run
from train.processes.group import ProcessGroup
from train.setup import open_sequences

pytestmark = pytest.mark.gpu
STEPS = 20
MODEL = ModelConfig(num_layers=2, num_heads=2, width=64)  # heads of 32: the smallest that every kernel takes

Train = Callable[..., Path]


def small_config(data: Path, run_dir: Path, **train: Any) -> Config:
    config = tiny_config(data, run_dir, **({"steps": STEPS} | train))
    model = dataclasses.replace(MODEL, context_len=config.train.seq_len)
    return dataclasses.replace(config, model=model, optim=dataclasses.replace(config.optim, lr_peak=2e-3))


@pytest.fixture
def train(tiny_data: Path, tmp_path: Path, alone: ProcessGroup) -> Train:
    def train_run(name: str = "run", **options: Any) -> Path:
        run(small_config(tiny_data, tmp_path / name, **options), alone)
        return tmp_path / name

    return train_run


@pytest.fixture(scope="module")
def plain(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory, device: torch.device) -> Path:
    """The run that others are compared with: fp32, eager, plain loss."""
    folder = tmp_path_factory.mktemp("plain")
    run(small_config(tiny_data, folder / "run"), ProcessGroup(0, 1, device))
    return folder / "run"


def largest_difference(left: Path, right: Path) -> float:
    return (losses(left) - losses(right)).abs().max().item()


@pytest.mark.parametrize("options", [{}, {"loss": "chunked"}, {"activation_checkpointing": True}], ids=str)
def test_compiled_equals_eager(train: Train, plain: Path, gpu: torch.device, options: dict[str, Any]) -> None:
    compiled = train(compile=True, **options)
    assert largest_difference(compiled, plain) <= 1e-4
    assert validations(compiled) == pytest.approx(np.array(validations(plain)), abs=1e-4)


@pytest.mark.parametrize("options", [{}, {"dtype": "fp16", "loss": "chunked"}, {"compile": True}], ids=str)
def test_a_captured_pass_is_the_same_run(train: Train, gpu: torch.device, options: dict[str, Any]) -> None:
    """With several micro-batches, whose gradients the graph adds up in place."""
    plain = train("plain", micro_batch=3, **options)
    graphs = train("graphs", micro_batch=3, cuda_graphs=True, **options)
    assert curve(graphs) == pytest.approx(np.array(curve(plain)), abs=1e-3)


def test_ways_to_compute_are_the_same_run(train: Train, plain: Path) -> None:
    assert largest_difference(train(loss="chunked", activation_checkpointing=True, micro_batch=2), plain) <= 1e-4


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_stays_close_to_fp32(train: Train, plain: Path, dtype: str) -> None:
    run_dir = train(dtype=dtype)
    assert 0 < largest_difference(run_dir, plain) <= 2e-2
    if dtype == "fp16":
        assert {row["loss_scale"] for row in rows(run_dir) if "loss" in row} == {65536.0}


def test_tf32_stays_close_to_fp32(train: Train, plain: Path, gpu: torch.device) -> None:
    assert largest_difference(train(dtype="tf32"), plain) <= 5e-3


@pytest.mark.parametrize("options", [{"dtype": "fp16"}, {"dtype": "bf16", "compile": True}], ids=str)
def test_a_run_saved_beside_training_resumes_bitwise(
    tiny_data: Path, tmp_path: Path, alone: ProcessGroup, options: dict[str, Any]
) -> None:
    """With deterministic kernels a resumed run is the uninterrupted one, in losses, weights and optimizer state."""
    if options.get("compile") and alone.device.type != "cuda":
        pytest.skip("compiling C++ takes a minute")
    config = small_config(tiny_data, tmp_path / "whole", deterministic=True, **options)
    config = with_save(config, every=10, mode="async")
    run(config, alone)
    cut_back(tmp_path / "whole", tmp_path / "resumed", step=10)
    run(dataclasses.replace(config, run_dir=tmp_path / "resumed"), alone)
    assert "continuing from" in (tmp_path / "resumed" / "log.txt").read_text()
    assert curve(tmp_path / "resumed") == curve(tmp_path / "whole")
    assert_same_tensors(final_tensors(tmp_path / "resumed"), final_tensors(tmp_path / "whole"))


def test_batches_arrive_through_pinned_memory_as_they_are_on_disk(tiny_data: Path, alone: ProcessGroup) -> None:
    config = small_config(tiny_data, tiny_data)
    plan = plan_batches(config, 1)
    sequences = open_sequences(config)
    prefetcher = Prefetcher(sequences, plan, rank=0, device=alone.device)
    for position in range(0, 10 * plan.sequences, plan.sequences):
        taken = prefetcher.take(position)
        expected = sequences.micro_batches(position, plan, rank=0)
        for (inputs_BT, targets_BT), (expected_inputs_BT, expected_targets_BT) in zip(taken, expected, strict=True):
            assert inputs_BT.device.type == alone.device.type
            assert torch.equal(inputs_BT.cpu(), expected_inputs_BT)
            assert torch.equal(targets_BT.cpu(), expected_targets_BT)
    if alone.device.type == "cuda":
        assert prefetcher._ahead is not None
        assert all(tensor.is_pinned() for batch in prefetcher._ahead[1].result() for tensor in batch)
    prefetcher.close()
