"""Reading one string column of a parquet file by row groups, with `datasets`, whose pitfalls this module hides.

`flag` is the command-line flag that named the file, for messages.
"""

import functools
import glob
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common.errors import InputError, first_line, reading_from

BATCH_ROWS = 1000


def row_group_bytes(path: str, column: str, flag: str) -> list[int]:
    """Return the uncompressed bytes of the column in each row group. Reads the footer alone."""
    metadata = _open(path, column, flag).metadata
    [leaf] = [index for index in range(metadata.num_columns) if metadata.schema.column(index).path == column]
    groups = range(metadata.num_row_groups)
    return [metadata.row_group(group).column(leaf).total_uncompressed_size for group in groups]


def read_rows(
    path: str, column: str, row_groups: Sequence[int], *, flag: str, tolerant: bool
) -> Iterator[tuple[int, str]]:
    """Yield (row in the file, text) of every row of consecutive row groups.

    tolerant: as in `Reading`, for rows that are null or not UTF-8.
    """
    import pyarrow as pa  # type: ignore[import-untyped]

    metadata = _open(path, column, flag).metadata
    if row_groups[-1] >= metadata.num_row_groups:
        raise InputError(f"{path}: became shorter while it was read")
    row = sum(metadata.row_group(group).num_rows for group in range(row_groups[0]))
    with reading_from(path):
        stream = _stream(path, column, Path(path).stat().st_mtime_ns)
    for group in row_groups:
        try:
            for table in stream.shard(metadata.num_row_groups, group).iter(BATCH_ROWS):
                for value in _strings(table.column(0)):
                    text = value if isinstance(value, str) else _as_text(value, path, row, column, tolerant=tolerant)
                    yield row, text
                    row += 1
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path}: row group {group} is damaged ({first_line(error)})") from error


def row_location(path: str, row: int) -> str:
    return f"{path}, row {row:,}"


def _open(path: str, column: str, flag: str) -> Any:
    """Return a pyarrow.parquet.ParquetFile. Raise InputError if it lacks the column or it holds no strings."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq  # type: ignore[import-untyped]
    except ImportError as error:
        raise InputError(f"{path}: parquet files need pyarrow: pip install -e '.[data]'") from error
    try:
        opened = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable parquet file ({first_line(error)}) ({flag})") from error
    schema = opened.schema_arrow
    if column not in schema.names:
        names = ", ".join(map(repr, schema.names)) or "none"
        raise InputError(f"{path}: no column {column!r}, only {names}; name it with --text-column")
    kind = schema.field(column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise InputError(f"{path}: column {column!r} is {kind}, not string (--text-column)")
    return opened


@functools.lru_cache(maxsize=1)
def _stream(path: str, column: str, _changed_ns: int) -> Any:
    """Return a `datasets` stream over the column, with one shard for each row group."""
    try:
        from tqdm.std import TqdmDefaultWriteLock

        TqdmDefaultWriteLock.mp_lock = None  # else a killed worker leaves a semaphore, and Python warns of it
        import datasets
    except ImportError as error:
        raise InputError(f"{path}: parquet files need datasets: pip install -e '.[data]'") from error
    import pyarrow as pa

    if "::" in path:  # fsspec, and so datasets, takes '::' for a file in an archive
        raise InputError(f"{path}: '::' in the path of a parquet file; rename it")
    datasets.config.TORCH_AVAILABLE = False  # else each worker imports torch for nothing: 2.4 s and 200 MB
    pa.set_cpu_count(1)  # parallel work is left to the worker processes
    with tempfile.TemporaryDirectory() as folder:  # for the lock that datasets takes while it opens the file
        stream = datasets.IterableDataset.from_parquet(
            glob.escape(path), columns=[column], cache_dir=folder, batch_size=BATCH_ROWS
        )
    return stream.reshard().with_format("arrow")


def _strings(column: Any) -> list[str | bytes | None]:
    """Return the column's values; all of them as bytes if one is not UTF-8."""
    import pyarrow as pa

    values: list[str | bytes | None]
    try:
        values = column.to_pylist()
    except UnicodeDecodeError:
        values = column.cast(pa.large_binary()).to_pylist()
    return values


def _as_text(value: bytes | None, path: str, row: int, column: str, *, tolerant: bool) -> str:
    if value is None:
        if tolerant:
            return ""
        raise InputError(f"{row_location(path, row)}: null in column {column!r} (--text-column)")
    try:
        return value.decode("utf-8", "surrogateescape" if tolerant else "strict")
    except UnicodeDecodeError as error:
        raise InputError(f"{row_location(path, row)}: not UTF-8 ({error.reason}); convert it first") from error
