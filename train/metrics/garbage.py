"""Python's cycle collector, run between steps only."""

import contextlib
import gc
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def collected_between_steps() -> Iterator[Callable[[int], int]]:
    """Switch automatic collections off, and yield the function that collects up to a generation, 0 to 2.

    A collection in the middle of a step stops one rank, and so all ranks, for tens of milliseconds. Objects made before
    this (the model, the modules) are left out of every collection.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield gc.collect
    finally:
        gc.enable()
        gc.unfreeze()
