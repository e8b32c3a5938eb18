"""Requests to stop: SIGTERM, SIGINT, SIGUSR1, SIGHUP (unless nohup has it ignored), the STOP file, a dead launcher, and
the end of the time that --stop-after gives.

A request is noticed by one rank and acted on by all: the loop adds `wanted()` up in each step's one
all-reduce, so that every rank stops after the same step.
"""

import signal
import time
from pathlib import Path
from types import FrameType, TracebackType

from common.errors import writing_to
from train.config_checks import parse_duration
from train.processes import parent_watch

FILE_NAME = "STOP"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
SECONDS_BETWEEN_LOOKS = 1.0  # at the file system, which may be shared and slow


def is_there(path: Path) -> bool:
    """Does the file exist? Not for now, where a file server stumbles: the next look may come through."""
    try:
        return path.exists()
    except OSError:
        return False


class StopRequests:
    """Install with `with`; the previous handlers come back at the end. `reason` is None until there is one.

    `run_dir` None: there is no file to look for. `after`: a duration as --stop-after has it, from the moment `started`
    of time.perf_counter().
    """

    def __init__(self, run_dir: Path | None, *, is_main: bool, after: str | None = None, started: float = 0.0) -> None:
        self.reason: str | None = None
        self._after = after
        self._deadline = None if after is None else started + parse_duration(after)
        self._file = None if run_dir is None else run_dir / FILE_NAME
        self._is_main = is_main
        self._next_look = 0.0

    def __enter__(self) -> "StopRequests":
        heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._handle) for number in heard}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def wanted(self) -> bool:
        """Has anything asked this rank to stop? Cheap enough for every step."""
        if self.reason is None and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + SECONDS_BETWEEN_LOOKS
            if self._is_main and self._file is not None and is_there(self._file):
                self.reason = f"{FILE_NAME} file"
            elif self._is_main and self._deadline is not None and time.perf_counter() >= self._deadline:
                self.reason = f"--stop-after {self._after}"
            elif parent_watch.is_gone():
                self.reason = "launcher died"
        return self.reason is not None

    def remove_file(self) -> None:
        """So that the next start runs. For rank 0."""
        if self._file is not None:
            with writing_to(self._file):
                self._file.unlink(missing_ok=True)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.reason = self.reason or signal.Signals(number).name
