"""Units of input: files found, divided into what one worker reads at a time, and read back document by document.

| kind | a document is | a unit is |
|---|---|---|
| plain text (.txt, .txt.gz, any other file that is named) | the file | the file |
| plain text with `split_on` | the text between two separators | about UNIT_BYTES, cut after a separator |
| .jsonl, .jsonl.gz | one line's `text_column` | about UNIT_BYTES, cut after a line end |
| .parquet | one row's `text_column` | whole row groups, about UNIT_BYTES of that column |

A .gz file is one unit: it cannot be entered in the middle. Text is kept to the byte: nothing is stripped, line ends
stay. Units depend on the files alone, and what is made of them does not depend on where they are cut.
"""

import gzip
import itertools
import json
import mmap
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from common.errors import InputError, reading_from
from data_prep.pipeline import parquet_rows, python_docs

UNIT_BYTES = 8 * 2**20
BLOCK_BYTES = 2**20

FileState = tuple[int, int]
Kind = Literal["text", "jsonl", "parquet", "python-docs"]
KINDS: dict[str, tuple[Kind, bool]] = {
    ".txt": ("text", False),
    ".txt.gz": ("text", True),
    ".jsonl": ("jsonl", False),
    ".jsonl.gz": ("jsonl", True),
    ".parquet": ("parquet", False),
}
PYTHON_DOCS: dict[str, Callable[[], str]] = {
    "pydoc_data.topics": python_docs.topics,
    "standard library docstrings": python_docs.docstrings,
}


@dataclass(frozen=True)
class InputFile:
    """path: as given, for reading and for messages. name: as the manifest records it, the same on every machine.

    flag: what named it, for messages.
    """

    path: str
    name: str
    kind: Kind
    compressed: bool = False
    flag: str = "--input"


@dataclass(frozen=True)
class Reading:
    """What decides where documents begin: the separator in plain text, the field or column of rows.

    tolerant, of parquet rows alone: null reads as no text, and bytes that are not UTF-8 as lone surrogates. Otherwise
    both are errors.
    """

    split_on: str | None = None
    text_column: str = "text"
    tolerant: bool = False


@dataclass(frozen=True)
class Unit:
    """A part of one file: bytes [start, stop), or row groups of a parquet file. num_bytes: of text, about.

    Of what lies there only [first, last) counts: documents, or characters of a file that is one document.
    """

    file: InputFile
    start: int
    stop: int
    num_bytes: int
    first: int = 0
    last: int | None = None


@dataclass(frozen=True, slots=True)
class Document:
    """A text and its bytes, where lone surrogates (which UTF-8 has none of) pass as they are."""

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
    """Is the whole file one document, which may be cut anywhere?"""
    return file.kind == "python-docs" or (file.kind == "text" and reading.split_on is None)


def find_files(inputs: tuple[str, ...], flag: str = "--input") -> tuple[list[InputFile], list[str]]:
    """The files that `inputs` name, in order, folders in the order of their relative paths; and warnings."""
    with reading_from(flag):
        return _find_files(inputs, flag)


def _find_files(inputs: tuple[str, ...], flag: str) -> tuple[list[InputFile], list[str]]:
    found: list[InputFile] = []
    warnings: list[str] = []
    for name in inputs:
        path = Path(name)
        if name == "python-docs":
            found += [InputFile(title, title, "python-docs", flag=flag) for title in PYTHON_DOCS]
        elif path.is_dir():
            files, left_out = _files_below(path, flag)
            if not files:
                raise InputError(f"{path}: no {', '.join(KINDS)} file in this folder ({flag})")
            found += files
            if left_out:
                kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(left_out.items()))
                warnings.append(f"{path}: left out {left_out.total()} files of other kinds ({kinds})")
        elif not path.exists():
            raise InputError(f"{path}: no such file ({flag})")
        elif not path.is_file():
            raise InputError(f"{path}: neither a file nor a folder ({flag})")
        elif path.stat().st_size == 0:
            raise InputError(f"{path}: empty; leave it out of {flag}")
        else:
            kind, compressed = KINDS.get(_suffix(path), ("text", False))
            found.append(InputFile(name, path.name, kind, compressed, flag))
    return found, warnings


