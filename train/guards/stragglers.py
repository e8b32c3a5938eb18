"""Which rank is slow, before anybody has to ask: its own part of a step against the others'.

A rank's own part is from asking for data to the last micro-batch's backward pass. What comes after is waiting for the
others as well, and takes as long on every rank. Where weights are gathered, all passes wait for others: there it is
the wait for data and the first block's forward passes, in which nothing is gathered.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable

import torch
from torch import nn

from train.processes.group import ProcessGroup

STEPS_BETWEEN_CHECKS = 100
SLOW = 1.5  # times the median of the others', twice in a row

Moment = float | torch.cuda.Event  # on the host's clock, or in the GPU's stream


class Stragglers:
    """Clock reads or events in every step, and one gathering in a hundred. A world of one does nothing."""

    def __init__(self, group: ProcessGroup, hosts: list[str], log: Callable[[str], None]) -> None:
        self._group = group
        self._hosts = hosts
        self._log = log
        self._began: Moment | None = None
        self._pieces: list[tuple[Moment, Moment]] | None = None  # of the own part of the step under way
        self._parts: deque[list[tuple[Moment, Moment]]] = deque()  # of steps whose results nobody has read yet
        self._seconds, self._num_steps = 0.0, 0  # since the last check
        self._slow_before: set[int] = set()
        self._reported: set[int] = set()

    def watch(self, block: nn.Module) -> None:
        """Count its forward passes in a step. After sharding: what FSDP's hooks around it wait for is left out."""
        block.register_forward_pre_hook(lambda *_: self.begin())
        block.register_forward_hook(lambda *_: self.end(), prepend=True)

    def begin_step(self) -> None:
        if self._group.world > 1:
            self._pieces = []
            self.begin()

    def begin(self) -> None:
        """What this rank does alone begins. Nothing outside a step: a warm-up is none."""
        if self._pieces is not None:
            self._began = self._now()

    def end(self) -> None:
        """What comes now waits for others too."""
        if self._began is not None and self._pieces is not None:
            self._pieces.append((self._began, self._now()))
        self._began = None

    def end_step(self) -> None:
        """What is left of the step waits for others too."""
        self.end()
        if self._pieces is not None:
            self._parts.append(self._pieces)
            self._pieces = None

    def _now(self) -> Moment:
        if self._group.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def record(self, step: int) -> None:
        """The oldest step's results are there, and so its events. Collective at every hundredth step."""
        if self._group.world == 1:
            return
        self._seconds += sum(seconds_between(began, ended) for began, ended in self._parts.popleft())
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


def seconds_between(began: Moment, ended: Moment) -> float:
    if isinstance(began, float) and isinstance(ended, float):
        return ended - began
    assert isinstance(began, torch.cuda.Event) and isinstance(ended, torch.cuda.Event)
    return began.elapsed_time(ended) / 1e3


def median_of_others(seconds: list[float], rank: int) -> float:
    return statistics.median(seconds[:rank] + seconds[rank + 1 :])


def slow_ranks(seconds: list[float]) -> set[int]:
    return {rank for rank, own in enumerate(seconds) if own > SLOW * median_of_others(seconds, rank)}
