"""Files that are either whole or absent: they are written under another name, fsynced and renamed."""

from __future__ import annotations  # launch/requeue.py runs on Python 3.9

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.errors import InputError, reading_from

ROOT = Path(__file__).resolve().parents[1]  # of the code that runs: a checkout, or a job's copy of one


def fsync_directory(directory: Path) -> None:
    """Make the new names inside `directory` survive a crash of the machine."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: str) -> None:
    """Replace `path` by `content` in UTF-8, like `write_blocks_atomically`."""
    write_blocks_atomically(path, [content.encode("utf-8")])


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


def write_json_atomically(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, like `write_atomically`."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=True) + "\n")


def read_own_json(path: Path) -> dict[str, Any] | None:
    """Return a JSON object that `write_json_atomically` wrote; None if the file does not exist.

    Such files are replaced whole, so one that does not parse is damaged: InputError.
    """
    with reading_from(path):
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: damaged ({error}); remove it") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: damaged (it holds no JSON object); remove it")
    return value


def sha256_of_json(value: Any) -> str:
    """Return the hex sha256 of a value's JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("ascii")).hexdigest()


def sha256_of_file(path: Path) -> str:
    """Return the hex sha256 of a file's bytes, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
