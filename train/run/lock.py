"""Lets one process write into a run directory: a lock file with host, pid, job and a heartbeat."""

from __future__ import annotations  # launch/requeue.py runs on Python 3.9

import fcntl
import json
import os
import socket
import stat
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.files import move_aside
from common.reading import misfit, parse_json
from train.processes.ranks import slurm_job

FILE_NAME = "lock.json"
FORM = {"host": str, "pid": range(1, 2**22 + 1), "started": (str, None), "job": (str, None)}  # pids as in proc(5)
HEARTBEAT_SECONDS = 10.0
SECONDS_BETWEEN_CHECKS = 1.0
DEAD_AFTER_SECONDS = 60.0  # A holder on another host counts as dead after so long without a heartbeat.


class RunLock:
    """The lock that rank 0 holds from `acquire` to `release`. Only a dead holder's lock is taken over.

    A holder on this host is alive while its pid runs and has the start time in the lock, since pids are reused. A
    holder on another host is alive while its heartbeats come: `acquire` waits up to a minute, by the file server's
    clock, to see one.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / FILE_NAME
        self._stop = threading.Event()
        self._changing = threading.Lock()
        self._now = 0.0
        self.remarks: list[str] = []  # what `acquire` moved away
        self._me: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": _start_time(os.getpid()),
            "job": slurm_job(os.environ),
        }
        self.text = json.dumps(self._me) + "\n"

    def acquire(self) -> None:
        """Take the lock; raise InputError with the holder's name if it is alive."""
        first: tuple[str, float, float] | None = None  # another host's lock: text, heartbeat, when it was first read
        while not self._create():
            if os.path.lexists(self._path) and not _is_file(self._path):
                self.remarks.append(f"{self._path}: not a lock; moved aside to {move_aside(self._path).name}")
                continue
            holder = _read_lock(self._path)
            if holder is None:
                continue  # It was released meanwhile.
            text, heartbeat = holder
            is_alive = _is_alive_here(text)
            # The clocks of hosts may differ by anything, so a heartbeat in the future counts for no longer than others.
            if is_alive is None and self._now - heartbeat < DEAD_AFTER_SECONDS:
                if first is None or first[0] != text:
                    first = text, heartbeat, time.monotonic()
                    print(f"{self._path}: waiting to see whether {_describe(text)} lives", file=sys.stderr, flush=True)
                is_alive = first[1] != heartbeat
                if not is_alive and time.monotonic() - first[2] < DEAD_AFTER_SECONDS:
                    time.sleep(SECONDS_BETWEEN_CHECKS)
                    continue
            if is_alive:
                raise InputError(
                    f"{self._path.parent}: another process is training here ({_describe(text)}); {self._path}"
                )
            self._remove_dead(text)
        threading.Thread(target=self._beat, name="lock-heartbeat", daemon=True).start()

    def release(self) -> None:
        """Remove the lock, if it is still ours."""
        self._stop.set()
        with self._changing:
            if self.reads(self.text):
                self._path.unlink()

    def reads(self, text: str) -> bool:
        """Return whether the lock file has this text."""
        holder = _read_lock(self._path)
        return holder is not None and holder[0] == text

    def _create(self) -> bool:
        """Write the lock; return False if there is one already."""
        mine = self._path.with_name(f".{FILE_NAME}.{self._me['host']}.{self._me['pid']}")
        try:
            mine.write_text(self.text, encoding="utf-8")
            self._now = mine.stat().st_mtime  # the file server's clock, which also dates heartbeats
            os.link(mine, self._path)  # atomic, together with the content, also on NFS
        except FileExistsError:
            return False
        finally:
            mine.unlink(missing_ok=True)
        return True

    def _remove_dead(self, text: str) -> None:
        """Remove the lock if it is still the dead one.

        Rivals take a file lock on the very file, so only one of them removes it, and none a lock made since. Where the
        file system has no file locks, a rival's new lock could be removed in the microseconds between look and removal.
        """
        try:
            with self._path.open("r+b") as file:
                with suppress(OSError):
                    fcntl.lockf(file, fcntl.LOCK_EX)
                is_same = os.fstat(file.fileno()).st_ino == self._path.stat().st_ino
                if is_same and file.read().decode("utf-8", "replace") == text:
                    self._path.unlink()
        except FileNotFoundError:
            pass  # a rival removed it

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            with self._changing:
                if self._stop.is_set():
                    return
                try:
                    is_ours = self._is_still_ours()
                except OSError:
                    continue  # The file server fails now; the next heartbeat may succeed.
            if not is_ours:
                # After a minute of silence another process took over: writing on would spoil its run.
                print(f"{self._path}: taken over by another process; leaving", file=sys.stderr, flush=True)
                os._exit(1)

    def _is_still_ours(self) -> bool:
        """Renew the heartbeat, or the lock if somebody removed it; return False if another process holds it."""
        if self.reads(self.text):
            os.utime(self._path)
            return True
        return not self._path.exists() and self._create()


def living_holder(run_dir: Path) -> str | None:
    """Return who trains in the run directory, as far as is known without waiting; None if nobody does."""
    holder = _read_lock(run_dir / FILE_NAME)
    if holder is None:
        return None
    text, heartbeat = holder
    is_alive = _is_alive_here(text)
    if is_alive is None:
        is_alive = abs(_file_time(run_dir) - heartbeat) < DEAD_AFTER_SECONDS
    return _describe(text) if is_alive else None


def _is_file(path: Path) -> bool:
    return stat.S_ISREG(path.lstat().st_mode)


def _read_lock(path: Path) -> tuple[str, float] | None:
    """Return a lock's text, whatever it holds, and its last heartbeat; None if there is no lock, or no file."""
    try:
        if _is_file(path):
            return path.read_bytes().decode("utf-8", "replace"), path.stat().st_mtime
    except (FileNotFoundError, NotADirectoryError):
        pass
    return None


def _file_time(folder: Path) -> float:
    """Return the time of the file server's clock, which dates heartbeats; of ours if the folder is not writable."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()


def _holder_in(text: str) -> dict[str, Any] | None:
    """Return the holder that a lock's text names; None if it is no lock of ours."""
    try:
        holder = parse_json(text)
    except ValueError:
        return None
    return holder if misfit(holder, FORM) is None else None


def _is_alive_here(text: str) -> bool | None:
    """Return whether the holder runs on this host; None, if it is elsewhere or unreadable: the heartbeat decides."""
    holder = _holder_in(text)
    if holder is None or holder["host"] != socket.gethostname():
        return None
    return holder["started"] is not None and _start_time(holder["pid"]) == holder["started"]


def _start_time(pid: int) -> str | None:
    """Return when a process of this host started, in the kernel's ticks; None if there is no such process.

    This is field 22 of /proc/PID/stat (proc(5)); a zombie counts as gone. Without /proc, return a constant while it
    runs.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        return None if fields[0] == "Z" else fields[19]
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "running"


def _describe(text: str) -> str:
    """Return the holder that a lock's text names, or the text's beginning if it is no lock of ours."""
    holder = _holder_in(text)
    if holder is None:
        return f"a lock that says {text[:40]!r}"
    job = f", job {holder['job']}" if holder["job"] else ""
    return f"pid {holder['pid']} on {holder['host']}{job}"
