"""The mean of the weights against one computed by hand, and its exchange with the weights."""

import dataclasses

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.gpt import build_model
from tests.helpers.runs import assert_same_tensors
from train.config import OptimConfig
from train.losses import LossModel
from train.optim import build_optimizer, update
from train.parallel.averaging import WeightAverage, default_decay

MODEL = ModelConfig(num_layers=1, num_heads=2, width=32, vocab_size=33, context_len=8)
NUM_STEPS = 12
YES, NO = torch.tensor(True), torch.tensor(False)


def averaging(fraction: float, decay: float | None = None) -> tuple[LossModel, WeightAverage]:
    loss_model = LossModel(build_model(MODEL, seed=1), chunk_tokens=None)
    config = OptimConfig(average_fraction=fraction, average_decay=decay)
    return loss_model, WeightAverage(loss_model, config, NUM_STEPS)


def weights_of(loss_model: LossModel) -> dict[str, Tensor]:
    return {f"average.{name}": p.detach().clone() for name, p in loss_model.model.named_parameters()}


@torch.no_grad()
def change(loss_model: LossModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in loss_model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize(("fraction", "decay", "first"), [(0.5, 0.8, 6), (1.0, None, 0), (0.01, 0.98, 11)])
def test_it_is_the_mean_by_hand(fraction: float, decay: float | None, first: int) -> None:
    loss_model, average = averaging(fraction, decay)
    seen = []
    for step in range(NUM_STEPS):
        change(loss_model, step)
        average.add(step, YES)
        seen.append(weights_of(loss_model))
        expected_keys = seen[0].keys() if step >= first else set()
        assert average.tensors(step + 1).keys() == expected_keys
        if step == first:
            assert_same_tensors(average.tensors(step + 1), seen[first])
    d = default_decay(12) if decay is None else decay
    counts = [d ** (NUM_STEPS - 1 - step) for step in range(first, NUM_STEPS)]
    for name, mean in average.tensors(NUM_STEPS).items():
        terms = [count * weights[name].double() for count, weights in zip(counts, seen[first:], strict=True)]
        torch.testing.assert_close(mean.double(), torch.stack(terms).sum(0) / sum(counts), rtol=0, atol=2e-6)


def test_a_decay_of_0_keeps_the_last_weights() -> None:
    loss_model, average = averaging(1.0, 0.0)
    for step in range(3):
        change(loss_model, step)
        average.add(step, YES)
    assert_same_tensors(average.tensors(3), weights_of(loss_model))


def test_steps_that_are_not_finite_have_no_part_in_it() -> None:
    loss_model, average = averaging(1.0, 0.5)
    average.add(0, NO)
    before = weights_of(loss_model)
    assert_same_tensors(average.tensors(1), before)
    change(loss_model, 1)
    average.add(1, NO)
    assert_same_tensors(average.tensors(2), before)
    average.add(2, YES)
    assert not any(torch.equal(mean, before[name]) for name, mean in average.tensors(3).items())


def test_the_exchange_is_undone_exactly_also_after_an_error() -> None:
    loss_model, average = averaging(1.0, 0.9)
    for step in range(3):
        change(loss_model, step)
        average.add(step, YES)
    weights, mean = weights_of(loss_model), {name: t.clone() for name, t in average.tensors(3).items()}
    places = [parameter.data_ptr() for parameter in loss_model.parameters()]
    with pytest.raises(KeyError), average.in_place_of_the_weights():
        assert_same_tensors(weights_of(loss_model), mean)
        with pytest.raises(AssertionError, match="lie in the mean's place"):
            average.tensors(3)  # what a checkpoint would save
        raise KeyError
    assert_same_tensors(weights_of(loss_model), weights)
    assert_same_tensors(average.tensors(3), mean)
    assert [parameter.data_ptr() for parameter in loss_model.parameters()] == places


def test_the_optimizer_adds_to_it_after_each_update() -> None:
    loss_model, average = averaging(1.0, 0.5)
    optimizer = dataclasses.replace(build_optimizer(loss_model.model, OptimConfig()), average=average)
    seen = []
    for step in range(2):
        for parameter in loss_model.parameters():
            parameter.grad = torch.ones_like(parameter)
        update(optimizer, step, 0.1, torch.tensor(1.0), YES)
        seen.append(weights_of(loss_model))
    for name, mean in average.tensors(2).items():
        torch.testing.assert_close(mean, (seen[0][name] + 2 * seen[1][name]) / 3)
