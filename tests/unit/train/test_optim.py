"""Schedules as tables; the update against torch's clipping and AdamW; a bad step changes nothing."""

import copy
import dataclasses
import math
import re
from typing import Any

import pytest
import torch

from model.config import ModelConfig
from model.gpt import GPT, build_model
from tests.unit.model.test_switches import MODERN
from train.config import OptimConfig
from train.optim import build_optimizer, learning_rate, sum_of_squares, update

CONFIG = OptimConfig(lr_peak=1e-2, clip_norm=0.5)
TINY = ModelConfig(num_layers=1, num_heads=2, width=16, vocab_size=40, context_len=8)


WARMED_UP = OptimConfig(lr_peak=1.0, lr_final=0.1, warmup_steps=10)
LINEAR = OptimConfig(lr_peak=1.0, warmup_steps=0, schedule="wsd", warmdown_fraction=1.0)


WSD = dataclasses.replace(WARMED_UP, schedule="wsd", warmdown_fraction=0.2)
SCHEDULES = {  # the configuration, the number of steps, and rates by step
    "cosine": (WARMED_UP, 110, {0: 0.1, 4: 0.5, 9: 1, 10: 1, 35: 0.868198, 60: 0.55, 85: 0.231802, 109: 0.100222}),
    "wsd": (WSD, 100, {0: 0.1, 9: 1.0, 10: 1.0, 79: 1.0, 80: 1.0, 81: 0.955, 90: 0.55, 99: 0.145}),
    "wsd without a plateau": (LINEAR, 4, {0: 1.0, 1: 0.75, 2: 0.5, 3: 0.25}),
    "wsd of one step": (LINEAR, 1, {0: 1.0}),
    "constant": (OptimConfig(lr_peak=0.5, schedule="constant", warmup_steps=0), 10, {0: 0.5, 5: 0.5, 9: 0.5}),
    "GPT-2 small": (OptimConfig(), 19_073, {0: 6e-4 / 700, 699: 6e-4, 700: 6e-4, 9_886: 3.00026e-4, 19_072: 0.0}),
}


@pytest.mark.parametrize(("config", "num_steps", "rates"), SCHEDULES.values(), ids=SCHEDULES)
def test_learning_rates(config: OptimConfig, num_steps: int, rates: dict[int, float]) -> None:
    for step, rate in rates.items():
        assert learning_rate(step, config, num_steps) == pytest.approx(rate, rel=1e-5, abs=1e-8)


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
    reference_model = copy.deepcopy(ours)
    for mine, reference_parameter in zip(ours.parameters(), reference_model.parameters(), strict=True):
        reference_parameter.grad = None if mine.grad is None else mine.grad.clone()
    decayed = [p for p in reference_model.parameters() if p.dim() >= 2]
    others = [p for p in reference_model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    torch.nn.utils.clip_grad_norm_(reference_model.parameters(), 0.5)
    reference.step()

    norm = norm_of(ours)
    optimizer = build_optimizer(ours, CONFIG)
    update(optimizer, 0, 1e-2, norm, torch.isfinite(norm))
    for (name, mine), reference_parameter in zip(ours.named_parameters(), reference_model.parameters(), strict=True):
        torch.testing.assert_close(mine, reference_parameter, rtol=0, atol=2e-7, msg=name)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing(bad: float) -> None:
    model = with_gradients(1.0)
    optimizer = build_optimizer(model, CONFIG)
    gradients(model)[3].view(-1)[0] = bad
    before = [parameter.detach().clone() for parameter in model.parameters()]
    norm = norm_of(model)
    update(optimizer, 0, 1e-2, norm, torch.isfinite(norm))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    for state in optimizer.state.values():
        assert not state["step"].item() and not state["exp_avg"].any() and not state["exp_avg_sq"].any()


@pytest.mark.parametrize("switches", [{}, MODERN], ids=["GPT-2", "modern"])
def test_matrices_decay_and_norms_biases_and_scalars_do_not(switches: dict[str, Any]) -> None:
    model = build_model(dataclasses.replace(TINY, num_layers=2, **switches), seed=1)
    groups = {group.kind: group for group in build_optimizer(model, CONFIG).groups}
    assert {kind: group.weight_decay for kind, group in groups.items()} == (
        {"matrix": 0.1, "embedding": 0.1, "vector": 0.0} | ({} if model.is_tied else {"head": 0.1})
    )
    names = {parameter: name for name, parameter in model.named_parameters()}
    others = groups.pop("vector").parameters
    kinds = {re.sub(r".*\.(?=\w+\.\w+$)|\.weight$", "", names[p]).split(".")[-1] for p in others}
    expected = (
        {"ln_1", "ln_2", "ln_f", "q_norm", "k_norm", "value_mix"} if switches else {"ln_1", "ln_2", "ln_f", "bias"}
    )
    assert kinds == expected
    decayed = [parameter for group in groups.values() for parameter in group.parameters]
    assert len(others) + len(decayed) == len(names)
    assert all(parameter.dim() == 2 for parameter in decayed)
