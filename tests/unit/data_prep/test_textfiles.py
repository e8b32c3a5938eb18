"""textfiles.py against the input's own bytes and tiktoken's ids, and its faults through the command line."""

import contextlib
import hashlib
import json
import subprocess
from pathlib import Path

import pytest
import tiktoken

from data_prep.textfiles import Options, main, prepare
from data_prep.tokenizer import CharTokenizer, load_tokenizer
from tests.helpers.data_dirs import EOT_ID, contents, decoded, document_starts, names, state, tokens, write_rows
from tests.helpers.data_dirs import write_text as write
from tests.helpers.runs import called

EOT = "<|endoftext|>"
ALICE = "Alice was beginning to get very tired\nof sitting by her sister on the bank. " * 20
# A mark, every kind of line end, a NUL, and characters of two, three and four bytes.
UNUSUAL = f"a\ufeffone\r\ntwo\rthree\n\r\n\0 \x85 \u2028 \u00e9\u20ac\U0001f600 e\u0301 {EOT} \t\x0b\x0c no newline"


def textfiles(*arguments: str | Path, cwd: Path = Path()) -> subprocess.CompletedProcess[str]:
    """Run the command in this process."""
    with contextlib.chdir(cwd):
        return called(main, *map(str, arguments))


def assert_one_line(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("textfiles: ") and done.stderr.count("\n") == 1 and done.stderr.endswith("\n")
    for part in parts:
        assert part in done.stderr


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """tmp_path/data, made of tmp_path/alice.txt by characters."""
    prepare(Options((write(tmp_path / "alice.txt", ALICE),), tmp_path / "data", "char"))
    return tmp_path / "data"


# The output


def test_tiny_shakespeare_by_characters(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "tinyshakespeare.txt"
    done = textfiles("--input", source, "--out", tmp_path / "data", "--tokenizer", "char")
    assert (done.returncode, done.stderr) == (0, "")
    assert "1,003,854 tokens" in done.stdout and "111,540 tokens" in done.stdout
    text = source.read_bytes().decode()
    index_of = {character: index for index, character in enumerate(sorted(set(text)))}
    assert len(index_of) == 65
    ids = [index_of[character] for character in text]
    assert tokens(tmp_path / "data", "train") == ids[:1_003_854]
    assert tokens(tmp_path / "data", "val") == ids[1_003_854:]


@pytest.mark.parametrize("tokenizer", ["char", "byte", "gpt2"])
def test_every_byte_of_the_text_is_kept(shared_data: Path, tmp_path: Path, tokenizer: str) -> None:
    source = write(tmp_path / "unusual.txt", UNUSUAL)
    prepare(Options((source,), tmp_path / "data", tokenizer, val_fraction=0.3, shard_tokens=10))
    assert decoded(tmp_path / "data") == UNUSUAL.encode()


def test_the_last_characters_are_for_validation(tmp_path: Path) -> None:
    text = "\u00e9".join("0123456789" * 5)[:99] + "!"
    source = write(tmp_path / "text.txt", text)
    for val_fraction, num_train in ((0.1, 90), (0.25, 75), (0.5, 50), (0.005, 99), (0.001, 99), (0.987, 1)):
        prepare(Options((source,), tmp_path / "data", "byte", val_fraction, overwrite=True))
        assert bytes(tokens(tmp_path / "data", "train")).decode() == text[:num_train]
        assert bytes(tokens(tmp_path / "data", "val")).decode() == text[num_train:]


@pytest.mark.parametrize("shard_tokens", [7, 100_000])
def test_every_file_is_a_document_that_begins_with_eot(shared_data: Path, tmp_path: Path, shard_tokens: int) -> None:
    oracle = tiktoken.get_encoding("gpt2").encode_ordinary
    texts = [ALICE[:150], f"{EOT} is only text here\r\n"[:30].ljust(50, "."), ALICE[:200]]
    sources = tuple(write(tmp_path / f"{i}.txt", text) for i, text in enumerate(texts))
    data = tmp_path / "data"
    # Of 400 characters, the last 100 are the second half of the third file, which begins the val split as a document.
    for val_fraction, cut in ((0.25, 100), (0.5, None)):
        manifest = prepare(Options(sources, data, "gpt2", val_fraction, shard_tokens=shard_tokens, overwrite=True))
        train, val = texts[:2], texts[2:]
        if cut is not None:
            train, val = [*train, texts[2][:cut]], [texts[2][cut:]]
        for split, documents in (("train", train), ("val", val)):
            expected = [index for text in documents for index in (EOT_ID, *oracle(text))]
            assert tokens(data, split) == expected
            assert manifest.splits[split].documents == len(documents)
            starts = [offset for offset, index in enumerate(expected) if index == EOT_ID]
            assert document_starts(data, split, shard_tokens) == starts


@pytest.mark.parametrize(
    ("lengths", "val_fraction", "num_val"),
    [
        ([10] * 10, 0.1, 1),
        ([10] * 10, 0.11, 2),
        ([1, 1, 98], 0.1, 1),
        ([10, 0, 0, 10, 0], 0.5, 1),
        ([50, 40, 0, 10], 0.2, 2),
    ],
)
def test_rows_and_split_documents_stay_whole(
    tmp_path: Path, lengths: list[int], val_fraction: float, num_val: int
) -> None:
    texts = [chr(ord("a") + n) * length for n, length in enumerate(lengths)]
    kept = [text for text in texts if text]
    rows = write_rows(tmp_path / "a.jsonl", texts)
    rows_of_two = write_rows(tmp_path / "b.jsonl", texts[:2]), write_rows(tmp_path / "c.jsonl", texts[2:])
    split_text = write(tmp_path / "a.txt", "|".join(texts) + "|")
    for number, sources in enumerate(((rows,), rows_of_two, (split_text,))):
        data = tmp_path / str(number)
        manifest = prepare(Options(sources, data, "byte", val_fraction, split_documents_on="|"))
        assert bytes(tokens(data, "train")).decode() == "".join(kept[:-num_val])
        assert bytes(tokens(data, "val")).decode() == "".join(kept[-num_val:])
        assert [split.documents for split in manifest.splits.values()] == [len(kept) - num_val, num_val]
        assert manifest.source["empty_documents"] == len(texts) - len(kept)


def test_a_validation_file_of_its_own(tmp_path: Path) -> None:
    train, val = write(tmp_path / "train.txt", ALICE), write(tmp_path / "val.txt", "the end ~")
    manifest = prepare(Options((train,), tmp_path / "data", "char", val_input=(val,)))
    tokenizer = load_tokenizer(tmp_path / "data")
    assert tokenizer.decode_bytes(tokens(tmp_path / "data", "train")) == ALICE.encode()
    assert tokenizer.decode_bytes(tokens(tmp_path / "data", "val")) == b"the end ~"
    assert [file["name"] for file in manifest.source["val_files"]] == ["val.txt"]
    assert manifest.options["val_fraction"] is None


def test_a_folder_is_read_in_order_and_other_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "input" / "b").mkdir(parents=True)
    write_rows(tmp_path / "input" / "b" / "2.jsonl", ["two", "", "three"])
    write(tmp_path / "input" / "a.txt", "one")
    write(tmp_path / "input" / "notes.md", "# not text for training")
    done = textfiles("--input", "input", "--out", "data", "--tokenizer", "byte", "--val-fraction", "0.3", cwd=tmp_path)
    assert done.stderr == "textfiles: warning: input: left out 1 files of other kinds (1 .md)\n"
    assert "1 empty documents dropped" in done.stdout
    assert decoded(tmp_path / "data") == b"onetwothree"
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert [file["name"] for file in manifest["source"]["files"]] == ["a.txt", "b/2.jsonl"]


def test_a_saved_tokenizer_gives_its_own_ids_and_lacks_other_characters(finished: Path, tmp_path: Path) -> None:
    alphabet = sorted(set(ALICE))
    prepare(Options((write(tmp_path / "new.txt", "sister" * 5),), tmp_path / "other", str(finished)))
    assert tokens(tmp_path / "other", "train") == [alphabet.index(character) for character in ("sister" * 5)[:27]]
    source = write(tmp_path / "zebra.txt", "zebra ~~~" * 20)
    done = textfiles("--input", source, "--out", tmp_path / "no", "--tokenizer", finished)
    assert_one_line(done, f"textfiles: {source}: character 'z' at 0 ")
    assert not (tmp_path / "no").exists()


# Faults


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "bad.txt: no such file (--input)"),
        (b"", "bad.txt: empty"),
        (b"one\ntwo\nthr\xe9e\nfour\xff\n", "bad.txt:3: not UTF-8 (byte 0xe9 at 11)"),
        (b"caf\xc3", "bad.txt:1: not UTF-8"),
        (b"a\n\xed\xa0\x80", "bad.txt:2: not UTF-8"),
    ],
)
def test_bad_input_gives_one_line_and_leaves_nothing(tmp_path: Path, content: bytes | None, complaint: str) -> None:
    good, bad = write(tmp_path / "good.txt", ALICE), tmp_path / "bad.txt"
    if content is not None:
        bad.write_bytes(content)
    before = names(tmp_path)
    done = textfiles("--input", good, bad, "--out", tmp_path / "data", "--tokenizer", "char")
    assert_one_line(done, str(tmp_path / complaint))
    assert names(tmp_path) == before


