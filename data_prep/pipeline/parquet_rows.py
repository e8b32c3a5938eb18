"""Reading one string column of a parquet file by row groups, in bounded memory however the file is compressed.

pyarrow decompresses a page whole. A row may be as long as a page, since rows can share an entry of the dictionary, or
the beginning of the row before. So no page may be larger than LARGEST_PAGE or two documents, and the larger the pages
are, the fewer rows are read at once. Memory: the dictionary, a page, BATCH_BYTES or one row, and the texts of these.

`flag` is the command-line flag that named the file, for messages.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from common.errors import InputError, first_line
from common.reading import open_regular
from data_prep.pipeline.bad_rows import BadRowError, too_long
from data_prep.pipeline.json_lines import shown_names
from data_prep.pipeline.parquet_layout import Chunk, page_sizes, read_chunks

BATCH_ROWS = 1000
BATCH_BYTES = 2**26
LARGEST_PAGE = 2**28
MOST_VALUES = 2**26  # in a page; most writers stop at 20,000 rows or at a megabyte
BUFFER_BYTES = 2**20


@dataclass(frozen=True)
class _Column:
    """One string column of an open file. parquet: a pyarrow.parquet.ParquetFile. chunks: one for each row group."""

    path: str
    name: str
    file: BinaryIO
    parquet: Any
    chunks: list[Chunk]


def row_group_bytes(path: str, column: str, flag: str) -> list[int]:
    """Return the uncompressed bytes of the column in each row group. Reads the footer alone."""
    with _open(path, column, flag) as opened:
        return [chunk.num_bytes for chunk in opened.chunks]


def read_rows(
    path: str, column: str, row_groups: Sequence[int], *, flag: str, tolerant: bool, max_document_bytes: int
) -> Iterator[tuple[int, str | BadRowError]]:
    """Yield (row in the file, its text or fault) of every row of consecutive row groups.

    tolerant: as in `Reading`, for rows that are null or not UTF-8.
    """
    with _open(path, column, flag) as opened:
        if row_groups[-1] >= len(opened.chunks):
            raise InputError(f"{path}: became shorter while it was read")
        row = sum(chunk.num_rows for chunk in opened.chunks[: row_groups[0]])
        for group in row_groups:
            end = row + opened.chunks[group].num_rows
            if row == end:  # such a row group need not have pages
                continue
            for batch in _batches(opened, group, max_document_bytes):
                for value in _values(batch, max_document_bytes):
                    yield row, value if isinstance(value, str) else _text_of(value, column, tolerant=tolerant)
                    row += 1
            if row != end:
                raise InputError(f"{path}: row group {group} is damaged (it ends at row {row:,}, not {end:,})")


def row_location(path: str, row: int) -> str:
    return f"{path}, row {row:,}"


@contextmanager
def _open(path: str, column: str, flag: str) -> Iterator[_Column]:
    """Open a file and find the column. Raise InputError if it is not there once, or holds no strings."""
    try:
        import pyarrow as pa  # type: ignore[import-untyped]
        import pyarrow.parquet as pq  # type: ignore[import-untyped]
    except ImportError as error:
        raise InputError(f"{path}: parquet files need pyarrow: pip install -e '.[data]'") from error
    pa.set_cpu_count(1)  # parallel work is left to the worker processes
    with open_regular(Path(path)) as file:
        try:
            parquet = pq.ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False)
            schema = parquet.schema_arrow
            names, kinds = schema.names, schema.types
            paths = [parquet.schema.column(index).path for index in range(parquet.metadata.num_columns)]
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not a readable parquet file ({first_line(error)}) ({flag})") from error
        if column not in names:
            raise InputError(f"{path}: no column {column!r}, only {shown_names(names)}; name it with --text-column")
        kind = kinds[names.index(column)]
        if names.count(column) > 1 or paths.count(column) > 1:
            raise InputError(
                f"{path}: more than one column {column!r}; rename all but one, or name another with --text-column"
            )
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            raise InputError(f"{path}: column {column!r} is {kind}, not string (--text-column)")
        try:
            chunks = _chunks(path, paths.index(column), Path(path).stat().st_mtime_ns)
        except (ValueError, OSError) as error:
            raise InputError(f"{path}: not a readable parquet file ({first_line(error)}) ({flag})") from error
        yield _Column(path, column, file, parquet, chunks)


@functools.lru_cache(maxsize=1)  # the footer of a file of many row groups takes longer than one of them
def _chunks(path: str, leaf: int, _changed_ns: int) -> list[Chunk]:
    with open_regular(Path(path)) as file:
        return read_chunks(file, leaf)


def _batches(opened: _Column, group: int, max_document_bytes: int) -> Iterator[Any]:
    """Yield the column's values in a row group, as pyarrow arrays of few enough rows for BATCH_BYTES."""
    import pyarrow as pa

    damaged = f"{opened.path}: row group {group} is damaged"
    largest = _largest_page(opened, group, max_document_bytes, damaged)
    num_rows = max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, largest)))
    try:
        for batch in opened.parquet.iter_batches(
            batch_size=num_rows, row_groups=[group], columns=[opened.name], use_threads=False
        ):
            array = batch.column(0)
            yield array.dictionary_decode() if pa.types.is_dictionary(array.type) else array
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{damaged} ({first_line(error)})") from error


def _largest_page(opened: _Column, group: int, max_document_bytes: int, damaged: str) -> int:
    """Return the bytes of the largest page of the row group. Raise InputError if that is too much to decompress."""
    largest = most_values = 0
    try:
        for num_bytes, num_values in page_sizes(opened.file, opened.chunks[group]):
            largest, most_values = max(largest, num_bytes), max(most_values, num_values)
    except (ValueError, OSError) as error:
        raise InputError(f"{damaged} ({first_line(error)})") from error
    if largest > max(LARGEST_PAGE, 2 * max_document_bytes):
        fault = f"row group {group} has a page of {largest:,} bytes, which is read whole"
        raise InputError(f"{opened.path}: {fault}; write it with smaller pages, or raise --max-document-bytes")
    if most_values > MOST_VALUES:
        raise InputError(f"{damaged} (a page of {most_values:,} rows)")
    return largest


def _values(array: Any, max_document_bytes: int) -> list[str | bytes | BadRowError | None]:
    """Return an array's values; all of them as bytes if one is not UTF-8."""
    import pyarrow as pa
    import pyarrow.compute as pc  # type: ignore[import-untyped]

    if pa.types.is_string_view(array.type):
        array = array.cast(pa.large_string())
    is_long = pc.fill_null(pc.greater(pc.binary_length(array), max_document_bytes), False)
    any_long = pc.any(is_long).as_py()
    if any_long:
        array = pc.if_else(is_long, None, array)
    values: list[str | bytes | BadRowError | None]
    try:
        values = array.to_pylist()
    except UnicodeDecodeError:
        values = array.cast(pa.large_binary()).to_pylist()
    if any_long:
        fault = too_long(max_document_bytes)
        values = [fault if long else value for long, value in zip(is_long.to_pylist(), values, strict=True)]
    return values


def _text_of(value: bytes | BadRowError | None, column: str, *, tolerant: bool) -> str | BadRowError:
    """Return the text of a value that is no string yet, or its fault."""
    if isinstance(value, BadRowError):
        return value
    if value is None:
        return "" if tolerant else BadRowError("null", f"null in column {column!r} (--text-column)")
    try:
        return value.decode("utf-8", "surrogateescape" if tolerant else "strict")
    except UnicodeDecodeError as error:
        return BadRowError("not UTF-8", f"not UTF-8 ({error.reason}); convert it first")
