"""The shard format, for writing and reading: llm.c's header and uint16 tokens, plus an index of document starts.

    {split}_{number:06d}.bin   256 little-endian int32, then uint16 tokens
        [0] 20240520  [1] 1  [2] tokens  [3] vocabulary  [4] EOT id or -1  [5] documents that start here
    {split}_{number:06d}.idx   little-endian uint64: the offset in this shard at which each of those documents starts

Slots 0 to 2 of the header are llm.c's (dev/data/data_common.py); slots 3 to 5 are ours and 0 there.

Three formats of other projects are read too. They have no .idx file: a document starts at each EOT.

    llm.c      the same header without our slots (llm.c, modded-nanogpt: fineweb_train_000001.bin)
    headerless uint16 tokens alone               (nanoGPT: train.bin)
    npy        a one-dimensional uint16 array    (build-nanogpt: edufineweb_train_000001.npy)
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from common.errors import InputError, reading_from
from common.files import write_blocks_atomically

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = HEADER_INTS * 4
MAX_VOCAB_SIZE = 2**16  # ids are uint16

Format = Literal["ladder", "llm.c", "headerless", "npy"]
FORMATS: tuple[Format, ...] = get_args(Format)

Tokens = npt.NDArray[np.uint16]
Offsets = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ShardInfo:
    """The manifest's entry of one shard. `bytes` and `sha256` are of the whole file; idx_sha256 None: no .idx file."""

    file: str
    format: Format
    tokens: int
    documents: int
    bytes: int
    sha256: str
    idx_sha256: str | None

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise TypeError(f"unknown format {self.format!r} of {self.file}")


def check_shard_tokens(shard_tokens: int) -> None:
    """Raise InputError unless the header can state so many tokens."""
    if not 0 < shard_tokens < 2**31:
        raise InputError(f"--shard-tokens {shard_tokens} must be between 1 and {2**31 - 1}")


class ShardWriter:
    """A writer that cuts one split's token stream into shards of exactly `shard_tokens`; the last may be shorter.

    Use it as a context manager: the last shard is written only if the body succeeded, so an interrupted write never
    leaves a shard that looks finished. `shards` and `stream_sha256` are final afterwards.
    """

    def __init__(self, directory: Path, split: str, *, vocab_size: int, eot_id: int | None, shard_tokens: int) -> None:
        if not 0 < vocab_size <= MAX_VOCAB_SIZE:
            raise InputError(f"vocabulary of {vocab_size} does not fit uint16 shards (at most {MAX_VOCAB_SIZE})")
        check_shard_tokens(shard_tokens)
        self.directory = directory
        self.split = split
        self.shards: list[ShardInfo] = []
        self._vocab_size = vocab_size
        self._eot_id = eot_id
        self._shard_tokens = shard_tokens
        self._blocks: list[Tokens] = []
        self._starts: list[Offsets] = []
        self._buffered = 0
        self._stream_hash = hashlib.sha256()

    def append(self, tokens: npt.NDArray[np.integer], document_starts: Sequence[int] | Offsets = ()) -> None:
        """Append tokens [n] to the stream; documents begin at the offsets `document_starts` in them."""
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < self._vocab_size:
            outside = tokens[(tokens < 0) | (tokens >= self._vocab_size)]
            raise InputError(f"token id {int(outside[0])} is outside the vocabulary of {self._vocab_size}")
        ids = np.ascontiguousarray(tokens, dtype="<u2")
        starts = np.asarray(document_starts, dtype=np.int64)
        self._stream_hash.update(ids.data)
        taken = 0
        while taken < len(ids):
            room = self._shard_tokens - self._buffered
            block = ids[taken : taken + room]
            inside = starts[(starts >= taken) & (starts < taken + len(block))]
            self._starts.append(inside - taken + self._buffered)
            self._blocks.append(block)
            self._buffered += len(block)
            taken += len(block)
            if self._buffered == self._shard_tokens:
                self._write_shard()

    @property
    def stream_sha256(self) -> str:
        """The hash of the tokens alone, which does not depend on the shards' size."""
        return self._stream_hash.hexdigest()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._buffered:
            self._write_shard()  # the remaining tokens

    def _bytes_of(self, header: npt.NDArray[np.int32]) -> Iterator[bytes | memoryview]:
        yield header.tobytes()
        for block in self._blocks:
            yield block.data

    def _write_shard(self) -> None:
        name = f"{self.split}_{len(self.shards):06d}"
        starts = np.concatenate(self._starts).astype("<u8")
        header = np.zeros(HEADER_INTS, dtype="<i4")
        eot = -1 if self._eot_id is None else self._eot_id
        header[:6] = MAGIC, VERSION, self._buffered, self._vocab_size, eot, len(starts)
        bin_hash = write_blocks_atomically(self.directory / f"{name}.bin", self._bytes_of(header))
        idx_hash = write_blocks_atomically(self.directory / f"{name}.idx", [starts.tobytes()])
        num_bytes = HEADER_BYTES + 2 * self._buffered
        info = ShardInfo(f"{name}.bin", "ladder", self._buffered, len(starts), num_bytes, bin_hash, idx_hash)
        self.shards.append(info)
        self._blocks, self._starts, self._buffered = [], [], 0


