"""Parts joined in an order into exact shards: what the training reads."""

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
    directory: Path, split: str, blocks: Blocks, *, num_tokens: int, tokenizer: Tokenizer, shard_tokens: int
) -> SplitInfo:
    """One split's shards in `directory`, from (tokens, places at which documents begin). Memory: one shard."""
    progress = Progress(f"pack {split}", 2 * num_tokens)
    with ShardWriter(
        directory, split, vocab_size=tokenizer.vocab_size, eot_id=tokenizer.eot_id, shard_tokens=shard_tokens
    ) as writer:
        for tokens, document_starts in blocks:
            writer.append(tokens, document_starts)
            progress.add(2 * len(tokens), len(document_starts))
    tokens_in_all = sum(shard.tokens for shard in writer.shards)
    documents = sum(shard.documents for shard in writer.shards)
    return SplitInfo(tuple(writer.shards), tokens_in_all, documents, writer.stream_sha256)


def parts_in_turn(parts: Iterable[Part]) -> Iterator[tuple[Tokens, Offsets]]:
    """All documents of the parts, one part after the other."""
    for part in parts:
        yield from part.blocks()


def documents_in_order(order: Order, parts: Sequence[Part]) -> Iterator[tuple[Tokens, Offsets]]:
    """The documents of `order`, about BLOCK_TOKENS at a time. Each part is read from beginning to end for a block."""
    begins_inside = order.skip > 0
    for records in ranges(order, BLOCK_TOKENS):
        places = np.cumsum([0, *records["length"]])
        tokens = np.empty(places[-1], dtype="<u2")
        by_place = np.lexsort((records["start"], records["part"]))
        borders = np.flatnonzero(np.diff(records["part"][by_place], prepend=-1, append=-1))
        groups = [by_place[begin:end] for begin, end in pairwise(borders)]
        if hasattr(os, "posix_fadvise"):
            # Documents lie scattered, and on a network file system it is the waiting that takes the time: all of a
            # block's are asked for first. Threads that read took four times as long where all is in memory.
            for chosen in groups:
                _ask_for(parts[int(records["part"][chosen[0]])], records[chosen])
        for chosen in groups:
            _read_documents(parts[int(records["part"][chosen[0]])], records[chosen], places[chosen], tokens)
        yield tokens, places[int(begins_inside) : -1]
        begins_inside = False


def _ask_for(part: Part, records: npt.NDArray[np.void]) -> None:
    with part.path.open("rb") as file:
        for start, length in zip(records["start"].tolist(), records["length"].tolist(), strict=True):
            os.posix_fadvise(file.fileno(), 2 * start, 2 * length, os.POSIX_FADV_WILLNEED)


def _read_documents(part: Part, records: npt.NDArray[np.void], places: Offsets, tokens: Tokens) -> None:
    """Copy documents of a part to their places in `tokens`."""
    view = tokens.view(np.uint8).data
    with part.path.open("rb") as file:
        for start, length, place in zip(
            records["start"].tolist(), records["length"].tolist(), places.tolist(), strict=True
        ):
            wanted, offset = view[2 * place : 2 * (place + length)], 2 * start
            while wanted:
                count = os.preadv(file.fileno(), [wanted], offset)
                if count == 0:
                    raise InputError(f"{part.path}: became shorter while it was read")
                wanted, offset = wanted[count:], offset + count
