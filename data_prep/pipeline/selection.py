"""Which documents are kept, in which split, in what order: decided from the parts' places and hashes alone.

Of N documents 5 bytes each are held, and beside them at most PARTITION_DOCUMENTS documents' hashes and places (80 bytes
each as measured, with what sorting takes, so 0.7 GB): above that many, everything that needs hashes is done once for
each range of hashes. max_tokens takes 24 bytes more for each document read. The order goes to disk, 16 bytes each.

Documents are taken in their canonical order (files, rows). Then, in turn:

1. Duplicates. Of documents with the same text (the same 16-byte hash) the first is kept.
2. max_tokens. The documents before the first one with which they would be more.
3. The split. hash: validation is the documents whose hash's first eight bytes are lowest, until they hold val_tokens
   (VAL_TOKENS, or one in VAL_SHARE where that is less); equal texts are in one split. first-shard: validation is the
   first val_tokens tokens, wherever a document ends, as build-nanogpt's fineweb.py has it.
4. The order. Canonical, or by the hash mixed with a seed: the same documents in any order of files then come out the
   same (equal texts, where they are kept, in their canonical order).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from common.errors import InputError
from data_prep.pipeline.encode import Part

PARTITION_DOCUMENTS = 2**23
VAL_TOKENS = 10_485_760
VAL_SHARE = 100
BLOCK_DOCUMENTS = 2**16
TRAIN, VAL, DUPLICATE, BEYOND = range(4)
RECORD = np.dtype([("part", "<u4"), ("start", "<u8"), ("length", "<u4")])

Split = Literal["hash", "first-shard"]
Integers = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Rules:
    """What decides; shuffle_seed is None where the order is canonical. val_tokens: None for the default of `hash`."""

    drop_duplicates: bool
    max_tokens: int | None
    split: Split
    val_tokens: int | None
    shuffle_seed: int | None


@dataclass(frozen=True)
class Order:
    """Documents of one split in order: RECORDs in a file, from the `first` on.

    Of the first one `skip` tokens belong to the other split, and what is beyond `tokens` of the last one.
    """

    path: Path
    documents: int
    tokens: int
    first: int = 0
    skip: int = 0

    def records(self) -> npt.NDArray[np.void]:
        """(part, start in it, length) of every document, mapped: RECORD [documents]."""
        offset = self.first * RECORD.itemsize
        return np.memmap(self.path, dtype=RECORD, mode="r", offset=offset, shape=(self.documents,))


@dataclass(frozen=True)
class Selection:
    """The two orders, and the documents and tokens that are in neither."""

    train: Order
    val: Order
    duplicates: int
    duplicate_tokens: int
    documents_beyond: int


class Documents:
    """All parts' documents in canonical order: their lengths and fates, held; hashes and places, read when asked."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        self.firsts = np.cumsum([0, *(part.documents for part in parts)])
        self.lengths = np.empty(self.firsts[-1], dtype=np.uint32)
        for part, first in zip(parts, self.firsts, strict=False):
            self.lengths[first : first + part.documents] = np.diff(part.starts(), append=part.tokens)
        self.fates = np.full(self.firsts[-1], TRAIN, dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens_of(self, fate: int) -> int:
        return int(self.lengths.sum(where=self.fates == fate, dtype=np.int64))

    def partitions(self) -> int:
        """In how many ranges of equal width hashes and keys are looked at."""
        return max(1, -(-len(self) // PARTITION_DOCUMENTS))

    def hashes_between(self, number: int) -> tuple[Integers, Keys, Keys]:
        """(document, first and other half of its hash) of those in that range of first halves, canonical order."""
        found = []
        for part, first in zip(self.parts, self.firsts, strict=False):
            hashes = part.hashes()
            inside = np.flatnonzero(_in_range(hashes[:, 0], number, self.partitions()))
            found.append((inside + first, hashes[inside, 0], hashes[inside, 1]))
        documents, high, low = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        return documents, high, low


def select(parts: Sequence[Part], rules: Rules, folder: Path) -> Selection:
    """Decide on every document of `parts`; the orders are written into `folder`.

    Raises InputError where a split would be empty.
    """
    documents = Documents(parts)
    if rules.drop_duplicates:
        drop_duplicates(documents)
    if rules.max_tokens is not None:
        cut_at(documents, rules.max_tokens)
    if rules.split == "hash":
        split_by_hash(documents, rules.val_tokens or min(VAL_TOKENS, documents.tokens_of(TRAIN) // VAL_SHARE + 1))
        train = write_order(documents, TRAIN, folder / "train.order", rules.shuffle_seed)
        val = write_order(documents, VAL, folder / "val.order", rules.shuffle_seed)
    else:
        assert rules.val_tokens is not None
        whole = write_order(documents, TRAIN, folder / "train.order", rules.shuffle_seed)
        train, val = split_at_token(whole, rules.val_tokens)
    if not train.tokens or not val.tokens:
        raise InputError(
            f"{train.tokens:,} training and {val.tokens:,} validation tokens: a split is empty; "
            f"give more text, or lower {'--val-tokens' if rules.split == 'hash' else '--shard-tokens'}"
        )
    return Selection(
        train,
        val,
        duplicates=int((documents.fates == DUPLICATE).sum()),
        duplicate_tokens=documents.tokens_of(DUPLICATE),
        documents_beyond=int((documents.fates == BEYOND).sum()),
    )


def drop_duplicates(documents: Documents) -> None:
    """Mark every document whose text an earlier one has."""
    for number in range(documents.partitions()):
        indices, high, low = documents.hashes_between(number)
        order = np.lexsort((low, high))  # stable: of equal hashes the first document comes first
        high, low = high[order], low[order]
        same = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
        documents.fates[indices[order[1:][same]]] = DUPLICATE


def cut_at(documents: Documents, max_tokens: int) -> None:
    """Mark what lies beyond max_tokens of kept documents."""
    kept = np.flatnonzero(documents.fates == TRAIN)
    ends = np.cumsum(documents.lengths[kept], dtype=np.int64)
    count = int(np.searchsorted(ends, max_tokens, side="right"))
    if count < len(kept):
        documents.fates[kept[count] :] = BEYOND


def split_by_hash(documents: Documents, val_tokens: int) -> None:
    """Mark as validation the kept documents of lowest hashes, as many as hold val_tokens, equal ones together."""
    needed = val_tokens
    for number in range(documents.partitions()):
        indices, high, _ = documents.hashes_between(number)
        kept = documents.fates[indices] == TRAIN
        indices, high = indices[kept], high[kept]
        order = np.argsort(high, kind="stable")
        ends = np.cumsum(documents.lengths[indices[order]], dtype=np.int64)
        if len(ends) and ends[-1] >= needed:
            last = high[order[np.searchsorted(ends, needed)]]
            documents.fates[indices[high <= last]] = VAL
            return
        documents.fates[indices] = VAL
        needed -= int(ends[-1]) if len(ends) else 0


def write_order(documents: Documents, fate: int, path: Path, seed: int | None) -> Order:
    """The documents of that fate, in canonical order or in the one that the seed gives."""
    with path.open("wb") as file:
        if seed is None:
            for number in range(len(documents.parts)):
                file.write(_records_of_part(documents, number, fate).tobytes())
        else:
            for number in range(documents.partitions()):
                file.write(_shuffled_records(documents, number, fate, seed).tobytes())
    count = int((documents.fates == fate).sum())
    return Order(path, count, documents.tokens_of(fate))


def _records_of_part(documents: Documents, number: int, fate: int) -> npt.NDArray[np.void]:
    part, first = documents.parts[number], documents.firsts[number]
    inside = np.flatnonzero(documents.fates[first : first + part.documents] == fate)
    records = np.empty(len(inside), dtype=RECORD)
    records["part"] = number
    records["start"] = part.starts()[inside]
    records["length"] = documents.lengths[first + inside]
    return records


def _shuffled_records(documents: Documents, number: int, fate: int, seed: int) -> npt.NDArray[np.void]:
    """Those whose key lies in that range, by key."""
    found = [np.empty(0, dtype=RECORD)]
    keys = [np.empty(0, dtype=np.uint64)]
    for place, part in enumerate(documents.parts):
        fates = documents.fates[documents.firsts[place] : documents.firsts[place + 1]]
        part_keys = mixed(part.hashes()[fates == fate, 0], seed)
        inside = _in_range(part_keys, number, documents.partitions())
        found.append(_records_of_part(documents, place, fate)[inside])
        keys.append(part_keys[inside])
    return np.concatenate(found)[np.argsort(np.concatenate(keys), kind="stable")]


def mixed(keys: Keys, seed: int) -> Keys:
    """Keys in an order that has nothing to do with theirs, another for each seed; equal ones stay equal.

    SplitMix64's finalizer (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", fig. 13).
    """
    with np.errstate(over="ignore"):
        mixed_keys = keys + np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)
        for _ in range(2):
            mixed_keys = (mixed_keys ^ (mixed_keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed_keys = (mixed_keys ^ (mixed_keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            mixed_keys ^= mixed_keys >> np.uint64(31)
    return mixed_keys


def _in_range(keys: Keys, number: int, partitions: int) -> npt.NDArray[np.bool_]:
    """Do they lie in range `number` of so many that divide 0 to 2**64 evenly?"""
    width = -(-(2**64) // partitions)
    inside = keys >= np.uint64(number * width)
    if number + 1 < partitions:
        inside &= keys < np.uint64((number + 1) * width)
    return inside


def split_at_token(whole: Order, count: int) -> tuple[Order, Order]:
    """(the rest, the first `count` tokens), a document that lies across the cut in both."""
    if count >= whole.tokens:
        raise InputError(f"only {whole.tokens:,} tokens: the first shard takes all of them; lower --shard-tokens")
    records = whole.records()
    before = crossing = 0
    while True:  # some at a time: of hundreds of millions not all ends are held
        ends = before + np.cumsum(records["length"][crossing : crossing + BLOCK_DOCUMENTS], dtype=np.int64)
        if ends[-1] > count:
            break
        before, crossing = int(ends[-1]), crossing + len(ends)
    inside = int(np.searchsorted(ends, count, side="right"))
    skip = count - (int(ends[inside - 1]) if inside else before)
    crossing += inside
    val = Order(whole.path, crossing + bool(skip), count)
    return Order(whole.path, whole.documents - crossing, whole.tokens - count, first=crossing, skip=skip), val


def ranges(order: Order, block_tokens: int) -> Iterator[npt.NDArray[np.void]]:
    """The order's records, each time as many as hold about block_tokens; all together exactly its tokens."""
    records = order.records() if order.documents else np.empty(0, dtype=RECORD)
    begin = 0
    left = order.tokens
    while begin < len(records):
        some = np.array(records[begin : begin + BLOCK_DOCUMENTS])
        if begin == 0:
            some["start"][0] += order.skip
            some["length"][0] -= order.skip
        ends = np.cumsum(some["length"], dtype=np.int64)
        count = max(1, int(np.searchsorted(ends, block_tokens, side="right")))
        if ends[count - 1] > left:  # the last one goes on in the other split
            some["length"][count - 1] -= ends[count - 1] - left
        left -= min(left, int(ends[count - 1]))
        yield some[:count]
        begin += count
