"""Shards against struct's own packing of llm.c's header, hashlib, and plain numpy concatenation."""

import hashlib
import random
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from common.errors import InputError
from data_prep.shards import ShardWriter, TokenStream, open_shard

Ids = npt.NDArray[np.int64]


def header(*slots: int) -> bytes:
    """llm.c's header: int32[256], little-endian, zero after the given slots."""
    return struct.pack("<256i", *slots, *[0] * (256 - len(slots)))


def random_documents(seed: int, *, count: int) -> list[Ids]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 65_536, size=rng.integers(1, 40)) for _ in range(count)]


def write(directory: Path, documents: list[Ids], *, shard_tokens: int) -> ShardWriter:
    directory.mkdir(exist_ok=True)
    with ShardWriter(directory, "train", vocab_size=65_536, eot_id=None, shard_tokens=shard_tokens) as writer:
        for document in documents:
            writer.append(document, document_starts=[0])
    return writer


def open_all(directory: Path) -> TokenStream:
    return TokenStream([open_shard(path) for path in sorted(directory.glob("*.bin"))])


@pytest.mark.parametrize(("eot_id", "eot_slot"), [(None, -1), (50_256, 50_256)])
def test_the_bytes_of_a_small_split_are_exact(tmp_path: Path, eot_id: int | None, eot_slot: int) -> None:
    with ShardWriter(tmp_path, "val", vocab_size=50_257, eot_id=eot_id, shard_tokens=4) as writer:
        writer.append(np.array([10, 11, 12, 13, 14]), document_starts=[0])
        writer.append(np.array([], dtype=np.int64))
        writer.append(np.array([20, 21, 22], dtype=np.uint16), document_starts=[0])
        writer.append(np.array([30, 50_256, 32, 33, 34], dtype=np.uint32), document_starts=[0, 2])
    expected = {
        "val_000000": ((10, 11, 12, 13), (0,)),
        "val_000001": ((14, 20, 21, 22), (1,)),
        "val_000002": ((30, 50_256, 32, 33), (0, 2)),
        "val_000003": ((34,), ()),
    }
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{name}{end}" for name in expected for end in (".bin", ".idx")
    }
    for (name, (tokens, starts)), info in zip(expected.items(), writer.shards, strict=True):
        content = header(20240520, 1, len(tokens), 50_257, eot_slot, len(starts))
        content += struct.pack(f"<{len(tokens)}H", *tokens)
        index = struct.pack(f"<{len(starts)}Q", *starts)
        assert (tmp_path / f"{name}.bin").read_bytes() == content
        assert (tmp_path / f"{name}.idx").read_bytes() == index
        assert (info.file, info.format) == (f"{name}.bin", "ladder")
        assert (info.tokens, info.documents, info.bytes) == (len(tokens), len(starts), len(content))
        assert info.sha256 == hashlib.sha256(content).hexdigest()
        assert info.idx_sha256 == hashlib.sha256(index).hexdigest()
        shard = open_shard(tmp_path / f"{name}.bin")
        assert tuple(shard.tokens.tolist()) == tokens
        assert tuple(shard.document_starts().tolist()) == starts
        assert (shard.vocab_size, shard.eot_id, shard.documents) == (50_257, eot_id, len(starts))


