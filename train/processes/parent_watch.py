"""torchrun's agent, which started this process. Nobody ends a worker whose launcher is gone: it leaves by itself.

Before the process group there is nothing to save: the process ends. After it, stop_requests.py stops the run.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

SECONDS_BETWEEN_LOOKS = 1.0

_pid: int | None = None


def remember() -> None:
    """Call this before the slow imports: the launcher may die in those seconds, and cannot be known afterwards."""
    global _pid
    if _pid is None and "TORCHELASTIC_RUN_ID" in os.environ:
        _pid = os.getppid()


def is_gone() -> bool:
    """Has the launcher died? False without one."""
    return _pid is not None and os.getppid() != _pid


@contextlib.contextmanager
def needed() -> Iterator[None]:
    """End the process (exit status 1) if the launcher dies in here: its store would be asked for half an hour."""
    over = threading.Event()
    threading.Thread(target=_watch, args=(over,), name="launcher", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _watch(over: threading.Event) -> None:
    while not over.is_set():
        if is_gone():
            print("train: the launcher died; leaving", file=sys.stderr, flush=True)
            os._exit(1)
        over.wait(SECONDS_BETWEEN_LOOKS)
