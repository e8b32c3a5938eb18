"""Compiled against eager, bf16 against fp32, and a loss that is not finite."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.runs import curve, losses, status, tiny_config, validations
from train import loop
from train.loop import NonFiniteError
from train.main import run
from train.mesh import Mesh

ALONE = Mesh(0, 1, torch.device("cpu"))


def test_compiled_equals_eager_to_the_printed_digits(tiny_data: Path, tmp_path: Path) -> None:
    run(tiny_config(tiny_data, tmp_path / "eager", steps=10), ALONE)
    torch._dynamo.utils.counters.clear()
    run(tiny_config(tiny_data, tmp_path / "compiled", steps=10, compile=True), ALONE)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # one for all blocks, one without gradients
    for eager, compiled in zip(curve(tmp_path / "eager"), curve(tmp_path / "compiled"), strict=True):
        assert f"{eager[1]:.4f} {eager[2]:.3f}" == f"{compiled[1]:.4f} {compiled[2]:.3f}"
    assert validations(tmp_path / "eager") == pytest.approx(np.array(validations(tmp_path / "compiled")), abs=1e-5)


def test_bf16_stays_close_to_fp32(tiny_data: Path, tmp_path: Path) -> None:
    for dtype in ("fp32", "bf16"):
        run(tiny_config(tiny_data, tmp_path / dtype, dtype=dtype), ALONE)
    difference = (losses(tmp_path / "bf16") - losses(tmp_path / "fp32")).abs()
    assert 0 < difference[:2].max() <= 5e-4
    assert difference.max() <= 2e-2


def test_a_loss_that_is_not_finite_fails_by_name_and_keeps_the_weights(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Poison the loss of one step: its update is not made, and the step and its windows are named."""
    sound, calls = loop.summed_cross_entropy, iter(range(1000))

    def poisoned(logits: torch.Tensor, targets: torch.Tensor, vocab_size: int) -> torch.Tensor:
        loss = sound(logits, targets, vocab_size)
        return loss * float("inf") if next(calls) == 2 + 2 * 12 else loss  # 2 to warm up, 12 steps of 2

    monkeypatch.setattr(loop, "summed_cross_entropy", poisoned)
    with pytest.raises(NonFiniteError, match=r"step 13: .* positions 144 to 155"):
        run(tiny_config(tiny_data, tmp_path / "run"), ALONE)
    assert status(tmp_path / "run")["state"] == "failed"
    assert "step 13" in status(tmp_path / "run")["reason"]
    assert [step for step, *_ in curve(tmp_path / "run")] == list(range(1, 13))
