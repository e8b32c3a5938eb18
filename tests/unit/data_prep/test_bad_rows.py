"""Rows that are not as they should be: each stops with its place, or is left out and counted, and the rest is the same.

Also what a damaged or odd input of any kind does to the whole command: it reads, or is one line.
"""

import gzip
import json
import random
import shutil
import subprocess
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from data_prep import bpe, fineweb, fineweb_plan, textfiles
from data_prep.manifest import read_manifest
from data_prep.pipeline import json_lines, sources
from tests.helpers.data_dirs import contents, names, tokens
from tests.helpers.pages import make_pages, write_pages
from tests.helpers.runs import called

TOO_LONG = "longer than --max-document-bytes"
DIGITS = "an integer of more than 4,300 digits"
BAD_LINES: list[tuple[bytes, str]] = [
    (b'{"text": null}', "null"),
    (b'{"body": "x"}', "no such field"),
    (b"{}", "no such field"),
    (b'{"text": 5}', "not a string"),
    (b'{"text": ["x"]}', "not a string"),
    (b'["text"]', "not an object"),
    (b"null", "not an object"),
    (b'"text"', "not an object"),
    (b'{"text": "torn', "not JSON"),
    (b'{"text": "a"}{"text": "b"}', "not JSON"),
    (b"\0\0\0\0", "not JSON"),
    (b'{"text": "a \0 byte"}', "not JSON"),
    (b"{'text': 'quotes'}", "not JSON"),
    (b'{"text": "caf\xe9"}', "not UTF-8"),
    (b'{"text": "a surrogate in bytes \xed\xa0\x80"}', "not UTF-8"),
    (b'{"text": "x", "id": ' + b"1" * 4_301 + b"}", DIGITS),
    (b'{"text": "x", "deep": ' + b"[" * 3_000 + b"]" * 3_000 + b"}", "nested too deeply"),
    (b'{"text": "' + b"x" * 1_001 + b'"}', TOO_LONG),
    (b'{"text": "' + b"\xc3\xa9" * 501 + b'"}', TOO_LONG),
    (b'{"text": "x", "more": "' + b"y" * 90_000 + b'"}', TOO_LONG),
    (b'{"text": "x", "many": [' + b"0," * 9_000 + b"0]}", "too many values"),
]
GOOD_LINES: list[tuple[bytes, str]] = [
    (b'{"text": "one"}', "one"),
    (b'{"text": ""}', ""),
    (b'  {"id": NaN, "text": "first", "text": "last"}\r', "last"),
    (b'{"text": "\\ud83d\\ude00 \\ud800x\\udfff \\u0000"}', "\U0001f600 \ufffdx\ufffd \0"),
    (b'{"text": "' + b"\\u00e9" * 500 + b'", "id": ' + b"1" * 4_300 + b"}", "\u00e9" * 500),
    (b'{"text": "' + b"," * 1_000 + b'", "more": "' + b"[{," * 3_000 + b'"}', "," * 1_000),
]
Done = subprocess.CompletedProcess[str]
IDS = [f"{number}-{reason}" for number, (_, reason) in enumerate(BAD_LINES)]
LIMIT = ("--max-document-bytes", "1000")
SKIP = ("--on-bad-row", "skip")


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "LONG_LINE", 8_000)
    monkeypatch.setattr(json_lines, "MOST_VALUES", 4_000)
    monkeypatch.setattr(sources, "EXTRA_LINE_BYTES", 80_000)


def run(source: Path, out: Path, *more: str) -> Done:
    return called(textfiles.main, "--input", str(source), "--out", str(out), "--tokenizer", "byte", *more)


def prepare(source: Path, out: Path, *more: str) -> None:
    done = run(source, out, *more)
    assert (done.returncode, done.stderr) == (0, "")


