"""Ends a run that hangs, writes every rank's stacks into RUN/hang and names the silent rank with its host.

A thread of each rank counts the seconds since the loop's last heartbeat. At the limit it writes this rank's report,
which makes the other ranks write theirs. The lowest rank with a report then writes the verdict, and all exit. The
process groups' own time-outs are the back-up: they come a minute later and name nobody.
"""

import contextlib
import faulthandler
import json
import os
import socket
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.files import move_aside, write_atomically
from train.config import ParallelConfig
from train.metrics.logger import LOG_FILE
from train.processes import flight_recorder
from train.processes.group import ProcessGroup
from train.processes.stop_requests import file_exists
from train.run.directory import RunDirectory

FOLDER = "hang"
VERDICT_FILE = "verdict.txt"
STDERR = 2
ALL_BEHIND = "all ranks are at the same place"
MAX_RANKS_NAMED = 16  # in one line
GRACE_SECONDS = 30.0  # to wait for the other ranks' reports: a network file system may show a new file late
MAX_TICK_SECONDS = 10.0  # between checks; each asks for one file on a file system that may be shared


class Watchdog:
    """Watches the main thread between entry (collective) and exit.

    Silence may last --parallel.init-timeout-seconds until `expect_steps`, then --parallel.timeout-seconds. Only time in
    which the watching thread runs is counted: a suspended process, or a closed laptop, simply continues afterwards.
    """

    def __init__(self, limits: ParallelConfig, group: ProcessGroup, directory: RunDirectory) -> None:
        self._group = group
        self._directory = directory
        self._limits = limits
        self._limit_seconds = limits.init_timeout_seconds
        self._beats = 0
        self._position = "set-up"
        self._stop = threading.Event()

    def __enter__(self) -> "Watchdog":
        self._folder = self._directory.path / FOLDER / f"attempt_{self._directory.attempt}"
        # A folder of this attempt's number is left over if status.json was removed or damaged.
        self._group.on_main(lambda: move_aside(self._folder) if self._folder.exists() else None)
        self.hosts = self._group.gather(socket.gethostname())
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop.set()
        self._thread.join()  # If the thread has found a hang, it ends the process and this never returns.
        if kind is not None and file_exists(self._folder / VERDICT_FILE):
            os._exit(1)  # The others gave the verdict while this rank was stopped: it stays as it is.

    def heartbeat(self, position: str | None = None) -> None:
        """Note that the main thread has reached `position`; None: that it has advanced in the same position.

        Every rank must send the same heartbeats in the same order: the rank with the fewest is furthest behind.
        """
        self._position = position or self._position
        self._beats += 1

    def expect_steps(self) -> None:
        """Note that the first step is done: from now on silence may last --parallel.timeout-seconds."""
        self._group.set_timeout(self._limits.timeout_seconds)
        self._limit_seconds = self._limits.timeout_seconds

    def _watch(self) -> None:
        last_beats, silent_seconds = -1, 0.0
        before = time.monotonic()
        while not self._stop.wait(tick_seconds := min(self._limit_seconds / 20, MAX_TICK_SECONDS)):
            now = time.monotonic()
            silent_seconds += min(now - before, 2 * tick_seconds)
            before = now
            if self._beats != last_beats:
                last_beats, silent_seconds = self._beats, 0.0
            if silent_seconds > self._limit_seconds or (self._group.world > 1 and file_exists(self._folder)):
                self._leave(silent_seconds)

    def _leave(self, silent_seconds: float) -> None:
        grace_seconds = min(GRACE_SECONDS, self._limit_seconds)
        # A file server or the GPU's driver may hang below: this ends the process without Python's help.
        faulthandler.dump_traceback_later(2 * grace_seconds + GRACE_SECONDS, exit=True, file=STDERR)
        try:
            self._report(silent_seconds)
            reports = self._gather(grace_seconds)
            if min(reports) == self._group.rank:
                self._log(f"hang: {verdict(reports, self.hosts)}; every rank's stacks are in {self._folder}")
            wait_for(self._folder / VERDICT_FILE, grace_seconds)  # Launchers kill the rest when one exits.
        finally:
            if sys.exc_info()[0] is not None:
                traceback.print_exc()
            # A process group whose peers are gone cannot be torn down, so the process exits hard.
            os._exit(1)

    def _report(self, silent_seconds: float) -> None:
        """Write rank_00003.txt, a line of JSON and every thread's stack, and beside it the last collectives."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            stacks = file.read()
        rank = self._group.rank
        report = {"rank": rank, "host": self.hosts[rank], "pid": os.getpid(), "beats": self._beats}
        path = self._folder / f"rank_{rank:05}.txt"
        report |= {"where": self._position, "silent_seconds": round(silent_seconds, 1), "collectives": None}
        write_atomically(path, f"{json.dumps(report)}\n{stacks}")  # First: the recorder may hang.
        try:
            report["collectives"] = flight_recorder.num_collectives(path)
        except (OSError, RuntimeError, ValueError) as error:
            print(f"train: the flight recorder could not be read: {error}", file=sys.stderr, flush=True)
            return
        write_atomically(path, f"{json.dumps(report)}\n{stacks}")
        flight_recorder.write_for_torchfrtrace(self._folder, rank)

    def _gather(self, seconds: float) -> dict[int, dict[str, Any]]:
        """Return the reports by rank, once all are complete or after `seconds`."""
        end = time.monotonic() + seconds
        while True:
            is_over = time.monotonic() > end  # before the last reading
            reports = read_reports(self._folder)
            if is_over or sum(report["collectives"] is not None for report in reports.values()) == self._group.world:
                return reports
            time.sleep(seconds / 100)

    def _log(self, text: str) -> None:
        print(f"train: {text}", file=sys.stderr, flush=True)
        with contextlib.suppress(InputError, OSError):  # A full disk may still take the next file.
            self._directory.fail(text)
        with contextlib.suppress(OSError), (self._directory.path / LOG_FILE).open("a", encoding="utf-8") as log:
            log.write(text + "\n")
        write_atomically(self._folder / VERDICT_FILE, text + "\n")


def read_reports(folder: Path) -> dict[int, dict[str, Any]]:
    """Return the first line of each rank's report, by rank."""
    reports = {}
    for path in folder.glob("rank_*.txt"):
        with path.open(encoding="utf-8") as file:
            report = json.loads(file.readline())
        reports[report["rank"]] = report
    return reports


