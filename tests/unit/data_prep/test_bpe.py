"""Byte-pair training against a naive trainer, Hugging Face's merges, and merges applied one after the other."""

import gzip
import hashlib
import itertools
import json
import random
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex

from common.errors import InputError
from data_prep.bpe import Options, main, prepare, save, tokens_of, train_by_tokenizers
from data_prep.bpe_reference import train as train_reference
from data_prep.pipeline.bad_rows import Skipped
from data_prep.pipeline.input_files import InputFile
from data_prep.pipeline.sources import Reading, plan_units, read_pieces
from data_prep.pipeline.text_sample import PIECE_BYTES, draw, key_of, pieces, spread
from data_prep.textfiles import Options as DataOptions
from data_prep.textfiles import prepare as prepare_data
from data_prep.tokenizer import BYTE_ORDER, BpeTokenizer, load_tokenizer, make_tokenizer
from tests.helpers.data_dirs import names, state, write_rows
from tests.helpers.data_dirs import write_text as write
from tests.helpers.runs import called
from tests.unit.data_prep.test_tokenizer import NASTY, PUBLISHED_PATTERN, SHARED_TEXTS, random_texts

pytest.importorskip("tokenizers")
MARK = "<|endoftext|>"
FILES = ["codec.json", "ranks.tiktoken", "training.json"]


