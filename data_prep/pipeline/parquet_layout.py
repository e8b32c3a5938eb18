"""Where the pages of a parquet column lie, and the sizes that they declare, read before anything is decompressed.

A page is a header and a compressed block; 600 bytes of file can declare a page of 2 GB. pyarrow has no limit for pages
and does not show them, and it ends the process at some damaged column descriptions. So their few fields are read here.
Headers and the footer are structs in Thrift's compact protocol:
https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift
https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

TAIL_BYTES = 8  # the footer's length in four bytes, and the magic number
HEADER_BYTES, LARGEST_HEADER = 2**12, 2**24  # usual, and as pyarrow has it
DEEPEST = 16

# Kinds of values.
STOP, TRUE, FALSE, BYTE, INT16, INT32, INT64, DOUBLE, BINARY, LIST, SET, _, STRUCT = range(13)
# Fields: FileMetaData.row_groups; RowGroup.columns and .num_rows; ColumnChunk.meta_data.
ROW_GROUPS, COLUMNS, NUM_ROWS, META_DATA = 4, 1, 3, 3
# ColumnMetaData's total sizes, data_page_offset and dictionary_page_offset.
CHUNK_UNCOMPRESSED, CHUNK_COMPRESSED, DATA_OFFSET, DICTIONARY_OFFSET = 6, 7, 9, 11
# PageHeader's sizes, and its structs for data pages, dictionary pages and data pages of version 2.
PAGE_UNCOMPRESSED, PAGE_COMPRESSED, PAGE_KINDS = 2, 3, (5, 7, 8)
NUM_VALUES = 1  # the first field of each of these


@dataclass(frozen=True)
class Chunk:
    """One column of one row group: bytes [start, stop) of the file. num_bytes: uncompressed."""

    num_rows: int
    num_bytes: int
    start: int
    stop: int


def read_chunks(file: BinaryIO, leaf: int) -> list[Chunk]:
    """Return a column's chunk of every row group. leaf: its number in the file. Raise ValueError if one is damaged."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(os.pread(file.fileno(), 4, max(0, size - TAIL_BYTES)), "little")
    thrift = _Thrift(os.pread(file.fileno(), length, max(0, size - TAIL_BYTES - length)))
    chunks = []
    try:
        for field, kind in thrift.fields():
            if field == ROW_GROUPS:
                chunks += [_read_row_group(thrift, leaf) for _ in thrift.items()]
            else:
                thrift.skip(kind)
    except IndexError as error:
        raise ValueError("a footer without an end") from error
    return chunks


def _read_row_group(thrift: "_Thrift", leaf: int) -> Chunk:
    num_rows, column = -1, dict[int, int]()
    for field, kind in thrift.fields():
        if field == NUM_ROWS:
            num_rows = thrift.integer()
        elif field == COLUMNS:
            for index, item_kind in enumerate(thrift.items()):
                if index == leaf:
                    column = _read_column(thrift)
                else:
                    thrift.skip(item_kind)
        else:
            thrift.skip(kind)
    num_bytes, compressed = column.get(CHUNK_UNCOMPRESSED, -1), column.get(CHUNK_COMPRESSED, -1)
    start = column.get(DATA_OFFSET, -1)
    if min(num_rows, num_bytes, compressed, start) < 0:
        raise ValueError("a row group without sizes")
    if 0 < column.get(DICTIONARY_OFFSET, 0) < start:
        start = column[DICTIONARY_OFFSET]
    return Chunk(num_rows, num_bytes, start, start + compressed)


def _read_column(thrift: "_Thrift") -> dict[int, int]:
    """Return the integers of a ColumnChunk's ColumnMetaData."""
    integers: dict[int, int] = {}
    for field, kind in thrift.fields():
        if field == META_DATA:
            integers = thrift.integers()
        else:
            thrift.skip(kind)
    return integers


def page_sizes(file: BinaryIO, chunk: Chunk) -> Iterator[tuple[int, int]]:
    """Yield (uncompressed bytes, values) of each page of a chunk. Raise ValueError if a header is damaged."""
    start = chunk.start
    while start < chunk.stop:
        try:
            num_bytes, compressed, num_values, length = _read_page(os.pread(file.fileno(), HEADER_BYTES, start))
        except IndexError:
            try:
                num_bytes, compressed, num_values, length = _read_page(os.pread(file.fileno(), LARGEST_HEADER, start))
            except IndexError as error:
                raise ValueError("a page header without an end") from error
        if min(num_bytes, compressed, num_values) < 0:
            raise ValueError("a page header without sizes")
        yield num_bytes, num_values
        start += length + compressed


def _read_page(data: bytes) -> tuple[int, int, int, int]:
    """Return (uncompressed bytes, compressed bytes, values, length of the header), -1 for what is not there."""
    thrift = _Thrift(data)
    num_bytes = compressed = -1
    num_values = 0
    for field, kind in thrift.fields():
        if field == PAGE_UNCOMPRESSED:
            num_bytes = thrift.integer()
        elif field == PAGE_COMPRESSED:
            compressed = thrift.integer()
        elif field in PAGE_KINDS:
            num_values = thrift.integers().get(NUM_VALUES, -1)
        else:
            thrift.skip(kind)
    return num_bytes, compressed, num_values, thrift.at


class _Thrift:
    """A reader of Thrift's compact protocol. Raises IndexError if the data ends, ValueError if it is something else."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._depth = 0
        self.at = 0

    def fields(self) -> Iterator[tuple[int, int]]:
        """Yield (number, kind) of each field of a struct. Whoever iterates reads or skips its value."""
        self._depth += 1
        if self._depth > DEEPEST:
            raise ValueError("nested too deeply")
        number = 0
        while (head := self._byte()) != STOP:
            number = number + (head >> 4) if head >> 4 else self.integer()
            yield number, head & 15
        self._depth -= 1

    def items(self) -> Iterator[int]:
        """Yield the kind of each item of a list, like `fields`."""
        head = self._byte()
        count = self._varint() if head >> 4 == 15 else head >> 4
        if count > len(self._data) - self.at:  # each item takes a byte or more
            raise IndexError("a list goes on beyond the data")
        for _ in range(count):
            yield head & 15

    def integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def integers(self) -> dict[int, int]:
        """Return the integers of a struct by their fields."""
        values = {}
        for field, kind in self.fields():
            if kind in (INT16, INT32, INT64):
                values[field] = self.integer()
            else:
                self.skip(kind)
        return values

    def skip(self, kind: int, *, is_item: bool = False) -> None:
        """Go past a value. A boolean field is its kind alone, a boolean item is a byte."""
        if kind in (INT16, INT32, INT64):
            self._varint()
        elif kind == BINARY:
            length = self._varint()
            self.at += length
        elif kind == STRUCT:
            for _, field_kind in self.fields():
                self.skip(field_kind)
        elif kind in (LIST, SET):
            for item_kind in self.items():
                self.skip(item_kind, is_item=True)
        elif kind in (TRUE, FALSE, BYTE):
            self.at += is_item or kind == BYTE
        elif kind == DOUBLE:
            self.at += 8
        else:
            raise ValueError("a field of an unknown kind")

    def _byte(self) -> int:
        byte = self._data[self.at]
        self.at += 1
        return byte

    def _varint(self) -> int:
        value = shift = 0
        while (byte := self._byte()) >= 128:
            value |= (byte & 127) << shift
            shift += 7
            if shift > 63:
                raise ValueError("a number of more than 64 bits")
        return value | byte << shift
