"""Input files, their division into units (which one worker reads at a time), and the documents of a unit.

| kind | a document is | a unit is |
|---|---|---|
| plain text (.txt, .txt.gz, any other file that is named) | the file | the file |
| plain text with `split_on` | the text between two separators | about UNIT_BYTES, cut after a separator |
| .jsonl, .jsonl.gz | one line's `text_column` | about UNIT_BYTES, cut after a line end |
| .parquet | one row's `text_column` | whole row groups, about UNIT_BYTES of that column |

A .gz file is one unit, because it can only be read from its beginning. Every byte of the text is kept: nothing is
stripped, and line ends stay. Units depend on the files alone, and the documents do not depend on where units are cut.
"""

import gzip
import itertools
import json
import mmap
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from common.errors import InputError, reading_from, warn
from data_prep.pipeline import parquet_rows
from data_prep.pipeline.input_files import PYTHON_DOCS, InputFile, file_state
from data_prep.tokenizer import EOT

UNIT_BYTES = 8 * 2**20
BLOCK_BYTES = 2**20


@dataclass(frozen=True)
class Reading:
    """The way documents are read: the separator of plain text, the field or column of rows.

    tolerant: in parquet rows, null reads as empty text, and bytes that are not UTF-8 read as lone surrogates.
    Otherwise both are errors.
    """

    split_on: str | None = None
    text_column: str = "text"
    tolerant: bool = False


@dataclass(frozen=True)
class Unit:
    """A range of one file: bytes [start, stop), or row groups of a parquet file. num_bytes: of text, approximately.

    [first, last): the documents of this range that count, or the characters of a file that is one document.
    """

    file: InputFile
    start: int
    stop: int
    num_bytes: int
    first: int = 0
    last: int | None = None


@dataclass(frozen=True, slots=True)
class Document:
    """A text and its UTF-8 bytes. Lone surrogates, which UTF-8 does not allow, are encoded like other characters."""

    position: int
    text: str
    utf8: bytes
    has_surrogates: bool = False

    @classmethod
    def of(cls, position: int, text: str) -> "Document":
        try:
            return cls(position, text, text.encode("utf-8"))
        except UnicodeEncodeError:
            return cls(position, text, text.encode("utf-8", "surrogatepass"), has_surrogates=True)


def is_one_document(file: InputFile, reading: Reading) -> bool:
    """Return whether the whole file is one document, which may be cut anywhere."""
    return file.kind == "python-docs" or (file.kind == "text" and reading.split_on is None)


def warn_of_reading(program: str, reading: Reading, files: list[InputFile]) -> None:
    """Warn of flags that concern no file of the given kinds."""
    kinds = {file.kind for file in files}
    if reading.split_on is not None and "text" not in kinds:
        warn(program, "--split-documents-on has no effect: no plain text among the files")
    if reading.text_column != "text" and not kinds & {"jsonl", "parquet"}:
        warn(program, "--text-column has no effect: no .jsonl or .parquet among the files")


def warn_of_marks(program: str, eot_marks: int, reading: Reading) -> None:
    """Warn if the text holds '<|endoftext|>', which is ordinary text there."""
    if eot_marks:
        advice = "" if reading.split_on else f"; --split-documents-on '{EOT}' makes documents of it"
        warn(program, f"the text contains '{EOT}' {eot_marks} times, as ordinary text{advice}")


