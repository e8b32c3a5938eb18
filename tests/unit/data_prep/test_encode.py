"""Parts: read back as written, used again only for the same input and options, packed into the same shards."""

import hashlib
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import InputError
from data_prep.pipeline import encode, workers
from data_prep.pipeline.encode import BLOCK_TOKENS, Part, Tally, encode_unit, read_part, write_part
from data_prep.textfiles import Options, prepare
from tests.helpers.data_dirs import contents, names, write_stories


def test_a_part_reads_back_as_written(tmp_path: Path) -> None:
    documents = [np.arange(n, dtype=np.uint16) for n in (3, 1, BLOCK_TOKENS + 5, 2)]
    hashes = [hashlib.sha256(bytes([n])).digest()[:16] for n in range(4)]
    tally = Tally(empty=3, repaired=1)
    batches = [
        (np.concatenate(documents[begin:end]), [len(ids) for ids in documents[begin:end]], hashes[begin:end])
        for begin, end in ((0, 1), (1, 4))
    ]
    part = write_part(tmp_path / "one", {"key": 1}, iter(batches), tally)
    assert (part.documents, part.tokens) == (4, BLOCK_TOKENS + 11)
    read = read_part(tmp_path / "one", {"key": 1})
    assert read == Part(part.path, part.tokens, 4, tally, is_reused=True)
    assert read.starts().tolist() == [0, 3, 4, BLOCK_TOKENS + 9]
    assert [a << 64 | b for a, b in read.hashes().tolist()] == [int.from_bytes(value, "big") for value in hashes]
    blocks = list(read.blocks())
    assert [starts.tolist() for _, starts in blocks] == [[0, 3, 4], [9]]
    np.testing.assert_array_equal(np.concatenate([tokens for tokens, _ in blocks]), np.concatenate(documents))


@pytest.mark.parametrize(
    "damage", ["key", "record", "torn record", "no form", "no tally", "fifo", "flipped bit", "shorter", "gone"]
)
def test_a_damaged_or_other_part_is_not_used(tmp_path: Path, damage: str) -> None:
    part = write_part(tmp_path / "one", {"key": 1}, [(np.arange(50, dtype=np.uint16), [50], [bytes(16)])], Tally())
    record, content = tmp_path / "one.json", part.path.read_bytes()
    match damage:
        case "record":
            record.unlink()
        case "torn record":
            record.write_text(record.read_text()[:-9])
        case "no form":
            record.write_text("[" * 100_000)
        case "no tally":
            record.write_text(record.read_text().replace('"repaired": 0', '"repaired": "0"'))
        case "fifo":
            part.path.unlink()
            os.mkfifo(part.path)
        case "flipped bit":
            part.path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        case "shorter":
            part.path.write_bytes(content[:-8])
        case "gone":
            part.path.unlink()
    assert read_part(tmp_path / "one", {"key": 2 if damage == "key" else 1}) is None


@pytest.mark.parametrize(
    ("change", "expected"),
    [("nothing", 5), ("shard_tokens", 5), ("a file", 4), ("another file", 5), ("tokenizer", 0), ("text_column", 0)],
)
def test_only_parts_of_the_same_input_and_options_are_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change: str, expected: int
) -> None:
    folder = write_stories(tmp_path / "input")
    options: dict[str, Any] = {"input": (str(folder),), "out": tmp_path / "out", "tokenizer": "byte"}
    made: list[Part] = []

    def fail_after_five(task: Any) -> Part:
        if len(made) == 5:
            raise OSError("No space left on device")
        made.append(encode_unit(task))
        return made[-1]

    with monkeypatch.context() as patched:
        patched.setattr(encode, "encode_unit", fail_after_five)
        with pytest.raises(InputError, match=r"No space left on device; 5 finished parts .* stay in "):
            prepare(Options(**options))
    match change:
        case "a file":
            text = (folder / "02.jsonl").read_text()
            (folder / "02.jsonl").write_text(text.replace("Story", "Start"))
        case "another file":
            shutil.copy(folder / "11.jsonl", folder / "00a.jsonl")
        case "tokenizer":
            options["tokenizer"] = "char"
        case "text_column":
            for path in folder.iterdir():
                path.write_text(path.read_text().replace('"text"', '"body"'))
            options["text_column"] = "body"
        case "shard_tokens":
            options["shard_tokens"] = 100_000
    prepare(Options(**options))
    report = capsys.readouterr().err
    assert ("earlier run" in report) == bool(expected)
    assert report.startswith(f"textfiles: {expected} of " if expected else "")
    prepare(Options(**options | {"out": tmp_path / "fresh"}))
    assert "earlier run" not in capsys.readouterr().err
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    assert names(tmp_path) == ["fresh", "input", "out"]


def test_progress_is_in_plain_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(workers, "REPORT_SECONDS", 0.0)
    prepare(Options((str(write_stories(tmp_path / "input")),), tmp_path / "out", "byte"))
    lines = capsys.readouterr().err.splitlines()
    rates = r"[\d.]+ of [\d.]+ MB  [\d.]+ MB/s  [\d,]+ documents"
    for pattern, count in ((rf"survey  {rates}", 12), (rf"encode  {rates}  [\d,]+ tokens  [\d,]+ tokens/s", 13)):
        assert sum(bool(re.fullmatch(rf"{pattern}  \d+ s left", line)) for line in lines) == count
