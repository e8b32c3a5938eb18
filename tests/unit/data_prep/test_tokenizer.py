"""Tokenizers against tiktoken's own ids, hashlib, and Python's own encoders."""

import hashlib
import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import tiktoken

from common.errors import InputError
from data_prep.tokenizer import (
    BpeTokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    alphabet_of,
    gives_same_ids,
    load_tokenizer,
    make_tokenizer,
    name_of,
)

# As published with GPT-2 (encoder.py); GPT2_PATTERN is a faster spelling of it.
PUBLISHED_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"  # one emoji of five code points
NASTY = [
    "",
    " ",
    "=" * 300_000,
    " " * 10_000 + "x",
    "<|endoftext|>",
    "one<|endoftext|><|endoftext|>two <|endoftext|> <|fim_prefix|><|endofprompt|>",
    "\r\n\r\n x\r\ny\r",
    "\n \n\t  \x0b\x0c x  \n",
    "\ud800",
    "a\ud800b\udfff \udc00\ud800",
    f"{FAMILY}{FAMILY} \U0001f600",
    "e\u0301 \u00e9 \u0130 \u1e9e \ufb03",
    "I'LL we've don't 'sd ''' 're'll",
    "123456789 12,345.67 \u0663\u0664 \u2167 \u00bd",
    "\0\x01\x7f\x80\x85\xa0\u2028\u3000",
    "\u4f60\u597d\u4e16\u754c \u0645\u0631\u062d\u0628\u0627 \U0002070e",
    "\ufeffBOM",
    "\U0010ffff\ue000\uffff",
]
SHARED_TEXTS = ["tinyshakespeare.txt", "tinystories_2mb.txt", "fineweb_edu_sample.txt", "wikitext2_valid.txt"]


def random_texts(seed: int, count: int = 200) -> list[str]:
    """Return strings over ASCII, whitespace, Latin, CJK, emoji and everything else but surrogates."""
    rng = random.Random(seed)
    ranges = [(32, 126), (9, 13), (0xA0, 0x24F), (0x4E00, 0x4FFF), (0x1F300, 0x1F6FF), (0xE000, 0x10FFFF), (48, 57)]
    texts = []
    for _ in range(count):
        chosen = rng.sample(ranges, k=rng.randint(1, 4))
        texts.append("".join(chr(rng.randint(*rng.choice(chosen))) for _ in range(rng.randint(0, 80))))
    return texts


def small_ranks() -> dict[bytes, int]:
    return {bytes([byte]): byte for byte in range(256)} | {b"ab": 256, b"abc": 257, b" a": 258}


@pytest.fixture(scope="module")
def gpt2(shared_data: Path) -> Tokenizer:
    return make_tokenizer("gpt2", "")


@pytest.fixture(scope="module")
def oracle(shared_data: Path) -> tiktoken.Encoding:
    return tiktoken.get_encoding("gpt2")


