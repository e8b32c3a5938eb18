"""The text of training sequences by number, to see what a step that went wrong has read.

Sequence i of a split is its tokens [iT, iT+T], as train/data.py reads them: T + 1 tokens, of which the last is the
first of sequence i + 1.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.errors import InputError
from data_prep.manifest import Manifest, open_split
from data_prep.shards import TokenStream
from data_prep.tokenizer import EOT, Tokenizer


def show_sequences(
    directory: Path, manifest: Manifest, tokenizer: Tokenizer, *, split: str, sequences: Sequence[int], seq_len: int
) -> None:
    """Print each sequence's number, shard, offset, number of documents that begin in it, and text with EOT spelt out.

    Raise InputError if there is no such split or sequence, and for tokens that the tokenizer did not make.
    """
    if seq_len < 1:
        raise InputError(f"--seq-len {seq_len} must be at least 1")
    if tokenizer.describe() != manifest.tokenizer:
        raise InputError(f"{directory}: its tokenizer is not the one in the manifest, so it cannot show the text")
    stream = open_split(directory, split)
    count = max(0, (len(stream) - 1) // seq_len)
    if unknown := [sequence for sequence in sequences if not 0 <= sequence < count]:
        raise InputError(
            f"--sequence {' '.join(map(str, unknown))}: {split} has {count} sequences of --seq-len {seq_len}, "
            "numbered from 0"
        )
    for sequence in sequences:
        start = sequence * seq_len
        ranges = stream.ranges(start, start + seq_len + 1)
        documents = 0
        for shard, begin, end in ranges:
            starts = shard.document_starts()
            documents += int(np.count_nonzero((starts >= begin) & (starts < end)))
        shard, begin, _ = ranges[0]
        print(f"sequence {sequence}: {shard.path} from token {begin}, {documents} documents begin in it")
        print(text_of(stream, start, start + seq_len + 1, tokenizer))


def text_of(stream: TokenStream, start: int, stop: int, tokenizer: Tokenizer) -> str:
    """Return the text of tokens [start, stop), with EOT spelt out."""
    ids = stream.read(start, stop)
    documents = np.split(ids, np.flatnonzero(ids == tokenizer.eot_id)) if tokenizer.eot_id is not None else [ids]
    # Each document but the first begins with EOT, which decode_bytes leaves out.
    texts = (tokenizer.decode_bytes(document.tolist()) for document in documents)
    return EOT.encode().join(texts).decode("utf-8", errors="replace")