def verdict(reports: dict[int, dict[str, Any]], hosts: list[str]) -> str:
    """Return which ranks hold the others up: those without a report, else those furthest behind.

    Ranks with equally many heartbeats may still differ in their collectives: then the others wait in one of these.
    """
    silent = [rank for rank in range(len(hosts)) if rank not in reports]
    if silent:
        waiting = f"rank {min(reports)} waited at {position_of(reports[min(reports)])}"
        return f"{named_ranks(silent, hosts)} gave no sign, stopped or gone, while {waiting}"
    is_counted = all(report["collectives"] is not None for report in reports.values())
    reached = {rank: (report["beats"], report["collectives"] if is_counted else 0) for rank, report in reports.items()}
    last, first = min(reached.values()), max(reached.values())
    behind = [rank for rank in sorted(reached) if reached[rank] == last]
    position = position_of(reports[behind[0]])
    if last == first:
        return f"{named_ranks([0], hosts)} is at {position}" if len(hosts) == 1 else f"{ALL_BEHIND}, {position}"
    ahead = next(rank for rank in sorted(reached) if reached[rank] == first)
    verb = "is" if len(behind) == 1 else "are"
    ahead_position = position_of(reports[ahead])
    return f"{named_ranks(behind, hosts)} {verb} furthest behind, at {position}; rank {ahead} is at {ahead_position}"


def named_ranks(ranks: list[int], hosts: list[str]) -> str:
    """Return the ranks with their hosts; of many, the first and the number of the others."""
    names = [f"rank {rank} on {hosts[rank]}" for rank in ranks[:MAX_RANKS_NAMED]]
    return ", ".join(names) + (f" and {len(ranks) - MAX_RANKS_NAMED} more" if len(ranks) > MAX_RANKS_NAMED else "")


def position_of(report: dict[str, Any]) -> str:
    """Return where a rank is, for how long, and how many collectives it has called."""
    count = "unknown" if report["collectives"] is None else report["collectives"]
    return f'"{report["where"]}" for {report["silent_seconds"]:.0f} s (collectives called: {count})'


def wait_for(path: Path, seconds: float) -> None:
    """Wait until the file exists, at most `seconds`."""
    end = time.monotonic() + seconds
    while not file_exists(path) and time.monotonic() < end:
        time.sleep(seconds / 100)
