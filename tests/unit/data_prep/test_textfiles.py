"""The preparation against the input's own bytes and tiktoken's ids; faults through the real command line."""

import contextlib
import hashlib
import inspect
import json
import os
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path
from pydoc_data import topics

import numpy as np
import pytest
import tiktoken

from common.errors import InputError
from data_prep.manifest import Manifest
from data_prep.textfiles import Options, main, prepare
from data_prep.tokenizer import load_tokenizer
from tests.helpers.runs import called

SCRIPT = str(Path(__file__).resolve().parents[3] / "data_prep" / "textfiles.py")
# Starts a command under a limit on the size of any file it writes: to it, the disk is full.
WITH_SMALL_FILES = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""
EOT = 50_256
ALICE = "Alice was beginning to get very tired\nof sitting by her sister on the bank. " * 20
# A mark, every kind of line end, a NUL, and characters of two, three and four bytes.
ODD = "\ufeffone\r\ntwo\rthree\n\r\n\0 \x85 \u2028 \u00e9\u20ac\U0001f600 e\u0301 <|endoftext|> \t\x0b\x0c no newline"


def command_line(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True)


def textfiles(*arguments: str | Path, cwd: Path = Path()) -> subprocess.CompletedProcess[str]:
    """The same in this process."""
    with contextlib.chdir(cwd):
        return called(main, *map(str, arguments))


def write(path: Path, text: str) -> str:
    path.write_bytes(text.encode())
    return str(path)


def tokens(data: Path, split: str) -> list[int]:
    """A split's ids, read by numpy alone."""
    shards = [np.fromfile(path, dtype="<u2", offset=1024) for path in sorted(data.glob(f"{split}_*.bin"))]
    return [int(index) for shard in shards for index in shard]


