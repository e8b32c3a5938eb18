"""A run directory's own files: config.json, provenance.json, status.json, the tokenizer and the lock."""

import contextlib
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy
import torch

from common.errors import InputError, reading_from, writing_to
from common.files import ROOT, write_json_atomically
from data_prep.tokenizer import load_tokenizer
from model.checkpoint import list_checkpoints
from model.config import with_current_names
from train.config import Config
from train.processes.group import ProcessGroup
from train.processes.ranks import slurm_job
from train.run.lock import RunLock

# What makes two runs the same run. Everything else (processes, micro-batch, compilation, intervals) may change.
IDENTITY = (
    "seed",
    "from_checkpoint",
    "model",
    "train.seq_len",
    "train.steps",
    "train.batch_tokens",
    "train.dtype",
    "optim",
)

STATUS_FILE = "status.json"
SNAPSHOT_FILE = "SNAPSHOT.json"
SECONDS_TO_SEE = 30.0  # a network file system may show a new file late


class RunDirectory:
    """Claimed with `with`: locked, then `running` in status.json; at the end `failed` unless told otherwise.

    Only rank 0 writes, but for how a run failed: that says whichever rank met it. `forget` and `fail` are for one rank
    alone; the other methods are called by every rank, and raise InputError on every rank when rank 0 cannot write.
    """

    def __init__(self, config: Config, fingerprint: str, group: ProcessGroup) -> None:
        self.path = config.directory
        self._config = config
        self._fingerprint = fingerprint
        self._group = group
        self.attempt = 1
        self._step = 0
        self._state = "running"  # what status.json says
        self._ended = False
        self._lock = RunLock(self.path)
        self._claimed = self._lock.text  # rank 0's, on every rank once entered
        self.found: dict[str, Any] = {}  # known to rank 0, as is the next
        self.provenance: dict[str, Any] = {}

    def __enter__(self) -> "RunDirectory":
        self._claimed, self.attempt, self._step = self._group.on_main(self._claim)
        try:
            self._group.on_all(self._check_shared)
        except InputError as error:
            self.__exit__(InputError, error, None)
            raise
        return self

    def _check_shared(self) -> None:
        """Every rank must see rank 0's lock: a checkpoint is written by all of them into one directory."""
        end = time.monotonic() + SECONDS_TO_SEE
        while not self._sees_lock():
            if time.monotonic() > end:
                raise InputError(
                    f"{self.path}: {socket.gethostname()} does not see what rank 0 writes; share --run-dir"
                )
            time.sleep(0.1)

    def _sees_lock(self) -> bool:
        with reading_from(self.path):
            return self._lock.reads(self._claimed)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is not None and not self._ended:
                self._report_error(kind, error)
        except InputError:  # what ended the run is to be reported, most often the same full disk
            print(f"warning: {self.path / STATUS_FILE} still says {self._state}", file=sys.stderr)
        finally:
            if self._group.is_main:
                try:
                    self._lock.release()
                except OSError as fault:
                    if kind is None:
                        raise InputError(f"{self.path}: its lock cannot be given up ({fault}); remove it") from fault

    def _report_error(self, kind: type[BaseException], error: BaseException | None) -> None:
        """In status.json, by the rank that met it first: the others only meet that it has gone.

        An InputError all ranks meet together, and rank 0 says it.
        """
        if not self._group.is_main and issubclass(kind, InputError):
            return
        status = read_status(self.path)
        if status is not None and status["state"] == "failed" and status["attempt"] == self.attempt:
            return
        who = "" if self._group.is_main else f"rank {self._group.rank} on {socket.gethostname()}: "
        reason = str(error).strip().splitlines()
        self._write_status("failed", f"{who}{kind.__name__}: {reason[0] if reason else ''}")

    def _claim(self) -> tuple[str, int, int]:
        """Lock the directory and put its files in place; the lock's text, the attempt and the step it begins with."""
        with writing_to(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        with contextlib.ExitStack() as undo:
            undo.callback(self._lock.release)
            self.check_start()
            status = read_status(self.path)
            if status is not None:
                self.attempt, self._step = status["attempt"] + 1, status["step"]
            tokenizer = load_tokenizer(self._config.data.dir)
            self.provenance = provenance(self._config)
            self._write_config()
            self._write("provenance.json", self.provenance)
            with writing_to(self.path):
                tokenizer.save(self.path)
            self._write_status("running", None)
            undo.pop_all()
        return self._lock.text, self.attempt, self._step

    def check_start(self) -> None:
        """InputError if what is there is another run, or one that --no-resume does not want. Nothing is written."""
        path = self.path / "config.json"
        with reading_from(path):
            if not path.is_file() or not list_checkpoints(self.path):
                return  # nothing of another run to protect
            content = path.read_bytes()
        try:
            before = json.loads(content)
            old, old_data, self.found = before["config"], before["data"], before["found"]
            old = old | {"model": with_current_names(old["model"])}
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path}: damaged ({error}); the run cannot be compared with what was asked for"
            ) from error
        differences = differing(old, self._config.to_json())
        if old_data != self._fingerprint:
            differences.append(
                f"--data.dir holds other tokens (fingerprint {self._fingerprint[:12]}, was {old_data[:12]})"
            )
        if differences:
            raise InputError(
                f"{self.path}: is another run: {'; '.join(differences)}; "
                "choose another --run-dir, or give the values it began with"
            )
        if not self._config.resume:
            raise InputError(
                f"{self.path}: holds checkpoints; drop --no-resume to continue it, or choose another --run-dir"
            )

    def _write_config(self) -> None:
        content = {"config": self._config.to_json(), "data": self._fingerprint, "found": self.found}
        self._write("config.json", content)

    def record(self, found: dict[str, Any]) -> None:
        """Keep in config.json what set-up found out (parallel/auto_micro_batch.py), for later attempts."""
        self.found = found
        self._group.on_main(self._write_config)

    def forget(self) -> None:
        """Drop that again, from an error that this rank may be alone with: not collective, and rank 0's only."""
        self.found = {}
        if self._group.is_main:
            with contextlib.suppress(InputError):
                self._write_config()

    def report(self, step: int) -> None:
        """Note in status.json that the run lives and where it stands."""
        self._step = step
        self._group.on_main(lambda: self._write_status("running", None))

    def end(self, state: str, step: int, reason: str | None) -> None:
        """The run ended well: `done`, or `stopped` for a reason."""
        self._step = step
        self._group.on_main(lambda: self._write_status(state, reason))
        self._ended = True

    def fail(self, reason: str) -> None:
        """Any rank, alone: the run ends here and now. The lock is given up if it is this rank's."""
        self._write_status("failed", reason)
        self._lock.release()

    def _write_status(self, state: str, reason: str | None) -> None:
        status = {"state": state, "step": self._step, "reason": reason, "attempt": self.attempt}
        self._write(STATUS_FILE, status)
        self._state = state

    def _write(self, name: str, content: dict[str, Any]) -> None:
        """Only under our own lock: whoever was stopped, and taken for dead, must not spoil the run of who took over."""
        with writing_to(self.path):
            if self._lock.reads(self._claimed):
                write_json_atomically(self.path / name, content)


