"""Requests to stop a run: a signal, the STOP file, --stop-after, or a dead launcher.

The signals are SIGTERM, SIGINT, SIGUSR1 and SIGHUP, unless nohup has SIGHUP ignored. One rank notices a request and all
act on it: the loop adds up `wanted()` in each step's one all-reduce, so that every rank stops after the same step.
"""

import signal
import time
from pathlib import Path
from types import FrameType

from common.errors import writing_to
from common.files import remove
from train.config import parse_duration
from train.processes import parent_watch

FILE_NAME = "STOP"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
SECONDS_BETWEEN_CHECKS = 1.0  # of the file system, which may be shared and slow


def file_exists(path: Path) -> bool:
    """Return whether the file exists; False if the file server fails now, since the caller checks again later."""
    try:
        return path.exists()
    except OSError:
        return False


class StopRequests:
    """Notices requests to stop between entry and exit; `reason` is None until there is one.

    On exit the previous signal handlers come back. `run_dir` None: no STOP file is looked for. `after`: a duration in
    the form of --stop-after, counted from `started`, a reading of time.perf_counter().
    """

    def __init__(self, run_dir: Path | None, *, is_main: bool, after: str | None = None, started: float = 0.0) -> None:
        self.reason: str | None = None
        self._after = after
        self._deadline = None if after is None else started + parse_duration(after)
        self._file = None if run_dir is None else run_dir / FILE_NAME
        self._is_main = is_main
        self._next_check = 0.0

    def __enter__(self) -> "StopRequests":
        handled = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._handle) for number in handled}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def wanted(self) -> bool:
        """Return whether this rank has been asked to stop. Cheap enough for every step."""
        if self.reason is None and time.monotonic() >= self._next_check:
            self._next_check = time.monotonic() + SECONDS_BETWEEN_CHECKS
            if self._is_main and self._file is not None and file_exists(self._file):
                self.reason = f"{FILE_NAME} file"
            elif self._is_main and self._deadline is not None and time.perf_counter() >= self._deadline:
                self.reason = f"--stop-after {self._after}"
            elif parent_watch.is_gone():
                self.reason = "launcher died"
        return self.reason is not None

    def remove_file(self) -> None:
        """Remove the STOP file, so that the next start runs. For rank 0."""
        if self._file is not None:
            with writing_to(self._file):
                remove(self._file)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.reason = self.reason or signal.Signals(number).name
