"""Input files, their division into units (which one worker reads at a time), and the documents of a unit.

| kind | a document is | a unit is |
|---|---|---|
| plain text (.txt, .txt.gz, any other file that is named) | the file | the file |
| plain text with `split_on` | the text between two separators | about UNIT_BYTES, cut after a separator |
| .jsonl, .jsonl.gz | one line's `text_column` | about UNIT_BYTES, cut after a line end |
| .parquet | one row's `text_column` | whole row groups, about UNIT_BYTES of that column |

A .gz file is one unit, because it can only be read from its beginning. Every byte of the text is kept: nothing is
stripped but a byte-order mark at the beginning of a file, and line ends stay. Units depend on the files alone, and the
documents do not depend on where units are cut.
"""

import gzip
import itertools
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.errors import InputError, reading_from, warn
from common.reading import open_regular
from data_prep.pipeline import parquet_rows
from data_prep.pipeline.bad_rows import (
    MAX_DOCUMENT_BYTES,
    NUM_PLACES,
    BadRowError,
    OnBadRow,
    Skipped,
    count_reasons,
    too_long,
)
from data_prep.pipeline.input_files import NUM_NAMED, PYTHON_DOCS, InputFile, file_state
from data_prep.pipeline.json_lines import EXTRA_LINE_BYTES, line_too_long, text_of_line
from data_prep.pipeline.split_bytes import find_cut, occurs, split_blocks
from data_prep.tokenizer import EOT

UNIT_BYTES = 8 * 2**20
BLOCK_BYTES = 2**20


@dataclass(frozen=True)
class Reading:
    """The way documents are read: the separator of plain text, the field or column of rows.

    tolerant: in parquet rows, null reads as empty text, and bytes that are not UTF-8 read as lone surrogates.
    Otherwise both are bad rows. on_bad_row: see pipeline/bad_rows.py.
    """

    split_on: str | None = None
    text_column: str = "text"
    tolerant: bool = False
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    on_bad_row: OnBadRow = "stop"


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


def warn_of_separator(program: str, reading: Reading, files: list[InputFile]) -> None:
    """Warn of the plain text in which the separator occurs nowhere. Reads each file up to its first separator."""
    if reading.split_on is None:
        return
    separator = reading.split_on.encode("utf-8", "surrogateescape")
    texts = (file for file in files if file.kind == "text")
    whole = [file.path for file in texts if not occurs(_blocks(_whole(file)), separator)]
    if whole:
        more = f" and {len(whole) - NUM_NAMED:,} more files" if len(whole) > NUM_NAMED else ""
        place = f"{', '.join(whole[:NUM_NAMED])}{more}"
        warn(program, f"--split-documents-on {reading.split_on!r}: this separator occurs nowhere in {place}")


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
    cuts = [file.text_start]
    with open_regular(Path(file.path)) as opened, reading_from(file.path):
        while (cut := find_cut(opened, separator, cuts[-1] + unit_bytes)) is not None:
            cuts.append(cut)
    return [Unit(file, start, stop, stop - start) for start, stop in itertools.pairwise([*cuts, size])]


def _whole(file: InputFile) -> Unit:
    size, _ = file_state(file)
    return Unit(file, file.text_start, size, size)


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


def read_documents(unit: Unit, reading: Reading, skipped: Skipped | None = None) -> Iterator[tuple[int, str]]:
    """Yield (position, text) of every document of the unit, empty ones too. See `document_location` for positions.

    Raise InputError at a bad row, or, if reading.on_bad_row is skip, leave it out and add it to `skipped`.
    """
    skipped = Skipped() if skipped is None else skipped
    documents = _without_bad_rows(_rows(unit, reading), unit, reading, skipped)
    if is_one_document(unit.file, reading):
        for position, text in documents:
            yield position, text[unit.first : unit.last]
    else:
        yield from itertools.islice(documents, unit.first, unit.last)


def _rows(unit: Unit, reading: Reading) -> Iterator[tuple[int, str | BadRowError]]:
    """Yield (position, text or fault) of every row of the unit."""
    if is_one_document(unit.file, reading):
        return _whole_document(unit.file, reading.max_document_bytes)
    match unit.file.kind:
        case "parquet":
            return parquet_rows.read_rows(
                unit.file.path,
                reading.text_column,
                range(unit.start, unit.stop),
                flag=unit.file.flag,
                tolerant=reading.tolerant,
                max_document_bytes=reading.max_document_bytes,
            )
        case "jsonl":
            return _json_lines(unit, reading)
        case _:
            return _separated(unit, reading)


def _without_bad_rows(
    rows: Iterable[tuple[int, str | BadRowError]], unit: Unit, reading: Reading, skipped: Skipped
) -> Iterator[tuple[int, str]]:
    for position, row in rows:
        if not isinstance(row, BadRowError):
            yield position, row
        elif reading.on_bad_row == "skip":
            skipped.add(position if row.position is None else row.position, row.reason)
        else:
            location = document_location(unit, reading, position)
            if row.position is not None:
                location = f"{unit.file.path}:{_line_at(unit.file, row.position)}"
            raise InputError(f"{location}: {row}") from row


