"""Parquet columns of every kind that writers make: each reads as pyarrow reads it, or is one line."""

import io
import random
from pathlib import Path
from typing import Any

import pytest

from common.errors import InputError
from data_prep.pipeline import parquet_layout, parquet_rows
from data_prep.pipeline.bad_rows import BadRowError
from data_prep.pipeline.parquet_layout import page_sizes, read_chunks
from data_prep.pipeline.parquet_rows import read_rows, row_group_bytes

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

TEXTS = [f"row {n} \u00e9" * (n % 7) for n in range(100)]
ENCODINGS: list[dict[str, Any]] = [
    {},
    {"use_dictionary": False},
    {"data_page_version": "2.0", "compression": "zstd"},
    {"data_page_size": 64, "write_page_index": True, "write_page_checksum": True},
    {"column_encoding": {"text": "DELTA_BYTE_ARRAY"}, "use_dictionary": False},
    {"column_encoding": {"text": "DELTA_LENGTH_BYTE_ARRAY"}, "use_dictionary": False, "compression": "gzip"},
]


def write(path: Path, column: Any, **options: Any) -> Path:
    pq.write_table(pa.table({"n": range(len(column)), "text": column}), path, row_group_size=30, **options)
    return path


def rows(path: Path, *, tolerant: bool = False, most: int = 10**6, column: str = "text") -> list[str]:
    """Return the texts, and the reasons of bad rows."""
    groups = range(len(row_group_bytes(str(path), column, "--input")))
    if not groups:
        return []
    read = read_rows(str(path), column, groups, flag="--input", tolerant=tolerant, max_document_bytes=most)
    numbers, values = zip(*read, strict=True)
    assert numbers == tuple(range(len(numbers)))
    return [value.reason if isinstance(value, BadRowError) else value for value in values]


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        rows(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("options", ENCODINGS)
@pytest.mark.parametrize("batch_bytes", [100, 10**6])
def test_every_encoding_reads_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], batch_bytes: int
) -> None:
    monkeypatch.setattr(parquet_rows, "BATCH_BYTES", batch_bytes)
    monkeypatch.setattr(parquet_layout, "HEADER_BYTES", 5 if batch_bytes == 100 else 4096)
    path = write(tmp_path / "rows.parquet", TEXTS, **options)
    assert rows(path) == TEXTS
    metadata = pq.ParquetFile(path).metadata
    for leaf in range(2):
        with path.open("rb") as file:
            for group, chunk in enumerate(read_chunks(file, leaf)):
                told = metadata.row_group(group).column(leaf)
                assert (chunk.num_rows, chunk.num_bytes) == (told.num_values, told.total_uncompressed_size)
                assert chunk.stop - chunk.start == told.total_compressed_size
                sizes = [*page_sizes(file, chunk)]
                assert 0 < sum(num_bytes for num_bytes, _ in sizes) < chunk.num_bytes
                pages = sizes[1:] if told.has_dictionary_page else sizes
                assert sum(num_values for _, num_values in pages) == chunk.num_rows


def test_columns_of_every_type_read_or_are_one_line(tmp_path: Path, shared_data: Path) -> None:
    for kind in (pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())):
        assert rows(write(tmp_path / "rows.parquet", pa.array(TEXTS[:30], kind))) == TEXTS[:30]
    for column, shown in (
        (pa.array([b"a"]), "binary"),
        (pa.nulls(1), "null"),
        (pa.array([["a"]]), "list<element: string>"),
        (pa.array([{"text": "a"}]), "struct<text: string>"),
        (pa.array([1.5]), "double"),
    ):
        assert f"column 'text' is {shown}, not string (--text-column)" in refusal(
            write(tmp_path / "odd.parquet", column)
        )
    many = pa.table({f"column {n}" + "x" * 999: [n] for n in range(50)})
    pq.write_table(many, tmp_path / "many.parquet")
    assert "and 40 more; name it with" in (line := refusal(tmp_path / "many.parquet")) and len(line) < 1000
    two = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(two, tmp_path / "two.parquet")
    for path in (tmp_path / "two.parquet", shared_data / "odd_inputs" / "two_text_columns.parquet"):
        assert "more than one column 'text'" in refusal(path)
    nested = pa.table({"a.text": ["x"], "a": pa.array([{"text": "y"}])})
    pq.write_table(nested, tmp_path / "nested.parquet")
    assert "more than one column 'a.text'" in refusal(tmp_path / "nested.parquet", column="a.text")
    assert "no column 'text'" in refusal(tmp_path / "nested.parquet")


