"""An exponential mean of the weights over the last part of a run. Evaluations and readers take it for the weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from model.checkpoint import AVERAGE
from train.config import OptimConfig
from train.losses import LossModel
from train.parallel.apply import free_gathered, local


class WeightAverage:
    """The mean of --optim.average-fraction, in fp32 and spread as the weights are.

    A step's weights count `decay` times as much as those of the next step, and all counts together are 1. So the first
    averaged step's weights are the mean at first, and weights from before it never have a part in it.
    """

    def __init__(self, loss_model: LossModel, config: OptimConfig, num_steps: int) -> None:
        assert config.average_fraction is not None
        num_averaged = max(1, round(config.average_fraction * num_steps))
        self.first_step = num_steps - num_averaged  # from 0
        self.decay = default_decay(num_averaged) if config.average_decay is None else config.average_decay
        self._loss_model = loss_model
        self._weights = dict(loss_model.model.named_parameters())
        self._means = {name: torch.zeros_like(weight) for name, weight in self._weights.items()}
        self._is_exchanged = False

    def has_begun(self, step: int) -> bool:
        """Return whether there is a mean once `step` steps are done."""
        return step > self.first_step

    def tensors(self, step: int) -> dict[str, Tensor]:
        """Return the mean by its names in the checkpoint of a step; nothing if there is none yet."""
        assert not self._is_exchanged, "the weights lie in the mean's place"
        if not self.has_begun(step):
            return {}
        return {f"{AVERAGE}{name}": mean for name, mean in self._means.items()}

    @torch.no_grad()
    def add(self, step: int, is_finite: Tensor) -> None:
        """Add the weights after the update of `step` (from 0), unless `is_finite` is False. The host never waits.

        The first averaged step's weights are taken in any case: where it made no update, they are those before it.
        """
        index = step - self.first_step
        if index < 0:
            return
        rate = torch.where(is_finite | (index == 0), share_of_newest(self.decay, index), 0.0)
        for name, weight in self._weights.items():
            local(self._means[name]).lerp_(local(weight.detach()), rate)

    @contextmanager
    def in_place_of_the_weights(self) -> Iterator[None]:
        """Exchange the contents of the weights and the mean, which needs one more tensor at a time, and undo it.

        No step, and no save that is still being copied, may lie between. FSDP2's gathered weights are freed each time,
        since they would stay those of before.
        """
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        free_gathered(self._loss_model)
        for name, weight in self._weights.items():
            own, mean = local(weight.detach()), local(self._means[name])
            kept = own.clone()
            own.copy_(mean)
            mean.copy_(kept)
        self._is_exchanged = not self._is_exchanged


def default_decay(num_averaged: int) -> float:
    """Return the decay with which the mean reaches back over a tenth of the averaged steps, 1 / (1 - decay) of them.

    So one setting serves runs of any length. A fixed decay would average ever smaller parts of longer runs.
    """
    return num_averaged / (num_averaged + 10)


def share_of_newest(decay: float, index: int) -> float:
    """Return the share of the weights of averaged step `index` (from 0) in the mean up to them: Adam's correction."""
    return (1 - decay) / (1 - decay ** (index + 1))
