"""Steps whose loss or gradient is not finite: judged on the device, before the update. Runs that diverge."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from common.errors import InputError
from train.metrics.logger import NONFINITE_FILE
from train.parallel.precision import LossScale

LEAST_LOSS_SCALE = 1.0  # below it fp16's small numbers are lost: what still overflows then is no matter of scale
ROWS_ABOVE = 2  # one may be a bad batch
MOST_IN_A_ROW = 20  # skipped steps after which it is no matter of a few sequences


class NonFiniteError(InputError):
    """A step's loss or gradient was not finite. Its update was not made."""


class DivergedError(InputError):
    """The loss was above --train.diverged-above for ROWS_ABOVE rows."""


class NonFiniteGuard:
    """Decides alike on all ranks whether a step's update is made: their loss and norm are the same numbers.

    A step that is not finite is never an update. It is `bad` unless fp16's loss scale was merely too high, which lowers
    itself. The host reads that one step late; with "stop" the steps enqueued meanwhile are no updates either, so that
    the state is still the one before the bad step.
    """

    def __init__(self, mode: Literal["stop", "skip"], device: torch.device) -> None:
        self.mode = mode
        self.is_halted = torch.zeros((), dtype=torch.bool, device=device)
        self.num_in_a_row = 0

    def judge(self, loss: Tensor, norm: Tensor, scale: LossScale | None) -> tuple[Tensor, Tensor]:
        """(is the update to be made, is the step bad), both bool scalars on the device; nothing waits."""
        is_finite = torch.isfinite(norm) & torch.isfinite(loss)
        is_bad = ~is_finite
        if scale is not None:
            is_bad = is_bad & (~torch.isfinite(loss) | (scale.scale <= LEAST_LOSS_SCALE))
        if self.mode == "stop":
            self.is_halted.logical_or_(is_bad)
            is_finite = is_finite & ~self.is_halted
        return is_finite, is_bad


def advice(*, data: Path, seq_len: int, suspects: Sequence[int]) -> str:
    """What to look at and what to set, in one line."""
    skip = "to go on without such steps: --train.on-nonfinite skip"
    if not suspects:
        return (
            "No sequence of it does that by itself, so look at the learning rate or the hardware before the text "
            f"(all its sequences are in {NONFINITE_FILE}); {skip}"
        )
    numbers = " ".join(str(number) for number in suspects)
    return (
        f"Not finite by themselves: sequences {numbers}; to read them: "
        f"python data_prep/verify.py {data} --seq-len {seq_len} --sequence {numbers}; "
        f"to leave them out: --data.skip-sequences {numbers}; {skip}"
    )
