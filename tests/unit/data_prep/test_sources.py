"""Documents against str.split, json and pyarrow, wherever units and blocks end, and the location of every fault."""

import gzip
import itertools
import json
import random
import sys
from pathlib import Path

import pytest

from common.errors import InputError
from data_prep.pipeline import sources
from data_prep.pipeline.input_files import InputFile, find_files
from data_prep.pipeline.sources import Reading, plan_units, read_documents

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

EOT = "<|endoftext|>"


def texts(path: Path, reading: Reading | None = None) -> list[str]:
    reading = reading or Reading()
    [file] = find_files((str(path),))[0]
    return [text for unit in plan_units(file, reading) for _, text in read_documents(unit, reading)]


def refusal(path: Path, reading: Reading | None = None) -> str:
    with pytest.raises(InputError) as caught:
        texts(path, reading)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("separator", [EOT, "\n\n", "\n", "aba", "\u20ac\u20ac", "---\n"])
@pytest.mark.parametrize("unit_bytes", [1, 17, 1000])
def test_split_text_equals_str_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, separator: str, unit_bytes: int
) -> None:
    rng = random.Random(separator)
    path = tmp_path / "text.txt"
    monkeypatch.setattr(sources, "UNIT_BYTES", unit_bytes)
    for _ in range(15):
        text = "".join(rng.choices([separator, separator[0], separator[-1], "x", "\u20ac", "\r\n"], k=40))
        path.write_bytes(text.encode())
        monkeypatch.setattr(sources, "BLOCK_BYTES", rng.choice([1, 2, 5, 4096]))
        *expected, last = text.split(separator)
        assert texts(path, Reading(split_on=separator)) == expected + [last] * bool(last)


def test_units_of_a_real_file_cover_it_once(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shared_data / "tinystories_2mb.txt"
    expected = path.read_bytes().decode().split(EOT)
    assert len(expected) == 2317
    for unit_bytes, num_units in ((2**15, 62), (2**23, 1)):
        monkeypatch.setattr(sources, "UNIT_BYTES", unit_bytes)
        units = plan_units(InputFile(str(path), "", "text"), Reading(split_on=EOT))
        assert abs(len(units) - num_units) <= 2
        assert (units[0].start, units[-1].stop) == (0, path.stat().st_size)
        assert all(a.stop == b.start for a, b in itertools.pairwise(units))
        assert texts(path, Reading(split_on=EOT)) == expected


@pytest.mark.parametrize("unit_bytes", [1, 50, 10_000])
def test_json_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit_bytes: int) -> None:
    monkeypatch.setattr(sources, "UNIT_BYTES", unit_bytes)
    expected = ["one", "", "two\nlines\u2028\x85", "\U0001f600 \u00e9", " spaces ", EOT]
    lines = [json.dumps({"id": 1, "story": text}, ensure_ascii=bool(n % 2)) for n, text in enumerate(expected)]
    data = ("\r\n".join(lines) + "\n\n  \n").encode()
    for name, content in (("rows.jsonl", data), ("rows.jsonl.gz", gzip.compress(data))):
        (tmp_path / name).write_bytes(content)
        assert texts(tmp_path / name, Reading(text_column="story")) == expected


def test_compressed_text(tmp_path: Path) -> None:
    path = tmp_path / "text.TXT.GZ"
    path.write_bytes(gzip.compress(f"\ufeff\ufeffone\r\n{EOT}two{EOT}".encode()))
    assert texts(path) == [f"\ufeffone\r\n{EOT}two{EOT}"]
    assert texts(path, Reading(split_on=EOT)) == ["\ufeffone\r\n", "two"]
    path.write_bytes(path.read_bytes()[:-9])
    assert "damaged gzip file" in refusal(path)


def test_parquet_rows(shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, reading = tmp_path / "rows.parquet", Reading(text_column="body")
    expected = [f"row {n} \u00e9" * (n % 7) for n in range(100)]
    pq.write_table(
        pa.table({"n": [*range(100)], "body": pa.array(expected, pa.large_string())}), path, row_group_size=9
    )
    for unit_bytes, num_units in ((1, 12), (10**9, 1)):
        monkeypatch.setattr(sources, "UNIT_BYTES", unit_bytes)
        assert len(plan_units(InputFile(str(path), "", "parquet"), reading)) == num_units
        assert texts(path, reading) == expected
    real = shared_data / "fineweb_rows_15.parquet"
    assert texts(real) == pq.read_table(real)["text"].to_pylist()
    assert "no column 'story', only 'text', 'id'" in refusal(real, Reading(text_column="story"))
    assert "'token_count' is int64, not string (--text-column)" in refusal(real, Reading(text_column="token_count"))


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"text": "a"', ":3: not JSON ("),
        (b'["text"]', ":3: a JSON list, not an object"),
        (b'{"body": "x", "id": 3}', ":3: no field 'text', only 'body', 'id'; name it with --text-column"),
        (b'{"text": null}', ":3: 'text' is NoneType, not a string (--text-column)"),
        (b'{"text": "caf\xe9"}', ":3: not UTF-8 (byte 0xe9"),
        (b"[" * 100_000, ":3: not JSON ("),
    ],
)
@pytest.mark.parametrize("unit_bytes", [1, 10_000])
def test_a_bad_line_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: bytes, complaint: str, unit_bytes: int
) -> None:
    monkeypatch.setattr(sources, "UNIT_BYTES", unit_bytes)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "first"}\n{"text": "second"}\n' + line + b'\n{"text": "last"}\n')
    assert str(path) + complaint in refusal(path)
    path = tmp_path / "stories.txt"
    path.write_bytes(b"one\n<>\ntwo\n<>\nthr\xe9e\n<>\nfour\n")
    assert f"{path}:5: not UTF-8 (byte 0xe9 at 17)" in refusal(path, Reading(split_on="<>"))


def test_bad_parquet_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 not really")
    assert "rows.parquet: not a readable parquet file" in refusal(path)
    for rows, complaint in (
        (pa.array(["a", "b", None]), "rows.parquet, row 2: null in column 'text'"),
        (pa.array([b"good", b"caf\xe9"], pa.binary()).view(pa.string()), "rows.parquet, row 1: not UTF-8"),
    ):
        pq.write_table(pa.table({"text": rows}), path)
        assert complaint in refusal(path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install -e '.[data]'" in refusal(path)


def test_a_folder_is_its_files_in_the_order_of_their_paths(tmp_path: Path) -> None:
    names = ["b.txt", "a/z.jsonl", "a/b/c.parquet", "B.TXT", "a/y.txt.gz", "a-b.txt", "q.jsonl.gz"]
    others = [".hidden.txt", ".git/x.txt", "a/.b/x.txt", "notes.md", "a/notes.md", "README", "archive.tar.gz"]
    for name in names + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    files, [warning] = find_files((str(tmp_path),))
    assert [file.name for file in files] == sorted(names)
    assert [(file.kind, file.compressed) for file in files if file.name.startswith("a/y")] == [("text", True)]
    assert warning == f"{tmp_path}: left out 4 files of other kinds (1 .gz, 2 .md, 1 without a suffix)"
    for number, name in enumerate(("x.md", ".x.txt")):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / name).write_text("x")
        with pytest.raises(InputError, match="file in this folder"):
            find_files((str(tmp_path / str(number)),))