@pytest.mark.parametrize("shard_tokens", [7, 97, 2**31 - 1])
def test_shards_are_the_concatenated_documents_wherever_they_are_cut(tmp_path: Path, shard_tokens: int) -> None:
    documents = random_documents(1, count=25)
    tokens = np.concatenate(documents)
    starts = np.cumsum([0, *(len(document) for document in documents[:-1])])
    writer = write(tmp_path, documents, shard_tokens=shard_tokens)
    assert writer.stream_sha256 == hashlib.sha256(tokens.astype("<u2").tobytes()).hexdigest()
    assert len(writer.shards) == -(-len(tokens) // shard_tokens)
    for number, info in enumerate(writer.shards):
        begin = number * shard_tokens
        inside = starts[(starts >= begin) & (starts < begin + shard_tokens)] - begin
        stored = np.fromfile(tmp_path / f"train_{number:06d}.bin", dtype="<u2", offset=1024)
        np.testing.assert_array_equal(stored, tokens[begin : begin + shard_tokens])
        np.testing.assert_array_equal(np.fromfile(tmp_path / f"train_{number:06d}.idx", dtype="<u8"), inside)
        assert info.documents == len(inside)

    stream = open_all(tmp_path)
    assert len(stream) == len(tokens)
    rng = random.Random(4)
    ranges = [sorted(rng.sample(range(len(tokens) + 1), 2)) for _ in range(200)]
    ranges += [[0, len(tokens)], [len(tokens) - 1, len(tokens)], [97, 194], [96, 98], [7, 7], [3, 3]]
    for start, stop in ranges:
        assert stream.read(start, stop).dtype == np.uint16
        np.testing.assert_array_equal(stream.read(start, stop), tokens[start:stop])
    for start, stop in ((-1, 3), (0, len(tokens) + 1), (4, 3)):
        with pytest.raises(AssertionError):
            stream.read(start, stop)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "cannot be read .*check the path"),
        (b"", "0 bytes is too short"),
        (header(20240520, 1, 0)[:-1], "1023 bytes is too short"),
        (header(20240521, 1, 2) + bytes(4), "not a token shard"),
        (header(20240520, 2, 2) + bytes(4), "not a token shard"),
        (struct.pack(">256i", 20240520, 1, 2, *[0] * 253) + bytes(4), "not a token shard"),
        (header(20240520, 1, 2) + bytes(3), "truncated or altered: 1027 bytes"),
        (header(20240520, 1, 2) + bytes(6), "truncated or altered: 1030 bytes"),
        (header(20240520, 1, -2) + bytes(4), "truncated or altered: 1028 bytes"),
    ],
)
def test_a_damaged_shard_is_refused_by_name(tmp_path: Path, content: bytes | None, complaint: str) -> None:
    path = tmp_path / "train_000007.bin"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=complaint) as refusal:
        open_shard(path)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("vocab_size", "tokens", "complaint"),
    [
        (300, [5, 300, 2], r"token id 300 .* 300"),
        (10, [3, -1], "token id -1 "),
        (65_536, [3, -1, 9], "outside the vocabulary of 65536"),
        (65_536, [3, 65_536 + 3], "outside the vocabulary of 65536"),  # it would wrap around
    ],
)
def test_ids_outside_the_vocabulary_are_refused_by_number(
    tmp_path: Path, vocab_size: int, tokens: list[int], complaint: str
) -> None:
    with (
        pytest.raises(InputError, match=complaint),
        ShardWriter(tmp_path, "train", vocab_size=vocab_size, eot_id=None, shard_tokens=10) as writer,
    ):
        writer.append(np.array([0, 1]))
        writer.append(np.array(tokens))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("vocab_size", "shard_tokens", "complaint"),
    [
        (0, 10, "vocabulary of 0 "),
        (65_537, 10, "vocabulary of 65537 "),
        (10, 0, "--shard-tokens 0 "),
        (10, 2**31, f"--shard-tokens {2**31} "),
    ],
)
def test_sizes_that_the_format_cannot_hold_are_refused(
    tmp_path: Path, vocab_size: int, shard_tokens: int, complaint: str
) -> None:
    with pytest.raises(InputError, match=complaint):
        ShardWriter(tmp_path, "train", vocab_size=vocab_size, eot_id=None, shard_tokens=shard_tokens)


def test_an_interrupted_writer_leaves_no_shard_for_its_unfinished_part(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        ShardWriter(tmp_path, "train", vocab_size=100, eot_id=None, shard_tokens=10) as writer,
    ):
        writer.append(np.arange(25))
        raise KeyboardInterrupt
    assert sorted(path.name for path in tmp_path.glob("*.bin")) == ["train_000000.bin", "train_000001.bin"]
    np.testing.assert_array_equal(open_all(tmp_path).read(0, 20), np.arange(20))