def test_bad_options_give_one_line_and_leave_nothing(tmp_path: Path) -> None:
    text, single = write(tmp_path / "text.txt", ALICE), write(tmp_path / "a.txt", "a")
    row, rows = write_rows(tmp_path / "1.jsonl", ["a" * 100]), write_rows(tmp_path / "2.jsonl", ["a" * 99, "b"])
    before = names(tmp_path)
    for source, *flags in (
        (text, "--tokenizer", "gpt5"),
        (text, "--shard-tokens", "0"),
        (text, "--split-documents-on", ""),
        (text, "--workers", "0"),
        *((text, "--val-fraction", value) for value in ("0.0", "1.0", "-0.1", "nan")),
        *((source, "leaves a split empty") for source in (single, row, rows)),
    ):
        options = flags if flags[0].startswith("--") else []
        done = textfiles("--input", source, "--out", tmp_path / "data", "--tokenizer", "char", *options)
        assert_one_line(done, " ".join(flags).strip())
        assert names(tmp_path) == before


def test_a_row_with_a_run_of_blanks_is_encoded_like_the_others(shared_data: Path, tmp_path: Path) -> None:
    texts = ["one", "two" + " " * 1_500_000 + "x", "three"]
    source, ranks = write_rows(tmp_path / "a.jsonl", texts), shared_data / "gpt2.tiktoken"
    done = textfiles("--input", source, "--out", tmp_path / "data", "--tokenizer", ranks, "--val-fraction", "0.4")
    assert (done.returncode, done.stderr) == (0, "")
    assert decoded(tmp_path / "data") == "".join(texts).encode()
    assert document_starts(tmp_path / "data", "train", 100_000_000) == [0]


