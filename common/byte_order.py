"""Byte-order marks at the beginning of text files: UTF-8's is left out, other encodings are refused by their names."""

import codecs
import shlex
from pathlib import Path

from common.errors import InputError

MARK = codecs.BOM_UTF8
OTHER_MARKS = {  # UTF-32's little-endian mark begins with UTF-16's, so it comes first.
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
HEAD_BYTES = 4  # of the longest mark


def mark_bytes(head: bytes, path: str, *, flag: str, compressed: bool = False) -> int:
    """Return how many of a text's first bytes are a mark, which is no part of the text: 3 or 0.

    head: at least its first HEAD_BYTES, if it has so many. Raise InputError for UTF-16 and UTF-32, with the command
    that converts the file.
    """
    for mark, name in OTHER_MARKS.items():
        if head.startswith(mark):
            convert = f"iconv -f {name} -t UTF-8"
            old, new = shlex.quote(path), shlex.quote(str(Path(path).with_name(f"utf8_{Path(path).name}")))
            command = f"gzip -dc {old} | {convert} | gzip > {new}" if compressed else f"{convert} {old} > {new}"
            raise InputError(f"{path}: {name}, by its byte-order mark; UTF-8 is read ({flag}): {command}")
    return len(MARK) if head.startswith(MARK) else 0


def left_out(place: str) -> str:
    """Return the line of warning about a mark."""
    return f"{place}: its byte-order mark, which is no text, is left out"
