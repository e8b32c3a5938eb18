"""The run's reports: each record goes to metrics.jsonl and W&B and, as one line, to the console and log.txt.

A row that cannot be written, as on a full disk, is kept and written later. Rank 0 alone sees the error. `make_durable`
raises it on every rank if it is still so when a checkpoint is to be saved.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import writing_to
from train.metrics.line_file import LineFile
from train.metrics.rows import KEPT_FILES, METRICS_FILE, SAMPLES_FILE, Row, Seal, restore_rows, row_of

if TYPE_CHECKING:  # these import torch, which costs curves.py seconds
    from train.evals.samples import Sample
    from train.metrics.wandb_process import Tracking
    from train.processes.group import ProcessGroup
    from train.processes.stop_requests import StopRequests

NONFINITE_FILE = "nonfinite.jsonl"
LOG_FILE = "log.txt"


class RunLogger:
    """The reports of rank 0; on other ranks every method does nothing.

    Opening drops the rows after `step`. A fresh start (`step` None) drops every row, since they come from an attempt
    that ended before its first checkpoint. `seals` describe the rows at that checkpoint (train/metrics/rows.py); from
    then on `self.seals` are those of the last `make_durable`. `stop_requests` gets a request when a row cannot be
    written; None: the run goes on, to see whether a save can be. `tracking` is the W&B run, set by the caller; None: no
    tracking.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        step: int | None,
        group: ProcessGroup,
        stop_requests: StopRequests | None,
        seals: Mapping[str, Seal] | None = None,
    ) -> None:
        self._run_dir = run_dir
        self._group = group
        self._stop_requests = stop_requests
        self._files: dict[str, LineFile] = {}
        self._is_behind = False  # some line is not written yet
        self.tracking: Tracking | None = None
        self.remarks: list[str] = []  # on rank 0: damage that was found
        self.seals: dict[str, Seal] = {}

        def open_files() -> list[list[Row]]:
            with writing_to(run_dir), contextlib.ExitStack() as undo:
                undo.callback(self._close)
                kept = []
                for name in KEPT_FILES:
                    rows, content, remark = restore_rows(run_dir / name, step, (seals or {}).get(name))
                    self._files[name] = LineFile(run_dir / name, content)
                    self.remarks += [] if remark is None else [remark]
                    kept.append(rows)
                self._file(METRICS_FILE).open()
                self._file(LOG_FILE).open()
                undo.pop_all()
            return kept

        rows, samples = group.on_main(open_files)
        self.validated_steps = {row["step"] for row in rows if "val_loss" in row}
        self.scored_steps = {row["step"] for row in rows if "hellaswag_acc" in row}
        self.sampled_steps = {row["step"] for row in samples}

    def log(self, text: str) -> None:
        """Write text for people to the console and log.txt."""
        if self._group.is_main:
            self._print(text)
            self._write(LOG_FILE, text)

    def _print(self, text: str) -> None:
        try:
            print(text, flush=True)
        except OSError as error:  # a closed pipe or terminal is no reason to lose a run
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            self._write(LOG_FILE, f"warning: the console is gone ({error}); this file goes on")

    def _file(self, name: str) -> LineFile:
        return self._files.setdefault(name, LineFile(self._run_dir / name))

    def _write(self, name: str, line: str) -> None:
        """Write a line at once, or keep it if the disk fails now."""
        assert name not in KEPT_FILES or row_of(name, line.encode()) is not None, "a restart would take it for damage"
        try:
            self._file(name).add(line)
        except OSError as error:
            if self._stop_requests is not None:
                self._stop_requests.reason = self._stop_requests.reason or f"{name} could not be written"
            elif not self._is_behind:
                warning = f"{self._run_dir / name}: cannot be written now ({error}); its lines are kept until it can"
                print(f"warning: {warning}", file=sys.stderr, flush=True)
            self._is_behind = True

    def row(self, row: Row) -> None:
        """Write a record for programs, and its line for people."""
        if self._group.is_main:
            self._write(METRICS_FILE, json.dumps(row))
            self.log(line_of(row))
            if self.tracking is not None:
                self.tracking.row(row)

    def samples(self, row: Row) -> None:
        """Write a step's samples to samples.jsonl and, as lines, for people."""
        if not self._group.is_main:
            return
        samples: list[Sample] = row["samples"]
        row = row | {"samples": [asdict(sample) for sample in samples]}
        self._write(SAMPLES_FILE, json.dumps(row))
        for sample in samples:
            self.log(f"step {row['step']:>7}  sample {json.dumps(sample.prompt + sample.text)}{note_of(row)}")
        if self.tracking is not None:
            self.tracking.row(row)

    def note_nonfinite(self, row: dict[str, Any]) -> None:
        """Record a step that was not finite and its sequences. Such rows are never dropped."""
        if self._group.is_main:
            self._write(NONFINITE_FILE, json.dumps(row))

    def make_durable(self) -> None:
        """Flush all rows to the disk, so that they survive a crash of the machine. Collective.

        Call before each checkpoint and at the end. Raise InputError on every rank if a row could not be written.
        """
        self._group.on_main(self._synchronize)

    def _synchronize(self) -> None:
        with writing_to(self._run_dir):
            for file in self._files.values():
                file.flush()
        self._is_behind = False
        self.seals |= {name: self._files[name].seal for name in KEPT_FILES}

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.tracking is not None and kind is None:
            self.tracking.close(exit_code=0)
        elif self.tracking is not None:
            self.tracking.leave()
        self._close()

    def _close(self) -> None:
        for file in self._files.values():
            file.close()


def line_of(row: dict[str, Any]) -> str:
    """Return a record as one line in fixed columns."""
    if "val_loss" in row:
        loss = with_error(row["val_loss"], row["val_loss_stderr"])
        return f"step {row['step']:>7}  val loss {loss}  bits/byte {row['val_bits_per_byte']:.4f}{note_of(row)}"
    if "hellaswag_acc" in row:
        acc, acc_norm = (
            with_error(row[f"hellaswag_{name}"], row[f"hellaswag_{name}_stderr"]) for name in ("acc", "acc_norm")
        )
        text = f"step {row['step']:>7}  hellaswag acc {acc}  acc_norm {acc_norm}  of {row['hellaswag_items']:,}"
        return text + note_of(row)
    mfu = "    -" if row["mfu"] is None else f"{row['mfu']:5.1%}"
    loss = "     nan" if row["loss"] is None else f"{row['loss']:8.4f}"
    norm = "skipped" if row["grad_norm"] is None else f"{row['grad_norm']:7.3f}"
    return (
        f"step {row['step']:>7}  loss {loss}  lr {row['lr']:.2e}  norm {norm}  "
        f"{row['step_seconds'] * 1e3:8.1f} ms  {row['tokens_per_second']:>11,.0f} tok/s  mfu {mfu}  "
        f"left {duration(row['eta_seconds'])}"
    )


def note_of(row: dict[str, Any]) -> str:
    return "  (mean of the weights)" if "averaged" in row else ""


def with_error(value: float | None, stderr: float | None) -> str:
    """Return a value with four decimals and its standard error, if it has one."""
    return "nan" if value is None else f"{value:.4f}" + ("" if stderr is None else f" +- {stderr:.4f}")


def duration(seconds: float) -> str:
    """Return seconds as 4:05 (minutes) or 27:04:05 (hours)."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}"
