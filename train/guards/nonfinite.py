"""Steps whose loss or gradient is not finite, and runs that diverge.

A step is judged on the device, before its update. The search for the sequences that are at fault runs afterwards.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from common.errors import InputError
from train.config import Config
from train.data import Batch
from train.metrics.logger import NONFINITE_FILE
from train.parallel.precision import LossScale
from train.processes.group import ProcessGroup

LEAST_LOSS_SCALE = 1.0  # below it fp16 loses small numbers: what still overflows there is not the scale's fault
ROWS_ABOVE = 2  # one may be a bad batch
MOST_IN_A_ROW = 20  # skipped steps after which a few bad sequences are no longer the likely cause


class NonFiniteError(InputError):
    """A step's loss or gradient was not finite. Its update was not made."""


class DivergedError(InputError):
    """The loss was above --train.diverged-above for ROWS_ABOVE rows."""


class NonFiniteGuard:
    """Decides whether a step's update is made, alike on all ranks: their loss and norm are the same numbers.

    A step that is not finite is never an update. It is bad unless fp16's loss scale was merely too high, which lowers
    itself. The host reads that one step late. In mode "stop" the steps enqueued meanwhile are no updates either, so
    that the state is still the one before the bad step.
    """

    def __init__(
        self, mode: Literal["stop", "skip"], device: torch.device, *, diverged_above: float | None = None
    ) -> None:
        self.mode = mode
        self.is_halted = torch.zeros((), dtype=torch.bool, device=device)
        self.num_in_a_row = 0
        self._diverged_above = diverged_above
        self._rows_above = 0

    def judge(self, loss: Tensor, norm: Tensor, scale: LossScale | None) -> tuple[Tensor, Tensor]:
        """Return (whether to make the update, whether the step is bad): bool scalars on the device; nothing waits."""
        is_finite = torch.isfinite(norm) & torch.isfinite(loss)
        is_bad = ~is_finite
        if scale is not None:
            is_bad = is_bad & (~torch.isfinite(loss) | (scale.scale <= LEAST_LOSS_SCALE))
        if self.mode == "stop":
            self.is_halted.logical_or_(is_bad)
            is_finite = is_finite & ~self.is_halted
        return is_finite, is_bad

    def check_divergence(self, step: int, loss: float) -> DivergedError | None:
        """Return the error that ends the run if this row and the one before are above --train.diverged-above."""
        limit = self._diverged_above
        self._rows_above = self._rows_above + 1 if limit is not None and not loss <= limit else 0
        if self._rows_above != ROWS_ABOVE:
            return None
        return DivergedError(
            f"step {step}: loss {loss:.4f} is above --train.diverged-above {limit:g}, as in the row before; "
            "a lower --optim.lr-peak may learn, in another --run-dir"
        )


def find_suspects(
    micro_batches: Sequence[Batch],
    own_ids: Sequence[int],
    is_finite: Callable[..., bool],
    *,
    group: ProcessGroup,
) -> list[int]:
    """Return the sequences of a step, of any rank, whose own loss or gradient is not finite. Collective.

    `micro_batches` and `own_ids` are this rank's. `is_finite(*batch)` is a pass of all ranks, since a gradient may be
    spread over them. A bad micro-batch is tried again with halves of the ranks, then halves of those, while the others
    read zeros; on a bad rank each sequence is tried alone, with its own dropout. Return none if zeros are not finite
    either: then the cause is not in the sequences.
    """
    zeros = [torch.zeros_like(tensor) for tensor in micro_batches[0]]
    micro_batch = len(zeros[0])
    suspects: list[int] = []
    if not is_finite(*zeros):
        return []
    for index, batch in enumerate(micro_batches):
        rank_groups = [range(group.world)]
        while rank_groups:
            ranks = rank_groups.pop()
            if is_finite(*(batch if group.rank in ranks else zeros)):
                continue
            if len(ranks) > 1:
                rank_groups += [ranks[: len(ranks) // 2], ranks[len(ranks) // 2 :]]
                continue
            for row in range(micro_batch):  # repeated to a micro-batch, the shape that is compiled
                repeated = [tensor[row].expand_as(tensor).contiguous() for tensor in batch]
                if not is_finite(*(repeated if group.rank in ranks else zeros)):
                    suspects += [own_ids[index * micro_batch + row]] if group.rank in ranks else []
    return sorted(number for numbers in group.gather(suspects) for number in numbers)


def stop_error(message: str, config: Config, *, step: int, suspects: Sequence[int]) -> NonFiniteError:
    """Return the error that ends a run at a bad step: what is saved, what to read and what to set."""
    saved = f"step {step - 1} is saved" if step > 1 else "there was no step before it"
    return NonFiniteError(f"{message}, and {saved}. {_advice(config, suspects)}")


def skip_warning(message: str) -> str:
    return f"warning: {message} (--train.on-nonfinite skip); its sequences are in {NONFINITE_FILE}"


def too_many_error(message: str) -> NonFiniteError:
    return NonFiniteError(f"{message}, nor were those of the {MOST_IN_A_ROW - 1} before it")


def _advice(config: Config, suspects: Sequence[int]) -> str:
    skip = "to go on without such steps: --train.on-nonfinite skip"
    if not suspects:
        return (
            "No sequence of it is the cause by itself, so look at the learning rate or the hardware before the text "
            f"(all its sequences are in {NONFINITE_FILE}); {skip}"
        )
    numbers = " ".join(str(number) for number in suspects)
    return (
        f"Not finite by themselves: sequences {numbers}; to read them: "
        f"python data_prep/verify.py {config.data.dir} --seq-len {config.train.seq_len} --sequence {numbers}; "
        f"to skip them: --data.skip-sequences {numbers}; {skip}"
    )
