"""A file of lines on a disk that may fail: no line is lost, none is written twice, none is written in parts."""

import hashlib
import os
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any


class LineFile:
    """A file to which lines are appended. It keeps them in memory until they are on the disk.

    A line that could not be written follows later, in order. If a flush fails, the kernel may have dropped what it
    could not write, so all lines since the last flush are written again. `content` is what the file holds already, for
    the `seal` of the file as it was last flushed.
    """

    def __init__(self, path: Path, content: bytes = b"") -> None:
        self._path = path
        self._digest = hashlib.sha256(content)
        self._file: FileIO | None = None
        self._lines = bytearray()  # those since the last flush
        self._num_written = 0  # bytes of these
        self._flushed_size = len(content)  # of the file
        self._is_doubtful = False  # the file may not have what was written since the last flush

    def open(self) -> FileIO:
        """Return the open file. Unbuffered, since closing a buffer would write again what could not be written."""
        if self._file is None:
            self._file = self._path.open("ab", buffering=0)
            self._flushed_size = os.fstat(self._file.fileno()).st_size
        return self._file

    def add(self, line: str) -> None:
        """Append a line. If the disk fails, raise OSError but keep the line."""
        self._lines += f"{line}\n".encode(errors="backslashreplace")
        self._write()

    def flush(self) -> None:
        """Bring all lines to the disk, so that they survive a crash of the machine. If it fails, raise OSError."""
        if self._file is None and not self._lines:
            return  # a file without lines is not made
        self._write()
        try:
            os.fsync(self.open().fileno())
        except OSError:
            self._is_doubtful = True
            raise
        self._flushed_size += len(self._lines)
        self._digest.update(self._lines)
        self._lines.clear()
        self._num_written = 0

    @property
    def seal(self) -> dict[str, Any]:
        """The size and hash of the file as it was last flushed."""
        return {"bytes": self._flushed_size, "sha256": self._digest.hexdigest()}

    def close(self) -> None:
        if self._lines:
            with suppress(OSError):
                self._write()
        if self._file is not None:
            self._file.close()

    def _write(self) -> None:
        file = self.open()
        if self._is_doubtful:
            file.truncate(self._flushed_size)
            self._num_written, self._is_doubtful = 0, False
        while self._num_written < len(self._lines):
            self._num_written += file.write(self._lines[self._num_written :])
