"""Documents against str.split, json and pyarrow themselves; units wherever they are cut; every fault by its place."""

import gzip
import itertools
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from common.errors import InputError
from data_prep.pipeline import sources
from data_prep.pipeline.sources import InputFile, Reading, find_files, plan_units, read_documents

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

EOT = "<|endoftext|>"


def texts(path: Path, reading: Reading | None = None) -> list[str]:
    reading = reading or Reading()
    [file] = find_files((str(path),))[0]
    return [text for unit in plan_units(file, reading) for _, text in read_documents(unit, reading)]


def split_like_str(text: str, separator: str) -> list[str]:
    """The oracle: str.split, and nothing after a separator at the very end."""
    pieces = text.split(separator)
    return pieces[:-1] if pieces[-1] == "" else pieces


def refusal(path: Path, reading: Reading | None = None) -> str:
    with pytest.raises(InputError) as caught:
        texts(path, reading)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("separator", [EOT, "\n\n", "\n", "aba", "\u20ac\u20ac", "---\n"])
@pytest.mark.parametrize("unit_bytes", [1, 3, 17, 1000])
def test_split_text_is_what_str_split_gives_wherever_units_and_blocks_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, separator: str, unit_bytes: int
) -> None:
    rng = random.Random(separator)
    path = tmp_path / "text.txt"
    monkeypatch.setattr(sources, "UNIT_BYTES", unit_bytes)
    for _ in range(20):
        text = "".join(rng.choices([separator, separator[0], separator[-1], "x", "\u20ac", "\r\n"], k=40))
        path.write_bytes(text.encode())
        monkeypatch.setattr(sources, "BLOCK_BYTES", rng.choice([1, 2, 5, 4096]))
        assert texts(path, Reading(split_on=separator)) == split_like_str(text, separator)


def test_units_cover_a_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "UNIT_BYTES", 100)
    path = tmp_path / "stories.txt"
    path.write_text(EOT.join("story " * n for n in range(60)))
    units = plan_units(find_files((str(path),))[0][0], Reading(split_on=EOT))
    assert len(units) > 10
    assert units[0].start == 0 and units[-1].stop == path.stat().st_size
    assert all(a.stop == b.start for a, b in itertools.pairwise(units))


def test_a_real_file_of_stories(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shared_data / "tinystories_2mb.txt"
    expected = path.read_bytes().decode().split(EOT)
    assert len(expected) == 2317
    for unit_bytes in (2**15, 2**23):
        monkeypatch.setattr(sources, "UNIT_BYTES", unit_bytes)
        assert texts(path, Reading(split_on=EOT)) == expected


@pytest.mark.parametrize("unit_bytes", [1, 50, 10_000])
@pytest.mark.parametrize("packed", [False, True])
def test_json_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit_bytes: int, packed: bool) -> None:
    monkeypatch.setattr(sources, "UNIT_BYTES", unit_bytes)
    expected = ["one", "", "two\nlines\u2028\x85", "\U0001f600 \u00e9", " spaces ", EOT]
    lines = [json.dumps({"id": 1, "story": text}, ensure_ascii=bool(n % 2)) for n, text in enumerate(expected)]
    data = ("\r\n".join(lines) + "\n\n  \n").encode()
    path = tmp_path / ("rows.jsonl.gz" if packed else "rows.jsonl")
    path.write_bytes(gzip.compress(data) if packed else data)
    assert texts(path, Reading(text_column="story")) == expected


def test_packed_text(tmp_path: Path) -> None:
    path = tmp_path / "text.TXT.GZ"
    path.write_bytes(gzip.compress(f"\ufeffone\r\n{EOT}two{EOT}".encode()))
    assert texts(path) == [f"\ufeffone\r\n{EOT}two{EOT}"]
    assert texts(path, Reading(split_on=EOT)) == ["\ufeffone\r\n", "two"]
    path.write_bytes(path.read_bytes()[:-9])
    assert "damaged gzip file" in refusal(path)


def test_parquet_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [f"row {n} \u00e9" * (n % 7) for n in range(100)]
    table = pa.table({"n": list(range(100)), "body": pa.array(expected, type=pa.large_string())})
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=9)
    for unit_bytes, num_units in ((1, 12), (10**9, 1)):
        monkeypatch.setattr(sources, "UNIT_BYTES", unit_bytes)
        assert (
            len(plan_units(InputFile(str(tmp_path / "rows.parquet"), "", "parquet"), Reading(None, "body")))
            == num_units
        )
        assert texts(tmp_path / "rows.parquet", Reading(text_column="body")) == expected


def test_real_parquet_rows(shared_data: Path) -> None:
    path = shared_data / "fineweb_rows_15.parquet"
    assert texts(path) == pq.read_table(path)["text"].to_pylist()
    assert "no column 'story', only 'text', 'id'" in refusal(path, Reading(text_column="story"))
    assert "'token_count' is int64, not string (--text-column)" in refusal(path, Reading(text_column="token_count"))


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"text": "a"', ":3: not JSON ("),
        (b"plain text", ":3: not JSON ("),
        (b'["text"]', ":3: a JSON list, not an object"),
        (b'{"body": "x", "id": 3}', ":3: no field 'text', only 'body', 'id'; name it with --text-column"),
        (b'{"text": 3}', ":3: 'text' is int, not a string (--text-column)"),
        (b'{"text": null}', ":3: 'text' is NoneType, not a string"),
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


def test_a_bad_story_is_named_by_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "UNIT_BYTES", 10)
    path = tmp_path / "stories.txt"
    path.write_bytes(b"one\n<>\ntwo\n<>\nthr\xe9e\n<>\nfour\n")
    assert f"{path}:5: not UTF-8 (byte 0xe9 at 17)" in refusal(path, Reading(split_on="<>"))


def test_bad_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 not really")
    assert "rows.parquet: not a readable parquet file" in refusal(path)
    pq.write_table(pa.table({"text": ["a", "b", None]}), path)
    assert "rows.parquet, row 2: null in column 'text'" in refusal(path)
    raw = pa.array([b"good", b"caf\xe9"], type=pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": raw}), path)
    assert "rows.parquet, row 1: not UTF-8" in refusal(path)
    pq.write_table(pa.table({"text": ["some text " * 50] * 1000}), path)
    data = bytearray(path.read_bytes())
    data[4 : len(data) // 2] = bytes(len(data) // 2 - 4)
    path.write_bytes(data)
    assert "rows.parquet" in refusal(path)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["a"]}), path)
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


@pytest.mark.parametrize("make", ["nothing", "hidden", "empty"])
def test_what_holds_no_text_is_refused(tmp_path: Path, make: str) -> None:
    target: Any = tmp_path / "input"
    if make == "empty":
        target.write_bytes(b"")
    else:
        target.mkdir()
        (target / (".x.txt" if make == "hidden" else "x.md")).write_text("x")
    with pytest.raises(InputError, match=str(target)):
        find_files((str(target),))
