"""Holds shards to their manifest: the size and sha256 of each file, and each id inside the vocabulary.

Threads read the files block by block: hashlib and numpy release Python's lock meanwhile. A record can keep which files
have passed, so that each is read once: it passes unread while its size, times and inode stay as they were.
"""

import hashlib
import os
import time
from collections.abc import Iterable
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import InputError, reading_from, writing_to
from common.files import move_aside, write_json_atomically
from common.reading import child, open_regular, read_own_json
from data_prep.manifest import SplitInfo
from data_prep.pipeline.workers import available_cores
from data_prep.shards import outside_vocabulary

BLOCK_BYTES = 2**22
MOST_THREADS = 32  # more than a disk or a file server needs at once
SETTLED_SECONDS = 2.0  # A file that changed since is not recorded: a second change could have the same times.


@dataclass(frozen=True)
class StatedFile:
    """A file as the manifest states it. Its last `token_bytes` bytes are tokens; an index has none."""

    path: Path
    sha256: str
    num_bytes: int | None  # None: not stated
    token_bytes: int = 0

    def state(self, now: os.stat_result) -> str:
        """Return the text that a record keeps of a file that has passed."""
        return f"{now.st_size} {now.st_mtime_ns} {now.st_ctime_ns} {now.st_ino} {self.sha256}"


def stated_files(directory: Path, splits: Iterable[SplitInfo]) -> list[StatedFile]:
    """Return the shards of splits and their indexes. Raise InputError for a name that leaves the directory."""
    files = []
    for info in (info for split in splits for info in split.shards):
        path = child(directory, info.file)
        files.append(StatedFile(path, info.sha256, info.bytes, 2 * info.tokens))
        if info.idx_sha256 is not None:
            files.append(StatedFile(path.with_suffix(".idx"), info.idx_sha256, None))
    return files


class ShardCheck:
    """Checks files in threads between entry and exit; an exit before the end stops them within a block.

    `record` is the file that keeps what has passed; None: keep nothing. `faults` has a line for each file that has not
    passed, once `wait` has returned True.
    """

    def __init__(self, files: list[StatedFile], vocab_size: int, *, record: Path | None = None) -> None:
        self.faults: dict[Path, str] = {}
        self.record_fault: str | None = None  # why what has passed could not be kept
        self._vocab_size = vocab_size
        self._record = record
        known = {} if record is None else read_record(record, vocab_size)
        self._passed: dict[str, str] = {}  # by the file's real path
        self._unread: list[StatedFile] = []
        for file in files:
            real = os.path.realpath(file.path)
            with reading_from(file.path):
                if real in known and file.path.exists() and known[real] == file.state(file.path.stat()):
                    self._passed[real] = known[real]
                else:
                    self._unread.append(file)
        self._num_recorded = len(self._passed)
        self.total_bytes = sum(file.num_bytes or 0 for file in self._unread)
        self._done_bytes = [0] * len(self._unread)
        self._is_cancelled = False

    @property
    def done_bytes(self) -> int:
        return sum(self._done_bytes)

    def __enter__(self) -> "ShardCheck":
        self._threads = futures.ThreadPoolExecutor(min(available_cores(), MOST_THREADS), thread_name_prefix="verify")
        self._checks = [self._threads.submit(self._check, *numbered) for numbered in enumerate(self._unread)]
        return self

    def __exit__(self, *_: object) -> None:
        self._is_cancelled = True
        self._threads.shutdown(cancel_futures=True)

    def wait(self, seconds: float) -> bool:
        """Return whether every file has been checked, after at most `seconds`; bring the record up to date."""
        is_over = not futures.wait(self._checks, seconds).not_done
        passed = dict(self._passed)
        if self._record is not None and len(passed) > self._num_recorded:
            try:
                with writing_to(self._record):
                    self._record.parent.mkdir(exist_ok=True)
                    write_json_atomically(self._record, {"vocab_size": self._vocab_size, "files": passed})
                self._num_recorded = len(passed)
                self.record_fault = None
            except InputError as error:
                self.record_fault = str(error)
        for file, check in zip(self._unread, self._checks, strict=True):
            if is_over and (fault := check.result()) is not None:
                self.faults[file.path] = fault
        return is_over

    def _check(self, index: int, file: StatedFile) -> str | None:
        """Return what is wrong with a file; None if nothing is, and note then that it has passed."""
        digest, outside = hashlib.sha256(), None
        block = memoryview(bytearray(BLOCK_BYTES))
        try:
            with open_regular(file.path, inside=file.path.parent) as opened, reading_from(file.path):
                before = os.fstat(opened.fileno())
                if file.num_bytes not in (None, before.st_size):
                    stated = f"{before.st_size} bytes, the manifest says {file.num_bytes}"
                    return f"{file.path}: truncated or altered: {stated}"
                offset, first_token = 0, before.st_size - file.token_bytes  # in bytes
                while (num_bytes := opened.readinto(block)) and not self._is_cancelled:
                    digest.update(block[:num_bytes])
                    begin = max(0, first_token - offset)
                    tokens = np.frombuffer(block[begin:num_bytes], "<u2", count=max(0, num_bytes - begin) // 2)
                    if outside is None:
                        first = (offset + begin - first_token) // 2
                        outside = outside_vocabulary(tokens, self._vocab_size, first=first)
                    offset += num_bytes
                    self._done_bytes[index] = offset
                after = os.fstat(opened.fileno())
        except InputError as error:
            return str(error)
        fault = None if digest.hexdigest() == file.sha256 else "sha256 differs from the manifest's"
        if fault or outside:
            return f"{file.path}: {'; '.join(each for each in (fault, outside) if each)}"
        if file.state(before) == file.state(after) and time.time() - after.st_ctime > SETTLED_SECONDS:
            self._passed[os.path.realpath(file.path)] = file.state(after)
        return None


def read_record(path: Path, vocab_size: int) -> dict[str, str]:
    """Return the files that a record names. Anything else of this name is moved aside: the record is made anew."""
    form = {"vocab_size": int, "files": dict}
    try:
        record = read_own_json(path, form)
    except InputError:
        record = None
        with writing_to(path):
            move_aside(path)
    if record is None or record["vocab_size"] != vocab_size:
        return {}
    files: dict[str, str] = record["files"]
    return files