def test_a_text_that_the_tokenizer_cannot_encode_is_named_by_its_line(tmp_path: Path) -> None:
    CharTokenizer("eno").save(tmp_path)
    source = write_rows(tmp_path / "a.jsonl", ["one", "nex", "none"])
    flags = ("--out", tmp_path / "data", "--tokenizer", tmp_path / "tokenizer", "--val-fraction", "0.4")
    assert_one_line(textfiles("--input", source, *flags), f"{source}:2: character 'x' at 2 is not among")


def test_flags_without_effect_and_forgotten_separators_are_warned_of(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "a.jsonl", ["one", "two", "three"])
    flags = ("--tokenizer", "byte", "--val-fraction", "0.4", "--split-documents-on")
    done = textfiles("--input", rows, "--out", tmp_path / "rows", *flags, "|")
    assert "warning: --split-documents-on has no effect" in done.stderr
    stories = write(tmp_path / "stories.txt", (ALICE + EOT) * 3)
    assert f"'{EOT}' 3 times" in textfiles("--input", stories, "--out", tmp_path / "whole", *flags, "~~").stderr
    done = textfiles("--input", stories, "--out", tmp_path / "split", *flags, EOT)
    assert (done.returncode, done.stderr) == (0, "")


# A data directory that is there already


def test_the_same_again_leaves_the_data_alone(finished: Path, tmp_path: Path) -> None:
    before = state(tmp_path)
    arguments = ("--input", tmp_path / "alice.txt", "--out", finished, "--tokenizer", "char")
    done = textfiles(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert "already complete" in done.stdout
    assert state(tmp_path) == before
    digest = hashlib.sha256(ALICE.encode()).hexdigest()
    assert prepare(Options((str(tmp_path / "alice.txt"),), finished, "char")).source == {
        "files": [{"name": "alice.txt", "bytes": len(ALICE), "sha256": digest}],
        "empty_documents": 0,
    }
    (finished / "train_000000.bin").unlink()
    assert_one_line(textfiles(*arguments), "train_000000.bin: missing")
    for name in ("train_000000.bin", "manifest.json"):  # --overwrite repairs damaged data
        (finished / name).write_text("{")
        assert textfiles(*arguments, "--overwrite").returncode == 0
        assert decoded(finished) == ALICE.encode()


@pytest.mark.parametrize(
    ("text", "options", "mismatch"),
    [
        (ALICE.replace("tired", "bored"), ("--tokenizer", "char"), "other input"),
        (ALICE, ("--tokenizer", "char", "--val-fraction", "0.2"), "--val-fraction 0.2 (was 0.1)"),
        (ALICE, ("--tokenizer", "char", "--shard-tokens", "100"), "--shard-tokens 100 (was 100000000)"),
        (ALICE, ("--tokenizer", "byte"), "another tokenizer"),
    ],
)
def test_other_data_needs_overwrite(
    finished: Path, tmp_path: Path, text: str, options: tuple[str, ...], mismatch: str
) -> None:
    write(tmp_path / "alice.txt", text)
    before = state(tmp_path)
    arguments = ("--input", "alice.txt", "--out", "data", *options)
    assert_one_line(textfiles(*arguments, cwd=tmp_path), "--overwrite", mismatch)
    assert state(tmp_path) == before
    write(finished / "train_000007.bin", "of an earlier, longer split")
    assert textfiles(*arguments, "--overwrite", cwd=tmp_path).returncode == 0
    assert textfiles(*arguments, "--out", "fresh", cwd=tmp_path).returncode == 0
    assert contents(finished) == contents(tmp_path / "fresh")
    assert decoded(finished) == text.encode()
    assert names(tmp_path) == ["alice.txt", "data", "fresh"]


def test_leftovers_and_empty_or_deep_directories_do_not_matter(finished: Path, tmp_path: Path) -> None:
    for leftover in (".again.partial", ".again.replaced", ".again.removing"):
        (tmp_path / leftover).mkdir()
        for name in ("train_000000.bin", "train_000007.bin", ".train_000008.bin.tmp"):
            (tmp_path / leftover / name).write_bytes(bytes(3000))
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "again", tmp_path / "empty", tmp_path / "a" / "b" / "data"):
        prepare(Options((str(tmp_path / "alice.txt"),), out, "char"))
        assert contents(out) == contents(finished)
    assert names(tmp_path) == ["a", "again", "alice.txt", "data", "empty"]


def test_a_directory_of_something_else_is_refused_and_untouched(tmp_path: Path) -> None:
    source = write(tmp_path / "alice.txt", ALICE)
    (tmp_path / "thesis").mkdir()
    write(tmp_path / "thesis" / "chapter.txt", "the only copy")
    before = state(tmp_path)
    for out in ("thesis", "alice.txt"):
        for overwrite in ((), ("--overwrite",)):
            done = textfiles("--input", source, "--out", tmp_path / out, "--tokenizer", "char", *overwrite)
            assert_one_line(done, f"--out {tmp_path / out}: ")
            assert state(tmp_path) == before
    assert_one_line(textfiles("--input", source, "--out", ".", "--tokenizer", "char", cwd=tmp_path), "--out .: ")


def test_a_link_as_out_stays_a_link(tmp_path: Path) -> None:
    source = write(tmp_path / "alice.txt", ALICE)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    prepare(Options((source,), tmp_path / "link", "char"))
    assert (tmp_path / "link").is_symlink() and decoded(tmp_path / "real") == ALICE.encode()
    assert names(tmp_path) == ["alice.txt", "link", "real"]