def _files_below(folder: Path, flag: str) -> tuple[list[InputFile], Counter[str]]:
    files = []
    left_out: Counter[str] = Counter()
    for path in sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).as_posix()):
        relative = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in relative.parts):
            continue
        if _suffix(path) in KINDS:
            files.append(InputFile(str(path), relative.as_posix(), *KINDS[_suffix(path)], flag))
        else:
            left_out[path.suffix or "without a suffix"] += 1
    return files, left_out


def _suffix(path: Path) -> str:
    """`.jsonl.gz` of `A.JSONL.GZ`, `.txt` of `a.b.txt`."""
    name = path.name.lower()
    return next((suffix for suffix in sorted(KINDS, key=len, reverse=True) if name.endswith(suffix)), path.suffix)


def file_state(file: InputFile) -> FileState:
    """Size and time of change in ns, to notice what changes while it is read."""
    if file.kind == "python-docs":
        return 0, 0
    with reading_from(file.path):
        stat = Path(file.path).stat()
    return stat.st_size, stat.st_mtime_ns


def _size_of(file: InputFile) -> int:
    with reading_from(file.path):
        return Path(file.path).stat().st_size


def plan_units(file: InputFile, reading: Reading, unit_bytes: int | None = None) -> list[Unit]:
    """The file's units in order, of about unit_bytes (UNIT_BYTES unless given) where it can be divided.

    Reads little: around each cut, or a parquet file's footer.
    """
    unit_bytes = unit_bytes or UNIT_BYTES
    if file.kind == "python-docs":
        size = len(PYTHON_DOCS[file.name]().encode("utf-8"))
        return [Unit(file, 0, size, size)]
    if file.kind == "parquet":
        return _row_group_units(file, reading, unit_bytes)
    size = _size_of(file)
    if file.compressed or is_one_document(file, reading) or size <= unit_bytes:
        return [Unit(file, 0, size, size)]
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


def _cut_after(data: mmap.mmap, separator: bytes, position: int) -> int | None:
    """The first place from `position` on that follows a separator and that reading from the start would also find.

    Separators may overlap (three line ends where two separate): one that no other overlaps from the left is always
    found, whatever came before.
    """
    while (place := data.find(separator, position)) >= 0:
        if data.find(separator, max(0, place - len(separator) + 1), place + len(separator) - 1) < 0:
            end = place + len(separator)
            return end if end < len(data) else None
        position = place + 1
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
    """(position, text) of every document of the unit, empty ones too; `place_of` turns the position into words."""
    if is_one_document(unit.file, reading):
        yield 0, read_whole(unit.file)[unit.first : unit.last]
        return
    match unit.file.kind:
        case "parquet":
            documents = parquet_rows.read_rows(
                unit.file.path,
                reading.text_column,
                range(unit.start, unit.stop),
                flag=unit.file.flag,
                tolerant=reading.tolerant,
            )
        case "jsonl":
            documents = _json_lines(unit, reading)
        case _:
            documents = _separated(unit, reading)
    yield from itertools.islice(documents, unit.first, unit.last)


def read_whole(file: InputFile) -> str:
    """The text of a file that is one document."""
    if file.kind == "python-docs":
        return PYTHON_DOCS[file.name]()
    size = _size_of(file)
    return _decode(b"".join(_blocks(Unit(file, 0, size, size))), file, 0)


def read_pieces(file: InputFile, piece_bytes: int) -> Iterator[str]:
    """The text of a file that is one document, at most piece_bytes at a time, cut after a line end where there is one.

    Unlike `read_whole` it holds no more than a block.
    """
    assert piece_bytes >= 4  # the longest character of UTF-8
    if file.kind == "python-docs":
        blocks = iter([PYTHON_DOCS[file.name]().encode("utf-8")])
    else:
        size = _size_of(file)
        blocks = _blocks(Unit(file, 0, size, size))
    offset = 0
    rest = b""
    for block in blocks:
        data = rest + block
        begin = 0
        while len(data) - begin > piece_bytes:
            stop = end_of_piece(data, begin, begin + piece_bytes)
            yield _decode(data[begin:stop], file, offset + begin)
            begin = stop
        offset += begin
        rest = data[begin:]
    if rest:
        yield _decode(rest, file, offset)


