"""The text of training windows, by number: what a step read that went wrong.

Window i of a split is its tokens [iT, iT+T], as train/batches.py reads them: T + 1 tokens, the last of them the first
of window i + 1.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_prep.codec import EOT, Codec
from data_prep.errors import InputError
from data_prep.manifest import Manifest, open_split
from data_prep.shards import Shard, TokenStream


def show_windows(
    directory: Path, manifest: Manifest, codec: Codec, *, split: str, windows: Sequence[int], seq_len: int
) -> None:
    """Print each window: its number, where it lies, how many documents begin in it, then its text with EOT written out.

    InputError where there is no such split or window, and for tokens that the tokenizer did not make.
    """
    if seq_len < 1:
        raise InputError(f"--seq-len {seq_len} must be at least 1")
    if codec.describe() != manifest.tokenizer:
        raise InputError(f"{directory}: its tokenizer is not the one in the manifest, so it cannot show the text")
    stream = open_split(directory, split)
    count = max(0, (len(stream) - 1) // seq_len)
    if outside := [window for window in windows if not 0 <= window < count]:
        raise InputError(
            f"--window {' '.join(map(str, outside))}: {split} has {count} windows of --seq-len {seq_len}, "
            "numbered from 0"
        )
    shards = [manifest.open_shard(directory, info) for info in manifest.splits[split].shards]
    for window in windows:
        start = window * seq_len
        pieces = pieces_of(shards, start, start + seq_len + 1)
        documents = sum(documents_in(shard, begin, end) for shard, begin, end in pieces)
        shard, begin, _ = pieces[0]
        print(f"window {window}: {shard.path} from token {begin}, {documents} documents begin in it")
        print(text_of(stream, start, start + seq_len + 1, codec, f"window {window}"))


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


def text_of(stream: TokenStream, start: int, stop: int, codec: Codec, name: str) -> str:
    ids = stream.read(start, stop)
    if int(ids.max()) >= codec.vocab_size:
        raise InputError(f"{name}: holds id {int(ids.max())}, vocabulary is {codec.vocab_size}")
    documents = np.split(ids, np.flatnonzero(ids == codec.eot_id)) if codec.eot_id is not None else [ids]
    # Each but the first begins with EOT, which decode_bytes leaves out.
    return EOT.encode().join(codec.decode_bytes(part.tolist()) for part in documents).decode("utf-8", errors="replace")