def refusal(program: str, done: Done) -> str:
    """Return the only line of stderr of a command that was refused, without warnings."""
    lines = [line for line in done.stderr.splitlines() if not line.startswith(f"{program}: warning: ")]
    assert done.returncode == 2 and len(lines) == 1, done
    assert lines[0].startswith(f"{program}: ") and len(lines[0]) < 2_000
    return lines[0]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES, ids=IDS)
def test_a_bad_line_stops_with_its_place_or_is_left_out_and_counted(tmp_path: Path, line: bytes, reason: str) -> None:
    good = b'{"text": "first"}\n\n{"text": "second"}\n'
    (tmp_path / "good.jsonl").write_bytes(good + b'{"text": "third"}\n')
    path = tmp_path / "rows.jsonl"
    path.write_bytes(good + line + b'\n{"text": "third"}')
    done = run(path, tmp_path / "out", *LIMIT)
    assert f"{path}:4: " in refusal("textfiles", done)
    assert names(tmp_path) == ["good.jsonl", "rows.jsonl"]
    prepare(path, tmp_path / "out", *SKIP, *LIMIT)
    record = read_manifest(tmp_path / "out").source["skipped"]
    assert record == {"rows": 1, "reasons": {reason: 1}, "first": [f"rows.jsonl:4: {reason}"]}
    prepare(tmp_path / "good.jsonl", tmp_path / "expected")
    for split in ("train", "val"):
        assert tokens(tmp_path / "out", split) == tokens(tmp_path / "expected", split)


def test_unusual_lines_that_are_good_read_whatever_is_done_with_bad_ones(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(line for line, _ in GOOD_LINES) + b"\n \n")
    for policy in ("stop", "skip"):
        prepare(path, tmp_path / policy, "--on-bad-row", policy, *LIMIT)
        ids = tokens(tmp_path / policy, "train") + tokens(tmp_path / policy, "val")
        assert bytes(ids).decode() == "".join(text for _, text in GOOD_LINES)
    assert contents(tmp_path / "stop") == contents(tmp_path / "skip")
    again = run(path, tmp_path / "stop", *LIMIT, *SKIP)
    assert "already complete" in again.stdout


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_counts_and_places_do_not_depend_on_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    rng = random.Random(name)
    lines = [json.dumps({"text": f"Story {number}."}).encode() for number in range(200)]
    bad = {rng.randrange(200): rng.choice(BAD_LINES) for _ in range(40)}
    data = b"\n".join(bad[number][0] if number in bad else line for number, line in enumerate(lines))
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    made = []
    for unit_bytes in (100, 3_000, 10**9):
        monkeypatch.setattr(sources, "UNIT_BYTES", unit_bytes)
        prepare(tmp_path / name, tmp_path / str(unit_bytes), *SKIP, *LIMIT)
        made.append(contents(tmp_path / str(unit_bytes)))
    assert made[0] == made[1] == made[2]
    record = read_manifest(tmp_path / "100").source["skipped"]
    places = [f"{name}:{number + 1}: {reason}" for number, (_, reason) in sorted(bad.items())]
    assert (record["rows"], record["first"]) == (len(bad), places[:10])
    assert record["reasons"] == {
        reason: sum(reason == other for _, other in bad.values())
        for reason in sorted({reason for _, reason in bad.values()})
    }
    done = run(tmp_path / name, tmp_path / "100", *LIMIT, *SKIP, "--overwrite")
    assert f"{len(bad)} bad rows left out (" in done.stdout and f"first {places[0]}; " in done.stdout