@dataclass(frozen=True)
class Shard:
    """A memory-mapped shard. tokens: uint16 [num_tokens]."""

    path: Path
    tokens: Tokens
    vocab_size: int
    eot_id: int | None
    documents: int
    format: Format = "ladder"

    def document_starts(self) -> npt.NDArray[np.uint64]:
        """Return the offsets in `tokens` at which documents start: uint64 [documents].

        They come from the .idx file beside the shard, or are the positions of EOT in another project's shard.
        """
        if self.format == "ladder":
            index = self.path.with_suffix(".idx")
            with reading_from(index):
                return np.fromfile(index, dtype="<u8")
        if self.eot_id is None:
            return np.zeros(0, dtype=np.uint64)
        return np.flatnonzero(self.tokens == self.eot_id).astype(np.uint64)


def open_shard(path: Path, format: Format = "ladder") -> Shard:
    """Map a shard. Other projects' shards get vocabulary 0, EOT None and 0 documents, which they do not state.

    Raise InputError that names the file if it is no shard of that format, has the wrong size or cannot be read.
    """
    with reading_from(path):
        match format:
            case "npy":
                tokens = _map_array(path)
            case "headerless":
                size = path.stat().st_size
                if size == 0 or size % 2:
                    raise InputError(f"{path}: {size} bytes are not uint16 tokens")
                tokens = np.memmap(path, dtype="<u2", mode="r")
            case _:
                return _map_with_header(path)
    return Shard(path, tokens, 0, None, 0, format)


def _map_array(path: Path) -> Tokens:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InputError(f"{path}: not a readable .npy file ({error})") from error
    if array.dtype != np.dtype("<u2") or array.ndim != 1:
        raise InputError(f"{path}: {array.ndim}-dimensional {array.dtype}; token shards are one-dimensional uint16")
    return array


def _map_with_header(path: Path) -> Shard:
    """Map a shard of ours or of llm.c."""
    size = path.stat().st_size
    if size < HEADER_BYTES:
        raise InputError(f"{path}: {size} bytes is too short for a shard's header of {HEADER_BYTES}")
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    magic, version, num_tokens, vocab_size, eot_id, documents = (int(number) for number in header[:6])
    if magic != MAGIC or version != VERSION:
        raise InputError(f"{path}: not a token shard (header {magic}, {version}; expected {MAGIC}, {VERSION})")
    expected = HEADER_BYTES + 2 * num_tokens
    if size != expected:
        fault = f"{size} bytes, but its header's {num_tokens} tokens make {expected}"
        raise InputError(f"{path}: truncated or altered: {fault}")
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(num_tokens,))
    if vocab_size == 0:
        return Shard(path, tokens, 0, None, documents, "llm.c")
    return Shard(path, tokens, vocab_size, eot_id if eot_id >= 0 else None, documents)


def outside_vocabulary(tokens: Tokens, vocab_size: int, *, first: int = 0) -> str | None:
    """Return which token is the first outside the vocabulary, counted from `first` for tokens[0]; None if none is."""
    if len(tokens) == 0 or int(tokens.max()) < vocab_size:
        return None
    index = int(np.argmax(tokens >= vocab_size))
    return f"token {first + index} is id {tokens[index]}, outside the vocabulary of {vocab_size}"


class TokenStream:
    """One split as one stream of tokens across its shards. What is read lies inside the vocabulary, or InputError."""

    def __init__(self, shards: Sequence[Shard], vocab_size: int = MAX_VOCAB_SIZE) -> None:
        self._shards = list(shards)
        self._vocab_size = vocab_size
        lengths = [len(shard.tokens) for shard in self._shards]
        self._ends = np.cumsum(lengths, dtype=np.int64)
        self._num_tokens = sum(lengths)

    def __len__(self) -> int:
        return self._num_tokens

    def ranges(self, start: int, stop: int) -> list[tuple[Shard, int, int]]:
        """Return the ranges of shards that hold tokens [start, stop), as (shard, begin, end)."""
        assert 0 <= start <= stop <= self._num_tokens, (start, stop, self._num_tokens)
        first = int(np.searchsorted(self._ends, start, side="right"))
        ranges = []
        for shard, shard_end in zip(self._shards[first:], self._ends[first:], strict=True):
            if start >= stop:
                break
            offset = int(shard_end) - len(shard.tokens)
            end = min(stop - offset, len(shard.tokens))
            ranges.append((shard, start - offset, end))
            start = offset + end
        return ranges

    def read(self, start: int, stop: int) -> Tokens:
        """Return tokens [start, stop) as uint16 [stop - start]; the range must lie within the stream."""
        return self.read_rows([start], stop - start)[0]

    def read_rows(self, starts: Sequence[int], length: int) -> Tokens:
        """Return the `length` tokens from each of `starts` on: uint16 [len(starts), length]."""
        rows = np.stack([self._read(start, start + length) for start in starts])
        if rows.size and int(rows.max()) >= self._vocab_size:
            row, column = divmod(int(np.argmax(rows >= self._vocab_size)), length)
            ((shard, position, _),) = self.ranges(starts[row] + column, starts[row] + column + 1)
            outside = outside_vocabulary(rows[row, column:], self._vocab_size, first=position)
            raise InputError(f"{shard.path}: {outside}; restore the file or prepare the data again")
        return rows

    def _read(self, start: int, stop: int) -> Tokens:
        pieces = [shard.tokens[begin:end] for shard, begin, end in self.ranges(start, stop)]
        if len(pieces) == 1:
            return np.asarray(pieces[0])
        return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.uint16)
