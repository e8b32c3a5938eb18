"""The errors that a user can mend: one clear line on stderr and exit status 2. A bug of ours keeps its traceback."""

from __future__ import annotations  # launch/snapshot.py and launch/requeue.py run on Python 3.9

import errno
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
READ_REMEDIES = {
    errno.ENOENT: "check the path",
    errno.EACCES: "change its permissions",
    errno.EPERM: "change its permissions",
    errno.EISDIR: "give a file, not a directory",
    errno.ENOTDIR: "give a directory, not a file",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: "remove that link to itself",
}
NO_PLACE = (errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP)


class InputError(ValueError):
    """A mistake of the user or a fault of the machine, in one line: what happened, what is needed, what to change."""


class RankError(InputError):
    """An InputError about this process's place among others, so it cannot be left to rank 0 to print it."""


def first_line(error: BaseException) -> str:
    """Return the first line of another library's message, or the error's type if it has none."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


@contextmanager
def reading_from(source: Path | str) -> Iterator[None]:
    """Turn an OSError inside into an InputError that names `source` (a path or a flag) and the remedy."""
    try:
        yield
    except OSError as error:
        remedy = READ_REMEDIES.get(error.errno or 0, "check the disk, then give the same command again")
        raise InputError(f"{source}: cannot be read ({error}); {remedy}") from error


@contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Turn an OSError inside into an InputError that names the directory or file and the remedy."""
    try:
        yield
    except OSError as error:
        remedy = "make room there" if error.errno in FULL_DISK else "fix that"
        remedy = "choose another place" if error.errno in NO_PLACE else f"{remedy}, then give the same command again"
        raise InputError(f"{path}: cannot be written ({error}); {remedy}") from error


def warn(program: str, warning: str) -> None:
    """Print one line of warning on stderr."""
    print(f"{program}: warning: {warning}", file=sys.stderr, flush=True)


def print_error(program: str, error: BaseException) -> None:
    """Print one line on stderr; if GPT_LADDER_TRACEBACK is 1, print the traceback first."""
    if os.environ.get("GPT_LADDER_TRACEBACK") == "1":
        traceback.print_exception(type(error), error, error.__traceback__)
    print(f"{program}: {str(error) or 'interrupted'}", file=sys.stderr, flush=True)


def print_interrupts_in_one_line(program: str) -> None:
    """Print one line instead of a traceback if Ctrl-C comes outside `one_line_errors`, as during slow imports."""

    def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            sys.__excepthook__(kind, error, trace)
        elif os.environ.get("RANK", "0") == "0":
            print_error(program, error)

    sys.excepthook = report


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Turn an InputError into one line on stderr and exit status 2, and Ctrl-C into one line and exit status 130.

    A stdout that is a closed pipe ends the command quietly, one on a full disk with one line. Every other exception
    keeps its traceback, since it is a bug of ours. That includes a bare OSError: code that opens what the user named
    wraps it in `reading_from` or `writing_to`. Under torchrun every rank raises the same InputError, so only rank 0
    prints it. A second Ctrl-C ends the process at once, without a traceback of Python's own clearing up. A character
    that the console cannot show is printed as its escape.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
        sys.stdout.flush()
    except (InputError, KeyboardInterrupt) as error:
        if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if isinstance(error, RankError) or os.environ.get("RANK", "0") == "0":
            print_error(program, error)
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 2)
    except OSError as error:
        # Our own files are written inside `writing_to`, so a full disk or a closed pipe that arrives here is stdout's.
        if error.filename is not None or error.errno not in (errno.EPIPE, *FULL_DISK):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that Python's last flush succeeds
        if isinstance(error, BrokenPipeError):  # nobody reads any more, as in `generate.py RUN | head`
            sys.exit(141)  # 128 + SIGPIPE, as the shell reports a command that a closed pipe ended
        print(f"{program}: its output cannot be written ({error})", file=sys.stderr, flush=True)
        sys.exit(2)