def plan_units(file: InputFile, reading: Reading, unit_bytes: int | None = None) -> list[Unit]:
    """Return the file's units in order, each of about unit_bytes (default: UNIT_BYTES) if the file can be divided.

    Reads little: the text around each cut, or a parquet file's footer.
    """
    unit_bytes = unit_bytes or UNIT_BYTES
    if file.kind == "python-docs":
        size = len(PYTHON_DOCS[file.name]().encode("utf-8"))
        return [Unit(file, 0, size, size)]
    if file.kind == "parquet":
        return _row_group_units(file, reading, unit_bytes)
    size, _ = file_state(file)
    if file.compressed or is_one_document(file, reading) or size <= unit_bytes:
        return [_whole(file)]
    separator = _separator(file, reading)
    cuts = [0]
    with (
        reading_from(file.path),
        Path(file.path).open("rb") as opened,
        mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        while (cut := _cut_after(data, separator, cuts[-1] + unit_bytes)) is not None:
            cuts.append(cut)
    return [Unit(file, start, stop, stop - start) for start, stop in itertools.pairwise([*cuts, size])]


def _whole(file: InputFile) -> Unit:
    size, _ = file_state(file)
    return Unit(file, 0, size, size)


def _cut_after(data: mmap.mmap, separator: bytes, position: int) -> int | None:
    """Return the first offset from `position` on, after a separator, at which reading from the start also cuts.

    Separators may overlap (three line ends where two separate). A separator that no other overlaps from the left
    always separates, whatever came before. Return None if there is none before the end of the file.
    """
    while (offset := data.find(separator, position)) >= 0:
        if data.find(separator, max(0, offset - len(separator) + 1), offset + len(separator) - 1) < 0:
            end = offset + len(separator)
            return end if end < len(data) else None
        position = offset + 1
    return None


def _row_group_units(file: InputFile, reading: Reading, unit_bytes: int) -> list[Unit]:
    units = []
    start = num_bytes = 0
    sizes = parquet_rows.row_group_bytes(file.path, reading.text_column, file.flag)
    for group, size in enumerate(sizes):
        num_bytes += size
        if num_bytes >= unit_bytes or group == len(sizes) - 1:
            units.append(Unit(file, start, group + 1, num_bytes))
            start, num_bytes = group + 1, 0
    return units


def read_documents(unit: Unit, reading: Reading) -> Iterator[tuple[int, str]]:
    """Yield (position, text) of every document of the unit, empty ones too. See `document_location` for positions."""
    if is_one_document(unit.file, reading):
        yield 0, read_whole(unit.file)[unit.first : unit.last]
        return
    match unit.file.kind:
        case "parquet":
            path, column, row_groups = unit.file.path, reading.text_column, range(unit.start, unit.stop)
            documents = parquet_rows.read_rows(path, column, row_groups, flag=unit.file.flag, tolerant=reading.tolerant)
        case "jsonl":
            documents = _json_lines(unit, reading)
        case _:
            documents = _separated(unit, reading)
    yield from itertools.islice(documents, unit.first, unit.last)


def read_whole(file: InputFile) -> str:
    """Return the text of a file that is one document."""
    if file.kind == "python-docs":
        return PYTHON_DOCS[file.name]()
    return _decode(b"".join(_blocks(_whole(file))), file, 0)


def read_pieces(file: InputFile, piece_bytes: int) -> Iterator[str]:
    """Yield the text of a file that is one document, in pieces. Unlike `read_whole`, holds only a block in memory."""
    assert piece_bytes >= 4  # the longest character of UTF-8
    is_embedded = file.kind == "python-docs"
    blocks = iter([PYTHON_DOCS[file.name]().encode("utf-8")]) if is_embedded else _blocks(_whole(file))
    offset = 0
    for piece in cut_pieces(blocks, piece_bytes):
        yield _decode(piece, file, offset)
        offset += len(piece)


def cut_pieces(blocks: Iterable[bytes], piece_bytes: int) -> Iterator[bytes]:
    """Yield the bytes of UTF-8 text at most piece_bytes at a time, cut after line ends if possible."""
    remainder = b""
    for block in blocks:
        data = remainder + block
        begin = 0
        while len(data) - begin > piece_bytes:
            stop = _end_of_piece(data, begin, begin + piece_bytes)
            yield data[begin:stop]
            begin = stop
        remainder = data[begin:]
    if remainder:
        yield remainder


def _end_of_piece(data: bytes, begin: int, limit: int) -> int:
    """Return the offset after the last line end in data[begin:limit], else the last that divides no character."""
    line_end = data.rfind(b"\n", begin, limit)
    if line_end >= 0:
        return line_end + 1
    offsets = range(limit, limit - 4, -1)
    return next((offset for offset in offsets if data[offset] & 0xC0 != 0x80), limit)


def document_location(unit: Unit, reading: Reading, position: int) -> str:
    """Return the location of a document, for a message: `file:line`, the row of a parquet file, or the file."""
    if is_one_document(unit.file, reading):
        return unit.file.path
    if unit.file.kind == "parquet":
        return parquet_rows.row_location(unit.file.path, position)
    return f"{unit.file.path}:{_line_at(unit.file, position)}"


def _line_at(file: InputFile, position: int) -> int:
    """Return the line number of a byte position. Reads the file from its start, so only for an error message."""
    line = 1
    for block in _blocks(_whole(file)):
        line += block.count(b"\n", 0, max(0, position))
        position -= len(block)
        if position <= 0:
            break
    return line


def _blocks(unit: Unit) -> Iterator[bytes]:
    """Yield the unit's bytes in blocks, decompressed."""
    path = Path(unit.file.path)
    if unit.file.compressed:
        try:
            with reading_from(path), gzip.open(path, "rb") as stream:
                while block := stream.read(BLOCK_BYTES):
                    yield block
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise InputError(f"{path}: damaged gzip file ({error}) ({unit.file.flag})") from error
        return
    bytes_left = unit.stop - unit.start
    with reading_from(path), path.open("rb") as stream:
        stream.seek(unit.start)
        while bytes_left:
            block = stream.read(min(bytes_left, BLOCK_BYTES))
            if not block:
                raise InputError(f"{path}: became shorter while it was read")
            bytes_left -= len(block)
            yield block


def _split(unit: Unit, separator: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (offset in the file, bytes) between separators, like bytes.split, but nothing after a final separator."""
    offset = unit.start
    remainder = b""
    for block in _blocks(unit):
        *pieces, remainder = (remainder + block).split(separator)
        for piece in pieces:
            yield offset, piece
            offset += len(piece) + len(separator)
    if remainder:
        yield offset, remainder


def _separator(file: InputFile, reading: Reading) -> bytes:
    if file.kind == "jsonl":
        return b"\n"
    assert reading.split_on
    return reading.split_on.encode("utf-8")


def _separated(unit: Unit, reading: Reading) -> Iterator[tuple[int, str]]:
    for offset, piece in _split(unit, _separator(unit.file, reading)):
        yield offset, _decode(piece, unit.file, offset)


def _json_lines(unit: Unit, reading: Reading) -> Iterator[tuple[int, str]]:
    for offset, line in _split(unit, b"\n"):
        if line.strip():
            yield offset, _text_of(_decode(line, unit.file, offset), unit, offset, reading)


def _text_of(line: str, unit: Unit, offset: int, reading: Reading) -> str:
    column = reading.text_column
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        fault = f"not JSON ({error}); a .jsonl file holds one object per line ({unit.file.flag})"
        raise InputError(f"{document_location(unit, reading, offset)}: {fault}") from error
    if not isinstance(row, dict):
        fault = f"a JSON {type(row).__name__}, not an object ({unit.file.flag})"
    elif column not in row:
        names = ", ".join(map(repr, row)) or "none"
        fault = f"no field {column!r}, only {names}; name it with --text-column"
    elif not isinstance(row[column], str):
        fault = f"{column!r} is {type(row[column]).__name__}, not a string (--text-column)"
    else:
        return row[column]
    raise InputError(f"{document_location(unit, reading, offset)}: {fault}")


def _decode(data: bytes, file: InputFile, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        position = offset + error.start
        fault = f"not UTF-8 (byte 0x{data[error.start]:02x} at {position}); convert it first"
        raise InputError(f"{file.path}:{_line_at(file, position)}: {fault}") from error
