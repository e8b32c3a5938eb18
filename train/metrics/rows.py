"""The rows of metrics.jsonl and samples.jsonl. Damage costs the damaged lines alone, and never goes unnoticed.

Each checkpoint's state.json keeps a seal of both files: their size and hash when it was begun.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import reading_from
from common.files import keep_aside, write_blocks_atomically
from common.reading import NATURAL, Form, is_there, misfit, open_regular, parse_json

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
KEPT_FILES = (METRICS_FILE, SAMPLES_FILE)
FLAGS = ("averaged", "hellaswag_pinned")  # keys of metrics rows whose values are true or false
SAMPLES_FORM = {"step": NATURAL, "samples": [{"prompt": str, "text": str}]}

Row = dict[str, Any]
Seal = dict[str, Any]  # {"bytes": size of the file, "sha256": of these bytes}


class Lines(NamedTuple):
    """A file's rows with their lines, and the numbers of its lines that hold no row."""

    rows: list[Row]
    lines: list[bytes]
    damaged: list[int]


def read_lines(path: Path) -> Lines:
    """Return the rows of a run's file; none if it does not exist.

    A last line without its end is no row and no damage: it is being written, or a kill cut it short.
    """
    return parse_lines(path.name, _content_of(path))


def parse_lines(name: str, content: bytes) -> Lines:
    rows, lines, damaged = [], [], []
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        row = row_of(name, line)
        if row is None:
            damaged.append(number)
        else:
            rows.append(row)
            lines.append(line + b"\n")
    return Lines(rows, lines, damaged)


def seal_of(content: bytes) -> Seal:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def restore_rows(path: Path, step: int | None, seal: Seal | None) -> tuple[list[Row], bytes, str | None]:
    """Rewrite a file with its rows up to `step`. Return them, the new content, and a line about damage or None.

    A file that is damaged, or not as `seal` says, is kept aside whole. `step` None drops every row: they come from an
    attempt that ended before its first checkpoint.
    """
    content = _content_of(path)
    rows, lines, damaged = parse_lines(path.name, content)
    last_step = -1 if step is None else step
    kept = [(row, line) for row, line in zip(rows, lines, strict=True) if row["step"] <= last_step]
    new = b"".join(line for _, line in kept)
    remark = None
    is_sealed = seal is None or seal_of(content[: seal["bytes"]]) == seal
    if step is not None and (damaged or not is_sealed):
        remark = f"{path}: not as it was written: {len(kept)} rows up to step {step} can be read"
        if damaged:
            remark += f", {len(damaged)} lines cannot (the first is line {damaged[0]})"
        if content:
            remark += f"; the file as it was is kept as {keep_aside(path).name}"
    if content or is_there(path):
        write_blocks_atomically(path, [new])
    return [row for row, _ in kept], new, remark


def _content_of(path: Path) -> bytes:
    if not is_there(path):
        return b""
    with open_regular(path) as file, reading_from(path):
        return file.read()


def row_of(name: str, line: bytes) -> Row | None:
    """Return the row in a line, None if there is none. A metrics row holds numbers and nulls, and the FLAGS."""
    try:
        row = parse_json(line)
    except ValueError:
        return None
    if not isinstance(row, dict):
        return None
    form = SAMPLES_FORM if name == SAMPLES_FILE else {key: _form_of(key) for key in row} | {"step": NATURAL}
    return row if misfit(row, form) is None else None


def _form_of(key: str) -> Form:
    return bool if key in FLAGS else (float, None)
