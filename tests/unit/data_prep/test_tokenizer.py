"""Codecs against tiktoken's own ids, hashlib, and Python's own encoders."""

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken

from common.errors import InputError
from data_prep.tokenizer import (
    GPT2_PATTERN,
    BpeTokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    load_tokenizer,
    make_tokenizer,
)

ROOT = Path(__file__).resolve().parents[3]
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
    """Strings over ASCII, whitespace, Latin, CJK, emoji and everything else but surrogates."""
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


def edit_description(directory: Path, *, sign: bool = False, **changes: Any) -> None:
    """Alter codec.json; with `sign` its check is made to fit, so that what lies behind the check is met."""
    path = directory / "tokenizer" / "codec.json"
    description = json.loads(path.read_text()) | changes
    if sign:
        del description["check"]
        text = json.dumps(description, sort_keys=True).encode("ascii")
        description["check"] = hashlib.sha256(text).hexdigest()
    path.write_text(json.dumps(description))


def refusal(directory: Path) -> str:
    """The one line with which `load_codec` refuses."""
    with pytest.raises(InputError) as caught:
        load_tokenizer(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_char_ids_are_places_in_code_point_order() -> None:
    text = "zebra \U0001f600\u00e9\uffff\u20ac\na"
    tokenizer = make_tokenizer("char", "".join(sorted(set(text))))
    in_order = ["\n", " ", "a", "b", "e", "r", "z", "\u00e9", "\u20ac", "\uffff", "\U0001f600"]
    assert tokenizer.encode(text).tolist() == [in_order.index(character) for character in text]
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (11, None)
    assert tokenizer.decode_bytes(list(range(11))) == "".join(in_order).encode()


@pytest.mark.parametrize("character", ["!", "m", "\U0001f600", "\0"])
def test_an_unknown_character_is_named_with_its_place(character: str) -> None:
    with pytest.raises(InputError) as caught:
        CharTokenizer("abcxyz").encode(f"abcab{character}{character}a")
    assert f"{character!r} at 5 " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_char_fills_uint16_and_not_more() -> None:
    alphabet = "".join(chr(0x10000 + i) for i in range(65_536))
    assert CharTokenizer(alphabet).encode(alphabet[-1] + alphabet[0]).tolist() == [65_535, 0]
    with pytest.raises(InputError, match="65537 distinct characters"):
        CharTokenizer("a" + alphabet)


@pytest.mark.parametrize("alphabet", ["", "ba", "aab"])
def test_an_alphabet_out_of_order_is_refused(alphabet: str) -> None:
    with pytest.raises(InputError, match="distinct characters in order"):
        CharTokenizer(alphabet)


def test_byte_ids_are_the_utf8_bytes() -> None:
    tokenizer = make_tokenizer("byte", "")
    for text in random_texts(1):
        assert tokenizer.encode(text).tolist() == list(text.encode())
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (256, None)
    assert tokenizer.decode_bytes(list(range(256))) == bytes(range(256))


@pytest.mark.parametrize("name", SHARED_TEXTS)
def test_gpt2_ids_of_real_text_are_tiktokens(
    gpt2: Tokenizer, oracle: tiktoken.Encoding, shared_data: Path, name: str
) -> None:
    text = (shared_data / name).read_bytes().decode("utf-8")
    middle = len(text) // 2
    for piece in (text[:150_000], text[middle : middle + 50_001], text[-50_000:]):
        ids = gpt2.encode(piece)
        assert ids.tolist() == oracle.encode_ordinary(piece)
        assert gpt2.decode_bytes(ids.tolist()) == piece.encode()


@pytest.mark.parametrize("text", NASTY, ids=lambda text: ascii(text[:12]))
def test_gpt2_ids_of_nasty_text_are_tiktokens(gpt2: Tokenizer, oracle: tiktoken.Encoding, text: str) -> None:
    ids = gpt2.encode(text)
    assert ids.tolist() == oracle.encode_ordinary(text)
    assert gpt2.eot_id not in ids.tolist()
    readable = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert gpt2.decode_bytes(ids.tolist()) == readable.encode()


def test_a_million_blanks_are_refused_by_name(gpt2: Tokenizer) -> None:
    """tiktoken's regular expressions give up on them."""
    with pytest.raises(InputError, match="tokenizer gpt2 gave up on this text"):
        gpt2.encode(" " * 1_200_000 + "x")


def test_gpt2_ids_of_random_text_are_tiktokens(gpt2: Tokenizer, oracle: tiktoken.Encoding) -> None:
    for text in random_texts(2):
        assert gpt2.encode(text).tolist() == oracle.encode_ordinary(text)


def test_the_gpt2_vocabulary_is_tiktokens(gpt2: Tokenizer, oracle: tiktoken.Encoding) -> None:
    assert (gpt2.vocab_size, gpt2.eot_id) == (50_257, 50_256) == (oracle.n_vocab, oracle.eot_token)
    assert gpt2.encode("<|endoftext|>").tolist() == [27, 91, 437, 1659, 5239, 91, 29]
    assert gpt2.decode_bytes([31373, 50_256, 995]) == b"hello world"


def test_the_pattern_splits_as_the_published_one_does(
    gpt2: Tokenizer, oracle: tiktoken.Encoding, shared_data: Path
) -> None:
    published = tiktoken.Encoding(
        "published", pat_str=PUBLISHED_PATTERN, mergeable_ranks=oracle._mergeable_ranks, special_tokens={}
    )
    own = BpeTokenizer(oracle._mergeable_ranks, name="own", pattern=GPT2_PATTERN)
    story = (shared_data / "wikitext2_valid.txt").read_bytes()[:60_000].decode("utf-8", "ignore")
    for text in [*random_texts(3), *NASTY, story]:
        assert own.encode(text).tolist() == published.encode_ordinary(text)


def test_the_saved_rank_file_is_gpt2s_and_loads_as_the_same_codec(
    gpt2: Tokenizer, shared_data: Path, tmp_path: Path
) -> None:
    gpt2.save(tmp_path)
    saved = (tmp_path / "tokenizer" / "ranks.tiktoken").read_bytes()
    assert saved == (shared_data / "gpt2.tiktoken").read_bytes()
    assert gpt2.describe()["sha256"] == hashlib.sha256(saved).hexdigest()
    from_file = make_tokenizer(str(shared_data / "gpt2.tiktoken"), "")
    for loaded in (load_tokenizer(tmp_path), load_tokenizer(tmp_path / "tokenizer"), from_file):
        assert loaded.describe() == gpt2.describe()
        for text in [*random_texts(4, 50), "<|endoftext|>", "It's 1e5\r\n"]:
            assert loaded.encode(text).tolist() == gpt2.encode(text).tolist()


@pytest.mark.parametrize("name", ["char", "byte", "small"])
def test_a_codec_loads_as_it_was_saved(tmp_path: Path, name: str) -> None:
    texts = random_texts(5)
    tokenizer: Tokenizer = (
        BpeTokenizer(small_ranks(), name="small") if name == "small" else make_tokenizer(name, alphabet_of(texts))
    )
    tokenizer.save(tmp_path)
    for loaded in (load_tokenizer(tmp_path), load_tokenizer(tmp_path / "tokenizer"), make_tokenizer(str(tmp_path), "")):
        assert type(loaded) is type(tokenizer)
        assert loaded.describe() == tokenizer.describe()
        for text in texts:
            np.testing.assert_array_equal(loaded.encode(text), tokenizer.encode(text))


def alphabet_of(texts: list[str]) -> str:
    return "".join(sorted(set("".join(texts))))


@pytest.mark.parametrize("name", ["char", "byte", "small", "gpt2"])
def test_decoding_is_the_inverse_of_encoding_wherever_it_is_cut(name: str, request: pytest.FixtureRequest) -> None:
    texts = random_texts(6)
    tokenizer: Tokenizer
    if name == "gpt2":
        tokenizer = request.getfixturevalue("gpt2")
    elif name == "small":
        tokenizer = BpeTokenizer(small_ranks(), name="small")
    else:
        tokenizer = make_tokenizer(name, alphabet_of(texts))
    rng = random.Random(7)
    lengths = tokenizer.byte_lengths()
    for text in texts:
        ids = tokenizer.encode(text).tolist()
        cut = rng.randint(0, len(ids))
        assert tokenizer.decode_bytes(ids[:cut]) + tokenizer.decode_bytes(ids[cut:]) == text.encode()
        assert lengths[ids].sum() == len(text.encode())
        assert all(0 <= index < tokenizer.vocab_size and index != tokenizer.eot_id for index in ids)


@pytest.mark.parametrize("name", ["char", "byte", "small", "gpt2"])
def test_byte_lengths_are_the_lengths_of_what_each_id_decodes_to(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer
    if name == "gpt2":
        tokenizer = request.getfixturevalue("gpt2")
    elif name == "small":
        tokenizer = BpeTokenizer(small_ranks(), name="small")
    else:
        tokenizer = make_tokenizer(name, "\nAz\u00e9\u20ac\U0001f600")
    expected = [len(tokenizer.decode_bytes([index])) for index in range(tokenizer.vocab_size)]
    assert tokenizer.byte_lengths().tolist() == expected
    if tokenizer.eot_id is None:
        assert min(expected) == 1
    else:
        assert [index for index, length in enumerate(expected) if length == 0] == [tokenizer.eot_id]


def test_a_rank_file_of_ones_own(tmp_path: Path) -> None:
    BpeTokenizer(small_ranks(), name="small").save(tmp_path)
    tokenizer = make_tokenizer(str(tmp_path / "tokenizer" / "ranks.tiktoken"), "")
    assert tokenizer.encode("abcab a").tolist() == [257, 256, 258]
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (260, 259)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b"YWJk 300\n", "ranks are not 0 to 259"),
        (b"YWJk 258\n", "ranks are not 0 to 259"),
        (b"YWJk\n", r"ranks\.tiktoken:260: "),
        (b"YWJk one\n", r"ranks\.tiktoken:260: "),
        (b"Y?Jk 259\n", r"ranks\.tiktoken:260: "),
        (b"\xff\xfe 259\n", r"ranks\.tiktoken:260: "),
    ],
)
def test_a_faulty_rank_file_is_refused(tmp_path: Path, line: bytes, complaint: str) -> None:
    BpeTokenizer(small_ranks(), name="small").save(tmp_path)
    path = tmp_path / "tokenizer" / "ranks.tiktoken"
    path.write_bytes(path.read_bytes() + line)
    with pytest.raises(InputError, match=complaint):
        make_tokenizer(str(path), "")


