"""A run that hangs ends, and says why: every rank's stacks in RUN/hang, the silent rank and its host by name.

A thread of each rank counts the seconds since the loop last said where it is. At the limit it writes this rank's
report, which is also what calls the other ranks to write theirs; the lowest rank that is there then says the verdict,
and all leave. The process groups' own time-outs are the back-up: they strike a minute later and name nobody.
"""

import contextlib
import faulthandler
import json
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

from common.errors import InputError
from common.files import write_atomically
from train.config import ParallelConfig
from train.metrics.logger import LOG_FILE
from train.processes import flight_recorder
from train.processes.group import ProcessGroup
from train.processes.stop_requests import is_there
from train.run.directory import RunDirectory

FOLDER = "hang"
VERDICT_FILE = "verdict.txt"
STDERR = 2
MOST_NAMED = 16  # ranks, in one line
GRACE_SECONDS = 30.0  # for the other ranks' reports: a network file system may show a new file late
LONGEST_TICK_SECONDS = 10.0  # between looks, which are one file's status on a file system that may be shared


class Watchdog:
    """Watches from entry to exit. The limit is the long one until `expect_steps`. Collective to enter.

    Only time that the watching thread lived through is counted: a process that was suspended, or a laptop that was
    closed, goes on where it was.
    """

    def __init__(self, limits: ParallelConfig, group: ProcessGroup, directory: RunDirectory) -> None:
        self._group = group
        self._directory = directory
        self._limits = limits
        self._limit_seconds = limits.init_timeout_seconds
        self._beats = 0
        self._where = "set-up"
        self._stop = threading.Event()

    def __enter__(self) -> "Watchdog":
        self._folder = self._directory.path / FOLDER / f"attempt_{self._directory.attempt}"
        # One of the same number can only be left over from before somebody removed status.json.
        self._group.on_main(lambda: shutil.rmtree(self._folder, ignore_errors=True))
        self.hosts = self._group.gather(socket.gethostname())
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()  # for ever if it strikes: the process ends with it
        if kind is not None and is_there(self._folder / VERDICT_FILE):
            os._exit(1)  # the others struck while this rank was stopped: what they found stands

    def heartbeat(self, where: str | None = None) -> None:
        """The main thread has come to `where` (None: a bit further on in the same place).

        Every rank must come to as many places in the same order: who has come to fewest is furthest behind.
        """
        self._where = where or self._where
        self._beats += 1

    def expect_steps(self) -> None:
        """The first step is done: from now on silence may last --parallel.timeout-seconds."""
        self._group.set_timeout(self._limits.timeout_seconds)
        self._limit_seconds = self._limits.timeout_seconds

    def _watch(self) -> None:
        seen, silent_seconds = -1, 0.0
        before = time.monotonic()
        while not self._stop.wait(tick_seconds := min(self._limit_seconds / 20, LONGEST_TICK_SECONDS)):
            now = time.monotonic()
            silent_seconds += min(now - before, 2 * tick_seconds)
            before = now
            if self._beats != seen:
                seen, silent_seconds = self._beats, 0.0
            if silent_seconds > self._limit_seconds or (self._group.world > 1 and is_there(self._folder)):
                self._leave(silent_seconds)

    def _leave(self, silent_seconds: float) -> None:
        grace_seconds = min(GRACE_SECONDS, self._limit_seconds)
        # Whatever hangs in here (a file server, the GPU's driver), this ends the process without Python's help.
        faulthandler.dump_traceback_later(2 * grace_seconds + GRACE_SECONDS, exit=True, file=STDERR)
        try:
            self._report(silent_seconds)
            reports = self._gather(grace_seconds)
            if min(reports) == self._group.rank:
                self._log(f"hang: {verdict(reports, self.hosts)}; every rank's stacks are in {self._folder}")
            wait_for(self._folder / VERDICT_FILE, grace_seconds)  # launchers kill the rest when the first process exits
        finally:
            if sys.exc_info()[0] is not None:
                traceback.print_exc()
            # The way out of an error: a process group whose peers are gone cannot be torn down.
            os._exit(1)

    def _report(self, silent_seconds: float) -> None:
        """rank_00003.txt: a line of JSON, then every thread's stack; beside it what the collectives were."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"rank_{self._group.rank:05}.txt"
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            stacks = file.read()
        report = {
            "rank": self._group.rank,
            "host": self.hosts[self._group.rank],
            "pid": os.getpid(),
            "beats": self._beats,
            "where": self._where,
            "silent_seconds": round(silent_seconds, 1),
            "collectives": None,
        }
        write_atomically(path, f"{json.dumps(report)}\n{stacks}")  # first: the recorder asks a GPU that may not answer
        try:
            report["collectives"] = flight_recorder.num_collectives(path)
        except (OSError, RuntimeError, ValueError) as error:
            print(f"train: the flight recorder has nothing to say: {error}", file=sys.stderr, flush=True)
            return
        write_atomically(path, f"{json.dumps(report)}\n{stacks}")
        flight_recorder.write_for_torchfrtrace(self._folder, self._group.rank)

    def _gather(self, seconds: float) -> dict[int, dict[str, Any]]:
        """The reports, by rank, that are there when all are complete or when `seconds` are over."""
        end = time.monotonic() + seconds
        while True:
            is_over = time.monotonic() > end
            reports = read_reports(self._folder)
            num_complete = sum(report["collectives"] is not None for report in reports.values())
            if num_complete == self._group.world or is_over:
                return reports
            time.sleep(seconds / 100)

    def _log(self, text: str) -> None:
        print(f"train: {text}", file=sys.stderr, flush=True)
        with contextlib.suppress(InputError, OSError):  # a full disk for one, which may still take the others
            self._directory.fail(text)
        with contextlib.suppress(OSError), (self._directory.path / LOG_FILE).open("a", encoding="utf-8") as log:
            log.write(text + "\n")
        write_atomically(self._folder / VERDICT_FILE, text + "\n")


def read_reports(folder: Path) -> dict[int, dict[str, Any]]:
    """The first line of each rank's report, by rank."""
    found = {}
    for path in folder.glob("rank_*.txt"):
        with path.open(encoding="utf-8") as file:
            report = json.loads(file.readline())
        found[report["rank"]] = report
    return found


