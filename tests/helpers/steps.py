"""A function that a test calls before each step of a run."""

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

from train import loop


@contextlib.contextmanager
def before_each_step(function: Callable[[loop.Run], object]) -> Iterator[None]:
    """Call `function` with the run before each of its steps."""
    take_step = loop.take_step

    def call_and_step(run: loop.Run) -> loop.StepResult:
        function(run)
        return take_step(run)

    with mock.patch.object(loop, "take_step", call_and_step):
        yield
