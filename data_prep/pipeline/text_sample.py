"""A sample of bounded size, drawn from all of the input, and held-out text that is never in the sample.

Every document has a key, a hash of its text. The sample is the documents with the smallest keys, until it is full; the
held-out text is the documents with the largest keys. The choice depends on the texts alone, not on the order of the
files. Equal documents count as one, so that copies of a held-out document are held out too. A file that is one document
is cut at line ends into pieces, which are drawn like documents.
"""

import hashlib
import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from common.errors import InputError
from data_prep.pipeline.bad_rows import Skipped
from data_prep.pipeline.input_files import InputFile
from data_prep.pipeline.sources import (
    Reading,
    Unit,
    cut_pieces,
    is_one_document,
    plan_units,
    read_documents,
    read_pieces,
)
from data_prep.pipeline.workers import Progress
from data_prep.tokenizer import EOT

PIECE_BYTES = 2**14
HELD_OUT_FRACTION = 0.05
HELD_OUT_BYTES = 4_000_000  # half a second of encoding
LARGEST_KEY = 2**64 - 1
RULE = (
    f"documents, or pieces of at most {PIECE_BYTES} bytes of a file that is one, in the order of the 64-bit blake2b of "
    f"their text, equal ones once: held out are the last, {HELD_OUT_FRACTION} of all bytes, at most {HELD_OUT_BYTES}, "
    "at least one document; the sample are the first, until it is full"
)


@dataclass(frozen=True)
class Drawn:
    """UTF-8 documents to train on (in the order of their keys) and held out, and the counts of all that was read.

    eot_marks: occurrences of "<|endoftext|>" in the text.
    """

    sample: list[bytes]
    held_out: list[bytes]
    documents: int
    num_bytes: int
    eot_marks: int


def read_texts(
    files: list[InputFile], reading: Reading, progress: Progress, skipped: list[tuple[Unit, Skipped]]
) -> Iterator[str]:
    """Yield every document of the files, or pieces of a file that is one. Memory: a block and a document.

    The bad rows that `reading` leaves out are appended to `skipped`, unit by unit.
    """
    for file in files:
        for unit in plan_units(file, reading):
            skipped.append((unit, Skipped()))
            if is_one_document(file, reading):
                for piece in read_pieces(unit, reading, PIECE_BYTES, skipped[-1][1]):
                    yield piece
                    progress.add(0 if file.compressed else len(piece), 1)
                continue
            documents = 0
            for _, text in read_documents(unit, reading, skipped[-1][1]):
                documents += 1
                yield text
            progress.add(unit.num_bytes, documents)


def draw(texts: Iterable[str], sample_bytes: int) -> Drawn:
    """Read all of `texts`; return at most sample_bytes to train on, and the held-out text.

    Memory: sample_bytes, HELD_OUT_BYTES and a document. Raise InputError if there are not two different documents.
    """
    smallest = _Smallest(sample_bytes)
    largest = _Smallest(HELD_OUT_BYTES)
    documents = num_bytes = eot_marks = 0
    for text in texts:
        if not text:
            continue
        data = utf8(text)
        key = key_of(data)
        smallest.add(key, data)
        largest.add(LARGEST_KEY - key, data)
        documents += 1
        num_bytes += len(data)
        eot_marks += text.count(EOT)
    missing_bytes = min(HELD_OUT_BYTES, int(HELD_OUT_FRACTION * num_bytes))
    held_out: dict[int, bytes] = {}
    for key, data in largest.in_order():
        held_out[LARGEST_KEY - key] = data
        missing_bytes -= len(data)
        if missing_bytes <= 0:
            break
    sample = [data for key, data in smallest.in_order() if key not in held_out]
    if not sample:
        raise InputError(
            f"--input: {documents} documents, of which one is held out, leave nothing to train on; at least two "
            "different ones are needed"
        )
    excess_bytes = sum(map(len, sample)) - sample_bytes
    if excess_bytes > 0:  # The last document alone is too long; half a character at the cut goes too.
        sample[-1] = sample[-1][:-excess_bytes].decode("utf-8", "ignore").encode("utf-8")
    return Drawn(sample, list(held_out.values()), documents, num_bytes, eot_marks)


def spread(texts: Iterable[str], limit: int) -> list[bytes]:
    """Return the documents with the smallest keys, as few as reach `limit` bytes."""
    smallest = _Smallest(limit)
    for text in texts:
        if text:
            data = utf8(text)
            smallest.add(key_of(data), data)
    return [data for _, data in smallest.in_order()]


def pieces(documents: Iterable[bytes]) -> Iterator[str]:
    """Yield the documents in pieces of PIECE_BYTES: trainers and tiktoken fail at a word of a million bytes."""
    for data in documents:
        for piece in cut_pieces([data], PIECE_BYTES):
            yield piece.decode("utf-8")


def key_of(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())


def utf8(text: str) -> bytes:
    """Return UTF-8, with U+FFFD for a lone surrogate, as tiktoken has it."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode("utf-8")


class _Smallest:
    """The documents with the smallest keys, as few as reach `limit` bytes, of any number that are added."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._num_bytes = 0
        self._heap: list[tuple[int, bytes]] = []  # (-key, document): the largest key is removed first
        self._keys: set[int] = set()

    def add(self, key: int, data: bytes) -> None:
        if key in self._keys or (self._num_bytes >= self._limit and key > -self._heap[0][0]):
            return
        heapq.heappush(self._heap, (-key, data))
        self._keys.add(key)
        self._num_bytes += len(data)
        while self._num_bytes - len(self._heap[0][1]) >= self._limit:
            negative_key, removed = heapq.heappop(self._heap)
            self._keys.remove(-negative_key)
            self._num_bytes -= len(removed)

    def in_order(self) -> list[tuple[int, bytes]]:
        """Return (key, document), smallest key first."""
        return [(-negative_key, data) for negative_key, data in sorted(self._heap, reverse=True)]
