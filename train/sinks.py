"""Where reports go: the same record to metrics.jsonl, to W&B and, as one line, to the console and log.txt."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from data_prep.atomic import write_atomically
from data_prep.errors import InputError
from train.mesh import Mesh
from train.samples import Sample
from train.tracking import Tracking

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
KEPT_FILES = (METRICS_FILE, SAMPLES_FILE)
LOG_FILE = "log.txt"


class Sinks:
    """Rank 0's reports; on other ranks every method does nothing. Opening drops the rows after `step`.

    A fresh start (`step` None) drops every row: they are of an attempt that ended before its first checkpoint.
    `tracking` is W&B's run, set by whoever opened it; None for none.
    """

    def __init__(self, run_dir: Path, *, step: int | None, mesh: Mesh) -> None:
        self._metrics: TextIO | None = None
        self._log: TextIO | None = None
        self._samples = run_dir / SAMPLES_FILE
        self.tracking: Tracking | None = None

        def open_files() -> list[list[dict[str, Any]]]:
            kept = [drop_rows_after(run_dir / name, step) for name in KEPT_FILES]
            self._metrics = (run_dir / METRICS_FILE).open("a", encoding="utf-8")
            self._log = (run_dir / LOG_FILE).open("a", encoding="utf-8")
            return kept

        rows, samples = mesh.on_main(open_files)
        self.validated_steps = {row["step"] for row in rows if "val_loss" in row}
        self.sampled_steps = {row["step"] for row in samples}

    def say(self, text: str) -> None:
        """Text for people."""
        if self._log is not None:
            self._print(text)
            self._log.write(text + "\n")
            self._log.flush()

    def _print(self, text: str) -> None:
        try:
            print(text, flush=True)
        except OSError as error:  # a closed pipe or terminal is no reason to lose a run
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            assert self._log is not None
            self._log.write(f"warning: the console is gone ({error}); this file goes on\n")

    def row(self, row: dict[str, Any]) -> None:
        """A record for programs, and its line for people."""
        if self._metrics is not None:
            self._metrics.write(json.dumps(row) + "\n")
            self._metrics.flush()
            self.say(line_of(row))
            if self.tracking is not None:
                self.tracking.row(row)

    def samples(self, step: int, samples: list[Sample]) -> None:
        """What the model said at `step`, to samples.jsonl and to people."""
        row = {"step": step, "samples": [asdict(sample) for sample in samples]}
        if self._metrics is None:
            return
        with self._samples.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        for sample in samples:
            self.say(f"step {step:>7}  sample {json.dumps(sample.prompt + sample.text)}")
        if self.tracking is not None:
            self.tracking.row(row)

    def make_durable(self) -> None:
        """Rows up to here survive a crash of the machine; called before each checkpoint."""
        if self._metrics is not None:
            os.fsync(self._metrics.fileno())

    def __enter__(self) -> "Sinks":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.tracking is not None and kind is None:
            self.tracking.close(exit_code=0)
        elif self.tracking is not None:
            self.tracking.leave()
        for file in (self._metrics, self._log):
            if file is not None:
                file.close()


def drop_rows_after(path: Path, step: int | None) -> list[dict[str, Any]]:
    """Rewrite a file of rows with those up to `step`, and return them."""
    if not path.exists():
        return []
    rows = kept_rows(path, step)
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def kept_rows(path: Path, step: int | None) -> list[dict[str, Any]]:
    """The rows of a file up to `step`; a last line cut short by a kill is dropped with the later ones."""
    if step is None or not path.is_file():
        return []
    rows = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise InputError(f"{path}:{number}: damaged ({error}); mend or remove that line") from error
        if row["step"] <= step:
            rows.append(row)
    return rows


def line_of(row: dict[str, Any]) -> str:
    """One report in fixed columns."""
    if "val_loss" in row:
        stderr = "" if row["val_loss_stderr"] is None else f" +- {row['val_loss_stderr']:.4f}"
        return (
            f"step {row['step']:>7}  val loss {row['val_loss']:.4f}{stderr}  bits/byte {row['val_bits_per_byte']:.4f}"
        )
    mfu = "    -" if row["mfu"] is None else f"{row['mfu']:5.1%}"
    norm = "skipped" if row["grad_norm"] is None else f"{row['grad_norm']:7.3f}"
    return (
        f"step {row['step']:>7}  loss {row['loss']:8.4f}  lr {row['lr']:.2e}  norm {norm}  "
        f"{row['step_seconds'] * 1e3:8.1f} ms  {row['tokens_per_second']:>11,.0f} tok/s  mfu {mfu}  "
        f"left {duration(row['eta_seconds'])}"
    )


def duration(seconds: float) -> str:
    """4:05 (minutes) or 27:04:05 (hours)."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}"
