"""The run directory's own files: config.json, provenance.json, status.json, the tokenizer and the lock."""

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
from typing import Any

import numpy
import torch

from common.errors import InputError, reading_from, writing_to
from common.files import ROOT, write_json_atomically
from common.reading import read_own_json
from data_prep.tokenizer import load_tokenizer
from model.checkpoint import list_checkpoints
from model.config import with_current_names
from train.config import Config
from train.processes.group import ProcessGroup
from train.processes.ranks import slurm_job
from train.run.lock import RunLock

# Flags that identify a run, --model and --optim with all below them. All others (processes, micro-batch, compilation,
# intervals) may change on the way.
IDENTITY = (
    *("--seed", "--from-checkpoint", "--model", "--train.seq-len", "--train.steps", "--train.batch-tokens"),
    *("--train.dtype", "--optim"),
)

STATUS_FILE = "status.json"
SNAPSHOT_FILE = "SNAPSHOT.json"
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
        self._state = "running"  # as in status.json
        self._ended = False
        self._lock = RunLock(self.path)
        self._claimed = self._lock.text  # after entry: the text of rank 0's lock, on every rank
        self.found: dict[str, Any] = {}  # on rank 0 only, like provenance
        self.provenance: dict[str, Any] = {}

    def __enter__(self) -> "RunDirectory":
        self._claimed, self.attempt, self._step = self._group.on_main(self._claim)
        try:
            self._group.on_all(self._check_shared)
        except InputError as error:
            self.__exit__(InputError, error, None)
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
        """Raise InputError if the directory holds another run, or a run with --no-resume. Write nothing."""
        path = self.path / "config.json"
        with reading_from(path):
            if not path.is_file() or not list_checkpoints(self.path):
                return  # there is no other run to protect
            text = path.read_bytes()
        try:
            content = json.loads(text)
            old, old_data, self.found = content["config"], content["data"], content["found"]
            old = old | {"model": with_current_names(old["model"])}
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: damaged ({error}); the run cannot be compared with these settings") from error
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

    def record(self, measured: dict[str, Any]) -> None:
        """Keep in config.json what set-up measured (parallel/auto_micro_batch.py), for later attempts."""
        self.found = measured
        self._group.on_main(self._write_config)

    def forget(self) -> None:
        """Drop from config.json what `record` kept. Not collective, since one rank may be alone with its error."""
        self.found = {}
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


def read_status(run_dir: Path) -> dict[str, Any] | None:
    """Return status.json: {state: running|stopped|done|failed, step, reason, attempt}; None before the first start."""
    return read_own_json(run_dir / STATUS_FILE)


def refuse_disagreement(config: Config, fingerprint: str, group: ProcessGroup) -> None:
    """Raise InputError on all ranks if settings, data or torch differ between ranks. Collective."""
    settings = flat(config.to_json()) | {"data fingerprint": fingerprint, "torch version": torch.__version__}
    first, *others = group.gather(settings)
    for rank, other in enumerate(others, start=1):
        differences = [
            f"{name} {other.get(name)} (rank 0: {value})" for name, value in first.items() if other.get(name) != value
        ]
        if differences:
            raise InputError(f"rank {rank} was started differently: {'; '.join(differences)}")


def flat(values: dict[str, Any], prefix: str = "--") -> dict[str, Any]:
    """Return nested settings by the names of their flags."""
    settings: dict[str, Any] = {}
    for name, value in values.items():
        flag = prefix + name.replace("_", "-")
        settings |= flat(value, flag + ".") if isinstance(value, dict) else {flag: value}
    return settings


def differing(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return the flag, new value and old value of each identity field that differs between two configurations.

    A field that a recorded configuration lacks, because the field is newer, has its default.
    """
    defaults = flat(Config().to_json())
    was, now = defaults | flat(old), defaults | flat(new)
    flags = [flag for prefix in IDENTITY for flag in sorted(was | now) if f"{flag}.".startswith(f"{prefix}.")]
    return [f"{flag} {now.get(flag)} (was {was.get(flag)})" for flag in flags if was.get(flag) != now.get(flag)]


def provenance(config: Config) -> dict[str, Any]:
    """Return what made this run: commit, uncommitted changes, command, host, versions, precision, threads."""
    cpu = platform.processor() or platform.machine()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
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
        "device": device,
        "dtype": config.train.dtype,
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
    }


def _code() -> dict[str, Any]:
    """Return the commit and changes of this checkout, or those recorded in a job's snapshot (launch/snapshot.py)."""
    try:
        record = json.loads((ROOT / SNAPSHOT_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        record = {"commit": _git("rev-parse", "HEAD"), "changes": _git("diff", "HEAD")}
    return {"code": str(ROOT), "commit": record["commit"], "changes": record["changes"]}


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *args], capture_output=True, text=True, errors="replace", check=False
        )
    except FileNotFoundError:  # no git on this machine
        return None
    return done.stdout.strip() if done.returncode == 0 else None