def test_documents_of_plain_text_are_rows_too(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"one<>tw\xe9o<>" + b"x" * 1_001 + b"<>three")
    (folder / "b.txt").write_bytes(b"caf\xe9<>four")
    prepare(folder, tmp_path / "split", "--split-documents-on", "<>", *SKIP, *LIMIT)
    record = read_manifest(tmp_path / "split").source["skipped"]
    assert record["reasons"] == {TOO_LONG: 1, "not UTF-8": 2}
    assert bytes(tokens(tmp_path / "split", "train") + tokens(tmp_path / "split", "val")) == b"onethreefour"
    (folder / "c.txt").write_bytes(b"good text")
    prepare(folder, tmp_path / "whole", *SKIP, *LIMIT)
    assert read_manifest(tmp_path / "whole").source["skipped"]["first"] == [f"a.txt: {TOO_LONG}", "b.txt: not UTF-8"]
    (folder / "a.txt").write_bytes(b"x" * 1_001)
    (folder / "b.txt").unlink()
    done = run(folder, tmp_path / "out", *LIMIT)
    assert f"{folder / 'a.txt'}: a document of more than 1,000 bytes; raise --max-document-bytes" in refusal(
        "textfiles", done
    )
    (folder / "c.txt").unlink()
    done = run(folder, tmp_path / "out", *LIMIT, *SKIP)
    assert f"no text in --input, without its bad rows (1 {TOO_LONG})" in refusal("textfiles", done)


def test_a_separator_that_occurs_nowhere_is_named(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text("a story <end>" * (number > 0) * (number < 2) + "the end " * 20)
    flags = ("--tokenizer", "byte", "--out", str(tmp_path / "out"), "--split-documents-on")
    files = [str(tmp_path / f"{number}.txt") for number in range(5)]
    done = called(textfiles.main, "--input", files[0], *flags, "<end>")
    warning, refused = done.stderr.splitlines()
    assert warning == f"textfiles: warning: --split-documents-on '<end>': this separator occurs nowhere in {files[0]}"
    assert "one document holds all of the text" in refused and "--val-fraction" not in refused
    done = called(textfiles.main, "--input", *files, *flags, "<end>")
    assert done.returncode == 0
    assert f"nowhere in {files[0]}, {files[2]}, {files[3]} and 1 more files" in done.stderr
    done = called(
        bpe.main,
        "--input",
        *files,
        "--out",
        str(tmp_path / "bpe"),
        "--split-documents-on",
        "ABSENT",
        "--vocab-size",
        "258",
    )
    assert "'ABSENT': this separator occurs nowhere in" in done.stderr


def fineweb_run(folder: Path, out: Path, *more: str) -> Done:
    options = ("--source", "local", "--data-files", str(folder), "--tokenizer", "byte", "--workers", "1")
    return called(fineweb.main, *options, "--out", str(out), "--val-tokens", "200", *more)


def test_fineweb_leaves_pages_out_the_same_way_for_any_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fineweb_plan, "UNIT_BYTES", 1)
    pages = make_pages(60, 0)
    for number in (7, 31):
        pages[number] = "long " * 1_000
    write_pages(tmp_path / "in" / "0.parquet", pages)
    write_pages(tmp_path / "short" / "0.parquet", [page for page in pages if page != "long " * 1_000])
    skip = ("--max-document-bytes", "4000", *SKIP)
    line = refusal("fineweb", fineweb_run(tmp_path / "in", tmp_path / "out", *skip[:2]))
    assert "0.parquet, row 7: a document of more than 4,000 bytes" in line
    # Parts that were finished before the bad row serve the command that skips it; those without a row serve no other.
    done = fineweb_run(tmp_path / "in", tmp_path / "out", *skip)
    assert done.returncode == 0 and "1 of 3 parts were there" not in done.stderr
    assert f"2 bad rows left out (2 {TOO_LONG}), first 0.parquet, row 7: " in done.stdout
    for index in "10":
        task = ("--stage", "tokenize", "--num-tasks", "2", "--task-index", index)
        assert fineweb_run(tmp_path / "in", tmp_path / "tasks", *skip, *task).returncode == 0
    line = refusal("fineweb", fineweb_run(tmp_path / "in", tmp_path / "tasks", "--stage", "pack", *skip[:2]))
    assert "2 of 3 parts are missing or damaged" in line
    assert fineweb_run(tmp_path / "in", tmp_path / "tasks", *skip, "--stage", "pack").returncode == 0
    assert contents(tmp_path / "tasks") == contents(tmp_path / "out")
    assert fineweb_run(tmp_path / "short", tmp_path / "expected").returncode == 0
    expected, made = read_manifest(tmp_path / "expected"), read_manifest(tmp_path / "out")
    assert made.fingerprint == expected.fingerprint
    counts = made.source["documents"]
    assert counts["read"] == len(pages) and counts["skipped"]["rows"] == 2
    assert "holds finished data without some bad rows" in refusal(
        "fineweb", fineweb_run(tmp_path / "in", tmp_path / "out", *skip[:2])
    )
    assert "already complete" in fineweb_run(tmp_path / "in", tmp_path / "out", *skip).stdout
    # Where no row is bad, --on-bad-row is nowhere in the data.
    assert "already complete" in fineweb_run(tmp_path / "short", tmp_path / "expected", *skip[2:]).stdout


