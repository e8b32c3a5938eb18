"""The sizes that the pages of a parquet column declare, read before anything is decompressed.

A page is a header in Thrift's compact protocol and a compressed block. 600 bytes of file can declare a page of 2 GB.
https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift (PageHeader), and
https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
"""

import os
from collections.abc import Iterator
from typing import BinaryIO

HEADER_BYTES = 2**12
LARGEST_HEADER = 2**24  # bytes, as pyarrow has it
UNCOMPRESSED, COMPRESSED = 2, 3  # fields of PageHeader
KIND_HEADERS = (5, 7, 8)  # its fields for data pages, dictionary pages and data pages of version 2; each begins
NUM_VALUES = 1  # with this
# Kinds of Thrift fields.
STOP, TRUE, FALSE, BYTE, INTEGERS, DOUBLE, BINARY, STRUCT = 0, 1, 2, 3, (4, 5, 6), 7, 8, 12

Fields = dict[int, "int | Fields"]


def pages(file: BinaryIO, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Yield (uncompressed bytes, values) of each page between two offsets. Raise ValueError if one is damaged."""
    while start < stop:
        data = os.pread(file.fileno(), HEADER_BYTES, start)
        try:
            header, size = _read_struct(data, 0)
        except IndexError:
            try:
                header, size = _read_struct(os.pread(file.fileno(), LARGEST_HEADER, start), 0)
            except IndexError as error:
                raise ValueError("a page header without an end") from error
        uncompressed, compressed = header.get(UNCOMPRESSED), header.get(COMPRESSED)
        kinds = [kind for field in KIND_HEADERS if isinstance(kind := header.get(field), dict)]
        values = kinds[0].get(NUM_VALUES) if kinds else 0
        numbers = [number for number in (uncompressed, compressed, values) if isinstance(number, int) and number >= 0]
        if len(numbers) < 3:
            raise ValueError("a page header without sizes")
        yield numbers[0], numbers[2]
        start += size + numbers[1]


def _read_struct(data: bytes, at: int, depth: int = 0) -> tuple[Fields, int]:
    """Return (the integers and structs of a struct by field, the offset after it). Raise IndexError if data ends."""
    if depth > 8:
        raise ValueError("a page header that is nested too deeply")
    fields: Fields = {}
    field = 0
    while (head := data[at]) != STOP:
        at += 1
        kind = head & 15
        if head >> 4:
            field += head >> 4
        else:
            field, at = _zigzag(data, at)
        if kind in (TRUE, FALSE):
            pass
        elif kind in INTEGERS:
            fields[field], at = _zigzag(data, at)
        elif kind == STRUCT:
            fields[field], at = _read_struct(data, at, depth + 1)
        elif kind == BINARY:
            length, at = _varint(data, at)
            at += length
        elif kind in (BYTE, DOUBLE):
            at += 1 if kind == BYTE else 8
        else:
            raise ValueError("a page header with a field of an unknown kind")
    return fields, at + 1


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a page header with a number of more than 64 bits")


def _zigzag(data: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), at
