"""Files that are either whole or absent: they are written under another name, fsynced and renamed."""

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


def _temporary_name(path: Path) -> Path:
    """Return a hidden name beside `path` that no other process uses, on any host."""
    return path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")


def write_atomically(path: Path, content: str) -> None:
    """Replace `path` by `content` so that no reader and no crash ever sees half of it.

    If that fails, as on a full disk, no temporary file stays, and the OSError names `path`: that of a failed write
    names no file.
    """
    temporary = _temporary_name(path)
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        fsync_directory(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_blocks_atomically(path: Path, blocks: Iterable[bytes | memoryview]) -> str:
    """Write blocks of bytes like `write_atomically`, one block in memory at a time, and return their hex sha256."""
    digest = hashlib.sha256()
    temporary = _temporary_name(path)
    with temporary.open("wb") as file:
        for block in blocks:
            digest.update(block)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    fsync_directory(path.parent)
    return digest.hexdigest()


def write_json_atomically(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, like `write_atomically`."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=True) + "\n")


def sha256_of_file(path: Path) -> str:
    """Return the hex sha256 of a file's bytes, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