def test_bpe_leaves_out_the_same_rows(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"Once upon a time there were {number} bears."}).encode() for number in range(50)]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([*lines[:20], b'{"text": null}', *lines[20:]]))
    flags = ("--input", str(path), "--vocab-size", "260", "--out", str(tmp_path / "out"))
    assert f"{path}:21: 'text' is NoneType" in refusal("bpe", called(bpe.main, *flags))
    done = called(bpe.main, *flags, *SKIP)
    assert (done.returncode, done.stderr) == (
        0,
        "",
    ) and "1 bad rows left out (1 null), first rows.jsonl:21" in done.stdout
    assert json.loads((tmp_path / "out" / "training.json").read_text())["skipped"]["rows"] == 1
    assert "already complete" in called(bpe.main, *flags, *SKIP).stdout
    assert "--on-bad-row skip (now stop)" in refusal("bpe", called(bpe.main, *flags))


def test_many_damaged_inputs_read_or_are_one_line(tmp_path: Path) -> None:
    rng = random.Random(11)
    texts = [
        " ".join(rng.choices(["alpha", "\u00e9t\u00e9", "\U0001f600", "x" * 30], k=rng.randrange(20)))
        for _ in range(40)
    ]
    rows = b"".join(
        json.dumps({"id": n, "text": text}, ensure_ascii=bool(n % 2)).encode() + b"\n" for n, text in enumerate(texts)
    )
    whole = "<>".join(texts).encode()
    pq.write_table(pa.table({"text": texts}), tmp_path / "table.parquet", row_group_size=17)
    kinds = {
        "a.jsonl": rows,
        "a.jsonl.gz": gzip.compress(rows),
        "a.txt": whole,
        "a.txt.gz": gzip.compress(whole),
        "a.parquet": (tmp_path / "table.parquet").read_bytes(),
    }
    (tmp_path / "in").mkdir()
    codes = set()
    for number in range(120):
        name = rng.choice([*kinds])
        content = bytearray(kinds[name])
        match rng.randrange(4):
            case 0:
                del content[rng.randrange(len(content)) :]
            case 1:
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            case 2:
                begin = rng.randrange(len(content))
                content[begin : begin + rng.randrange(9)] = rng.randbytes(rng.randrange(9))
            case 3:
                content *= 2
        path = tmp_path / "in" / name
        path.write_bytes(content)
        flags = ["--split-documents-on", "<>"] if rng.random() < 0.5 else []
        flags += ["--on-bad-row", rng.choice(["stop", "skip"]), "--tokenizer", rng.choice(["byte", "char"])]
        done = called(textfiles.main, "--input", str(path), "--out", str(tmp_path / "out"), *flags)
        codes.add(done.returncode)
        if done.returncode:
            refusal("textfiles", done)
            assert names(tmp_path) == ["in", "table.parquet"], number
        else:
            shutil.rmtree(tmp_path / "out")
    assert codes == {0, 2}