def test_files_without_rows_and_damaged_ones(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.ParquetWriter(path, pa.schema([("text", pa.string())])).close()
    assert rows(path) == []
    with pq.ParquetWriter(path, pa.schema([("text", pa.string())])) as writer:
        for texts in ([], ["a"], [], ["b", "c"]):
            writer.write_table(pa.table({"text": pa.array(texts, pa.string())}))
    assert pq.ParquetFile(path).metadata.num_row_groups == 4
    assert rows(path) == ["a", "b", "c"]
    content = write(path, TEXTS).read_bytes()
    for damaged in (b"", b"PAR1", content[: len(content) // 2], content[:-1], content[:-8] + bytes(4) + b"PAR1"):
        path.write_bytes(damaged)
        assert "not a readable parquet file" in refusal(path)
    path.write_bytes(content[:-4] + b"PARE")  # with an encrypted footer
    assert "not a readable parquet file" in refusal(path)
    (tmp_path / "folder.parquet").mkdir()
    assert "a directory, not a regular file" in refusal(tmp_path / "folder.parquet")


def test_bad_rows_have_reasons(tmp_path: Path) -> None:
    values = [b"good", None, b"caf\xe9", b"x" * 1001, b""]
    path = write(tmp_path / "rows.parquet", pa.array(values, pa.binary()).view(pa.string()))
    too_long = "longer than --max-document-bytes"
    assert rows(path, most=1000) == ["good", "null", "not UTF-8", too_long, ""]
    assert rows(path, most=1000, tolerant=True) == ["good", "", "caf\udce9", too_long, ""]


@pytest.mark.parametrize("options", [{}, {"column_encoding": {"text": "DELTA_BYTE_ARRAY"}, "use_dictionary": False}])
def test_rows_that_share_their_bytes_are_read_a_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """200 rows of a megabyte, in a file of less than two."""
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["a" * 2**20] * 200}), path, compression="zstd", **options)
    assert path.stat().st_size < 2**21
    monkeypatch.setattr(parquet_rows, "BATCH_BYTES", 2**23)
    before = pa.default_memory_pool().bytes_allocated()
    most = 0
    for _, text in read_rows(str(path), "text", [0], flag="", tolerant=False, max_document_bytes=2**20):
        assert isinstance(text, str) and len(text) == 2**20
        most = max(most, pa.default_memory_pool().bytes_allocated() - before)
    assert most < 2**26


def test_pages_that_declare_too_much_are_refused_before_they_are_decompressed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_rows, "LARGEST_PAGE", 10_000)
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["a" * 100_000]}), path, compression="zstd", use_dictionary=False)
    line = refusal(path, most=5_000)
    assert "row group 0 has a page of 100,010 bytes" in line and "--max-document-bytes" in line
    assert rows(path, most=100_000) == ["a" * 100_000]
    monkeypatch.setattr(parquet_rows, "MOST_VALUES", 20)
    assert "row group 0 is damaged (a page of 30 rows)" in refusal(write(tmp_path / "many.parquet", TEXTS))


def test_hundreds_of_damages_read_or_are_one_line(tmp_path: Path) -> None:
    """Damage that ends the process in pyarrow's own reader of footers is among it."""
    rng = random.Random(3)
    buffers = []
    for options in ENCODINGS:
        buffer = io.BytesIO()
        pq.write_table(pa.table({"text": TEXTS[:40]}), buffer, row_group_size=20, **options)
        buffers.append(buffer.getvalue())
    path = tmp_path / "rows.parquet"
    num_read = 0
    for _ in range(700):
        content = bytearray(rng.choice(buffers))
        for _ in range(rng.choice([1, 1, 2, 8])):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        try:
            rows(path, tolerant=rng.random() < 0.5)
            num_read += 1
        except InputError as error:
            assert "\n" not in str(error) and len(str(error)) < 2_000
    assert 0 < num_read < 700
