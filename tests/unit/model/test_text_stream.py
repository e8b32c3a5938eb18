"""Text out of tokens: whole characters, and nothing from a stop string on, wherever tokens end."""

import random

import pytest

from data_prep.tokenizer import BpeTokenizer, ByteTokenizer, CharTokenizer, Tokenizer
from model.generation.text_stream import Continuation


def said(
    tokenizer: Tokenizer, tokens: list[int], max_tokens: int = 1000, stop_requests: tuple[str, ...] = ()
) -> Continuation:
    """Of as many of the tokens as it takes; what is text stays text."""
    continuation = Continuation(tokenizer, max_tokens=max_tokens, stop_requests=stop_requests)
    for token in tokens:
        if continuation.stopped_by is None:
            before = continuation.text
            continuation.add(token)
            assert continuation.text.startswith(before)
    return continuation


def pairs() -> BpeTokenizer:
    """Bytes, and some tokens of several; EOT is 260."""
    ranks = {bytes([i]): i for i in range(256)} | {b"ab": 256, b"bc": 257, b"abc": 258, b"\xe2\x82": 259}
    return BpeTokenizer(ranks, name="pairs")


def test_whole_characters_only() -> None:
    text = "h\u00e9llo \U0001f600"
    found = said(ByteTokenizer(), list(text.encode()))
    assert found.text == text and found.stopped_by is None
    assert said(ByteTokenizer(), [0xE2, 0x82]).text == ""
    assert said(ByteTokenizer(), [0xE2, 0x82], max_tokens=2).text == "\ufffd"
    assert said(ByteTokenizer(), [0xE2, 0x61]).text == "\ufffda"
    assert said(CharTokenizer("ab"), [0, 1, 1]).text == "abb"


def test_it_ends_with_a_document() -> None:
    found = said(pairs(), [256, 99, 259, 260])
    assert (found.text, found.stopped_by, found.tokens) == ("abc\ufffd", "eot", [256, 99, 259])


def test_it_ends_with_enough_tokens() -> None:
    found = said(pairs(), [256, 257, 258], max_tokens=2)
    assert (found.text, found.stopped_by, found.tokens) == ("abbc", "max_tokens", [256, 257])
    assert said(pairs(), [256, 257], max_tokens=2, stop_requests=("bb",)).stopped_by == "stop"


@pytest.mark.parametrize("tokens", [[120, 258, 121], [120, 256, 99, 121], [120, 97, 257, 121], [120, 97, 98, 99, 121]])
def test_a_stop_string_lies_across_tokens(tokens: list[int]) -> None:
    for stop_requests, text in (
        (("abc",), "x"),
        (("bc",), "xa"),
        (("c",), "xab"),
        (("abc", "bc"), "x"),  # complete at once: the longest
        (("abc", "b"), "xa"),  # the first that is complete, also where one token has both
        (("bcz", "abz"), "xabcy"),
    ):
        found = said(pairs(), tokens, stop_requests=stop_requests, max_tokens=len(tokens))
        assert found.text == text, stop_requests
        assert found.stopped_by == ("max_tokens" if text == "xabcy" else "stop")


def test_what_may_become_a_stop_string_waits() -> None:
    tokenizer = CharTokenizer("abcx")
    continuation = Continuation(tokenizer, max_tokens=10, stop_requests=("abc", "bx"))
    texts = []
    for character in "aababa":
        continuation.add(tokenizer.stoi[character])
        texts.append(continuation.text)
    assert texts == ["", "a", "a", "aab", "aab", "aabab"]
    for character in "bc":
        continuation.add(tokenizer.stoi[character])
    assert continuation.text == "aabab" and continuation.stopped_by == "stop" and len(continuation.tokens) == 8


def test_neither_tokens_nor_waiting_change_the_text() -> None:
    """Random texts, stops and cuts into tokens, against a search of all the text, character by character."""
    rng = random.Random(1)
    tokenizer = pairs()
    for _ in range(300):
        tokens = rng.choices([97, 98, 99, 256, 257, 258], k=rng.randint(1, 12))
        stop_requests = tuple("".join(rng.choices("abc", k=rng.randint(1, 4))) for _ in range(rng.randint(0, 3)))
        text = tokenizer.decode_bytes(tokens).decode()
        ends = [end for end in range(len(text) + 1) if text[:end].endswith(stop_requests or ("never",))]
        wanted = text
        if ends:
            longest = max(len(stop) for stop in stop_requests if text[: ends[0]].endswith(stop))
            wanted = text[: ends[0] - longest]
        found = said(tokenizer, tokens, max_tokens=len(tokens), stop_requests=stop_requests)
        assert (found.text, found.stopped_by) == (wanted, "stop" if ends else "max_tokens"), (text, stop_requests)