def read_status(run_dir: Path) -> dict[str, Any] | None:
    """status.json: {state: running|stopped|done|failed, step, reason, attempt}; None before the first start."""
    path = run_dir / STATUS_FILE
    with reading_from(path):
        try:
            status: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: damaged ({error}); remove it to go on") from error
    return status


def refuse_disagreement(config: Config, fingerprint: str, group: ProcessGroup) -> None:
    """InputError on every rank if any has other settings, other data or another torch than rank 0. Collective."""
    mine = flat(config.to_json()) | {"data fingerprint": fingerprint, "torch version": torch.__version__}
    first, *others = group.gather(mine)
    for rank, its in enumerate(others, start=1):
        found = [f"{name} {its.get(name)} (rank 0: {first[name]})" for name in first if its.get(name) != first[name]]
        if found:
            raise InputError(f"rank {rank} was started differently: {'; '.join(found)}")


def flat(values: dict[str, Any], prefix: str = "--") -> dict[str, Any]:
    """Nested settings by the names of their flags."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        flag = prefix + name.replace("_", "-")
        found |= flat(value, flag + ".") if isinstance(value, dict) else {flag: value}
    return found


def differing(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Each identity field that differs between two configurations: its flag, the new value and the old."""
    found = []
    for name in IDENTITY:
        was, now = _lookup(old, name), _lookup(new, name)
        pairs = {name: (was, now)}
        if isinstance(now, dict):
            keys = now.keys() | (was.keys() if isinstance(was, dict) else set())
            pairs = {f"{name}.{key}": (_lookup(was, key), now.get(key)) for key in sorted(keys)}
        for field, (before, after) in pairs.items():
            if before != after:
                found.append(f"--{field.replace('_', '-')} {after} (was {before})")
    return found


def _lookup(values: Any, name: str) -> Any:
    for key in name.split("."):
        values = values.get(key) if isinstance(values, dict) else None
    return values


def provenance(config: Config) -> dict[str, Any]:
    """What made this run: commit and uncommitted changes, command, host, versions, precision and threads."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join([sys.executable, *sys.argv]),
        "directory": str(Path.cwd()),
        **_code(),
        "host": socket.gethostname(),
        "job": slurm_job(os.environ),
        "world": int(os.environ.get("WORLD_SIZE", "1")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or platform.machine(),
        "dtype": config.train.dtype,
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
    }


def _code() -> dict[str, Any]:
    """Which code runs: a checkout's, or that of a job's snapshot (launch/snapshot.py), which lies in no repository."""
    try:
        record = json.loads((ROOT / SNAPSHOT_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"code": str(ROOT), "commit": _git("rev-parse", "HEAD"), "changes": _git("diff", "HEAD")}
    return {"code": str(ROOT), "commit": record["commit"], "changes": record["changes"]}


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *args], capture_output=True, text=True, errors="replace", check=False
        )
    except FileNotFoundError:  # no git on this machine
        return None
    return done.stdout.strip() if done.returncode == 0 else None
