"""Schedules as tables; the update against torch's own clipping and AdamW; nothing happens on a bad step."""

import copy
import math

import pytest
import torch

from model.config import ModelConfig
from model.gpt import GPT, build_model
from train.config import OptimConfig
from train.optim import build_optimizer, learning_rate, sum_of_squares, update

CONFIG = OptimConfig(lr_peak=1e-2, clip_norm=0.5)
TINY = ModelConfig(num_layers=1, num_heads=2, width=16, vocab_size=40, context_len=8)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.1), (4, 0.5), (9, 1.0), (10, 1.0), (35, 0.868198), (60, 0.55), (85, 0.231802), (109, 0.100222)],
)
def test_cosine(step: int, expected: float) -> None:
    config = OptimConfig(lr_peak=1.0, lr_final=0.1, warmup_steps=10)
    assert learning_rate(step, config, num_steps=110) == pytest.approx(expected, abs=1e-6)


def test_gpt2_smalls_schedule() -> None:
    at = [learning_rate(step, OptimConfig(), 19_073) for step in (0, 699, 700, 9_886, 19_072)]
    assert at == pytest.approx([6e-4 / 700, 6e-4, 6e-4, 3.00026e-4, 0.0], abs=1e-8)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.1), (9, 1.0), (10, 1.0), (79, 1.0), (80, 1.0), (81, 0.955), (90, 0.55), (99, 0.145)],
)
def test_wsd(step: int, expected: float) -> None:
    config = OptimConfig(lr_peak=1.0, lr_final=0.1, warmup_steps=10, schedule="wsd", warmdown_fraction=0.2)
    assert learning_rate(step, config, num_steps=100) == pytest.approx(expected, abs=1e-9)


def test_wsd_without_a_plateau_and_of_a_single_step() -> None:
    linear = OptimConfig(lr_peak=1.0, warmup_steps=0, schedule="wsd", warmdown_fraction=1.0)
    assert [learning_rate(step, linear, 4) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert learning_rate(0, linear, 1) == 1.0


def test_constant_and_no_warm_up() -> None:
    config = OptimConfig(lr_peak=0.5, schedule="constant", warmup_steps=0)
    assert [learning_rate(step, config, 10) for step in (0, 5, 9)] == [0.5] * 3


def with_gradients(scale: float) -> GPT:
    model = build_model(TINY, seed=1)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * scale
    return model


def gradients(model: GPT) -> list[torch.Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def norm_of(model: GPT) -> torch.Tensor:
    return sum_of_squares(model.parameters()).sqrt().float()


def test_the_norm_is_the_fp64_norm() -> None:
    model = with_gradients(1.0)
    whole = torch.cat([gradient.flatten().double() for gradient in gradients(model)])
    assert norm_of(model).item() == whole.norm().float().item()


@pytest.mark.parametrize("scale", [1.0, 1e-4], ids=["clipped", "not clipped"])
def test_update_equals_torchs_clipping_and_adamw(scale: float) -> None:
    ours = with_gradients(scale)
    theirs = copy.deepcopy(ours)
    for mine, its in zip(ours.parameters(), theirs.parameters(), strict=True):
        its.grad = None if mine.grad is None else mine.grad.clone()
    decayed = [p for p in theirs.parameters() if p.dim() >= 2]
    others = [p for p in theirs.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
    reference.step()

    norm = norm_of(ours)
    optimizer = build_optimizer(ours, CONFIG)
    update(optimizer, 1e-2, norm, torch.isfinite(norm), CONFIG.clip_norm)
    for (name, mine), its in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=2e-7, msg=name)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing(bad: float) -> None:
    model = with_gradients(1.0)
    optimizer = build_optimizer(model, CONFIG)
    gradients(model)[3].view(-1)[0] = bad
    before = [parameter.detach().clone() for parameter in model.parameters()]
    norm = norm_of(model)
    update(optimizer, 1e-2, norm, torch.isfinite(norm), CONFIG.clip_norm)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    for state in optimizer.state.values():
        assert not state["step"].item() and not state["exp_avg"].any() and not state["exp_avg_sq"].any()


def test_matrices_decay_and_vectors_do_not() -> None:
    groups = build_optimizer(build_model(TINY, seed=1), CONFIG).param_groups
    assert {(group["weight_decay"], p.dim() >= 2) for group in groups for p in group["params"]} == {
        (0.1, True),
        (0.0, False),
    }
