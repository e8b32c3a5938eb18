"""Names that go into logs, file names, job scripts and web pages: what all of them can hold."""

from __future__ import annotations  # launch/requeue.py runs on Python 3.9

from common.errors import InputError


def require_printable(flag: str, text: str) -> None:
    """Raise InputError if a character of `text` does not print: a line end, an escape, a byte that is not UTF-8."""
    if not text.isprintable():
        raise InputError(f"{flag} {text!r}: it has characters that do not print; give a name without them")
