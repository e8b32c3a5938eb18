"""The loss scale against its rules and torch's own scaler, and torch's global switches."""

import pytest
import torch

from train.config import TrainConfig
from train.parallel import precision
from train.parallel.precision import LossScale, compute_dtype, set_numerics

CPU = torch.device("cpu")


def after(good: str) -> tuple[float, float]:
    """Return (scale, good steps) after steps that were finite (+) or not (-)."""
    loss_scale = LossScale(CPU)
    for sign in good:
        loss_scale.update(torch.tensor(sign == "+"), frozen=torch.tensor(False))
    return loss_scale.scale.item(), loss_scale.good_steps.item()


def test_three_good_steps_double_and_a_bad_one_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "STEPS_TO_DOUBLE", 3)
    scales = {"": (65536, 0), "++": (65536, 2), "-": (32768, 0), "++-": (32768, 0), "-+--": (8192, 0)}
    scales |= {"+++": (131072, 0), "++-+++": (65536, 0), "+++++++": (262144, 1)}
    assert {steps: after(steps) for steps in scales} == scales


def test_the_scale_follows_torchs_own_scaler() -> None:
    """torch.amp.GradScaler's rule, on a sequence long enough to double."""
    generator = torch.Generator().manual_seed(1)
    is_finite = torch.rand(9_000, generator=generator) > 0.0004
    ours = LossScale(CPU)
    scale, growth = torch.full((), 65536.0), torch.zeros((), dtype=torch.int32)
    scales = set()
    for finite in is_finite:
        ours.update(finite, frozen=torch.tensor(False))
        torch._amp_update_scale_(scale, growth, (~finite).float(), 2.0, 0.5, 2000)
        scales.add(scale.item())
        assert ours.scale == scale and ours.good_steps == growth
    assert len(scales) > 3


def test_a_run_sets_determinism_whatever_it_was() -> None:
    torch.use_deterministic_algorithms(True)
    set_numerics(TrainConfig(), CPU)
    assert not torch.are_deterministic_algorithms_enabled()
    set_numerics(TrainConfig(deterministic=True), CPU)
    assert torch.are_deterministic_algorithms_enabled()
    set_numerics(TrainConfig(), CPU)


def test_tf32_computes_in_fp32_tensors() -> None:
    dtypes = [compute_dtype(TrainConfig(dtype=dtype)) for dtype in ("bf16", "fp16", "tf32", "fp32")]
    assert dtypes == [torch.bfloat16, torch.float16, torch.float32, torch.float32]