@pytest.fixture(autouse=True)
def without_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure the speed, which no test here judges, for one pass only."""
    monkeypatch.setattr("data_prep.bpe.TIMED_SECONDS", 0.001)


def text_of(shared_data: Path, name: str, num_bytes: int | None = None) -> str:
    return (shared_data / name).read_bytes()[:num_bytes].decode("utf-8", "ignore")


def stories(shared_data: Path, num_bytes: int) -> list[str]:
    return text_of(shared_data, "tinystories_2mb.txt", num_bytes).split(MARK)


def refusal(*arguments: str | Path) -> str:
    """Return the one line with which the command refuses."""
    done = called(main, *map(str, arguments))
    assert done.returncode == 2, done.stdout
    *warnings, line = done.stderr.splitlines()
    assert all(warning.startswith("bpe: warning: ") for warning in warnings)
    assert line.startswith("bpe: ")
    return line


def pairs_of(words: dict[tuple[int, ...], int]) -> Counter[tuple[int, int]]:
    counts: Counter[tuple[int, int]] = Counter()
    for word, count in words.items():
        for pair in itertools.pairwise(word):
            counts[pair] += count
    return counts


def merged(word: tuple[int, ...], pair: tuple[int, int], new: int) -> tuple[int, ...]:
    """Replace every `pair` in the word by `new`, from left to right."""
    result: list[int] = []
    index = 0
    while index < len(word):
        if word[index : index + 2] == pair:
            result.append(new)
            index += 2
        else:
            result.append(word[index])
            index += 1
    return tuple(result)


def naive_merges(texts: list[str], num_merges: int) -> list[tuple[int, int]]:
    """Count everything again for every merge; of equal counts take the smallest pair of ids."""
    word_counts = Counter(word for text in texts for word in regex.findall(PUBLISHED_PATTERN, text))
    words: dict[tuple[int, ...], int] = {
        tuple(BYTE_ORDER.index(byte) for byte in word.encode()): count for word, count in word_counts.items()
    }
    merges: list[tuple[int, int]] = []
    while len(merges) < num_merges and (counts := pairs_of(words)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        words = {merged(word, best, 256 + len(merges)): count for word, count in words.items()}
        merges.append(best)
    return merges


def naive_tokens(merges: list[tuple[int, int]]) -> list[bytes]:
    tokens = [bytes([byte]) for byte in BYTE_ORDER]
    for left, right in merges:
        tokens.append(tokens[left] + tokens[right])
    return tokens


def random_corpora() -> list[list[str]]:
    """Return texts of few letters, full of ties, runs and merges of merges; and texts of every kind of character."""
    rng = random.Random(11)
    few = [["".join(rng.choices(letters, k=400))] for letters in ("a", "ab", "aab ", "abc \n", "ab1! '")]
    return [*few, ["aaaa", "aaa aa", "a" * 31], random_texts(12, 40), [*NASTY[4:9], "\u00e9\u20ac\U0001f600" * 9]]


def test_the_reference_makes_a_naive_trainers_merges(shared_data: Path) -> None:
    corpora = [*random_corpora(), *(text_of(shared_data, name, 5_000).split("\n") for name in SHARED_TEXTS)]
    for texts in corpora:
        readable = [text.encode("utf-8", "replace").decode() for text in texts]
        assert train_reference(readable, 256 + 120).tokens == naive_tokens(naive_merges(readable, 120))


def test_nothing_is_merged_across_documents_or_words() -> None:
    assert len(train_reference(["a", "b", "a b", "b!a"], 300).tokens) == 256 + 1  # " b" alone
    tokens = train_reference(["it's so"] * 9, 300).tokens[256:]
    assert sorted(tokens) == [b" so", b"'s", b"it", b"so"]


def test_both_trainers_make_the_same_merges(shared_data: Path) -> None:
    for texts in [*random_corpora()[:6], *([text_of(shared_data, name, 60_000)] for name in SHARED_TEXTS)]:
        reference = train_reference(texts, 1_500).tokens
        assert reference == tokens_of(train_by_tokenizers(texts, 1_500))
        assert len(set(reference)) == len(reference)  # no two merges have the same bytes


@pytest.mark.slow
def test_both_trainers_make_the_same_merges_up_to_the_last_id() -> None:
    """Ids from 55,296 to 57,343 would be surrogates as characters. Long words of many letters: few pairs twice."""
    rng = random.Random(13)
    letters = [chr(code) for code in range(0x100, 0x250) if chr(code).isalpha()]
    text = "\n".join("".join(rng.choices(letters, k=16)) for _ in range(4_800))
    reference = train_reference([text], 65_535).tokens
    assert len(set(reference)) == 65_535
    assert any(reference[55_300] in token for token in reference[55_301:])
    assert reference == tokens_of(train_by_tokenizers([text], 65_535))


def test_the_bytes_are_in_gpt2s_order(shared_data: Path) -> None:
    tokenizer = make_tokenizer(str(shared_data / "gpt2.tiktoken"), "")
    assert [tokenizer.decode_bytes([index])[0] for index in range(256)] == BYTE_ORDER


@pytest.mark.parametrize("name", SHARED_TEXTS)
def test_tiktoken_gives_the_ids_that_hugging_face_gives(shared_data: Path, name: str) -> None:
    hf_tokenizer = train_by_tokenizers([text_of(shared_data, name, 100_000)], 2_000)
    tokenizer = BpeTokenizer({token: rank for rank, token in enumerate(tokens_of(hf_tokenizer))}, name="trained")
    others = [text_of(shared_data, other)[-30_000:] for other in SHARED_TEXTS]
    for text in [*others, *random_texts(14), *NASTY]:
        if not regex.search(r"[\ud800-\udfff]", text):
            assert tokenizer.encode(text).tolist() == hf_tokenizer.encode(text).ids


def test_the_command_makes_a_tokenizer_and_prints_its_figures(shared_data: Path, tmp_path: Path) -> None:
    texts = stories(shared_data, 200_000)
    source = write(tmp_path / "stories.txt", MARK.join(texts))
    wiki = text_of(shared_data, "wikitext2_valid.txt", 50_000)
    other = write(tmp_path / "wiki.txt", wiki)
    ranks = set()
    for trainer in ("tokenizers", "reference"):
        out = tmp_path / trainer / "small"
        flags = ["--input", source, "--vocab-size", "1500", "--out", str(out), "--split-documents-on", MARK]
        done = called(main, *flags, "--compare", other, "--trainer", trainer)
        assert (done.returncode, done.stderr) == (0, "")
        assert names(out) == FILES and names(out.parent) == ["small"]
        ranks.add((out / "ranks.tiktoken").read_bytes())
        assert ("reference: merging" in done.stdout) == (trainer == "reference")
    assert len(ranks) == 1

    tokenizer = load_tokenizer(out)
    assert (tokenizer.vocab_size, tokenizer.eot_id, tokenizer.decode_bytes([1_499])) == (1_500, 1_499, b"")
    tokens = [tokenizer.decode_bytes([index]) for index in range(1_500)]
    assert not any(b"endof" in token or token == b"<|" for token in tokens)  # the separator is not learnt
    record = json.loads((out / "training.json").read_text())
    data = Path(source).read_bytes()
    described = {"name": "stories.txt", "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert record["inputs"] == [described]
    assert (record["merges"], record["tokenizer"]) == (1_243, tokenizer.describe())
    assert record["sample"]["bytes"] + record["held_out"]["bytes"] == record["read"]["bytes"]
    drawn = draw(texts, 10**9)
    ids = [tokenizer.encode(text.decode()) for text in drawn.held_out]
    held_out = {"documents": len(ids), "bytes": sum(map(len, drawn.held_out)), "tokens": sum(map(len, ids))}
    assert record["held_out"] == held_out
    assert f"{held_out['bytes'] / held_out['tokens']:.3f} bytes per token" in done.stdout
    wiki_tokens = sum(len(tokenizer.encode(text)) for text in pieces([wiki.encode()]))
    assert f"{len(wiki.encode()) / wiki_tokens:.3f} bytes per token ({len(wiki.encode()):,} bytes" in done.stdout
    longest = max(range(1_499), key=lambda index: tokenizer.byte_lengths()[index])
    assert repr(tokens[longest].decode()) in done.stdout
    for part in ("MB/s", "hours on one core", "on thirty", "peak memory", "longest"):
        assert part in done.stdout


def test_the_order_of_the_files_does_not_change_the_tokenizer(shared_data: Path, tmp_path: Path) -> None:
    sources = [write(tmp_path / f"{i}.txt", text_of(shared_data, name, 40_000)) for i, name in enumerate(SHARED_TEXTS)]
    tokenizers = [
        prepare(Options(tuple(order), 700, tmp_path / str(i) / "x", sample_bytes=30_000))
        for i, order in enumerate((sources, sources[::-1]))
    ]
    assert tokenizers[0].describe() == tokenizers[1].describe()


def test_a_tokenizer_folder_serves_the_data_preparation(shared_data: Path, tmp_path: Path) -> None:
    texts = stories(shared_data, 60_000)
    source = write(tmp_path / "stories.txt", MARK.join(texts))
    folder, data = tmp_path / "tokenizers" / "small", tmp_path / "data"
    tokenizer = prepare(Options((source,), 900, folder, split_documents_on=MARK))
    manifest = prepare_data(DataOptions((source,), data, str(folder), split_documents_on=MARK))
    assert manifest.tokenizer == tokenizer.describe() == load_tokenizer(data).describe()
    stored = [np.fromfile(data / f"{split}_000000.bin", dtype="<u2", offset=1024) for split in ("train", "val")]
    encoded = [tokenizer.encode(text).tolist() for text in texts if text]
    assert np.concatenate(stored).tolist() == [index for ids in encoded for index in (899, *ids)]


def test_a_mark_left_in_the_text_is_never_eot_nor_one_token(tmp_path: Path) -> None:
    texts = [f"{i} one two{MARK}three\n" for i in range(50)] + [MARK * 5, f" {MARK} {MARK}\n{MARK}"]
    out = tmp_path / "marked"
    flags = ["--input", write_rows(tmp_path / "a.jsonl", texts), "--vocab-size", "300", "--out", str(out)]
    done = called(main, *flags)
    assert done.returncode == 0 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"bpe: warning: the text contains '{MARK}' 58 times")
    tokenizer = load_tokenizer(out)
    tokens = [tokenizer.decode_bytes([index]) for index in range(tokenizer.vocab_size)]
    assert b"endoftext" in tokens  # ordinary text, and frequent
    assert not any(MARK.encode() in token for token in tokens)
    ids = tokenizer.encode("".join(texts)).tolist()
    assert tokenizer.eot_id == 299 and 299 not in ids
    assert tokenizer.decode_bytes(ids) == "".join(texts).encode()


@pytest.fixture
def alice(tmp_path: Path) -> str:
    rng = random.Random(15)
    words = ["alice", "was", "beginning", "to", "get", "very", "tired", "of", "sitting", "by", "her", "sister"]
    return write(tmp_path / "alice.txt", "".join(" ".join(rng.choices(words, k=12)) + ".\n" for _ in range(600)))


def test_an_existing_tokenizer_is_kept_unless_it_is_to_be_replaced(tmp_path: Path, alice: str) -> None:
    out = tmp_path / "tok"
    flags = ["--input", alice, "--vocab-size", "290", "--out", str(out)]
    assert called(main, *flags).returncode == 0
    before = state(out)
    again = called(main, *flags, "--compare", alice)
    assert again.returncode == 0 and "already complete, nothing to do" in again.stdout
    assert again.stdout.count("bytes per token") == 2  # as recorded, and of --compare
    assert "--vocab-size 290 (now 291)" in refusal("--input", alice, "--vocab-size", "291", "--out", out)
    assert "--trainer tokenizers (now reference)" in refusal(*flags, "--trainer", "reference")
    other = write(tmp_path / "other.txt", Path(alice).read_text()[::-1])
    assert "other input" in refusal("--input", other, "--vocab-size", "290", "--out", out)
    record = json.loads((out / "training.json").read_text())
    with pytest.raises(InputError, match="another process has made it meanwhile"):
        save(load_tokenizer(out), record, Options((alice,), 290, out))
    assert state(out) == before
    for name in FILES:
        content = (out / name).read_bytes()
        (out / name).write_bytes(content[: len(content) // 2])
        assert str(out) in refusal(*flags)
        assert called(main, *flags, "--overwrite").returncode == 0
        assert (out / name).read_bytes() == content
    assert called(main, *flags[:3], "291", *flags[4:], "--overwrite").returncode == 0
    assert load_tokenizer(out).vocab_size == 291
    assert names(tmp_path) == ["alice.txt", "other.txt", "tok"]


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--vocab-size", "256"], "--vocab-size 256 must lie between 257"),
        (["--vocab-size", "65537"], "--vocab-size 65537 must lie between 257 (256 bytes and EOT) and 65536"),
        (["--sample-bytes", "0"], "--sample-bytes 0 "),
        (["--sample-bytes", "2147483648"], "--sample-bytes 2147483648 "),
        (["--vocab-size", "9000"], "--vocab-size 9000 needs 8743 merges, but in "),
        (["--trainer", "reference", "--vocab-size", "9000"], "--vocab-size 9000 needs 8743 merges, but in "),
        (["--split-documents-on", ""], "--split-documents-on needs at least one character"),
        (["--split-documents-on", "no such mark"], "at least two different ones are needed"),
        (["--input", "nowhere.txt"], "nowhere.txt: no such file (--input)"),
        (["--input", "latin1.txt"], "latin1.txt:2: not UTF-8 (byte 0xe9 at 5)"),
        (["--compare", "nowhere.txt"], "nowhere.txt: no such file (--compare)"),
        (["--compare", "blank.jsonl"], "--compare blank.jsonl: no text in it"),
        (["--out", "/"], "--out /: give the directory a name"),
        (["--out", "alice.txt/tok"], "--out: alice.txt is no directory; choose another place"),
        (["--out", "alice.txt", "--overwrite"], "alice.txt: exists and is no tokenizer of this script"),
        (["--out", "mine", "--overwrite"], "mine: exists and is no tokenizer of this script"),
    ],
)
def test_bad_options_give_one_line(
    tmp_path: Path, alice: str, flags: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "blank.jsonl", ["", ""])
    (tmp_path / "latin1.txt").write_bytes(b"a\ncaf\xe9\n")
    (tmp_path / "mine" / "precious").mkdir(parents=True)
    line = refusal("--input", alice, "--vocab-size", "290", "--out", tmp_path / "new" / "tok", *flags)
    assert complaint in line
    assert {*names(tmp_path)} - {"new"} == {"alice.txt", "blank.jsonl", "latin1.txt", "mine"}
    assert names(tmp_path / "mine") == ["precious"]
    if (advice := regex.search(r"give (--vocab-size) (\d+) or", line)) and "--trainer" not in flags:
        assert called(main, "--input", alice, "--out", "tok", *advice.groups()).returncode == 0  # it can be made


def test_without_hugging_face_tokenizers_the_extra_is_named(
    tmp_path: Path, alice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    flags = ["--input", alice, "--vocab-size", "290", "--out", str(tmp_path / "tok")]
    assert "pip install -e '.[bpe]'" in refusal(*flags)
    assert called(main, *flags, "--trainer", "reference").returncode == 0


def test_flags_without_effect_are_told(tmp_path: Path, alice: str) -> None:
    json_lines = write_rows(tmp_path / "rows.jsonl", Path(alice).read_text().splitlines())
    size = ["--vocab-size", "290", "--out"]
    done = called(main, "--input", json_lines, *size, str(tmp_path / "a"), "--split-documents-on", "|")
    assert done.stderr == "bpe: warning: --split-documents-on has no effect: no plain text among the files\n"
    done = called(main, "--input", alice, *size, str(tmp_path / "b"), "--text-column", "story")
    assert done.stderr == "bpe: warning: --text-column has no effect: no .jsonl or .parquet among the files\n"


@pytest.mark.parametrize("trainer", ["tokenizers", "reference"])
def test_words_of_a_million_characters_and_lone_surrogates_are_trained_on(
    tmp_path: Path, alice: str, trainer: str
) -> None:
    """Read from a folder of packed JSON lines, which --text-column names, and plain text."""
    texts = [" " * 1_200_000 + "x", "=" * 1_000_000, "\n" * 1_000_000, "a\ud800b \udfff"]
    (tmp_path / "in").mkdir()
    packed = gzip.compress("".join(json.dumps({"story": text}) + "\n" for text in texts).encode())
    (tmp_path / "in" / "a.jsonl.gz").write_bytes(packed)
    inputs, out = (str(tmp_path / "in"), alice), tmp_path / "tok"
    prepare(Options(inputs, 320, out, trainer, text_column="story"))  # type: ignore[arg-type]
    read = json.loads((out / "training.json").read_text())["read"]
    num_pieces = len([*pieces([Path(alice).read_bytes()])])
    assert read["documents"] == 4 + num_pieces
    assert read["bytes"] == 3_200_001 + len("a\ufffdb \ufffd".encode()) + Path(alice).stat().st_size


def test_held_out_documents_are_never_trained_on(shared_data: Path) -> None:
    texts = stories(shared_data, 200_000)
    whole = draw(texts, 10**9)
    assert {*whole.sample} | {*whole.held_out} == {text.encode() for text in texts if text}
    assert 0.05 <= sum(map(len, whole.held_out)) / whole.num_bytes < 0.06
    assert max(map(key_of, whole.sample)) < min(map(key_of, whole.held_out))
    twice = draw([*texts, *texts[::-1]], 10**9)
    assert not {*twice.sample} & {*twice.held_out}
    assert twice.documents == 2 * whole.documents and len(twice.sample) <= len(whole.sample)


@pytest.mark.parametrize("sample_bytes", [1, 1_000, 30_000])
def test_the_sample_is_full_and_spread_over_all_documents(shared_data: Path, sample_bytes: int) -> None:
    texts = stories(shared_data, 200_000)
    drawn = draw(texts, sample_bytes)
    assert drawn.sample == draw(random.Random(16).sample(texts, k=len(texts)), sample_bytes).sample
    assert drawn.held_out == draw(texts, 10**9).held_out
    assert sum(map(len, drawn.sample)) == sample_bytes
    in_order = sorted((text.encode() for text in texts if text), key=key_of)
    assert drawn.sample[:-1] == in_order[: len(drawn.sample) - 1]
    assert in_order[len(drawn.sample) - 1].startswith(drawn.sample[-1])
    euros = draw([f"{i} " + "\u20ac" * 50 for i in range(40)], 300 + sample_bytes % 7).sample
    assert all(data.decode() for data in euros)  # no half character at the cut
    assert 298 <= sum(map(len, euros)) <= 306
    if sample_bytes > 20_000:
        offsets = [texts.index(data.decode()) / len(texts) for data in drawn.sample[:-1]]
        assert all(min(abs(offset - quarter) for offset in offsets) < 0.1 for quarter in (0.0, 0.25, 0.5, 0.75, 1.0))


def test_memory_is_bounded_on_input_larger_than_the_sample() -> None:
    tracemalloc.start()
    drawn = draw((f"{i} " * 500 for i in range(8_000)), 1_000_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert drawn.num_bytes > 19_000_000
    assert peak < 1.5 * (1_000_000 + 4_000_000)
    assert sum(map(len, spread((f"{i} " * 500 for i in range(2_000)), 100_000))) < 100_000 + 3_000


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("piece_bytes", [4, 7, 64, 16_384])
def test_pieces_are_the_file_cut_after_line_ends(tmp_path: Path, piece_bytes: int, compressed: bool) -> None:
    rng = random.Random(17)
    words = rng.choices(["a", " ", "\n", "\r\n", "\u00e9", "\u20ac", "\U0001f600", "word\n\n"], k=3_000)
    text = "".join(words) + "x" * 50_000
    path = tmp_path / "text"
    path.write_bytes(gzip.compress(text.encode()) if compressed else text.encode())
    [unit] = plan_units(InputFile(str(path), "text", "text", compressed), Reading())
    cut = [*read_pieces(unit, Reading(), piece_bytes, Skipped())]
    assert "".join(cut) == text
    assert [*pieces([text.encode()])] == [*read_pieces(unit, Reading(), PIECE_BYTES, Skipped())]
    for piece, after in itertools.pairwise(cut):
        assert 0 < len(piece.encode()) <= piece_bytes
        longer = (piece + after).encode()[:piece_bytes]
        assert piece.endswith("\n") or (b"\n" not in longer and len(piece.encode()) > piece_bytes - 4)
