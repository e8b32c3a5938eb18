"""Files that are either whole or absent: they are written under another name, fsynced and renamed."""

from __future__ import annotations  # launch/requeue.py runs on Python 3.9

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]  # of the code that runs: a checkout, or a job's copy of one


def fsync_directory(directory: Path) -> None:
    """Make the new names inside `directory` survive a crash of the machine."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: str) -> str:
    """Replace `path` by `content` in UTF-8, like `write_blocks_atomically`; return its hex sha256.

    The bytes of a path that is not UTF-8, which Python holds as surrogates, are written as escapes.
    """
    return write_blocks_atomically(path, [content.encode("utf-8", "backslashreplace")])


def write_blocks_atomically(path: Path, blocks: Iterable[bytes | memoryview]) -> str:
    """Replace `path` by blocks of bytes so that no reader and no crash sees half of them; return their hex sha256.

    One block is in memory at a time. If the disk fails, no temporary file stays, and the OSError names `path`: that of
    a failed write names no file.
    """
    digest = hashlib.sha256()
    # A hidden name that no other process uses, on any host.
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            for block in blocks:
                digest.update(block)
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        fsync_directory(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    return digest.hexdigest()


def write_json_atomically(path: Path, value: Any) -> str:
    """Write `value` as indented JSON, like `write_atomically`; return the file's hex sha256."""
    return write_atomically(path, json.dumps(value, indent=2, ensure_ascii=True) + "\n")


def keep_aside(path: Path) -> Path:
    """Give a file the second name NAME.aside_N, the first that is free, so that a new file may replace it."""
    number = 1
    while True:
        aside = path.with_name(f"{path.name}.aside_{number}")
        try:
            os.link(path, aside)
            return aside
        except FileExistsError:
            number += 1


def remove(path: Path) -> None:
    """Remove a file, if there is one; move a directory of its name aside."""
    try:
        path.unlink(missing_ok=True)
    except IsADirectoryError:
        move_aside(path)


def move_aside(path: Path) -> Path:
    """Rename whatever has this name to the first free NAME.aside_N beside it, links themselves too; return that."""
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.aside_{number}")):
        number += 1
    path.rename(aside)
    return aside


def sha256_of_json(value: Any) -> str:
    """Return the hex sha256 of a value's JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("ascii")).hexdigest()


def sha256_of_file(path: Path) -> str:
    """Return the hex sha256 of a file's bytes, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
