"""Warns when a rank is slow: compares the time that each rank itself needs for a step with the others'.

A rank's own time runs from asking for data to the end of the last micro-batch's backward pass. The rest of a step
includes waiting for other ranks, so it lasts equally long on all. Where weights are gathered, all passes wait for
others; there the own time is the wait for data and the first block's forward passes, in which nothing is gathered.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable

import torch
from torch import nn

from train.processes.group import ProcessGroup

STEPS_BETWEEN_CHECKS = 100
SLOW = 1.5  # A rank is slow above so many times the median of the others.

Moment = float | torch.cuda.Event  # a reading of the host's clock, or an event in the GPU's stream


class Stragglers:
    """Times every step, compares the ranks at every hundredth and logs a rank that was slow twice in a row.

    With one process it does nothing.
    """

    def __init__(self, group: ProcessGroup, hosts: list[str], log: Callable[[str], None]) -> None:
        self._group = group
        self._hosts = hosts
        self._log = log
        self._begin: Moment | None = None
        self._pieces: list[tuple[Moment, Moment]] | None = None  # the current step's own time; None between steps
        self._unread: deque[list[tuple[Moment, Moment]]] = deque()  # of steps whose results are not read yet
        self._seconds, self._num_steps = 0.0, 0  # own time since the last check
        self._slow_before: set[int] = set()
        self._reported: set[int] = set()

    def watch(self, block: nn.Module) -> None:
        """Count the block's forward passes as own time. Call after sharding, so that FSDP waits outside."""
        block.register_forward_pre_hook(lambda *_: self.begin())
        block.register_forward_hook(lambda *_: self.end(), prepend=True)

    def begin_step(self) -> None:
        if self._group.world > 1:
            self._pieces = []
            self.begin()

    def begin(self) -> None:
        """Begin a piece of own time. Outside a step, as in the warm-up, do nothing."""
        if self._pieces is not None:
            self._begin = self._now()

    def end(self) -> None:
        """End the piece of own time: what follows may wait for other ranks."""
        if self._begin is not None and self._pieces is not None:
            self._pieces.append((self._begin, self._now()))
        self._begin = None

    def end_step(self) -> None:
        """End the step's own time: the rest of the step may wait for other ranks."""
        self.end()
        if self._pieces is not None:
            self._unread.append(self._pieces)
            self._pieces = None

    def _now(self) -> Moment:
        if self._group.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def record(self, step: int) -> None:
        """Add up the oldest unread step, whose GPU events are done. Collective at every hundredth step."""
        if self._group.world == 1:
            return
        self._seconds += sum(seconds_between(begin, end) for begin, end in self._unread.popleft())
        self._num_steps += 1
        if step % STEPS_BETWEEN_CHECKS == 0:
            self._check(self._group.gather(self._seconds / self._num_steps))
            self._seconds, self._num_steps = 0.0, 0

    def _check(self, seconds: list[float]) -> None:
        slow = slow_ranks(seconds)
        for rank in sorted((slow & self._slow_before) - self._reported):
            self._log(
                f"warning: rank {rank} on {self._hosts[rank]} is slow: its own part of a step takes "
                f"{seconds[rank]:.3f} s, the others' median {median_of_others(seconds, rank):.3f} s"
            )
        self._reported = (self._reported | self._slow_before) & slow
        self._slow_before = slow


def seconds_between(begin: Moment, end: Moment) -> float:
    """Return the seconds between two clock readings or two finished events."""
    if isinstance(begin, float) and isinstance(end, float):
        return end - begin
    assert isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event)
    return begin.elapsed_time(end) / 1e3


def median_of_others(values: list[float], index: int) -> float:
    """Return the median of all values but the one at `index`."""
    return statistics.median(values[:index] + values[index + 1 :])


def slow_ranks(seconds: list[float]) -> set[int]:
    """Return the ranks that are slower than SLOW times the median of the others."""
    return {rank for rank, own in enumerate(seconds) if own > SLOW * median_of_others(seconds, rank)}
