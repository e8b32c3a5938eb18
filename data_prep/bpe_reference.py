"""Byte-pair training in a hundred lines that can be read: words counted once, then pairs counted incrementally.

Text is split into words by GPT-2's pattern, and pairs never cross a word. A word is at first its UTF-8 bytes. Again
and again the most frequent pair of neighbours becomes a new token, everywhere at once, from left to right in each word.

Tie-break: of equally frequent pairs the one with the smallest ids, left id first. Ids are GPT-2's: 0 to 255 are the
bytes in the order of GPT-2's vocabulary, 256 is the first merge. Hugging Face `tokenizers` decides in the same way, so
that both trainers make the same merges (test_bpe.py). Only characters newer than Unicode 16.0 may be split
differently.

What makes it fast enough: equal words are counted once; only words that hold the merged pair are touched (`where`);
the heap holds each pair once, and a count that has fallen since it was pushed is put right when it comes to the top.
"""

import heapq
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import regex

from data_prep.tokenizer import BYTE_ORDER, GPT2_PATTERN

WORD = regex.compile(GPT2_PATTERN)


@dataclass(frozen=True)
class TrainedModel:
    """tokens: the bytes of every id, 256 of them single. seconds: where the time went, by stage."""

    tokens: list[bytes]
    seconds: dict[str, float]


def train(texts: Iterable[str], num_tokens: int) -> TrainedModel:
    """Byte pairs learnt from `texts`, at most num_tokens <= 65,536 of them; fewer where no word has a pair left."""
    clock = _Clock()
    word_counts = count_words(texts, clock)
    words, counts = list(word_counts), list(word_counts.values())
    pair_counts, where = count_pairs(words, counts)
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)
    clock.lap("counting pairs")

    tokens = [bytes([byte]) for byte in BYTE_ORDER]
    while len(tokens) < num_tokens and heap:
        negative_count, pair = heapq.heappop(heap)
        if -negative_count != pair_counts[pair]:  # it has fallen since: words lost the pair to other merges
            if pair_counts[pair] > 0:
                heapq.heappush(heap, (-pair_counts[pair], pair))
            continue
        new = chr(len(tokens))
        tokens.append(tokens[ord(pair[0])] + tokens[ord(pair[1])])
        made = set()
        for index in where.pop(pair):
            before, count = words[index], counts[index]
            after = words[index] = before.replace(pair, new)
            for place in range(len(before) - 1):
                pair_counts[before[place : place + 2]] -= count
            for place in range(len(after) - 1):
                neighbours = after[place : place + 2]
                pair_counts[neighbours] += count
                if new in neighbours:
                    where[neighbours].add(index)
                    made.add(neighbours)
        for neighbours in made:
            heapq.heappush(heap, (-pair_counts[neighbours], neighbours))
    clock.lap("merging")
    return TrainedModel(tokens, clock.seconds)


def count_words(texts: Iterable[str], clock: "_Clock") -> Counter[str]:
    """How often each word stands in the texts. A word is a string with one character per id.

    So the language's own `replace` merges a pair, and pairs compare as their ids do.
    """
    found: Counter[str] = Counter()
    for text in texts:
        clock.lap("decoding")
        words = WORD.findall(text)
        clock.lap("splitting into words")
        found.update(words)
        clock.lap("counting words")
    id_of_byte = {byte: index for index, byte in enumerate(BYTE_ORDER)}
    as_ids = Counter(
        {word.encode("utf-8").decode("latin-1").translate(id_of_byte): count for word, count in found.items()}
    )
    clock.lap("counting words")
    return as_ids


def count_pairs(words: list[str], counts: list[int]) -> tuple[Counter[str], defaultdict[str, set[int]]]:
    """How often each pair stands in all words, and in which words."""
    pair_counts: Counter[str] = Counter()
    where: defaultdict[str, set[int]] = defaultdict(set)
    for index, (word, count) in enumerate(zip(words, counts, strict=True)):
        for place in range(len(word) - 1):
            pair_counts[word[place : place + 2]] += count
            where[word[place : place + 2]].add(index)
    return pair_counts, where


class _Clock:
    """Seconds per stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """The time since the last lap was spent on `stage`."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now
