"""Packing: parts, joined in some order, become the shards that training reads."""

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.errors import InputError
from data_prep.manifest import SplitInfo
from data_prep.pipeline.encode import Part
from data_prep.pipeline.selection import Order, ranges
from data_prep.pipeline.workers import Progress
from data_prep.shards import Offsets, ShardWriter, Tokens
from data_prep.tokenizer import Tokenizer

BLOCK_TOKENS = 2**25

Blocks = Iterable[tuple[Tokens, Offsets]]


def pack_split(
    directory: Path, split: str, blocks: Blocks, num_tokens: int, tokenizer: Tokenizer, shard_tokens: int
) -> SplitInfo:
    """Write one split's shards into `directory`, from (tokens, offsets of documents). Memory: one shard."""
    progress = Progress(f"pack {split}", 2 * num_tokens)
    vocab_size, eot_id = tokenizer.vocab_size, tokenizer.eot_id
    with ShardWriter(directory, split, vocab_size=vocab_size, eot_id=eot_id, shard_tokens=shard_tokens) as writer:
        for tokens, document_starts in blocks:
            writer.append(tokens, document_starts)
            progress.add(2 * len(tokens), len(document_starts))
    return SplitInfo.of(writer.shards, writer.stream_sha256)


def documents_in_order(order: Order, parts: Sequence[Part]) -> Iterator[tuple[Tokens, Offsets]]:
    """Yield (tokens, offsets of documents) of `order`, about BLOCK_TOKENS at a time.

    For each block, every part is read once, from beginning to end.
    """
    begins_inside = order.skip > 0
    for records in ranges(order, BLOCK_TOKENS):
        offsets = np.cumsum([0, *records["length"]])
        tokens = np.empty(offsets[-1], dtype="<u2")
        by_part = np.lexsort((records["start"], records["part"]))
        borders = np.flatnonzero(np.diff(records["part"][by_part], prepend=-1, append=-1))
        groups = [by_part[begin:end] for begin, end in pairwise(borders)]
        if hasattr(os, "posix_fadvise"):
            # The documents are scattered, and a network file system makes each read wait, so all documents of a block
            # are requested first. Reading in threads took four times as long where the data is in memory.
            for indices in groups:
                _prefetch(parts[int(records["part"][indices[0]])], records[indices])
        for indices in groups:
            _read_documents(parts[int(records["part"][indices[0]])], records[indices], offsets[indices], tokens)
        yield tokens, offsets[int(begins_inside) : -1]
        begins_inside = False


def _prefetch(part: Part, records: npt.NDArray[np.void]) -> None:
    with part.path.open("rb") as file:
        for start, length in zip(records["start"].tolist(), records["length"].tolist(), strict=True):
            os.posix_fadvise(file.fileno(), 2 * start, 2 * length, os.POSIX_FADV_WILLNEED)


def _read_documents(part: Part, records: npt.NDArray[np.void], offsets: Offsets, tokens: Tokens) -> None:
    """Copy documents of a part to their offsets in `tokens`."""
    view = tokens.view(np.uint8).data
    with part.path.open("rb") as file:
        columns = (records["start"].tolist(), records["length"].tolist(), offsets.tolist())
        for start, length, offset in zip(*columns, strict=True):
            buffer, file_offset = view[2 * offset : 2 * (offset + length)], 2 * start
            while buffer:
                count = os.preadv(file.fileno(), [buffer], file_offset)
                if count == 0:
                    raise InputError(f"{part.path}: became shorter while it was read")
                buffer, file_offset = buffer[count:], file_offset + count
