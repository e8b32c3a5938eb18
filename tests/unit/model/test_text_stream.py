"""Text from tokens: whole characters, and nothing from a stop string on, wherever the tokens are cut."""

import random

from data_prep.tokenizer import BpeTokenizer, ByteTokenizer, CharTokenizer, Tokenizer
from model.generation.text_stream import Continuation

# Single bytes and some longer tokens; EOT is 260.
RANKS = {bytes([i]): i for i in range(256)} | {b"ab": 256, b"bc": 257, b"abc": 258, b"\xe2\x82": 259}
PAIRS = BpeTokenizer(RANKS, name="pairs")


def stream(
    tokenizer: Tokenizer, tokens: list[int], max_tokens: int = 1000, stops: tuple[str, ...] = ()
) -> Continuation:
    """Add tokens until the text ends; check that text is only ever appended."""
    continuation = Continuation(tokenizer, max_tokens=max_tokens, stop_strings=stops)
    for token in tokens:
        if continuation.stopped_by is None:
            before = continuation.text
            continuation.add(token)
            assert continuation.text.startswith(before)
    return continuation


def test_only_whole_characters_appear() -> None:
    text = "h\u00e9llo \U0001f600"
    assert stream(ByteTokenizer(), list(text.encode())).text == text
    assert stream(ByteTokenizer(), [0xE2, 0x82]).text == ""
    assert stream(ByteTokenizer(), [0xE2, 0x82], max_tokens=2).text == "\ufffd"
    assert stream(ByteTokenizer(), [0xE2, 0x61]).text == "\ufffda"
    assert stream(CharTokenizer("ab"), [0, 1, 1]).text == "abb"


def test_a_text_ends_with_its_document_or_enough_tokens() -> None:
    ended = stream(PAIRS, [256, 99, 259, 260])
    assert (ended.text, ended.stopped_by, ended.tokens) == ("abc\ufffd", "eot", [256, 99, 259])
    ended = stream(PAIRS, [256, 257, 258], max_tokens=2)
    assert (ended.text, ended.stopped_by, ended.tokens) == ("abbc", "max_tokens", [256, 257])
    assert stream(PAIRS, [256, 257], max_tokens=2, stops=("bb",)).stopped_by == "stop"


def test_text_that_may_begin_a_stop_string_waits() -> None:
    tokenizer = CharTokenizer("abcx")
    continuation = Continuation(tokenizer, max_tokens=10, stop_strings=("abc", "bx"))
    texts = []
    for character in "aabababc":
        continuation.add(tokenizer.stoi[character])
        texts.append(continuation.text)
    assert texts == ["", "a", "a", "aab", "aab", "aabab", "aabab", "aabab"]
    assert continuation.stopped_by == "stop" and len(continuation.tokens) == 8


def test_random_texts_end_where_a_search_of_the_whole_text_says() -> None:
    rng = random.Random(1)
    for _ in range(300):
        tokens = rng.choices([97, 98, 99, 256, 257, 258], k=rng.randint(1, 12))
        stops = tuple("".join(rng.choices("abc", k=rng.randint(1, 4))) for _ in range(rng.randint(0, 3)))
        text = PAIRS.decode_bytes(tokens).decode()
        ends = [end for end in range(len(text) + 1) if text[:end].endswith(stops or ("never",))]
        expected = text
        if ends:
            expected = text[: ends[0] - max(len(stop) for stop in stops if text[: ends[0]].endswith(stop))]
        ended = stream(PAIRS, tokens, max_tokens=len(tokens), stops=stops)
        assert (ended.text, ended.stopped_by) == (expected, "stop" if ends else "max_tokens"), (text, stops)
