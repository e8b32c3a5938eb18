"""Bad input from a person: one clear line and exit status 2, never a traceback."""

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class InputError(ValueError):
    """What was given, what is needed, and which flag or file to change, in one line."""


def first_line(error: BaseException) -> str:
    """Of what another library says, which may be long."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


@contextmanager
def writing_to(directory: Path) -> Iterator[None]:
    """An OSError inside becomes an InputError that names the directory and says what to do about it."""
    try:
        yield
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "make room there" if is_full else "mend that"
        raise InputError(
            f"{directory}: cannot be written ({error}); {advice}, then give the same command again"
        ) from error


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Turn an InputError, and what the file system refuses, into one line on stderr and exit status 2; Ctrl-C into 130.

    Under torchrun every rank meets the same error; only rank 0 prints it. A character that the console cannot show
    is printed as its escape.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except (InputError, OSError, KeyboardInterrupt) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"{program}: {str(error) or 'interrupted'}", file=sys.stderr, flush=True)
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 2)
