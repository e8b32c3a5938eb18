"""Python's garbage collector, run between steps only."""

import contextlib
import gc
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def collected_between_steps() -> Iterator[Callable[[int], int]]:
    """Switch automatic collections off; yield the function that collects up to a generation, 0 to 2.

    A collection in the middle of a step stops one rank, and so all ranks, for tens of milliseconds. Objects that exist
    on entry (the model, imported modules) are left out of every collection.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield gc.collect
    finally:
        gc.enable()
        gc.unfreeze()
