"""Passes that train nothing, before the first step: they compile, and let DDP settle its buckets."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from train.data import Batch, zero_batch
from train.parallel import apply

if TYPE_CHECKING:
    from train.state import Run

AccumulateGradients = Callable[["Run", list[Batch], Tensor], Tensor]


def warm_up(run: Run, accumulate_gradients: AccumulateGradients) -> bool:
    """Run two training passes and each shape that evaluations call; return True if a stop was asked for meanwhile.

    DDP lays its buckets out anew at its second forward pass, and with three or more ranks the layout decides the order
    of addition: without this, the first step after a resume would round differently. Evaluations are compiled here too,
    under the watchdog's long time-out.
    """
    state, group, watchdog = run.state, run.processes.group, run.processes.watchdog
    watchdog.heartbeat("warm-up and compilation")
    shape = (run.data.batch_plan.micro_batch, run.config.train.seq_len)
    zeros = zero_batch(shape, has_dropout=run.config.model.dropout > 0, device=group.device)
    for _ in range(2):
        if group.any(run.processes.stop_requests.wanted()):
            return True
        accumulate_gradients(run, [zeros], run.token_weight(state.progress.position))
        apply.zero_gradients(state.module)
    if run.config.train.compile:
        for shape in dict.fromkeys(shape for each in run.data.evaluations for shape in each.shapes):
            watchdog.heartbeat()
            zeros_BT = torch.zeros(shape, dtype=torch.int64, device=group.device)
            state.loss_model.token_losses(zeros_BT, zeros_BT)
        apply.free_gathered(state.module)
    return group.any(run.processes.stop_requests.wanted())