def describe_skipped(skipped: Sequence[tuple[Unit, Skipped]], reading: Reading) -> dict[str, Any]:
    """Return the manifest's record of the rows of all units, in order, that were left out; {} if none was."""
    reasons = count_reasons(each for _, each in skipped)
    if not reasons:
        return {}
    places = [(unit, *place) for unit, each in skipped for place in each.first]
    first = [
        f"{document_location(unit, reading, position, unit.file.name)}: {reason}"
        for unit, position, reason in places[:NUM_PLACES]
    ]
    return {"skipped": {"rows": sum(reasons.values()), "reasons": reasons, "first": first}}


def _whole_document(file: InputFile, most_bytes: int) -> Iterator[tuple[int, str | BadRowError]]:
    """Yield the text of a file that is one document, or its fault."""
    if file.kind == "python-docs":
        yield 0, PYTHON_DOCS[file.name]()
        return
    data = bytearray()
    for block in _blocks(_whole(file)):
        data += block
        if len(data) > most_bytes:
            yield 0, too_long(most_bytes)
            return
    yield 0, _text_or_fault(data, file.text_start)


def read_pieces(unit: Unit, reading: Reading, piece_bytes: int, skipped: Skipped) -> Iterator[str]:
    """Yield the text of a file that is one document, however long, in pieces. Memory: a block.

    A piece that is not UTF-8 is a bad row, as in `read_documents`.
    """
    assert piece_bytes >= 4  # the longest character of UTF-8
    is_embedded = unit.file.kind == "python-docs"
    blocks = iter([PYTHON_DOCS[unit.file.name]().encode("utf-8")]) if is_embedded else _blocks(unit)
    pieces = _decoded_pieces(cut_pieces(blocks, piece_bytes), unit.start)
    for _, text in _without_bad_rows(pieces, unit, reading, skipped):
        yield text


def _decoded_pieces(pieces: Iterable[bytes], offset: int) -> Iterator[tuple[int, str | BadRowError]]:
    for piece in pieces:
        yield offset, _text_or_fault(piece, offset)
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


def document_location(unit: Unit, reading: Reading, position: int, name: str | None = None) -> str:
    """Return the location of a document, for a message: `file:line`, the row of a parquet file, or the file.

    name: how to call the file. None: by its path.
    """
    name = unit.file.path if name is None else name
    if is_one_document(unit.file, reading):
        return name
    if unit.file.kind == "parquet":
        return parquet_rows.row_location(name, position)
    return f"{name}:{_line_at(unit.file, position)}"


def _line_at(file: InputFile, position: int) -> int:
    """Return the line number of a byte position. Reads the file from its start, so only for an error message."""
    line = 1
    for block in _blocks(replace(_whole(file), start=0)):
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
            with open_regular(path) as file, reading_from(path), gzip.open(file, "rb") as stream:
                stream.read(unit.start)
                while block := stream.read(BLOCK_BYTES):
                    yield block
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise InputError(f"{path}: damaged gzip file ({error}) ({unit.file.flag})") from error
        return
    bytes_left = unit.stop - unit.start
    with open_regular(path) as stream, reading_from(path):
        stream.seek(unit.start)
        while bytes_left:
            block = stream.read(min(bytes_left, BLOCK_BYTES))
            if not block:
                raise InputError(f"{path}: became shorter while it was read")
            bytes_left -= len(block)
            yield block


def _separator(file: InputFile, reading: Reading) -> bytes:
    if file.kind == "jsonl":
        return b"\n"
    assert reading.split_on
    return reading.split_on.encode("utf-8", "surrogateescape")


def _separated(unit: Unit, reading: Reading) -> Iterator[tuple[int, str | BadRowError]]:
    separator, most_bytes = _separator(unit.file, reading), reading.max_document_bytes
    for offset, piece in split_blocks(_blocks(unit), separator, offset=unit.start, most_bytes=most_bytes):
        yield offset, too_long(most_bytes) if piece is None else _text_or_fault(piece, offset)


def _json_lines(unit: Unit, reading: Reading) -> Iterator[tuple[int, str | BadRowError]]:
    most_bytes = reading.max_document_bytes + EXTRA_LINE_BYTES
    for offset, line in split_blocks(_blocks(unit), b"\n", offset=unit.start, most_bytes=most_bytes):
        if line is None:
            yield offset, line_too_long(most_bytes)
        elif line.strip():
            text = _text_or_fault(line, offset)
            if isinstance(text, str):
                try:
                    text = text_of_line(text, reading.text_column, reading.max_document_bytes, unit.file.flag)
                except BadRowError as error:
                    text = error
            yield offset, text


def _text_or_fault(data: bytes | bytearray, offset: int) -> str | BadRowError:
    """Return UTF-8 bytes, which begin at `offset` in their file, as text, or the place of what is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        position = offset + error.start
        fault = f"not UTF-8 (byte 0x{data[error.start]:02x} at {position}); convert it first"
        return BadRowError("not UTF-8", fault, position)
