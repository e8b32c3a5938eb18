"""Detects that torchrun's agent, which started this process, has died: nothing else ends its workers then.

Before the process group exists there is nothing to save, and the process exits. After that, stop_requests.py stops the
run with a checkpoint.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

from common.errors import print_interrupts_in_one_line

SECONDS_BETWEEN_CHECKS = 1.0

_launcher_pid: int | None = None


def remember() -> None:
    """Remember the launcher's pid. Call this before slow imports: the launcher may die during them, or Ctrl-C come."""
    print_interrupts_in_one_line("train")
    global _launcher_pid
    if _launcher_pid is None and "TORCHELASTIC_RUN_ID" in os.environ:
        _launcher_pid = os.getppid()


def is_gone() -> bool:
    """Return whether the launcher has died; False if there was none."""
    return _launcher_pid is not None and os.getppid() != _launcher_pid


@contextlib.contextmanager
def exit_with_launcher() -> Iterator[None]:
    """Exit with status 1 if the launcher dies inside this context: torch would wait for its store for half an hour."""
    is_over = threading.Event()
    threading.Thread(target=_watch, args=(is_over,), name="launcher", daemon=True).start()
    try:
        yield
    finally:
        is_over.set()


def _watch(is_over: threading.Event) -> None:
    while not is_over.is_set():
        if is_gone():
            print("train: the launcher died; leaving", file=sys.stderr, flush=True)
            os._exit(1)
        is_over.wait(SECONDS_BETWEEN_CHECKS)
