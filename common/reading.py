"""Reads files whose content may be anything: damaged, planted, or no plain file at all.

A FIFO would block whoever opens it, a device does something, and a link may lead out of the folder that a person gave.
So every file that is not written in the same breath is opened here.
"""

from __future__ import annotations  # launch/requeue.py runs on Python 3.9

import hashlib
import io
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import InputError, reading_from

# What a JSON value must be: a type (float takes integers too), None, a range, a frozenset of strings, a tuple of forms
# of which one must fit, a list with the form of an array's entries, or a mapping with the forms of an object's keys.
Form = Any
NATURAL = range(2**63)
LARGEST_SMALL_FILE = 2**28  # bytes; a manifest of 100,000 shards has 2**25
KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def child(folder: Path, name: Any) -> Path:
    """Return folder / name. Raise InputError unless `name`, which a file gave, is the plain name of a file in it."""
    if not isinstance(name, str) or name in ("", ".", "..") or set("/\\") & set(name) or not name.isprintable():
        raise InputError(f"{folder}: a file in it names {name!r}, which is not a name inside this folder")
    return folder / name


def require_regular(path: Path, *, inside: Path | None = None) -> None:
    """Raise InputError unless `path` is a regular file that lies in the folder `inside` once links are followed."""
    with reading_from(path):
        mode = path.stat().st_mode
        if inside is not None:
            real, folder = os.path.realpath(path), os.path.realpath(inside)
            if os.path.commonpath([real, folder]) != folder:
                raise InputError(f"{path}: a link out of {inside}, to {real}; put the file itself there")
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: {KINDS.get(stat.S_IFMT(mode), 'no file')}, not a regular file; move it away")


def open_regular(path: Path, *, inside: Path | None = None) -> io.BufferedReader:
    """Open a file that passes `require_regular` for reading. Never blocks. Raise InputError if it cannot be opened."""
    require_regular(path, inside=inside)
    with reading_from(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # it may have become a FIFO since
    return os.fdopen(descriptor, "rb")


def read_regular(path: Path, *, inside: Path | None = None) -> bytes:
    """Return the bytes of a small file that passes `require_regular`. Raise InputError if it cannot be read."""
    with open_regular(path, inside=inside) as file, reading_from(path):
        content = file.read(LARGEST_SMALL_FILE + 1)
    if len(content) > LARGEST_SMALL_FILE:
        raise InputError(f"{path}: damaged (it has more than {LARGEST_SMALL_FILE} bytes)")
    return content


def sha256_of_regular(path: Path, *, inside: Path | None = None) -> str:
    """Return the hex sha256 of a file of any size that passes `require_regular`. Raise InputError on failure."""
    digest = hashlib.sha256()
    with open_regular(path, inside=inside) as file, reading_from(path):
        while block := file.read(2**18):
            digest.update(block)
    return digest.hexdigest()


def is_there(path: Path) -> bool:
    """Return whether anything has this name, be it a link to nowhere. Raise InputError if the disk does not say."""
    with reading_from(path):
        try:
            path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return False
    return True


def require_place(folder: Path, flag: str = "--out") -> None:
    """Raise InputError that names the flag, before any work, if `folder` is no directory and none can be made there."""
    place = folder
    while not is_there(place):
        place = place.parent
    with reading_from(folder):
        if not place.is_dir():
            fault = "is no directory"
        elif not os.access(place, os.W_OK | os.X_OK):
            fault = "is a directory that you may not write to"
        else:
            return
    raise InputError(f"{flag}: {place} {fault}; choose another place")


def parse_json(content: bytes | str) -> Any:
    """Return the value of a JSON text in UTF-8. Raise ValueError for anything else, however it is wrong."""
    try:
        return json.loads(content.decode("utf-8") if isinstance(content, bytes) else content)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def is_text(value: str) -> bool:
    """Return whether UTF-8 can write the text: JSON's escapes may also give half of a character."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def misfit(value: Any, form: Form, name: str = "it") -> str | None:
    """Return how a JSON value differs from its form, or None if it fits. Keys that the form does not name are free."""
    if isinstance(form, Mapping):
        if not isinstance(value, dict):
            return f"{name} is no JSON object"
        missing = next((key for key in form if key not in value), None)
        if missing is not None:
            return f"{name} has no key {missing!r}"
        return next((fault for key in form if (fault := misfit(value[key], form[key], repr(key)))), None)
    if isinstance(form, list):
        if not isinstance(value, list):
            return f"{name} is no JSON array"
        return next((fault for each in value if (fault := misfit(each, form[0], f"an entry of {name}"))), None)
    if isinstance(form, tuple):
        fits = any(misfit(value, each) is None for each in form)
    elif form is None or isinstance(value, bool):
        fits = value is None if form is None else form is bool
    elif isinstance(form, range):
        fits = isinstance(value, int) and value in form
    elif isinstance(form, frozenset):
        fits = isinstance(value, str) and value in form
    elif form is str:
        fits = isinstance(value, str) and is_text(value)
    else:
        fits = isinstance(value, (int, float) if form is float else form)
    return None if fits else f"{name} is {str(value)[:40]!r}"


def read_own_json(path: Path, form: Form = dict, *, remedy: str = "remove it") -> dict[str, Any] | None:
    """Return a JSON object that `write_json_atomically` wrote; None if nothing has this name.

    Such files are replaced whole, so one that is no plain file, does not parse or has another form than `form` is
    damaged: InputError with the remedy.
    """
    if not is_there(path):
        return None
    content = read_regular(path)
    try:
        value = parse_json(content)
    except ValueError as error:
        raise InputError(f"{path}: damaged ({str(error)[:200]}); {remedy}") from error
    fault = misfit(value, form)
    if fault is not None:
        raise InputError(f"{path}: damaged ({fault}); {remedy}")
    result: dict[str, Any] = value
    return result
