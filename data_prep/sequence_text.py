"""The text of training sequences, by number: what a step read that went wrong.

Window i of a split is its tokens [iT, iT+T], as train/data.py reads them: T + 1 tokens, the last of them the first
of sequence i + 1.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.errors import InputError
from data_prep.manifest import Manifest, open_split
from data_prep.shards import Shard, TokenStream
from data_prep.tokenizer import EOT, Tokenizer


def show_sequences(
    directory: Path, manifest: Manifest, tokenizer: Tokenizer, *, split: str, sequences: Sequence[int], seq_len: int
) -> None:
    """Print each sequence: its number, where it lies, how many documents begin in it, and its text with EOT spelt out.

    InputError where there is no such split or sequence, and for tokens that the tokenizer did not make.
    """
    if seq_len < 1:
        raise InputError(f"--seq-len {seq_len} must be at least 1")
    if tokenizer.describe() != manifest.tokenizer:
        raise InputError(f"{directory}: its tokenizer is not the one in the manifest, so it cannot show the text")
    stream = open_split(directory, split)
    count = max(0, (len(stream) - 1) // seq_len)
    if outside := [sequence for sequence in sequences if not 0 <= sequence < count]:
        raise InputError(
            f"--sequence {' '.join(map(str, outside))}: {split} has {count} sequences of --seq-len {seq_len}, "
            "numbered from 0"
        )
    shards = [manifest.open_shard(directory, info) for info in manifest.splits[split].shards]
    for sequence in sequences:
        start = sequence * seq_len
        pieces = pieces_of(shards, start, start + seq_len + 1)
        documents = sum(documents_in(shard, begin, end) for shard, begin, end in pieces)
        shard, begin, _ = pieces[0]
        print(f"sequence {sequence}: {shard.path} from token {begin}, {documents} documents begin in it")
        print(text_of(stream, start, start + seq_len + 1, tokenizer, f"sequence {sequence}"))


def pieces_of(shards: Sequence[Shard], start: int, stop: int) -> list[tuple[Shard, int, int]]:
    """Where tokens [start, stop) of a stream lie: shards, with the first token and the one after the last in each."""
    pieces = []
    for shard in shards:
        begin, end = max(start, 0), min(stop, len(shard.tokens))
        if begin < end:
            pieces.append((shard, begin, end))
        start, stop = start - len(shard.tokens), stop - len(shard.tokens)
    return pieces


def documents_in(shard: Shard, begin: int, end: int) -> int:
    starts = shard.document_starts()
    return int(np.count_nonzero((starts >= begin) & (starts < end)))


def text_of(stream: TokenStream, start: int, stop: int, tokenizer: Tokenizer, name: str) -> str:
    ids = stream.read(start, stop)
    if int(ids.max()) >= tokenizer.vocab_size:
        raise InputError(f"{name}: holds id {int(ids.max())}, vocabulary is {tokenizer.vocab_size}")
    documents = np.split(ids, np.flatnonzero(ids == tokenizer.eot_id)) if tokenizer.eot_id is not None else [ids]
    # Each but the first begins with EOT, which decode_bytes leaves out.
    return (
        EOT.encode().join(tokenizer.decode_bytes(part.tolist()) for part in documents).decode("utf-8", errors="replace")
    )
