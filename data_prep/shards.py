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
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, get_args

import numpy as np
import numpy.typing as npt

from common.errors import InputError, reading_from
from common.files import write_blocks_atomically
from common.reading import open_regular

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = HEADER_INTS * 4
MAX_VOCAB_SIZE = 2**16  # ids are uint16

# What numpy.save writes before a C-ordered array (numpy/lib/format.py): magic, version, length of the header, header.
NPY_MAGIC = b"\x93NUMPY"
NPY_VERSION = b"\x01\x00"
NPY_HEADER = re.compile(
    rb"\{'descr': '([!-&(-~]{1,9})', 'fortran_order': False, 'shape': \(((?:\d{1,19}, ?)*\d{0,19})\), \} *\n"
)

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

        They come from the .idx file beside the shard, or are the positions of EOT in another project's shard. Raise
        InputError unless that file holds as many as the shard states, each larger than the one before and inside it.
        """
        if self.format == "ladder":
            return self._read_index(self.path.with_suffix(".idx"))
        if self.eot_id is None:
            return np.zeros(0, dtype=np.uint64)
        return np.flatnonzero(self.tokens == self.eot_id).astype(np.uint64)

    def _read_index(self, path: Path) -> npt.NDArray[np.uint64]:
        with open_regular(path, inside=path.parent) as file, reading_from(path):
            size = os.fstat(file.fileno()).st_size
            if size != 8 * self.documents:
                raise InputError(f"{path}: damaged: {size} bytes, but {self.documents} documents begin in its shard")
            starts = np.fromfile(file, dtype="<u8")
        if len(starts) and (int(starts[-1]) >= len(self.tokens) or (starts[1:] <= starts[:-1]).any()):
            raise InputError(
                f"{path}: damaged: its offsets do not rise within the {len(self.tokens)} tokens of its shard"
            )
        return starts


def open_shard(path: Path, format: Format = "ladder") -> Shard:
    """Map a shard. Other projects' shards get vocabulary 0, EOT None and 0 documents, which they do not state.

    Raise InputError that names the file if it is no shard of that format, has no tokens or the wrong size, cannot be
    read, or is no plain file in its folder.
    """
    with open_regular(path, inside=path.parent) as file, reading_from(path):
        match format:
            case "npy":
                shard = Shard(path, _map(file, path, *_npy_layout(file, path)), 0, None, 0, format)
            case "headerless":
                size = os.fstat(file.fileno()).st_size
                if size % 2:
                    raise InputError(f"{path}: {size} bytes are not uint16 tokens")
                shard = Shard(path, _map(file, path, 0, size // 2), 0, None, 0, format)
            case _:
                shard = _map_with_header(file, path)
    return shard


def _map(file: BinaryIO, path: Path, offset: int, num_tokens: int) -> Tokens:
    """Map the tokens, which must be the rest of the file from `offset` on."""
    size, expected = os.fstat(file.fileno()).st_size, offset + 2 * num_tokens
    if size != expected:
        fault = f"{size} bytes, but its header's {num_tokens} tokens make {expected}"
        raise InputError(f"{path}: truncated or altered: {fault}")
    if num_tokens == 0:
        raise InputError(f"{path}: holds no tokens")
    return np.memmap(file, dtype="<u2", mode="r", offset=offset, shape=(num_tokens,))


def _npy_layout(file: BinaryIO, path: Path) -> tuple[int, int]:
    """Return the offset of an .npy file's tokens, and their number."""
    start = file.read(10)
    header = file.read(int.from_bytes(start[8:], "little"))
    match = NPY_HEADER.fullmatch(header)
    if start[:8] != NPY_MAGIC + NPY_VERSION or match is None:
        raise InputError(
            f"{path}: not a readable .npy file: numpy.save writes another header before an array of tokens"
        )
    dtype, sizes = match[1].decode("ascii"), re.findall(rb"\d+", match[2])
    if dtype != "<u2" or len(sizes) != 1:
        raise InputError(f"{path}: {len(sizes)}-dimensional {dtype}; token shards are one-dimensional <u2 (uint16)")
    return len(start) + len(header), int(sizes[0])


def _map_with_header(file: BinaryIO, path: Path) -> Shard:
    """Map a shard of ours or of llm.c."""
    start = file.read(HEADER_BYTES)
    if len(start) < HEADER_BYTES:
        raise InputError(f"{path}: {len(start)} bytes is too short for a shard's header of {HEADER_BYTES}")
    magic, version, num_tokens, vocab_size, eot_id, documents = np.frombuffer(start, dtype="<i4")[:6].tolist()
    if magic != MAGIC or version != VERSION:
        raise InputError(f"{path}: not a token shard (header {magic}, {version}; expected {MAGIC}, {VERSION})")
    tokens = _map(file, path, HEADER_BYTES, num_tokens)
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
