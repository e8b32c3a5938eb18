"""Byte-pair training in a hundred readable lines: words are counted once, then pairs are counted incrementally.

GPT-2's pattern splits text into words, and pairs never cross a word. A word begins as its UTF-8 bytes. Again and again
the most frequent pair of neighbours becomes a new token, everywhere at once, from left to right in each word.

Of equally frequent pairs, the pair with the smallest ids wins, left id first. The ids are GPT-2's: 0 to 255 are the
bytes in the order of GPT-2's vocabulary, and 256 is the first merge. Hugging Face `tokenizers` breaks ties in the same
way, so both trainers make the same merges (test_bpe.py). Only characters newer than Unicode 16.0 may be split
differently.

Three things make it fast enough. Equal words are counted once. A merge touches only the words that hold its pair
(`word_indices`). The heap holds each pair once, and a count that has fallen since it was pushed is corrected when it
comes to the top.
"""

import heapq
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import regex

from data_prep.tokenizer import BYTE_ORDER
from data_prep.words import GPT2_PATTERN

WORD = regex.compile(GPT2_PATTERN)


@dataclass(frozen=True)
class TrainedModel:
    """The result of training. tokens: the bytes of every id, of which 256 are single bytes. seconds: time by stage."""

    tokens: list[bytes]
    seconds: dict[str, float]


def train(texts: Iterable[str], num_tokens: int) -> TrainedModel:
    """Learn at most num_tokens <= 65,536 tokens from `texts`; fewer if no word has a pair left to merge."""
    clock = _Clock()
    word_counts = count_words(texts, clock)
    words, counts = list(word_counts), list(word_counts.values())
    pair_counts, word_indices = count_pairs(words, counts)
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)
    clock.lap("counting pairs")

    tokens = [bytes([byte]) for byte in BYTE_ORDER]
    while len(tokens) < num_tokens and heap:
        negative_count, pair = heapq.heappop(heap)
        if -negative_count != pair_counts[pair]:  # The count fell: words lost the pair to other merges.
            if pair_counts[pair] > 0:
                heapq.heappush(heap, (-pair_counts[pair], pair))
            continue
        new = chr(len(tokens))
        tokens.append(tokens[ord(pair[0])] + tokens[ord(pair[1])])
        new_pairs = set()
        for index in word_indices.pop(pair):
            before, count = words[index], counts[index]
            after = words[index] = before.replace(pair, new)
            for i in range(len(before) - 1):
                pair_counts[before[i : i + 2]] -= count
            for i in range(len(after) - 1):
                neighbours = after[i : i + 2]
                pair_counts[neighbours] += count
                if new in neighbours:
                    word_indices[neighbours].add(index)
                    new_pairs.add(neighbours)
        for neighbours in new_pairs:
            heapq.heappush(heap, (-pair_counts[neighbours], neighbours))
    clock.lap("merging")
    return TrainedModel(tokens, clock.seconds)


def count_words(texts: Iterable[str], clock: "_Clock") -> Counter[str]:
    """Count the words of the texts. A returned word is a string with one character per id.

    So `str.replace` merges a pair, and pairs compare as their ids do.
    """
    text_words: Counter[str] = Counter()
    for text in texts:
        clock.lap("decoding")
        words = WORD.findall(text)
        clock.lap("splitting into words")
        text_words.update(words)
        clock.lap("counting words")
    id_of_byte = {byte: index for index, byte in enumerate(BYTE_ORDER)}
    as_ids = Counter(
        {word.encode("utf-8").decode("latin-1").translate(id_of_byte): count for word, count in text_words.items()}
    )
    clock.lap("counting words")
    return as_ids


def count_pairs(words: list[str], counts: list[int]) -> tuple[Counter[str], defaultdict[str, set[int]]]:
    """Count each pair in all words, and return with it the indices of the words that hold the pair."""
    pair_counts: Counter[str] = Counter()
    word_indices: defaultdict[str, set[int]] = defaultdict(set)
    for index, (word, count) in enumerate(zip(words, counts, strict=True)):
        for i in range(len(word) - 1):
            pair_counts[word[i : i + 2]] += count
            word_indices[word[i : i + 2]].add(index)
    return pair_counts, word_indices


class _Clock:
    """A clock that adds up the seconds spent on each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Add the time since the last lap to `stage`."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now
