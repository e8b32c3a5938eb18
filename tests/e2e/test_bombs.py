"""Small files that become large: each is read, or refused in one line, in the memory that docs/data.md states."""

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from data_prep.manifest import read_manifest
from tests.helpers.data_dirs import contents
from tests.helpers.runs import ROOT

# Run a command, then print the peak of its memory in kilobytes. It would begin with that of this process otherwise.
MEASURED = """
import pathlib, re, runpy, sys
pathlib.Path("/proc/self/clear_refs").write_text("5")
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
"""
MEGABYTE = b"a" * 2**20
BOUND_BYTES = 500_000_000  # 0.2 GB for Python and its libraries, and one document of at most 128 MiB


def packed(path: Path, begin: bytes, megabytes: int, end: bytes) -> None:
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(begin)
        for _ in range(megabytes):
            file.write(MEGABYTE)
        file.write(end)


def long_line(folder: Path) -> Path:
    packed(folder / "line.jsonl.gz", b'{"text": "first"}\n{"text": "', 300, b'"}\n{"text": "last"}\n')
    return folder / "line.jsonl.gz"


def long_text(folder: Path) -> Path:
    packed(folder / "text.txt.gz", b"", 300, b"end")
    return folder / "text.txt.gz"


def far_separator(folder: Path) -> Path:
    packed(folder / "far.txt.gz", b"first<>", 300, b"<>last")
    return folder / "far.txt.gz"


def shared_entry(folder: Path) -> Path:
    """300 rows of a megabyte, which are one entry of the dictionary: 600 bytes."""
    dictionary = pa.DictionaryArray.from_arrays(pa.array([0] * 300, pa.int8()), pa.array([MEGABYTE.decode()]))
    pq.write_table(pa.table({"text": dictionary}), folder / "rows.parquet", compression="zstd")
    assert (folder / "rows.parquet").stat().st_size < 2_000
    return folder / "rows.parquet"


def many_values(folder: Path) -> Path:
    """A line of 60 MB that would be twenty million objects."""
    path = folder / "values.jsonl"
    path.write_bytes(b'{"text": "first"}\n{"text": "x", "more": [' + b"{}," * 20_000_000 + b'0]}\n{"text": "last"}\n')
    return path


def measured(*arguments: str | Path) -> tuple[subprocess.CompletedProcess[str], int]:
    """Run textfiles.py in a process of its own; return it, and the bytes of memory that it took at most."""
    command = [sys.executable, "-c", MEASURED, str(ROOT / "data_prep" / "textfiles.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    return done, 1024 * int(done.stdout.split()[-1])


@pytest.mark.parametrize(
    ("make", "complaint", "num_kept"),
    [
        (long_line, "line.jsonl.gz:2: a line of more than 150,994,944 bytes", 2),
        (far_separator, "far.txt.gz:1: a document of more than 134,217,728 bytes", 2),
        (long_text, "text.txt.gz: a document of more than 134,217,728 bytes", None),
        (many_values, "values.jsonl:2: more than 1,048,576 values in one line", 2),
        (shared_entry, None, 300),
    ],
)
def test_what_becomes_large_takes_bounded_memory(
    tmp_path: Path, make: Callable[[Path], Path], complaint: str | None, num_kept: int | None
) -> None:
    source = make(tmp_path)
    flags: list[str | Path] = [
        "--input",
        source,
        "--out",
        tmp_path / "out",
        "--tokenizer",
        "byte",
        "--val-fraction",
        "0.4",
    ]
    flags += ["--workers", "1", *(["--split-documents-on", "<>"] if make is far_separator else [])]
    done, peak = measured(*flags)
    assert peak < BOUND_BYTES
    if complaint is not None:
        assert done.returncode == 2 and complaint in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert "--max-document-bytes" in done.stderr or make is many_values
        if num_kept is not None:
            done, peak = measured(*flags, "--on-bad-row", "skip")
            assert peak < BOUND_BYTES
    if num_kept is not None:
        assert done.returncode == 0, done.stderr
        manifest = read_manifest(tmp_path / "out")
        assert sum(split.documents for split in manifest.splits.values()) == num_kept
        assert manifest.source.get("skipped", {"rows": 0})["rows"] == (complaint is not None)


def test_bad_rows_are_left_out_the_same_way_by_any_number_of_workers(tmp_path: Path) -> None:
    lines = [json.dumps({"text": None if number % 977 == 5 else f"Story {number}. " * 60}) for number in range(20_000)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    for workers in (1, 2):
        flags = ["--input", str(tmp_path / "rows.jsonl"), "--tokenizer", "byte", "--on-bad-row", "skip"]
        done, _ = measured(*flags, "--workers", str(workers), "--out", tmp_path / str(workers))
        assert done.returncode == 0, done.stderr
        assert "21 bad rows left out (21 null), first rows.jsonl:6: null; rows.jsonl:983: null" in done.stdout
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
