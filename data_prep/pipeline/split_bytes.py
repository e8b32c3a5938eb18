"""Cutting a stream of bytes at separators, in linear time and in bounded memory, wherever its blocks end."""

import os
import re
from collections.abc import Iterable, Iterator
from typing import BinaryIO

WINDOW_BYTES = 2**20


def split_blocks(
    blocks: Iterable[bytes], separator: bytes, *, offset: int, most_bytes: int
) -> Iterator[tuple[int, bytes | bytearray | None]]:
    """Yield (offset, bytes) between separators, like bytes.split, but nothing after a final separator.

    A piece of more than most_bytes is None. It is yielded as soon as it is too long, so that whoever refuses it need
    not read to its end; the next piece is searched for all the same. Memory: most_bytes and two blocks.
    """
    overlap = len(separator) - 1
    piece = bytearray()  # the beginning of the unfinished piece
    size = 0  # of that, also if it is too long and no longer kept
    tail = b""  # what follows it, which may begin a separator
    for block in blocks:
        *ends, rest = (tail + block).split(separator)
        for end in ends:
            if size + len(end) <= most_bytes:
                piece += end
                yield offset, piece
            elif size <= most_bytes:
                yield offset, None
            offset += size + len(end) + len(separator)
            piece, size = bytearray(), 0
        tail = rest[max(0, len(rest) - overlap) :]
        more = len(rest) - len(tail)
        if size + more <= most_bytes:
            piece += rest[:more]
        elif size <= most_bytes:
            yield offset, None
            piece = bytearray()
        size += more
    if size <= most_bytes and (size or tail):
        piece += tail
        yield offset, piece if len(piece) <= most_bytes else None


def find_cut(file: BinaryIO, separator: bytes, position: int) -> int | None:
    """Return the first offset from `position` on, after a separator, at which reading from the start also cuts.

    Separators may overlap (three line ends where two separate). A separator that no other overlaps from the left
    always separates, whatever came before. Return None if there is none before the end of the file.
    """
    borders = (size for size in range(1, len(separator)) if separator.endswith(separator[:size]))
    # Another one overlaps from the left if the bytes before are the separator without the border that both share.
    no_overlap = b"".join(b"(?<!%s)" % re.escape(separator[:-size]) for size in borders)
    pattern = re.compile(no_overlap + re.escape(separator))
    size = os.fstat(file.fileno()).st_size
    begin = max(0, position - len(separator))
    while begin < size:
        window = os.pread(file.fileno(), WINDOW_BYTES + 2 * len(separator), begin)
        if match := pattern.search(window, position - begin):
            return begin + match.end() if begin + match.end() < size else None
        if begin + len(window) >= size or not window:
            return None
        position = begin + len(window) - len(separator) + 1
        begin = position - len(separator)
    return None


def occurs(blocks: Iterable[bytes], separator: bytes) -> bool:
    """Return whether the separator is anywhere in the blocks, also across the end of one."""
    kept = b""
    for block in blocks:
        data = kept + block
        if separator in data:
            return True
        kept = data[max(0, len(data) - len(separator) + 1) :]
    return False