def verdict(reports: dict[int, dict[str, Any]], hosts: list[str]) -> str:
    """Who holds the others up, by the ranks' reports: who gave none, else who is furthest behind.

    Ranks at the same beat may still differ in how many collectives they have called: the others wait in one of those.
    """
    gone = [rank for rank in range(len(hosts)) if rank not in reports]
    if gone:
        place = named_place(reports[min(reports)])
        return f"{named_ranks(gone, hosts)} gave no sign, stopped or gone, while rank {min(reports)} waited at {place}"
    is_counted = all(report["collectives"] is not None for report in reports.values())
    reached = {rank: (report["beats"], report["collectives"] if is_counted else 0) for rank, report in reports.items()}
    last, first = min(reached.values()), max(reached.values())
    behind = [rank for rank in sorted(reached) if reached[rank] == last]
    place = named_place(reports[behind[0]])
    if last == first:
        return f"rank 0 on {hosts[0]} is at {place}" if len(hosts) == 1 else f"all ranks are at the same place, {place}"
    ahead = next(rank for rank in sorted(reached) if reached[rank] == first)
    verb = "is" if len(behind) == 1 else "are"
    ahead_place = named_place(reports[ahead])
    return f"{named_ranks(behind, hosts)} {verb} furthest behind, at {place}; rank {ahead} is at {ahead_place}"


def named_ranks(ranks: list[int], hosts: list[str]) -> str:
    names = [f"rank {rank} on {hosts[rank]}" for rank in ranks[:MOST_NAMED]]
    return ", ".join(names) + (f" and {len(ranks) - MOST_NAMED} more" if len(ranks) > MOST_NAMED else "")


def named_place(report: dict[str, Any]) -> str:
    count = "unknown" if report["collectives"] is None else report["collectives"]
    return f'"{report["where"]}" for {report["silent_seconds"]:.0f} s (collectives called: {count})'


def wait_for(path: Path, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not is_there(path) and time.monotonic() < end:
        time.sleep(seconds / 100)