def end_of_piece(data: bytes, begin: int, limit: int) -> int:
    """The place after the last line end in data[begin:limit], or else the last one there that divides no character."""
    line_end = data.rfind(b"\n", begin, limit)
    if line_end >= 0:
        return line_end + 1
    places = range(limit, limit - 4, -1)
    return next((place for place in places if data[place] & 0xC0 != 0x80), limit)


def place_of(unit: Unit, reading: Reading, position: int) -> str:
    """The place of a document, for a message: `file:line`, the row of a parquet file, or the file that it is."""
    if is_one_document(unit.file, reading):
        return unit.file.path
    if unit.file.kind == "parquet":
        return parquet_rows.place_of_row(unit.file.path, position)
    return f"{unit.file.path}:{_line_at(unit.file, position)}"


def _line_at(file: InputFile, position: int) -> int:
    """Counted only where there is something to complain of."""
    whole = Unit(file, 0, _size_of(file), 0)
    line = 1
    for block in _blocks(whole):
        line += block.count(b"\n", 0, max(0, position))
        position -= len(block)
        if position <= 0:
            break
    return line


def _blocks(unit: Unit) -> Iterator[bytes]:
    """The unit's bytes in blocks, unpacked where they are packed."""
    path = Path(unit.file.path)
    if unit.file.compressed:
        with reading_from(path):
            try:
                with gzip.open(path, "rb") as unpacked:
                    while block := unpacked.read(BLOCK_BYTES):
                        yield block
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise InputError(f"{path}: damaged gzip file ({error}) ({unit.file.flag})") from error
        return
    left = unit.stop - unit.start
    with reading_from(path), path.open("rb") as opened:
        opened.seek(unit.start)
        while left and (block := _read(opened, min(left, BLOCK_BYTES), path)):
            left -= len(block)
            yield block


def _read(opened: IO[bytes], count: int, path: Path) -> bytes:
    block = opened.read(count)
    if not block:
        raise InputError(f"{path}: became shorter while it was read")
    return block


def _pieces(unit: Unit, separator: bytes) -> Iterator[tuple[int, bytes]]:
    """(offset in the file, bytes) between separators, like bytes.split; what ends with one has nothing after it."""
    offset = unit.start
    rest = b""
    for block in _blocks(unit):
        *pieces, rest = (rest + block).split(separator)
        for piece in pieces:
            yield offset, piece
            offset += len(piece) + len(separator)
    if rest:
        yield offset, rest


def _separator(file: InputFile, reading: Reading) -> bytes:
    if file.kind == "jsonl":
        return b"\n"
    assert reading.split_on
    return reading.split_on.encode("utf-8")


def _separated(unit: Unit, reading: Reading) -> Iterator[tuple[int, str]]:
    for offset, piece in _pieces(unit, _separator(unit.file, reading)):
        yield offset, _decode(piece, unit.file, offset)


def _json_lines(unit: Unit, reading: Reading) -> Iterator[tuple[int, str]]:
    for offset, line in _pieces(unit, b"\n"):
        if line.strip():
            yield offset, _text_of(_decode(line, unit.file, offset), unit, offset, reading)


def _text_of(line: str, unit: Unit, offset: int, reading: Reading) -> str:
    column = reading.text_column
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        fault = f"not JSON ({error}); a .jsonl file holds one object per line ({unit.file.flag})"
        raise InputError(f"{place_of(unit, reading, offset)}: {fault}") from error
    if not isinstance(row, dict):
        fault = f"a JSON {type(row).__name__}, not an object ({unit.file.flag})"
    elif column not in row:
        names = ", ".join(map(repr, row)) or "none"
        fault = f"no field {column!r}, only {names}; name it with --text-column"
    elif not isinstance(row[column], str):
        fault = f"{column!r} is {type(row[column]).__name__}, not a string (--text-column)"
    else:
        return row[column]
    raise InputError(f"{place_of(unit, reading, offset)}: {fault}")


def _decode(data: bytes, file: InputFile, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        place = offset + error.start
        raise InputError(
            f"{file.path}:{_line_at(file, place)}: not UTF-8 (byte 0x{data[error.start]:02x} at {place}); "
            "convert it first"
        ) from error
