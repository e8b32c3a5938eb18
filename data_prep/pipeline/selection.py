"""Selection: which documents are kept, in which split, in what order. Reads only the parts' offsets and hashes.

The canonical order of documents is that of files and rows. The rules apply in turn:

1. Duplicates. Of documents with the same text (the same 16-byte hash), the first is kept.
2. max_tokens. Documents are kept up to the first one that would exceed it.
3. The split. hash: validation is the documents with the lowest first eight bytes of the hash, until they hold
   val_tokens (VAL_TOKENS, or one in VAL_SHARE where that is less); equal texts are in one split. first-shard:
   validation is the first val_tokens tokens, wherever a document ends, as in build-nanogpt's fineweb.py.
4. The order. It is canonical, or sorted by the hash mixed with a seed. A shuffle does not depend on the order of the
   files, except that equal texts, if they are kept, stay in canonical order.

Memory: 5 bytes for each document, and at most PARTITION_DOCUMENTS documents' hashes and offsets (80 bytes each as
measured, with sorting, so 0.7 GB). With more documents, each step that needs hashes is repeated for ranges of hashes.
max_tokens takes 24 bytes more for each document read. The order is written to disk, 16 bytes for each document.
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
    """The rules. val_tokens: None for the default of `hash`. shuffle_seed: None for canonical order."""

    drop_duplicates: bool
    max_tokens: int | None
    split: Split
    val_tokens: int | None
    shuffle_seed: int | None


@dataclass(frozen=True)
class Order:
    """The documents of one split in order: RECORDs in a file, from index `first` on.

    The first `skip` tokens of the first document belong to the other split. So do the last document's tokens beyond
    `tokens` in all.
    """

    path: Path
    documents: int
    tokens: int
    first: int = 0
    skip: int = 0

    def records(self) -> npt.NDArray[np.void]:
        """Return (part, start in it, length) of every document, memory-mapped: RECORD [documents]."""
        offset = self.first * RECORD.itemsize
        return np.memmap(self.path, dtype=RECORD, mode="r", offset=offset, shape=(self.documents,))


@dataclass(frozen=True)
class Selection:
    """The two orders, and the counts of documents and tokens that are in neither."""

    train: Order
    val: Order
    duplicates: int
    duplicate_tokens: int
    documents_beyond: int


class Documents:
    """The documents of all parts in canonical order. Lengths and labels are in memory; hashes are read when needed."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        self.firsts = np.cumsum([0, *(part.documents for part in parts)])
        self.lengths = np.empty(self.firsts[-1], dtype=np.uint32)
        for part, first in zip(parts, self.firsts, strict=False):
            self.lengths[first : first + part.documents] = np.diff(part.starts(), append=part.tokens)
        self.labels = np.full(self.firsts[-1], TRAIN, dtype=np.uint8)

    def count_of(self, label: int) -> int:
        return int((self.labels == label).sum())

    def tokens_of(self, label: int) -> int:
        return int(self.lengths.sum(where=self.labels == label, dtype=np.int64))

    def num_partitions(self) -> int:
        """Return the number of equal ranges into which hashes and keys are divided."""
        return max(1, -(-len(self.lengths) // PARTITION_DOCUMENTS))

    def hashes_in(self, partition: int) -> tuple[Integers, Keys, Keys]:
        """Return (document, high half of its hash, low half) of the documents of one partition, in canonical order."""
        columns = []
        for part, first in zip(self.parts, self.firsts, strict=False):
            hashes = part.hashes()
            inside = np.flatnonzero(_in_partition(hashes[:, 0], partition, self.num_partitions()))
            columns.append((inside + first, hashes[inside, 0], hashes[inside, 1]))
        documents, high, low = (np.concatenate(arrays) for arrays in zip(*columns, strict=True))
        return documents, high, low


def select(parts: Sequence[Part], rules: Rules, folder: Path) -> Selection:
    """Apply the rules, and write the orders into `folder`. Raise InputError if a split would be empty."""
    documents = Documents(parts)
    if rules.drop_duplicates:
        drop_duplicates(documents)
    if rules.max_tokens is not None:
        limit_tokens(documents, rules.max_tokens)
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
    duplicates, duplicate_tokens = documents.count_of(DUPLICATE), documents.tokens_of(DUPLICATE)
    return Selection(train, val, duplicates, duplicate_tokens, documents_beyond=documents.count_of(BEYOND))


def drop_duplicates(documents: Documents) -> None:
    """Label every document whose text an earlier document has."""
    for partition in range(documents.num_partitions()):
        indices, high, low = documents.hashes_in(partition)
        order = np.lexsort((low, high))  # stable, so that among equal hashes the first document comes first
        high, low = high[order], low[order]
        is_copy = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
        documents.labels[indices[order[1:][is_copy]]] = DUPLICATE


def limit_tokens(documents: Documents, max_tokens: int) -> None:
    """Label all documents, copies too, from the first kept one that exceeds max_tokens."""
    kept = np.flatnonzero(documents.labels == TRAIN)
    ends = np.cumsum(documents.lengths[kept], dtype=np.int64)
    count = int(np.searchsorted(ends, max_tokens, side="right"))
    if count < len(kept):
        documents.labels[kept[count] :] = BEYOND


def split_by_hash(documents: Documents, val_tokens: int) -> None:
    """Label as validation the kept documents with the lowest hashes that hold val_tokens, equal texts together."""
    missing = val_tokens
    for partition in range(documents.num_partitions()):
        indices, high, _ = documents.hashes_in(partition)
        kept = documents.labels[indices] == TRAIN
        indices, high = indices[kept], high[kept]
        order = np.argsort(high, kind="stable")
        ends = np.cumsum(documents.lengths[indices[order]], dtype=np.int64)
        if len(ends) and ends[-1] >= missing:
            last = high[order[np.searchsorted(ends, missing)]]
            documents.labels[indices[high <= last]] = VAL
            return
        documents.labels[indices] = VAL
        missing -= int(ends[-1]) if len(ends) else 0


def write_order(documents: Documents, label: int, path: Path, seed: int | None) -> Order:
    """Write the documents with that label, in canonical order or shuffled by the seed."""
    with path.open("wb") as file:
        if seed is None:
            for index in range(len(documents.parts)):
                file.write(_records_of_part(documents, index, label).tobytes())
        else:
            for partition in range(documents.num_partitions()):
                file.write(_shuffled_records(documents, partition, label, seed).tobytes())
    return Order(path, documents.count_of(label), documents.tokens_of(label))


def _records_of_part(documents: Documents, index: int, label: int) -> npt.NDArray[np.void]:
    part, first = documents.parts[index], documents.firsts[index]
    inside = np.flatnonzero(documents.labels[first : first + part.documents] == label)
    records = np.empty(len(inside), dtype=RECORD)
    records["part"] = index
    records["start"] = part.starts()[inside]
    records["length"] = documents.lengths[first + inside]
    return records


def _shuffled_records(documents: Documents, partition: int, label: int, seed: int) -> npt.NDArray[np.void]:
    """Return the records whose key lies in the partition, sorted by key."""
    records = [np.empty(0, dtype=RECORD)]
    keys = [np.empty(0, dtype=np.uint64)]
    for index, part in enumerate(documents.parts):
        labels = documents.labels[documents.firsts[index] : documents.firsts[index + 1]]
        part_keys = mix_keys(part.hashes()[labels == label, 0], seed)
        inside = _in_partition(part_keys, partition, documents.num_partitions())
        records.append(_records_of_part(documents, index, label)[inside])
        keys.append(part_keys[inside])
    return np.concatenate(records)[np.argsort(np.concatenate(keys), kind="stable")]


def mix_keys(keys: Keys, seed: int) -> Keys:
    """Return new keys whose order is unrelated to the old one and differs for each seed. Equal keys stay equal.

    SplitMix64's finalizer (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", fig. 13).
    """
    with np.errstate(over="ignore"):
        mixed_keys = keys + np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)
        for _ in range(2):
            mixed_keys = (mixed_keys ^ (mixed_keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed_keys = (mixed_keys ^ (mixed_keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            mixed_keys ^= mixed_keys >> np.uint64(31)
    return mixed_keys


def _in_partition(keys: Keys, partition: int, num_partitions: int) -> npt.NDArray[np.bool_]:
    """Return which keys lie in one of num_partitions equal ranges of 0 to 2**64."""
    width = -(-(2**64) // num_partitions)
    inside = keys >= np.uint64(partition * width)
    if partition + 1 < num_partitions:
        inside &= keys < np.uint64((partition + 1) * width)
    return inside


def split_at_token(whole: Order, count: int) -> tuple[Order, Order]:
    """Return (the rest, the first `count` tokens). A document that the cut divides is in both."""
    if count >= whole.tokens:
        raise InputError(f"only {whole.tokens:,} tokens: the first shard takes all of them; lower --shard-tokens")
    records = whole.records()
    before = crossing = 0
    while True:  # a block at a time, because the ends of hundreds of millions of documents would fill memory
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
    """Yield the order's records in blocks of about block_tokens. Together they hold exactly the order's tokens."""
    records = order.records() if order.documents else np.empty(0, dtype=RECORD)
    begin = 0
    tokens_left = order.tokens
    while begin < len(records):
        block = np.array(records[begin : begin + BLOCK_DOCUMENTS])
        if begin == 0:
            block["start"][0] += order.skip
            block["length"][0] -= order.skip
        ends = np.cumsum(block["length"], dtype=np.int64)
        count = max(1, int(np.searchsorted(ends, block_tokens, side="right")))
        if ends[count - 1] > tokens_left:  # the rest of the last document is in the other split
            block["length"][count - 1] -= ends[count - 1] - tokens_left
        tokens_left -= min(tokens_left, int(ends[count - 1]))
        yield block[:count]
        begin += count
