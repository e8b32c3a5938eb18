"""Input files: what --input names, what kind each is, and whether one changes while it is read."""

import gzip
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from common.byte_order import HEAD_BYTES, left_out, mark_bytes
from common.errors import InputError, reading_from
from common.reading import open_regular
from data_prep.pipeline import python_docs

NUM_NAMED = 3

FileState = tuple[int, int]
Kind = Literal["text", "jsonl", "parquet", "python-docs"]
KINDS: dict[str, tuple[Kind, bool]] = {
    ".txt": ("text", False),
    ".txt.gz": ("text", True),
    ".jsonl": ("jsonl", False),
    ".jsonl.gz": ("jsonl", True),
    ".parquet": ("parquet", False),
}
PYTHON_DOCS: dict[str, Callable[[], str]] = {
    "pydoc_data.topics": python_docs.topics,
    "standard library docstrings": python_docs.docstrings,
}


@dataclass(frozen=True)
class InputFile:
    """One input file.

    path: as on the command line, for reading and messages. name: for the manifest, the same on every machine.
    flag: the command-line flag that named it, for messages. text_start: the bytes of a byte-order mark before the text.
    """

    path: str
    name: str
    kind: Kind
    compressed: bool = False
    flag: str = "--input"
    text_start: int = 0


def find_files(inputs: tuple[str, ...], flag: str = "--input") -> tuple[list[InputFile], list[str]]:
    """Return (the files that `inputs` name, warnings). Files of a folder are in the order of their relative paths."""
    files: list[InputFile] = []
    warnings: list[str] = []
    with reading_from(flag):
        for name in inputs:
            path = Path(name)
            if name == "python-docs":
                files += [InputFile(title, title, "python-docs", flag=flag) for title in PYTHON_DOCS]
            elif path.is_dir():
                files_below, others = _files_below(path, flag)
                if not files_below:
                    raise InputError(f"{path}: no {', '.join(KINDS)} file in this folder ({flag})")
                files += files_below
                if others:
                    kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items()))
                    warnings.append(f"{path}: left out {others.total()} files of other kinds ({kinds})")
            elif not path.exists():
                raise InputError(f"{path}: no such file ({flag})")
            elif not path.is_file():
                raise InputError(f"{path}: neither a file nor a folder ({flag})")
            elif path.stat().st_size == 0:
                raise InputError(f"{path}: empty; leave it out of {flag}")
            else:
                kind, compressed = KINDS.get(_suffix(path), ("text", False))
                files.append(InputFile(name, path.name, kind, compressed, flag))
    files = [replace(file, text_start=_mark_bytes(file)) for file in files]
    marked = [file.path for file in files if file.text_start]
    warnings += map(left_out, marked[:NUM_NAMED])
    if len(marked) > NUM_NAMED:
        warnings.append(f"{len(marked) - NUM_NAMED:,} more files: their byte-order marks are left out too")
    return files, warnings


def _mark_bytes(file: InputFile) -> int:
    """Return the bytes of a file's byte-order mark. Raise InputError for UTF-16 and UTF-32."""
    if file.kind in ("parquet", "python-docs"):
        return 0
    with open_regular(Path(file.path)) as opened, reading_from(file.path):
        try:
            with gzip.GzipFile(fileobj=opened) if file.compressed else opened as text:
                head = text.read(HEAD_BYTES)
        except (EOFError, zlib.error, gzip.BadGzipFile):
            return 0  # Reading the file says what is wrong with it.
    return mark_bytes(head, file.path, flag=file.flag, compressed=file.compressed)


def _files_below(folder: Path, flag: str) -> tuple[list[InputFile], Counter[str]]:
    files = []
    left_out: Counter[str] = Counter()
    for path in sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).as_posix()):
        relative = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in relative.parts):
            continue
        if _suffix(path) in KINDS:
            files.append(InputFile(str(path), relative.as_posix(), *KINDS[_suffix(path)], flag))
        else:
            left_out[path.suffix or "without a suffix"] += 1
    return files, left_out


def _suffix(path: Path) -> str:
    """Return the lower-case suffix: `.jsonl.gz` of `A.JSONL.GZ`, `.txt` of `a.b.txt`."""
    name = path.name.lower()
    return next((suffix for suffix in sorted(KINDS, key=len, reverse=True) if name.endswith(suffix)), path.suffix)


def file_state(file: InputFile) -> FileState:
    """Return (bytes, modification time in ns), to notice a file that changes while it is read."""
    if file.kind == "python-docs":
        return 0, 0
    with reading_from(file.path):
        stat = Path(file.path).stat()
    return stat.st_size, stat.st_mtime_ns
