"""Texts on which tiktoken's regular expressions give up: their ids are those of expressions without a limit.

The oracles: tiktoken itself on texts below its limit, where the code that cuts is made to cut short runs; the words
that `regex` finds in texts above it; and byte pairs merged one after the other by the rule alone.
"""

from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import InputError
from data_prep import words
from data_prep.bpe_reference import WORD
from data_prep.textfiles import Options, prepare
from data_prep.tokenizer import BpeTokenizer
from data_prep.words import GPT2_PATTERN, cut_long_runs
from tests.helpers.data_dirs import decoded, write_text

SPACES = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000\u200a\u2028\u2029\u202f\u205f\u3000"
# \x1c is white space to Python alone, U+200B and U+FEFF to nobody.
OTHERS = "'sdmtlvre\x1c\u200b\ufeffaZ\u00e9\u4e2d\u0639\u0301\u094d07\u0664\u00bd=-_.\U0001f600\u200d\ufffd"
RUNS = st.tuples(st.sampled_from(SPACES + OTHERS), st.integers(1, 9)).map(lambda run: run[0] * run[1])
MIXED = st.text(st.sampled_from(SPACES), min_size=1, max_size=9)
TEXTS = st.lists(RUNS | MIXED, max_size=12).map("".join)
TOKENS = ["  ", "   ", "    ", "\n\n", " \n", "aa", "aaa", "==", "====", " a", "77", "ll", "\u4e2d"]
RANKS = {token: rank for rank, token in enumerate([bytes([b]) for b in range(256)] + [t.encode() for t in TOKENS])}
OWN_PATTERN = r"\p{L}++[\r\n]*|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s"
SMALL = BpeTokenizer(RANKS, name="small")
OWN = BpeTokenizer(RANKS, name="own", pattern=OWN_PATTERN)
LONG = pytest.mark.long(reason="tiktoken has no limit for what is not white space; seconds each")


def merged(word: bytes) -> list[int]:
    """Merge the pair of lowest rank, the leftmost first, until none is left."""
    parts = [word[index : index + 1] for index in range(len(word))]
    while True:
        pairs = [(RANKS.get(parts[index] + parts[index + 1], 2**30), index) for index in range(len(parts) - 1)]
        rank, index = min(pairs, default=(2**30, 0))
        if rank == 2**30:
            return [RANKS[part] for part in parts]
        parts[index : index + 2] = [parts[index] + parts[index + 1]]


def check_pieces(text: str, long_run: int) -> None:
    """Compare with tiktoken alone, which `encode` asks for any text below the limit."""
    for tokenizer in (SMALL, OWN):
        expected = tokenizer._encoding.encode_ordinary(text)
        assert tokenizer.encode_in_pieces(text, long_run).tolist() == expected


@settings(max_examples=100, derandomize=True, deadline=None)
@given(text=TEXTS, long_run=st.integers(2, 5))
def test_cut_text_has_tiktokens_ids(text: str, long_run: int) -> None:
    check_pieces(text, long_run)


@pytest.mark.long(reason="2,000 texts, 100 of which are in `make test`")
@settings(max_examples=2000, derandomize=True, deadline=None)
@given(text=TEXTS, long_run=st.integers(2, 5))
def test_more_cut_text_has_tiktokens_ids(text: str, long_run: int) -> None:
    check_pieces(text, long_run)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(text=TEXTS, long_run=st.integers(2, 5))
def test_a_piece_is_one_word_or_has_no_long_run_and_none_cuts_a_word(text: str, long_run: int) -> None:
    all_words: list[str] = []
    for piece, is_word in cut_long_runs(text, long_run):
        found = WORD.findall(piece)
        if is_word:
            assert found == [piece] and set(piece) <= set(SPACES)
        all_words += found
    assert all_words == WORD.findall(text)


@pytest.mark.parametrize("length", [99, 100, 101, 499, 500, 501])  # tiktoken merges long words in another way
@pytest.mark.parametrize("unit", [" ", "\n", " \n", "a", "ab", "=", "7", "\u4e2d", "\u0301", "\U0001f600"], ids=ascii)
def test_a_long_word_is_merged_by_the_rule_alone(unit: str, length: int) -> None:
    word = (unit * length)[:length]
    expected = merged(word.encode())
    assert SMALL._whole.encode_to_numpy(word, disallowed_special=()).tolist() == expected
    if len(WORD.findall(word)) == 1:
        assert SMALL.encode(word).tolist() == expected


@pytest.mark.parametrize(
    ("unit", "end"),
    [
        *((" ", "x"), ("\n", ""), ("\t \u3000\r\n", " x"), ("\n", "\ud800")),
        *(pytest.param(unit, "x", marks=LONG) for unit in [*"a7=\u0301\u4e2d\u0639", "\U0001f600", "ab", "=-_"]),
    ],
    ids=ascii,
)
def test_a_run_of_a_million_is_encoded(unit: str, end: str) -> None:
    text = "It" + unit * (1_100_000 // len(unit)) + end
    few_words = WORD.findall(text.replace("\ud800", "\ufffd"))
    assert len(few_words) < 6
    expected = [SMALL._encoding._encode_single_piece(word) for word in few_words]
    np.testing.assert_array_equal(SMALL.encode(text), np.concatenate(expected))


def test_many_runs_between_words(capfd: pytest.CaptureFixture[str]) -> None:
    text = ("don't \ud800" + "\n" * 1_200_000) * 3 + "end" + " " * 1_200_000
    ids = SMALL.encode(text)
    assert SMALL.decode_bytes(ids.tolist()) == text.replace("\ud800", "\ufffd").encode()
    assert capfd.readouterr().err == ""  # A panic of Rust prints its traceback.


def test_an_own_pattern_without_a_limit_or_without_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    assert OWN.encode(" " * 1_200_000 + "x").tolist() == [*SMALL.encode(" " * 1_199_999), *b" x"]
    monkeypatch.setattr(words, "OTHER_PATTERN_SECONDS", 0.1)
    endless = BpeTokenizer(RANKS, name="endless", pattern=r"(a|a)+(?!\S)b|\s")
    with pytest.raises(InputError, match=r"^the tokenizer's pattern .* \(regex timed out\); use another"):
        endless.encode("a" * 100)


def test_a_whole_preparation_keeps_such_text(tmp_path: Path) -> None:
    SMALL.save(tmp_path)
    text = "a" + " " * 1_200_000 + "b. " * 9
    prepare(Options((write_text(tmp_path / "a.txt", text),), tmp_path / "data", str(tmp_path / "tokenizer")))
    assert decoded(tmp_path / "data") == text.encode()


def test_the_pattern_is_tiktokens(shared_data: Path) -> None:
    assert tiktoken.get_encoding("gpt2")._pat_str == GPT2_PATTERN