def test_ranks_that_leave_out_a_byte_are_refused() -> None:
    ranks = {bytes([byte]): byte for byte in range(255)}
    with pytest.raises(InputError, match="no rank for byte 255"):
        BpeTokenizer(ranks, name="short")


def test_a_vocabulary_beyond_uint16_is_refused_by_number() -> None:
    singles = [bytes([byte]) for byte in range(256)]
    pairs = [first + second for first in singles for second in singles]
    tokens = [*singles, *pairs][:65_536]
    with pytest.raises(InputError, match="vocabulary of 65537 "):
        BpeTokenizer({token: rank for rank, token in enumerate(tokens)}, name="big")


def test_an_unknown_tokenizer_is_named() -> None:
    with pytest.raises(InputError, match="--tokenizer gpt5: "):
        make_tokenizer("gpt5", "abc")


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "codec.json") in refusal(tmp_path)


@pytest.mark.parametrize("changes", [{"alphabet": "abd"}, {"sha256": "0" * 64}, {"kind": "byte"}])
def test_an_altered_char_tokenizer_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    CharTokenizer("abc").save(tmp_path)
    edit_description(tmp_path, **changes)
    message = refusal(tmp_path)
    assert str(tmp_path / "tokenizer" / "codec.json") in message
    assert "altered" in message


