"""A byte-order mark is left out with a line, wherever text is read; UTF-16 and UTF-32 are refused by their names."""

import codecs
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from common.errors import InputError
from data_prep import bpe, hellaswag, textfiles
from data_prep.pipeline import sources
from model.generate import read_prompts
from model.lens import Ablate, read_text
from tests.helpers.data_dirs import contents, decoded
from tests.helpers.hellaswag_items import write_items
from tests.helpers.runs import called

ROWS = [f"row {number} \ufeff e\u0301\n" * (number % 5) for number in range(300)]
JSON_LINES = "".join(json.dumps({"text": text}) + "\n" for text in ROWS)
FILES = {"a.txt": "".join(ROWS), "b.txt.gz": "".join(ROWS), "c.jsonl": JSON_LINES, "d.jsonl.gz": JSON_LINES}
MARK = codecs.BOM_UTF8
OTHERS = {
    "UTF-16": (codecs.BOM_UTF16_LE, "utf-16-le"),
    "UTF-16 BE": (codecs.BOM_UTF16_BE, "utf-16-be"),
    "UTF-32": (codecs.BOM_UTF32_LE, "utf-32-le"),
    "UTF-32 BE": (codecs.BOM_UTF32_BE, "utf-32-be"),
}


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    return path


def prepare(path: Path, out: Path, *flags: str) -> Any:
    return called(textfiles.main, "--input", str(path), "--out", str(out), "--tokenizer", "byte", *flags)


def tokens_of(data: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(data).items() if name.endswith((".bin", ".idx"))}


@pytest.mark.parametrize("flags", [(), ("--split-documents-on", "e\u0301\n")], ids=["whole", "split"])
@pytest.mark.parametrize("name", FILES)
def test_a_mark_changes_no_token(
    name: str, flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "UNIT_BYTES", 500)
    plain, marked = (write(tmp_path / mark.hex() / name, mark + FILES[name].encode()) for mark in (b"", MARK))
    assert "byte-order mark" not in prepare(plain, tmp_path / "plain", *flags).stderr
    done = prepare(marked, tmp_path / "marked", *flags)
    assert done.returncode == 0
    assert f"textfiles: warning: {marked}: its byte-order mark, which is no text, is left out\n" in done.stderr
    assert tokens_of(tmp_path / "marked") == tokens_of(tmp_path / "plain")
    if not flags:
        assert "\ufeff" in decoded(tmp_path / "marked").decode()  # elsewhere it is text


def test_many_marked_files_are_three_lines_and_a_count(tmp_path: Path) -> None:
    for number in range(9):
        write(tmp_path / "in" / f"{number}.txt", MARK + b"some text")
    done = prepare(tmp_path / "in", tmp_path / "out")
    assert done.returncode == 0 and done.stderr.count("byte-order mark") == 4
    assert "6 more files: their byte-order marks are left out too" in done.stderr
    assert decoded(tmp_path / "out") == b"some text" * 9


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("encoding", OTHERS)
def test_another_encoding_is_refused_by_its_name_with_the_command(encoding: str, name: str, tmp_path: Path) -> None:
    mark, codec = OTHERS[encoding]
    path = write(tmp_path / "it's here" / name, mark + FILES[name].encode(codec))
    for done in (prepare(path, tmp_path / "out"), prepare(path.parent, tmp_path / "out")):
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert f"{path}: {encoding[:6]}, by its byte-order mark" in done.stderr
        assert f"iconv -f {encoding[:6]} -t UTF-8" in done.stderr
    assert not (tmp_path / "out").exists()


def test_lines_are_counted_as_an_editor_counts_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "UNIT_BYTES", 20)
    for line in range(1, 12):
        rows = [b'{"text": "a"}'] * 12
        rows[line - 1] = b"5"
        path = write(tmp_path / "a.jsonl", MARK + b"\n".join(rows))
        assert f"a.jsonl:{line}: " in prepare(path, tmp_path / "out").stderr
    path = write(tmp_path / "b.txt", MARK + b"\n\n\xff\n\n")
    assert "b.txt:3: not UTF-8 (byte 0xff at 5)" in prepare(path, tmp_path / "out").stderr


def test_a_file_that_is_nothing_but_a_mark_has_no_text(tmp_path: Path) -> None:
    done = prepare(write(tmp_path / "a.txt", MARK), tmp_path / "out")
    assert done.returncode == 2 and "no text in --input" in done.stderr


def test_other_commands_leave_it_out_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for mark in (b"", MARK):
        source = write(tmp_path / mark.hex() / "a.jsonl", mark + JSON_LINES.encode())
        out = tmp_path / mark.hex() / "vocabulary"
        done = called(bpe.main, "--input", str(source), "--vocab-size", "262", "--out", str(out))
        assert done.returncode == 0 and ("byte-order mark" in done.stderr) == bool(mark)
    ranks = [(tmp_path / mark.hex() / "vocabulary" / "ranks.tiktoken").read_bytes() for mark in (b"", MARK)]
    assert ranks[0] == ranks[1]

    prompts = write(tmp_path / "prompts.jsonl", MARK + b'"The "\n{"prompt": "A"}\n')
    assert [prompt for _, prompt in read_prompts(str(prompts))] == ["The ", "A"]
    text = write(tmp_path / "text.txt", MARK + b"Once upon")
    assert read_text(Ablate(path="none", file=text))[1] == "Once upon"
    assert capsys.readouterr().err.count("its byte-order mark, which is no text, is left out\n") == 2
    for path in (prompts, text):
        path.write_bytes(codecs.BOM_UTF16_LE + "abc".encode("utf-16-le"))
    with pytest.raises(InputError, match="UTF-16, by its byte-order mark"):
        list(read_prompts(str(prompts)))
    with pytest.raises(InputError, match="UTF-16, by its byte-order mark"):
        read_text(Ablate(path="none", file=text))


def test_hellaswags_items_are_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_items(tmp_path / "items.jsonl", 5)
    plain = hellaswag.open_items(path).items
    path.write_bytes(MARK + path.read_bytes())
    assert hellaswag.open_items(path).items == plain
    assert "byte-order mark" in capsys.readouterr().err