def decoded(data: Path) -> bytes:
    tokenizer = load_tokenizer(data)
    return tokenizer.decode_bytes(tokens(data, "train")) + tokenizer.decode_bytes(tokens(data, "val"))


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of change of every file under `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def contents(folder: Path) -> dict[str, bytes]:
    return {name: content for name, (content, _) in state(folder).items()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_one_line(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("textfiles: ")
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith("\n")
    for part in parts:
        assert part in done.stderr


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """tmp_path/data, made of tmp_path/alice.txt by characters."""
    prepare(Options((write(tmp_path / "alice.txt", ALICE),), tmp_path / "data", "char"))
    return tmp_path / "data"


def test_tiny_shakespeare_by_characters(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "tinyshakespeare.txt"
    done = command_line("--input", source, "--out", tmp_path / "data", "--tokenizer", "char")
    assert (done.returncode, done.stderr) == (0, "")
    assert "1,003,854 tokens" in done.stdout
    assert "111,540 tokens" in done.stdout
    text = source.read_bytes().decode()
    place = {character: index for index, character in enumerate(sorted(set(text)))}
    assert len(place) == 65
    ids = [place[character] for character in text]
    assert tokens(tmp_path / "data", "train") == ids[:1_003_854]
    assert tokens(tmp_path / "data", "val") == ids[1_003_854:]
    assert decoded(tmp_path / "data") == source.read_bytes()


@pytest.mark.parametrize("tokenizer", ["char", "byte", "gpt2"])
def test_every_byte_of_the_text_is_kept(shared_data: Path, tmp_path: Path, tokenizer: str) -> None:
    source = write(tmp_path / "odd.txt", ODD)
    prepare(Options((source,), tmp_path / "data", tokenizer, val_fraction=0.3, shard_tokens=10))
    assert decoded(tmp_path / "data") == ODD.encode()


@pytest.mark.parametrize(
    ("val_fraction", "num_train"), [(0.1, 90), (0.25, 75), (0.5, 50), (0.005, 99), (0.001, 99), (0.987, 1)]
)
def test_the_last_part_of_the_characters_is_for_validation(tmp_path: Path, val_fraction: float, num_train: int) -> None:
    text = "\u00e9".join("0123456789" * 5)[:99] + "!"
    prepare(Options((write(tmp_path / "text.txt", text),), tmp_path / "data", "byte", val_fraction))
    assert bytes(tokens(tmp_path / "data", "train")).decode() == text[:num_train]
    assert bytes(tokens(tmp_path / "data", "val")).decode() == text[num_train:]


@pytest.mark.parametrize("val_fraction", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_val_fraction_out_of_bounds_is_refused(tmp_path: Path, val_fraction: float) -> None:
    source = write(tmp_path / "text.txt", ALICE)
    with pytest.raises(InputError, match=f"--val-fraction {val_fraction} "):
        prepare(Options((source,), tmp_path / "data", "char", val_fraction))
    assert names(tmp_path) == ["text.txt"]


@pytest.mark.parametrize("shard_tokens", [7, 100_000])
def test_every_file_is_a_document_that_begins_with_eot(shared_data: Path, tmp_path: Path, shard_tokens: int) -> None:
    oracle = tiktoken.get_encoding("gpt2").encode_ordinary
    first, second, third = ALICE[:150], "<|endoftext|> is only text here\r\n"[:30].ljust(50, "."), ALICE[:200]
    sources = tuple(write(tmp_path / f"{i}.txt", text) for i, text in enumerate((first, second, third)))
    data = tmp_path / "data"
    manifest = prepare(Options(sources, data, "gpt2", val_fraction=0.25, shard_tokens=shard_tokens))
    # 400 characters: the last 100 are the second half of the third file, which opens the val split as a document.
    train = [EOT, *oracle(first), EOT, *oracle(second), EOT, *oracle(third[:100])]
    val = [EOT, *oracle(third[100:])]
    assert tokens(data, "train") == train
    assert tokens(data, "val") == val
    assert (manifest.splits["train"].documents, manifest.splits["val"].documents) == (3, 1)
    for split, expected in (("train", train), ("val", val)):
        starts: list[int] = []
        for number, path in enumerate(sorted(data.glob(f"{split}_*.idx"))):
            starts += [number * shard_tokens + int(start) for start in np.fromfile(path, dtype="<u8")]
        assert starts == [place for place, index in enumerate(expected) if index == EOT]


@pytest.mark.parametrize("name", ["char", "gpt2"])
def test_a_cut_between_two_files_divides_neither(shared_data: Path, tmp_path: Path, name: str) -> None:
    sources = (write(tmp_path / "a.txt", "aaa\n" * 10), write(tmp_path / "b.txt", "bbb\n" * 10))
    manifest = prepare(Options(sources, tmp_path / "data", name, val_fraction=0.5))
    tokenizer = load_tokenizer(tmp_path / "data")
    assert tokenizer.decode_bytes(tokens(tmp_path / "data", "train")) == b"aaa\n" * 10
    assert tokenizer.decode_bytes(tokens(tmp_path / "data", "val")) == b"bbb\n" * 10
    assert [manifest.splits[split].documents for split in ("train", "val")] == [1, 1]
    assert (tokens(tmp_path / "data", "val") + tokens(tmp_path / "data", "train")).count(EOT) == 2 * (name == "gpt2")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "bad.txt: no such file (--input)"),
        (b"", "bad.txt: empty"),
        (b"one\ntwo\nthr\xe9e\nfour\xff\n", "bad.txt:3: not UTF-8 (byte 0xe9 at 11)"),
        (b"one\r\n\xff\xfea\0", "bad.txt:2: not UTF-8"),
        (b"caf\xc3", "bad.txt:1: not UTF-8"),
        (b"a\n\xed\xa0\x80", "bad.txt:2: not UTF-8"),
    ],
)
def test_bad_input_gives_one_line_and_leaves_nothing(tmp_path: Path, content: bytes | None, complaint: str) -> None:
    good = Path(write(tmp_path / "good.txt", ALICE))
    bad = tmp_path / "bad.txt"
    if content is not None:
        bad.write_bytes(content)
    before = names(tmp_path)
    done = textfiles("--input", good, bad, "--out", tmp_path / "data", "--tokenizer", "char")
    assert_one_line(done, str(tmp_path / complaint))
    assert names(tmp_path) == before


def test_a_folder_without_text_gives_one_line(tmp_path: Path) -> None:
    done = command_line("--input", tmp_path, "--out", tmp_path / "data", "--tokenizer", "char")
    assert_one_line(done, f"{tmp_path}: no .txt, ")
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("--tokenizer", "gpt5"),
        ("--tokenizer", "char", "--val-fraction", "1"),
        ("--tokenizer", "byte", "--shard-tokens", "0"),
    ],
)
def test_bad_options_give_one_line(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    source = write(tmp_path / "text.txt", ALICE)
    done = textfiles("--input", source, "--out", tmp_path / "data", *arguments)
    assert_one_line(done, *arguments[-2:])
    assert not (tmp_path / "data").exists()


def test_a_character_that_a_saved_tokenizer_lacks_is_refused(finished: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "new.txt", ALICE + "\u20ac")
    done = textfiles("--input", source, "--out", tmp_path / "other", "--tokenizer", finished)
    assert_one_line(done, "\u20ac")
    assert not (tmp_path / "other").exists()


def test_a_saved_tokenizer_gives_its_own_ids(finished: Path, tmp_path: Path) -> None:
    alphabet = sorted(set(ALICE))
    prepare(Options((write(tmp_path / "new.txt", "sister" * 5),), tmp_path / "other", str(finished)))
    assert tokens(tmp_path / "other", "train") == [alphabet.index(character) for character in ("sister" * 5)[:27]]


def test_the_same_again_leaves_the_data_alone(finished: Path, tmp_path: Path) -> None:
    before = state(tmp_path)
    done = textfiles("--input", str(tmp_path / "alice.txt"), "--out", str(finished), "--tokenizer", "char")
    assert (done.returncode, done.stderr) == (0, "")
    assert "already complete" in done.stdout
    assert state(tmp_path) == before


def test_overwrite_mends_a_damaged_shard(finished: Path, tmp_path: Path) -> None:
    (finished / "train_000000.bin").write_bytes(b"damaged")
    prepare(Options((str(tmp_path / "alice.txt"),), finished, "char", overwrite=True))
    assert decoded(finished) == ALICE.encode()


@pytest.mark.parametrize(
    ("text", "options", "differing"),
    [
        (ALICE.replace("tired", "bored"), ("--tokenizer", "char"), "other input"),
        (ALICE, ("--tokenizer", "char", "--val-fraction", "0.2"), "--val-fraction 0.2 (was 0.1)"),
        (ALICE, ("--tokenizer", "char", "--shard-tokens", "100"), "--shard-tokens 100 (was 100000000)"),
        (ALICE, ("--tokenizer", "byte"), "another tokenizer"),
    ],
)
def test_other_data_needs_overwrite(
    finished: Path, tmp_path: Path, text: str, options: tuple[str, ...], differing: str
) -> None:
    write(tmp_path / "alice.txt", text)
    before = state(tmp_path)
    arguments = ("--input", "alice.txt", "--out", "data", *options)
    assert_one_line(textfiles(*arguments, cwd=tmp_path), "--overwrite", differing)
    assert state(tmp_path) == before


@pytest.mark.parametrize(("tokenizer", "val_fraction"), [("char", 0.1), ("byte", 0.3)])
def test_overwrite_replaces_the_data_whole(finished: Path, tmp_path: Path, tokenizer: str, val_fraction: float) -> None:
    text = ALICE.replace("tired", "bored") * 2
    source = write(tmp_path / "alice.txt", text)
    write(finished / "train_000007.bin", "of an earlier, longer split")
    prepare(Options((source,), finished, tokenizer, val_fraction, overwrite=True))
    prepare(Options((source,), tmp_path / "fresh", tokenizer, val_fraction))
    assert contents(finished) == contents(tmp_path / "fresh")
    assert decoded(finished) == text.encode()
    assert names(tmp_path) == ["alice.txt", "data", "fresh"]


def test_what_an_interrupted_preparation_left_does_not_disturb(finished: Path, tmp_path: Path) -> None:
    for leftover in (".again.partial", ".again.replaced", ".again.removing"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "train_000000.bin").write_bytes(b"half a sha")
        (tmp_path / leftover / "train_000007.bin").write_bytes(bytes(3000))
        (tmp_path / leftover / ".train_000008.bin.tmp").write_bytes(bytes(3000))
    prepare(Options((str(tmp_path / "alice.txt"),), tmp_path / "again", "char"))
    assert contents(tmp_path / "again") == contents(finished)
    assert names(tmp_path) == ["again", "alice.txt", "data"]


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_a_folder_of_something_else_is_refused_and_untouched(tmp_path: Path, overwrite: tuple[str, ...]) -> None:
    source = write(tmp_path / "alice.txt", ALICE)
    (tmp_path / "thesis").mkdir()
    write(tmp_path / "thesis" / "chapter.txt", "the only copy")
    before = state(tmp_path)
    for out in ("thesis", "alice.txt"):
        done = textfiles("--input", source, "--out", tmp_path / out, "--tokenizer", "char", *overwrite)
        assert_one_line(done, f"--out {tmp_path / out}: ")
        assert state(tmp_path) == before
        assert names(tmp_path) == ["alice.txt", "thesis"]


def test_an_empty_or_deep_folder_is_accepted(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "a" / "b" / "data"):
        prepare(Options((str(tmp_path / "alice.txt"),), out, "char"))
        assert contents(out) == contents(finished)


def test_a_full_disk_gives_one_line_and_keeps_the_earlier_data(finished: Path, tmp_path: Path) -> None:
    big = write(tmp_path / "big.txt", ALICE * 50)
    earlier = state(finished)
    arguments = ["--input", big, "--out", "data", "--tokenizer", "char", "--overwrite"]
    command = [sys.executable, "-B", "-c", WITH_SMALL_FILES, "20000", "-B", SCRIPT, *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert_one_line(done, "File too large")
    assert state(finished) == earlier
    assert [path.name for path in tmp_path.rglob("*.bin") if path.parent != finished] == []

    assert textfiles(*arguments, cwd=tmp_path).returncode == 0
    assert decoded(finished) == (ALICE * 50).encode()
    assert names(tmp_path) == ["alice.txt", "big.txt", "data"]


@pytest.mark.long(reason="all of CPython's documentation is collected")
def test_python_docs_are_large(tmp_path: Path) -> None:
    prepare(Options(("python-docs",), tmp_path / "one", "char"))
    text = decoded(tmp_path / "one").decode("utf-8")
    assert len(text) > 1_000_000
    assert len(tokens(tmp_path / "one", "train")) == int(len(text) * 0.9)
    assert topics.topics["assert"].strip() in text
    assert str(inspect.getdoc(ArgumentParser)) in text


@pytest.mark.long(reason="all of CPython's documentation is collected twice")
def test_python_docs_are_the_same_in_every_process(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "--input", "python-docs", "--tokenizer", "char", "--out"]
    running = [
        subprocess.Popen([*command, out], cwd=tmp_path, env=os.environ | {"PYTHONHASHSEED": seed}, text=True)
        for out, seed in (("one", "1"), ("two", "2"))
    ]
    assert [process.wait() for process in running] == [0, 0]
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_the_manifest_is_returned_and_names_the_input(finished: Path, tmp_path: Path) -> None:
    manifest: Manifest = prepare(Options((str(tmp_path / "alice.txt"),), finished, "char"))
    digest = hashlib.sha256(ALICE.encode()).hexdigest()
    assert manifest.source == {
        "files": [{"name": "alice.txt", "bytes": len(ALICE), "sha256": digest}],
        "empty_documents": 0,
    }


def test_the_current_folder_as_out(tmp_path: Path) -> None:
    source = write(tmp_path / "alice.txt", ALICE)
    (tmp_path / "empty").mkdir()
    done = textfiles("--input", source, "--out", ".", "--tokenizer", "char", cwd=tmp_path / "empty")
    assert "Traceback" not in done.stderr
    assert done.returncode == 2 or decoded(tmp_path / "empty") == ALICE.encode()


def test_overwrite_replaces_data_whose_manifest_is_damaged(finished: Path, tmp_path: Path) -> None:
    (finished / "manifest.json").write_text("{")
    prepare(Options((str(tmp_path / "alice.txt"),), finished, "char", overwrite=True))
    assert decoded(finished) == ALICE.encode()


def test_a_missing_shard_is_noticed_before_saying_complete(finished: Path, tmp_path: Path) -> None:
    (finished / "train_000000.bin").unlink()
    done = textfiles("--input", str(tmp_path / "alice.txt"), "--out", str(finished), "--tokenizer", "char")
    assert done.returncode == 2 and "train_000000.bin: missing" in done.stderr


@pytest.mark.parametrize(("text", "options"), [(ALICE, ("--shard-tokens", "0")), ("a", ())])
def test_a_refusal_leaves_nothing_beside_out(tmp_path: Path, text: str, options: tuple[str, ...]) -> None:
    source = write(tmp_path / "alice.txt", text)
    done = textfiles("--input", source, "--out", str(tmp_path / "out"), "--tokenizer", "char", *options)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["alice.txt"]


def test_a_link_as_out_stays_a_link(tmp_path: Path) -> None:
    source = write(tmp_path / "alice.txt", ALICE)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    prepare(Options((source,), tmp_path / "link", "char"))
    assert (tmp_path / "link").is_symlink() and decoded(tmp_path / "real") == ALICE.encode()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alice.txt", "link", "real"]


def test_a_character_that_a_saved_tokenizer_lacks_is_named_with_its_file(finished: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "other.txt", "zebra ~~~" * 20)
    done = textfiles("--input", source, "--out", str(tmp_path / "new"), "--tokenizer", str(finished))
    assert done.returncode == 2 and done.stderr.startswith(f"textfiles: {source}: character 'z' at 0 ")


def write_rows(path: Path, texts: list[str]) -> str:
    return write(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.mark.parametrize(
    ("lengths", "val_fraction", "num_val"),
    [
        ([10] * 10, 0.1, 1),
        ([10] * 10, 0.11, 2),
        ([10] * 10, 0.09, 1),
        ([1, 1, 98], 0.1, 1),
        ([10, 0, 0, 10, 0], 0.5, 1),
        ([50, 40, 0, 10], 0.2, 2),
    ],
)
@pytest.mark.parametrize("kind", ["rows", "split text", "two files"])
def test_rows_and_split_documents_are_in_one_split_whole(
    tmp_path: Path, lengths: list[int], val_fraction: float, num_val: int, kind: str
) -> None:
    texts = [chr(ord("a") + n) * length for n, length in enumerate(lengths)]
    sources: tuple[str, ...] = (write_rows(tmp_path / "a.jsonl", texts),)
    if kind == "split text":
        sources = (write(tmp_path / "a.txt", "|".join(texts) + "|"),)
    elif kind == "two files":
        sources = (write_rows(tmp_path / "a.jsonl", texts[:2]), write_rows(tmp_path / "b.jsonl", texts[2:]))
    options = Options(sources, tmp_path / "data", "byte", val_fraction, split_documents_on="|")
    manifest = prepare(options)
    kept = [text for text in texts if text]
    assert bytes(tokens(tmp_path / "data", "train")).decode() == "".join(kept[:-num_val])
    assert bytes(tokens(tmp_path / "data", "val")).decode() == "".join(kept[-num_val:])
    assert [split.documents for split in manifest.splits.values()] == [len(kept) - num_val, num_val]
    assert manifest.source["empty_documents"] == len(texts) - len(kept)


def test_one_row_is_not_cut(tmp_path: Path) -> None:
    for texts in (["a" * 100], ["a" * 99, "b"]):
        source = write_rows(tmp_path / "a.jsonl", texts)
        done = textfiles("--input", source, "--out", tmp_path / "data", "--tokenizer", "byte")
        assert_one_line(done, "leaves a split empty", "kept whole")


def test_a_validation_file_of_its_own(tmp_path: Path) -> None:
    train, val = write(tmp_path / "train.txt", ALICE), write(tmp_path / "val.txt", "the end ~")
    manifest = prepare(Options((train,), tmp_path / "data", "char", val_input=(val,)))
    tokenizer = load_tokenizer(tmp_path / "data")
    assert tokenizer.decode_bytes(tokens(tmp_path / "data", "train")) == ALICE.encode()
    assert tokenizer.decode_bytes(tokens(tmp_path / "data", "val")) == b"the end ~"
    assert [file["name"] for file in manifest.source["val_files"]] == ["val.txt"]
    assert manifest.options["val_fraction"] is None


def test_real_rows_by_gpt2(shared_data: Path, tmp_path: Path) -> None:
    oracle = tiktoken.get_encoding("gpt2").encode_ordinary
    path = shared_data / "fineweb_rows_15.parquet"
    documents = pytest.importorskip("pyarrow.parquet").read_table(path)["text"].to_pylist()
    manifest = prepare(Options((str(path),), tmp_path / "data", "gpt2", 0.3, shard_tokens=3000))
    num_train = manifest.splits["train"].documents
    assert tokens(tmp_path / "data", "train") == [i for text in documents[:num_train] for i in (EOT, *oracle(text))]
    assert tokens(tmp_path / "data", "val") == [i for text in documents[num_train:] for i in (EOT, *oracle(text))]
    share = sum(map(len, documents[num_train:])) / sum(map(len, documents))
    assert 0.3 <= share < 0.3 + max(map(len, documents)) / sum(map(len, documents))


def test_a_folder_is_read_in_order_and_the_rest_is_named(tmp_path: Path) -> None:
    (tmp_path / "input" / "b").mkdir(parents=True)
    write_rows(tmp_path / "input" / "b" / "2.jsonl", ["two", "", "three"])
    write(tmp_path / "input" / "a.txt", "one")
    write(tmp_path / "input" / "notes.md", "# not text for training")
    done = textfiles("--input", "input", "--out", "data", "--tokenizer", "byte", "--val-fraction", "0.3", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stderr == "textfiles: warning: input: left out 1 files of other kinds (1 .md)\n"
    assert "1 empty documents dropped" in done.stdout
    assert decoded(tmp_path / "data") == b"onetwothree"
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert [file["name"] for file in manifest["source"]["files"]] == ["a.txt", "b/2.jsonl"]


def test_a_flag_without_effect_is_told(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", ["one", "two", "three"])
    arguments = ("--input", source, "--out", tmp_path / "data", "--tokenizer", "byte", "--val-fraction", "0.4")
    done = textfiles(*arguments, "--split-documents-on", "|")
    assert "warning: --split-documents-on has no effect" in done.stderr
    assert_one_line(textfiles(*arguments, "--split-documents-on", ""), "--split-documents-on")
    assert_one_line(textfiles(*arguments, "--workers", "0"), "--workers 0")


def test_what_the_tokenizer_gives_up_on_is_named_by_its_line(shared_data: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", ["one", "two" + " " * 1_500_000 + "x", "three"])
    done = textfiles("--input", source, "--out", tmp_path / "data", "--tokenizer", "gpt2", "--val-fraction", "0.4")
    assert_one_line(done, f"{source}:2: tokenizer gpt2 gave up")


def test_a_console_that_cannot_show_a_character_gets_its_escape(tmp_path: Path) -> None:
    source = write(tmp_path / "\u00e9.txt", "caf\u00e9 \U0001f600 " * 9)
    env = os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    for script in (
        [SCRIPT, "--input", source, "--tokenizer", "byte", "--out"],
        [SCRIPT.replace("textfiles", "verify")],
    ):
        done = subprocess.run(
            [sys.executable, *script, str(tmp_path / "\u00e9")], env=env, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert "\\xe9" in done.stdout or "\\udcc3\\udca9" in done.stdout  # text, or a file's name


def test_a_separator_left_in_the_text_is_pointed_out(tmp_path: Path) -> None:
    """It would be trained on as ordinary characters."""
    source = write(tmp_path / "stories.txt", (ALICE + "<|endoftext|>") * 3)
    arguments = ("--input", source, "--tokenizer", "byte", "--out")
    assert "'<|endoftext|>' 3 times" in textfiles(*arguments, tmp_path / "whole").stderr
    split = textfiles(*arguments, tmp_path / "split", "--split-documents-on", "<|endoftext|>")
    assert split.returncode == 0 and "endoftext" not in split.stderr
