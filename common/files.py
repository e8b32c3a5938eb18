"""Files that are either whole or absent: write beside, fsync, rename."""

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]  # of the code that runs: a checkout, or a job's copy of one


def fsync_directory(directory: Path) -> None:
    """Make the renames and new names inside `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(path: Path) -> Path:
    """A name that no other process has, on whatever host."""
    return path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")


def write_atomically(path: Path, content: str) -> None:
    """Replace `path` by `content` so that no reader, and no crash, ever sees half of it.

    Where that fails, as on a full disk, nothing is left beside it, and the OSError names `path` (a failed write's own
    names no file).
    """
    temporary = _beside(path)
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
    """`write_atomically` of bytes as they come, without holding them; their hex sha256."""
    digest = hashlib.sha256()
    temporary = _beside(path)
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
    """`write_atomically` of `value` as indented JSON."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=True) + "\n")


def sha256_of_file(path: Path) -> str:
    """Hex sha256 of a file's bytes, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