@pytest.fixture(params=["char", "byte", "small", "gpt2"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Each kind; the alphabet of `char` is that of random_texts(6)."""
    if request.param == "gpt2":
        gpt2: Tokenizer = request.getfixturevalue("gpt2")
        return gpt2
    if request.param == "small":
        return BpeTokenizer(small_ranks(), name="small")
    return make_tokenizer(request.param, "".join(sorted(set("".join(random_texts(6))))))


def refusal(directory: Path) -> str:
    """Return the one line with which `load_tokenizer` refuses."""
    with pytest.raises(InputError) as caught:
        load_tokenizer(directory)
    assert "\n" not in str(caught.value) and str(directory) in str(caught.value)
    return str(caught.value)


def test_char_ids_are_positions_in_code_point_order() -> None:
    text = "zebra \U0001f600\u00e9\uffff\u20ac\na"
    tokenizer = make_tokenizer("char", "".join(sorted(set(text))))
    in_order = ["\n", " ", "a", "b", "e", "r", "z", "\u00e9", "\u20ac", "\uffff", "\U0001f600"]
    assert tokenizer.encode(text).tolist() == [in_order.index(character) for character in text]
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (11, None)
    assert tokenizer.decode_bytes(list(range(11))) == "".join(in_order).encode()
    for character in "!m\U0010ffff\0":
        complaint = f"^character {re.escape(repr(character))} at 300005 is not among"
        with pytest.raises(InputError, match=complaint) as caught:
            tokenizer.encode(f"{'zebra' * 60_001}{character}{character}a")
        assert "\n" not in str(caught.value)


def test_the_alphabet_of_a_long_text_is_its_characters() -> None:
    for text in ("", "b\ud800a\U0010ffff", "ab\0\U0010ffff" * 70_000 + "\udfff"):
        assert alphabet_of(text) == set(text)


def test_impossible_alphabets_and_texts_are_refused() -> None:
    alphabet = "".join(chr(0x10000 + i) for i in range(65_536))
    assert CharTokenizer(alphabet).encode(alphabet[-1] + alphabet[0]).tolist() == [65_535, 0]
    for wrong, complaint in (
        ("a" + alphabet, "65537 distinct characters"),
        ("", "distinct characters in order"),
        ("ba", "distinct characters in order"),
        ("aab", "distinct characters in order"),
        ("a\ud800", "lone surrogate"),
    ):
        with pytest.raises(InputError, match=complaint):
            CharTokenizer(wrong)
    for tokenizer in (CharTokenizer("abc"), ByteTokenizer()):
        with pytest.raises(InputError, match=r"at 1\b"):
            tokenizer.encode("a\ud800")


def test_byte_ids_are_the_utf8_bytes() -> None:
    tokenizer = make_tokenizer("byte", "")
    for text in random_texts(1):
        assert tokenizer.encode(text).tolist() == list(text.encode())
    assert tokenizer.decode_bytes(list(range(256))) == bytes(range(256))
    sha256 = hashlib.sha256(bytes(range(256))).hexdigest()
    assert tokenizer.describe() == {"kind": "byte", "vocab_size": 256, "eot_id": None, "sha256": sha256}
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (256, None)
    assert name_of(tokenizer) == "byte (256 ids, sha256 40aff2e9)"


@pytest.mark.parametrize("name", SHARED_TEXTS)
def test_gpt2_ids_of_real_text_are_tiktokens(
    gpt2: Tokenizer, oracle: tiktoken.Encoding, shared_data: Path, name: str
) -> None:
    text = (shared_data / name).read_bytes().decode("utf-8")
    middle = len(text) // 2
    for piece in (text[:50_000], text[middle : middle + 50_001], text[-50_000:]):
        ids = gpt2.encode(piece).tolist()
        assert ids == oracle.encode_ordinary(piece)
        assert gpt2.decode_bytes(ids) == piece.encode()


def test_gpt2_ids_of_nasty_and_random_text_are_tiktokens(gpt2: Tokenizer, oracle: tiktoken.Encoding) -> None:
    published = tiktoken.Encoding(
        "published", pat_str=PUBLISHED_PATTERN, mergeable_ranks=oracle._mergeable_ranks, special_tokens={}
    )
    for text in [*NASTY, *random_texts(2)]:
        ids = gpt2.encode(text).tolist()
        assert ids == oracle.encode_ordinary(text) == published.encode_ordinary(text)
        assert gpt2.eot_id not in ids
        readable = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        assert gpt2.decode_bytes(ids) == readable.encode()


def test_the_gpt2_vocabulary_is_tiktokens(gpt2: Tokenizer, oracle: tiktoken.Encoding) -> None:
    assert (gpt2.vocab_size, gpt2.eot_id) == (50_257, 50_256) == (oracle.n_vocab, oracle.eot_token)
    assert gpt2.encode("<|endoftext|>").tolist() == [27, 91, 437, 1659, 5239, 91, 29]
    assert gpt2.decode_bytes([31373, 50_256, 995]) == b"hello world"
    assert name_of(gpt2) == "gpt2 (50,257 ids, sha256 306cd27f)"


def test_the_saved_rank_file_is_gpt2s(gpt2: Tokenizer, shared_data: Path, tmp_path: Path) -> None:
    gpt2.save(tmp_path)
    saved = (tmp_path / "tokenizer" / "ranks.tiktoken").read_bytes()
    assert saved == (shared_data / "gpt2.tiktoken").read_bytes()
    assert gpt2.describe()["sha256"] == hashlib.sha256(saved).hexdigest()
    assert make_tokenizer(str(shared_data / "gpt2.tiktoken"), "").describe() == gpt2.describe()


def test_a_tokenizer_loads_as_it_was_saved(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = random_texts(6, 50)
    tokenizer.save(tmp_path)
    for loaded in (load_tokenizer(tmp_path), load_tokenizer(tmp_path / "tokenizer"), make_tokenizer(str(tmp_path), "")):
        assert type(loaded) is type(tokenizer)
        assert loaded.describe() == tokenizer.describe()
        assert gives_same_ids(loaded, tokenizer) and not gives_same_ids(loaded, CharTokenizer("abc"))
        for text in texts:
            np.testing.assert_array_equal(loaded.encode(text), tokenizer.encode(text))


def test_decoding_is_the_inverse_of_encoding_wherever_it_is_cut(tokenizer: Tokenizer) -> None:
    rng = random.Random(7)
    lengths = tokenizer.byte_lengths()
    for text in random_texts(6):
        ids = tokenizer.encode(text).tolist()
        cut = rng.randint(0, len(ids))
        assert tokenizer.decode_bytes(ids[:cut]) + tokenizer.decode_bytes(ids[cut:]) == text.encode()
        assert lengths[ids].sum() == len(text.encode())
        assert all(0 <= index < tokenizer.vocab_size and index != tokenizer.eot_id for index in ids)
    expected = [len(tokenizer.decode_bytes([index])) for index in range(tokenizer.vocab_size)]
    assert lengths.tolist() == expected
    without_bytes = [index for index, length in enumerate(expected) if length == 0]
    assert without_bytes == ([] if tokenizer.eot_id is None else [tokenizer.eot_id])


def test_a_rank_file_of_ones_own_is_used(tmp_path: Path) -> None:
    BpeTokenizer(small_ranks(), name="small").save(tmp_path)
    path = tmp_path / "tokenizer" / "ranks.tiktoken"
    tokenizer = make_tokenizer(str(path), "")
    assert tokenizer.encode("abcab a").tolist() == [257, 256, 258]
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (260, 259)
    content = path.read_bytes()
    for line, complaint in (
        (b"YWJk 300", "ranks are not 0 to 259"),
        (b"YWJk 258", "ranks are not 0 to 259"),
        (b"YWJk", r"ranks\.tiktoken:260: "),
        (b"YWJk one", r"ranks\.tiktoken:260: "),
        (b"Y?Jk 259", r"ranks\.tiktoken:260: "),
        (b"\xff\xfe 259", r"ranks\.tiktoken:260: "),
    ):
        path.write_bytes(content + line + b"\n")
        with pytest.raises(InputError, match=complaint):
            make_tokenizer(str(path), "")


def test_impossible_vocabularies_are_refused() -> None:
    singles = [bytes([byte]) for byte in range(256)]
    tokens = [*singles, *(first + second for first in singles for second in singles)][:65_536]
    with pytest.raises(InputError, match="vocabulary of 65537 "):
        BpeTokenizer({token: rank for rank, token in enumerate(tokens)}, name="big")
    with pytest.raises(InputError, match="no rank for byte 255"):
        BpeTokenizer({token: rank for rank, token in enumerate(singles[:255])}, name="short")


def test_unknown_and_missing_tokenizers_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="--tokenizer gpt5: neither char, byte or gpt2"):
        make_tokenizer("gpt5", "abc")
    with pytest.raises(InputError, match=r"^--tokenizer n+: cannot be read .*File name too long"):
        make_tokenizer("n" * 300, "abc")
    assert f"{tmp_path / 'codec.json'}: missing" in refusal(tmp_path)

    def fail(name: str) -> tiktoken.Encoding:
        raise requests.exceptions.ConnectionError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    with pytest.raises(InputError, match=r"--tokenizer gpt2: .* \(ConnectionError\); .* set TIKTOKEN_CACHE_DIR"):
        make_tokenizer("gpt2", "")


@pytest.mark.parametrize("is_signed", [False, True])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("char", {"alphabet": "abd"}),
        ("char", {"alphabet": None}),
        ("char", {"alphabet": ["a", "b"]}),
        ("char", {"alphabet": "a\ud800"}),
        ("char", {"sha256": "0" * 64}),
        ("char", {"kind": "byte"}),
        ("char", {"kind": "bpe"}),
        ("char", {"kind": "wordpiece"}),
        ("small", {"pattern": "("}),
        ("small", {"pattern": "a{1000000000}"}),
        ("small", {"vocab_size": 261}),
        ("small", {"vocab_size": 259.0}),
        ("small", {"eot_id": True}),
        ("small", {"name": ["small"]}),
        ("small", {"kind": ["bpe"]}),
    ],
)
def test_an_altered_description_is_refused(tmp_path: Path, kind: str, changes: dict[str, Any], is_signed: bool) -> None:
    """Also if its check was made to fit, so that the code behind the check is reached."""
    tokenizer: Tokenizer = CharTokenizer("abc") if kind == "char" else BpeTokenizer(small_ranks(), name="small")
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer" / "codec.json"
    description = json.loads(path.read_text()) | changes
    if is_signed:
        del description["check"]
        description["check"] = hashlib.sha256(json.dumps(description, sort_keys=True).encode("ascii")).hexdigest()
    path.write_text(json.dumps(description))
    if not is_signed:
        assert f"{path}: was altered since it was written" in refusal(tmp_path)
    else:
        assert refusal(tmp_path)


def test_altered_ranks_are_refused(tmp_path: Path) -> None:
    BpeTokenizer(small_ranks(), name="small").save(tmp_path)
    path = tmp_path / "tokenizer" / "ranks.tiktoken"
    lines = path.read_bytes().splitlines(keepends=True)
    assert lines[97:99] == [b"YQ== 97\n", b"Yg== 98\n"]
    for altered in ([*lines[:97], b"Yg== 97\n", b"YQ== 98\n", *lines[99:]], lines[:-1]):
        path.write_bytes(b"".join(altered))
        assert "altered" in refusal(tmp_path)
    path.write_bytes(b"".join(lines)[:1000])
    with pytest.raises(InputError):
        load_tokenizer(tmp_path)
    path.unlink()
    assert f"{path}: no such rank file" in refusal(tmp_path)


def test_a_truncated_description_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    CharTokenizer("abc\U0001f600").save(tmp_path)
    path = tmp_path / "tokenizer" / "codec.json"
    content = path.read_bytes()
    for damaged in (*(content[:length] for length in range(len(content) - 1)), b"[]", b"null", b"\xff", b"{}"):
        path.write_bytes(damaged)
        assert "damaged" in refusal(tmp_path)
