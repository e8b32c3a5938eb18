"""The run directory's own files: config.json, provenance.json, status.json, the tokenizer and the lock."""

import contextlib
import socket
import sys
import time
from pathlib import Path
from typing import Any

from common.errors import InputError, reading_from, writing_to
from common.files import write_json_atomically
from common.reading import is_there
from data_prep.tokenizer import load_tokenizer
from model.checkpoint import CHECKPOINTS, list_checkpoints, newest_sound
from train.config import Config
from train.metrics.logger import LOG_FILE
from train.metrics.rows import METRICS_FILE, read_lines
from train.processes.group import ProcessGroup
from train.processes.ranks import is_automatic_restart
from train.run.identity import CONFIG_FILE, recorded_run, refuse_another_run
from train.run.lock import FILE_NAME as LOCK_FILE
from train.run.lock import RunLock
from train.run.obstacles import clear_the_way, set_aside
from train.run.provenance import provenance
from train.run.status import STATUS_FILE, UNKNOWN_ATTEMPT, find_status, read_status

SECONDS_TO_SEE = 30.0  # a network file system may show a new file late


class RunDirectory:
    """A claimed run directory: as a context, locked and `running`; on exit `failed`, unless `end` was called.

    Only rank 0 writes, except that the rank with an error writes how the run failed. One rank alone may call `forget`
    and `fail`. Every rank calls the other methods, which raise InputError on every rank if rank 0 cannot write.
    """

    def __init__(self, config: Config, fingerprint: str, group: ProcessGroup) -> None:
        self.path = config.directory
        self._config = config
        self._fingerprint = fingerprint
        self._group = group
        self.attempt = 1
        self._step = 0
        self._begins_again = False  # --no-resume was given, and no checkpoint is sound
        self._state = "running"  # as in status.json
        self._ended = False
        self._lock = RunLock(self.path)
        self._claimed = self._lock.text  # after entry: the text of rank 0's lock, on every rank
        self._is_claimed = False
        self.measured: dict[str, Any] = {}  # on rank 0 only, like provenance and remarks
        self.provenance: dict[str, Any] = {}
        self.remarks: list[str] = []  # what was mended at the start, for the log

    def __enter__(self) -> "RunDirectory":
        try:
            self._claimed, self.attempt, self._step = self._group.on_main(self._claim)
            self._is_claimed = True
            self._group.on_all(self._check_shared)
        except BaseException as error:  # another rank may have been lost while this one claimed
            if self._is_claimed:
                self.__exit__(type(error), error, None)
            raise
        return self

    @property
    def step(self) -> int:
        """The step of the newest checkpoint, as in status.json."""
        return self._step

    def _check_shared(self) -> None:
        """Raise InputError unless this rank sees rank 0's lock: all ranks write checkpoints into one directory."""
        end = time.monotonic() + SECONDS_TO_SEE
        while True:
            with reading_from(self.path):
                if self._lock.reads(self._claimed):
                    return
            if time.monotonic() > end:
                raise InputError(
                    f"{self.path}: {socket.gethostname()} does not see what rank 0 writes; share --run-dir"
                )
            time.sleep(0.1)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if kind is not None and not self._ended:
                self._report_error(kind, error)
        except InputError:  # The error that ended the run matters more; often both are the same full disk.
            print(f"warning: {self.path / STATUS_FILE} still says {self._state}", file=sys.stderr)
        finally:
            if self._group.is_main:
                try:
                    self._lock.release()
                except OSError as fault:
                    if kind is None:
                        raise InputError(f"{self.path}: its lock cannot be given up ({fault}); remove it") from fault

    def _report_error(self, kind: type[BaseException], error: BaseException | None) -> None:
        """Write the error into status.json, if this rank is the first: later ranks only notice that others are gone.

        All ranks raise an InputError together, so rank 0 writes that one.
        """
        if not self._group.is_main and issubclass(kind, InputError):
            return
        with contextlib.suppress(InputError):
            status = read_status(self.path)
            if status is not None and status["state"] == "failed" and status["attempt"] == self.attempt:
                return
        prefix = "" if self._group.is_main else f"rank {self._group.rank} on {socket.gethostname()}: "
        first_line = str(error).strip().partition("\n")[0]
        self._write_status("failed", f"{prefix}{kind.__name__}: {first_line}")

    def _claim(self) -> tuple[str, int, int]:
        """Lock the directory and write its files; return the lock's text, the attempt and its first step."""
        with writing_to(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            was_locked = is_there(self.path / LOCK_FILE)
            self._lock.acquire()
        with contextlib.ExitStack() as undo:
            undo.callback(self._lock.release)
            status = find_status(self.path)  # a link to the file is read, before it is moved aside
            with writing_to(self.path):
                self.remarks = self._lock.remarks + clear_the_way(self.path)
            self.remarks += self.check_start(was_locked=was_locked)
            self._continue_from(status)
            if self._begins_again:
                self.remarks += self.give_up_progress()
            tokenizer = load_tokenizer(self._config.data.dir)
            self.provenance = provenance(self._config)
            self._write_config()
            self._write("provenance.json", self.provenance)
            with writing_to(self.path):
                tokenizer.save(self.path)
            self._write_status("running", None)
            undo.pop_all()
        self._is_claimed = True
        return self._lock.text, self.attempt, self._step

    def _continue_from(self, status: dict[str, Any] | None) -> None:
        """Take attempt and step from what status.json said; a damaged one is written again."""
        if status is not None and status["attempt"] == UNKNOWN_ATTEMPT:
            self.remarks.append(f"{status['reason']}; written again")
            status["attempt"] = 0
        if status is not None:
            self.attempt, self._step = status["attempt"] + 1, status["step"]

    def give_up_progress(self) -> list[str]:
        """Set checkpoints and rows aside, once status.json names none; return a line for each. On rank 0."""
        self._step = 0
        if is_there(self.path / STATUS_FILE):
            self._write_status("running", None)
        with writing_to(self.path):
            return set_aside(self.path)

    def check_start(self, *, was_locked: bool | None = None) -> list[str]:
        """Raise InputError if the directory holds another run, or progress that this start would lose. Write nothing.

        Return a line if this start will write config.json again. `was_locked`: an attempt before left its lock.
        """
        if not self._config.resume:
            self._begins_again = newest_sound(self.path)[0] is None
            if not self._begins_again and not is_automatic_restart():  # a restarted job goes on from what it saved
                raise InputError(
                    f"{self.path}: holds checkpoints; drop --no-resume to continue it, or choose another --run-dir"
                )
        if self._begins_again:
            return []
        recorded, remarks = recorded_run(self.path)
        if recorded is not None and list_checkpoints(self.path):
            self.measured = recorded.measured
            refuse_another_run(self.path, recorded, self._config, self._fingerprint)
            return remarks
        was_locked = is_there(self.path / LOCK_FILE) if was_locked is None else was_locked
        if (sign := sign_of_progress(self.path, was_locked=was_locked)) is not None:
            raise InputError(
                f"{self.path}: {sign}, but there is no checkpoint; put its {CHECKPOINTS} back, choose another "
                "--run-dir, or start afresh with --no-resume, which keeps the rows of before aside"
            )
        return []

    def _write_config(self) -> None:
        content = {"config": self._config.to_json(), "data": self._fingerprint, "found": self.measured}
        self._write(CONFIG_FILE, content)

    def record(self, measured: dict[str, Any]) -> None:
        """Keep in config.json what set-up measured (parallel/auto_micro_batch.py, attention.py), for later attempts."""
        self.measured = self.measured | measured
        self._group.on_main(self._write_config)

    def forget(self) -> None:
        """Drop from config.json the micro-batch that `record` kept. Not collective: one rank may be alone with it."""
        self.measured = {name: value for name, value in self.measured.items() if name == "attention"}
        if self._group.is_main:
            with contextlib.suppress(InputError):
                self._write_config()

    def report(self, step: int, trouble: str | None = None) -> None:
        """Write into status.json that the run is running, its newest checkpoint's step, and a trouble as the reason."""
        self._step = step
        self._group.on_main(lambda: self._write_status("running", trouble))

    def end(self, state: str, step: int, reason: str | None) -> None:
        """Write that the run ended in order: `done`, or `stopped` for a reason."""
        self._step = step
        self._group.on_main(lambda: self._write_status(state, reason))
        self._ended = True

    def fail(self, reason: str) -> None:
        """Write that the run failed, from any rank alone, and release the lock if this rank holds it."""
        self._write_status("failed", reason)
        self._lock.release()

    def _write_status(self, state: str, reason: str | None) -> None:
        self._write(STATUS_FILE, {"state": state, "step": self._step, "reason": reason, "attempt": self.attempt})
        self._state = state

    def _write(self, name: str, content: dict[str, Any]) -> None:
        """Write only while rank 0's lock is in place: after a takeover the directory belongs to another process."""
        with writing_to(self.path):
            if self._lock.reads(self._claimed):
                write_json_atomically(self.path / name, content)


def sign_of_progress(run_dir: Path, *, was_locked: bool) -> str | None:
    """Return what says that a run without checkpoints once had one; None for a new run, or one that never saved.

    An attempt writes status.json before its first row and its first line of log.
    """
    damage = ""
    try:
        status = read_status(run_dir)
        if status is not None:
            return f"{STATUS_FILE} says that step {status['step']} was saved" if status["step"] > 0 else None
    except InputError:
        damage = f" and {STATUS_FILE} is damaged"
    rows, _, damaged = read_lines(run_dir / METRICS_FILE)
    if damaged or any(row["step"] > 0 for row in rows):
        return f"{METRICS_FILE} has rows{damage}"
    if was_locked and is_there(run_dir / LOG_FILE):
        return f"an attempt left its {LOCK_FILE}{damage}"
    return None
