"""Every precision and way to compute against an eager fp32 run, and fp16's steps that are not finite."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.test_exact import cut_back
from tests.helpers.runs import assert_same_tensors, curve, final_tensors, losses, rows, tiny_config, validations
from train import losses as train_losses
from train.guards.nonfinite import NonFiniteError
from train.main import run
from train.parallel import precision
from train.processes.group import ProcessGroup

ALONE = ProcessGroup(0, 1, torch.device("cpu"))
STEPS = 20


@pytest.fixture(scope="module")
def plain(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that others are compared with: fp32, eager, plain loss."""
    folder = tmp_path_factory.mktemp("plain")
    run(tiny_config(tiny_data, folder / "run", steps=STEPS), ALONE)
    return folder / "run"


@pytest.fixture
def train(tiny_data: Path, tmp_path: Path) -> Callable[..., Path]:
    def train_run(**options: Any) -> Path:
        run(tiny_config(tiny_data, tmp_path / "run", steps=STEPS, **options), ALONE)
        return tmp_path / "run"

    return train_run


def largest_difference(run_dir: Path, plain: Path, first: int = STEPS) -> float:
    return (losses(run_dir) - losses(plain))[:first].abs().max().item()


@pytest.mark.parametrize("loss", ["plain", "chunked"])
def test_compiled_equals_eager_to_the_printed_digits(train: Callable[..., Path], plain: Path, loss: str) -> None:
    compiled = train(compile=True, loss=loss)
    for eager_row, compiled_row in zip(curve(plain), curve(compiled), strict=True):
        assert f"{eager_row[1]:.4f} {eager_row[2]:.3f}" == f"{compiled_row[1]:.4f} {compiled_row[2]:.3f}"
    assert validations(plain) == pytest.approx(np.array(validations(compiled)), abs=1e-5)


def test_chunked_is_the_same_run(train: Callable[..., Path], plain: Path) -> None:
    chunked = train(loss="chunked", loss_chunk_tokens=50)
    assert largest_difference(chunked, plain, first=1) <= 1e-6 and largest_difference(chunked, plain) <= 1e-5
    assert np.array(validations(chunked)) == pytest.approx(np.array(validations(plain)), abs=1e-5)


def test_activation_checkpointing_is_bitwise_the_same_run(train: Callable[..., Path], plain: Path) -> None:
    checkpointing = train(activation_checkpointing=True)
    assert curve(checkpointing) == curve(plain)
    assert_same_tensors(final_tensors(checkpointing), final_tensors(plain))


def test_activation_checkpointing_compiles(train: Callable[..., Path], plain: Path) -> None:
    assert largest_difference(train(activation_checkpointing=True, compile=True), plain) <= 1e-5


def test_deterministic_and_tf32_are_the_same_run_on_a_cpu(
    train: Callable[..., Path], plain: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run_dir = train(deterministic=True, dtype="tf32")
    assert torch.are_deterministic_algorithms_enabled()
    assert json.loads((run_dir / "provenance.json").read_text())["deterministic"] is True
    assert curve(run_dir) == curve(plain)
    assert "--train.dtype tf32 has no effect on a CPU" in (run_dir / "log.txt").read_text()
    run(tiny_config(tiny_data, tmp_path / "next", steps=1), ALONE)
    assert not torch.are_deterministic_algorithms_enabled(), "the next run sets its own"


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_stays_close_to_fp32(train: Callable[..., Path], plain: Path, dtype: str) -> None:
    run_dir = train(dtype=dtype)
    assert 0 < largest_difference(run_dir, plain, first=2) <= 5e-4
    assert largest_difference(run_dir, plain) <= 2e-2
    if dtype == "fp16":
        assert {row["loss_scale"] for row in rows(run_dir) if "loss" in row} == {65536.0}


def test_fp16_skips_what_overflows_and_halves_its_scale(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad_call = 2 + 2 * 12  # micro-batches, the two of the warm-up included: the first one of step 13
    sound, calls = train_losses.plain_loss, itertools.count()

    def poisoned(*args: Any) -> torch.Tensor:
        return sound(*args) * torch.tensor([math.inf if next(calls) == bad_call else 1.0, 1.0])

    monkeypatch.setattr(train_losses, "plain_loss", poisoned)
    steps = {row["step"]: row for row in rows(train(dtype="fp16")) if "loss" in row}
    assert len(steps) == STEPS and all(math.isfinite(row["loss"]) for row in steps.values())
    assert steps[13]["grad_norm"] is None and steps[13]["loss_scale"] == 65536
    assert steps[14]["grad_norm"] > 0 and steps[14]["loss_scale"] == 32768


def test_fp16_resumes_bitwise_with_its_scale(
    train: Callable[..., Path], tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "STEPS_TO_DOUBLE", 7)
    whole, resumed = train(dtype="fp16"), tmp_path / "resumed"
    cut_back(whole, resumed, step=10)
    run(tiny_config(tiny_data, resumed, steps=STEPS, dtype="fp16"), ALONE)
    assert rows_of(resumed) == rows_of(whole)
    after = [(norm is None, scale) for _, norm, scale in rows_of(resumed)[10:]]
    assert len({scale for _, scale in after}) > 1 and any(skipped for skipped, _ in after), "a scale that moved"
    assert_same_tensors(final_tensors(resumed), final_tensors(whole))


def rows_of(run_dir: Path) -> list[tuple[Any, ...]]:
    return [(row["loss"], row["grad_norm"], row["loss_scale"]) for row in rows(run_dir) if "loss" in row]


def test_fp16_stops_if_no_scale_helps(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = train_losses.plain_loss
    monkeypatch.setattr(train_losses, "plain_loss", lambda *args: sound(*args) * torch.tensor([math.nan, 1.0]))
    with pytest.raises(NonFiniteError, match="step 17: "):  # 65536 is halved 16 times first
        run(tiny_config(tiny_data, tmp_path / "run", dtype="fp16", steps=STEPS), ALONE)