@pytest.mark.parametrize("changes", [{"kind": "wordpiece"}, {"alphabet": None}, {"alphabet": ["ab"]}, {"kind": "bpe"}])
def test_a_nonsensical_description_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    CharTokenizer("abc").save(tmp_path)
    edit_description(tmp_path, sign=True, **changes)
    assert str(tmp_path) in refusal(tmp_path)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("char", {"alphabet": ["a", "b"]}),
        ("char", {"alphabet": "a\ud800"}),
        ("bpe", {"pattern": "("}),
        ("bpe", {"pattern": "."}),
    ],
)
def test_every_altered_field_is_refused(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    tokenizer: Tokenizer = CharTokenizer("abc") if kind == "char" else BpeTokenizer(small_ranks(), name="small")
    tokenizer.save(tmp_path)
    edit_description(tmp_path, **changes)
    assert str(tmp_path) in refusal(tmp_path)


def test_altered_ranks_are_refused(tmp_path: Path) -> None:
    BpeTokenizer(small_ranks(), name="small").save(tmp_path)
    path = tmp_path / "tokenizer" / "ranks.tiktoken"
    content = path.read_bytes()
    lines = content.splitlines()
    assert lines[97:99] == [b"YQ== 97", b"Yg== 98"]
    path.write_bytes(b"\n".join([*lines[:97], b"Yg== 97", b"YQ== 98", *lines[99:]]) + b"\n")
    assert "altered" in refusal(tmp_path)
    path.write_bytes(b"\n".join(lines[:-1]) + b"\n")
    assert "altered" in refusal(tmp_path)
    path.write_bytes(content[: len(content) // 2])
    refusal(tmp_path)
    path.unlink()
    assert f"{path}: no such rank file" in refusal(tmp_path)


def test_a_truncated_description_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    CharTokenizer("abc\U0001f600").save(tmp_path)
    path = tmp_path / "tokenizer" / "codec.json"
    content = path.read_bytes()
    for length in range(len(content) - 1):
        path.write_bytes(content[:length])
        assert "damaged" in refusal(tmp_path)
    for content in (b"[]", b"null", b"\xff", b"{}"):
        path.write_bytes(content)
        assert "damaged" in refusal(tmp_path)


def test_gpt2_without_network_says_what_to_set(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "text.txt").write_text("hello\n")
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    closed = dict.fromkeys(("HTTPS_PROXY", "HTTP_PROXY", "https_proxy", "http_proxy"), "http://127.0.0.1:9")
    script = str(ROOT / "data_prep" / "textfiles.py")
    done = subprocess.run(
        [sys.executable, script, "--input", "text.txt", "--out", "data", "--tokenizer", "gpt2"],
        cwd=tmp_path,
        env=kept | closed | {"TIKTOKEN_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "TIKTOKEN_CACHE_DIR" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "text.txt"]


def test_byte_codec_is_the_same_everywhere() -> None:
    assert ByteTokenizer().describe() == {
        "kind": "byte",
        "vocab_size": 256,
        "eot_id": None,
        "sha256": hashlib.sha256(bytes(range(256))).hexdigest(),
    }


@pytest.mark.parametrize("tokenizer", [CharTokenizer("abc"), ByteTokenizer()], ids=["char", "byte"])
def test_a_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"at 1\b"):
        tokenizer.encode("a\ud800")
