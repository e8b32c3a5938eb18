"""Parts joined in their order into exact shards: what the training reads."""

from collections.abc import Iterable
from pathlib import Path

from data_prep.codec import Codec
from data_prep.encode import Part
from data_prep.manifest import SplitInfo
from data_prep.shards import ShardWriter


def pack_split(directory: Path, split: str, parts: Iterable[Part], *, codec: Codec, shard_tokens: int) -> SplitInfo:
    """One split's shards in `directory`. Memory: one shard."""
    with ShardWriter(
        directory, split, vocab_size=codec.vocab_size, eot_id=codec.eot_id, shard_tokens=shard_tokens
    ) as writer:
        for part in parts:
            for tokens, document_starts in part.blocks():
                writer.append(tokens, document_starts)
    tokens_in_all = sum(shard.tokens for shard in writer.shards)
    documents = sum(shard.documents for shard in writer.shards)
    return SplitInfo(tuple(writer.shards), tokens_in_all, documents, writer.stream_sha256)
