"""A worker's part: one unit of input -> its own file of tokens, so that a later run need not make it again.

    parts/NAME.part    uint16 tokens; uint64 places in them at which documents begin; 16-byte hashes of their texts
    parts/NAME.json    written after it: what it was made of, counts, sha256

NAME is a hash of all that decides the bytes (file, place in it, reading, tokenizer): a part of another input or of
other options has another name, and is never taken for this one.
"""

import dataclasses
import functools
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from common.errors import InputError, reading_from
from common.files import sha256_of_file, write_blocks_atomically, write_json_atomically
from data_prep.pipeline.gigatoken_encoder import GigaEncoder
from data_prep.pipeline.sources import (
    PYTHON_DOCS,
    Document,
    FileState,
    InputFile,
    Reading,
    Unit,
    file_state,
    place_of,
    read_documents,
)
from data_prep.pipeline.workers import Progress, Workers
from data_prep.shards import Offsets, Tokens
from data_prep.tokenizer import EOT, FOLDER, RANKS_FILE, Ids, Tokenizer, alphabet_of, encode_or_fault, load_tokenizer

BLOCK_TOKENS = 2**22
BLOCK_CHARACTERS = 2**20
PART_FORMAT = 2
HASH_BYTES = 16
SURROGATE = re.compile("[\ud800-\udfff]")

Backend = Literal["tiktoken", "gigatoken"]
Encoded = tuple[Tokens, list[int], list[bytes]]  # some documents' ids, one after the other; their lengths; their hashes
Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Survey:
    """What one unit holds. `alphabet` is "" unless asked for. eot_marks: how often "<|endoftext|>" stands in it."""

    documents: int
    empty_documents: int
    characters: int
    alphabet: str
    eot_marks: int


@dataclass(frozen=True)
class SurveyTask:
    unit: Unit
    reading: Reading
    with_alphabet: bool


def survey_unit(task: SurveyTask) -> Survey:
    """Read a unit for the first time: counts, and every fault of the input before anything is written."""
    documents = empty = characters = eot_marks = 0
    alphabet: set[str] = set()
    pending: list[str] = []  # looked through together: document by document takes four times as long
    pending_until = BLOCK_CHARACTERS
    for _, text in read_documents(task.unit, task.reading):
        documents += bool(text)
        empty += not text
        characters += len(text)
        eot_marks += text.count(EOT)
        if task.with_alphabet:
            pending.append(text)
            if characters >= pending_until:
                alphabet.update(alphabet_of("".join(pending)))
                pending, pending_until = [], characters + BLOCK_CHARACTERS
    alphabet.update(alphabet_of("".join(pending)))
    return Survey(documents, empty, characters, "".join(sorted(alphabet)), eot_marks)


def describe_file(file: InputFile) -> dict[str, Any]:
    """What the manifest records of an input file: name, bytes, sha256."""
    if file.kind == "python-docs":
        data = PYTHON_DOCS[file.name]().encode("utf-8")
        return {"name": file.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    path = Path(file.path)
    with reading_from(path):
        return {"name": file.name, "bytes": path.stat().st_size, "sha256": sha256_of_file(path)}


@dataclass(frozen=True)
class EncodeTask:
    """codec_directory: where the tokenizer was saved. tokenizer_hash: its description's hash, which it must have.

    file_sha256: of the file when its size and time of change were file_state, which must still be so.
    """

    unit: Unit
    reading: Reading
    file_sha256: str
    file_state: FileState
    tokenizer_directory: Path
    tokenizer_hash: str
    parts: Path
    backend: Backend = "tiktoken"

    @property
    def key(self) -> dict[str, Any]:
        """Everything that decides the part's bytes; and the backend, lest a faulty one's parts serve the other."""
        unit = self.unit
        return {
            "format": PART_FORMAT,
            "backend": self.backend,
            "file": [self.file_sha256, unit.file.kind, unit.file.compressed],
            "place": [unit.start, unit.stop, unit.first, unit.last],
            "reading": [self.reading.split_on, self.reading.text_column, self.reading.tolerant],
            "tokenizer": self.tokenizer_hash,
        }

    @property
    def stem(self) -> Path:
        """The part's files without their suffixes."""
        return self.parts / hash_of(self.key)[:24]


@dataclass
class Tally:
    """What became of a unit's texts, beside the documents that are in its part.

    empty: null or without a character. repaired: held bytes that are not UTF-8, now U+FFFD. dropped: the rows of those
    that the tokenizer gave up on.
    """

    empty: int = 0
    repaired: int = 0
    dropped: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Part:
    """A finished part. `is_old`: it was there before this run."""

    path: Path
    tokens: int
    documents: int
    tally: Tally = field(default_factory=Tally)
    is_old: bool = False

    def starts(self) -> Offsets:
        """Where its documents begin: int64 [documents]."""
        return np.fromfile(self.path, dtype="<u8", offset=2 * self.tokens, count=self.documents).astype(np.int64)

    def hashes(self) -> Hashes:
        """The texts' hashes, their first eight bytes and the other eight as numbers: uint64 [documents, 2]."""
        offset = 2 * self.tokens + 8 * self.documents
        return np.fromfile(self.path, dtype=">u8", offset=offset).astype(np.uint64).reshape(self.documents, 2)

    def blocks(self) -> Iterator[tuple[Tokens, Offsets]]:
        """(tokens, places in them at which documents begin), some million tokens at a time."""
        starts = self.starts()
        with self.path.open("rb") as file:
            for begin in range(0, self.tokens, BLOCK_TOKENS):
                count = min(BLOCK_TOKENS, self.tokens - begin)
                inside = starts[np.searchsorted(starts, begin) : np.searchsorted(starts, begin + count)]
                yield np.fromfile(file, dtype="<u2", count=count), inside - begin


def hash_of(value: Any) -> str:
    """Hex sha256 of a value's JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("ascii")).hexdigest()


def encode_unit(task: EncodeTask) -> Part:
    """The unit's part: the one that is there if it is sound, else made now."""
    part = read_part(task.stem, task.key)
    if part is not None:
        return part
    tokenizer = _tokenizer(task.tokenizer_directory, task.tokenizer_hash)
    tally = Tally()
    return write_part(task.stem, task.key, _encoded(task, tokenizer, tally), tally)


def _encoded(task: EncodeTask, tokenizer: Tokenizer, tally: Tally) -> Iterator[Encoded]:
    """Every document that is not empty, begun by EOT where the codec has one, a batch at a time."""
    begin = np.array([] if tokenizer.eot_id is None else [tokenizer.eot_id], dtype="<u2")
    giga = _giga(task.tokenizer_directory, task.tokenizer_hash) if task.backend == "gigatoken" else None
    encode = encoder(tokenizer, giga)
    check_unchanged(task)
    for batch in _batches(task, tally):
        pieces: list[Ids] = []
        lengths: list[int] = []
        hashes: list[bytes] = []
        for document, ids in zip(batch, encode(batch), strict=True):
            if isinstance(ids, InputError):
                if not task.reading.tolerant:
                    raise InputError(f"{place_of(task.unit, task.reading, document.position)}: {ids}") from ids
                tally.dropped.append(document.position)
                continue
            pieces += (begin, ids)
            lengths.append(len(begin) + len(ids))
            hashes.append(hashlib.blake2b(document.utf8, digest_size=HASH_BYTES).digest())
        if pieces:
            yield np.concatenate(pieces, dtype="<u2", casting="unsafe"), lengths, hashes
    check_unchanged(task)


def check_unchanged(task: EncodeTask) -> None:
    """InputError if the file is no longer the one that was hashed."""
    if file_state(task.unit.file) != task.file_state:
        raise InputError(f"{task.unit.file.path}: changed while it was read; run the same command again")


def _batches(task: EncodeTask, tally: Tally) -> Iterator[list[Document]]:
    """Documents that are not empty, about BLOCK_CHARACTERS at a time."""
    batch: list[Document] = []
    characters = 0
    for position, text in read_documents(task.unit, task.reading):
        if not text:
            tally.empty += 1
            continue
        document = Document.of(position, text)
        if document.has_surrogates and task.reading.tolerant:
            document = Document.of(position, SURROGATE.sub("\ufffd", text))
            tally.repaired += 1
        batch.append(document)
        characters += len(text)
        if characters >= BLOCK_CHARACTERS:
            yield batch
            batch, characters = [], 0
    yield batch


def encoder(tokenizer: Tokenizer, giga: GigaEncoder | None) -> Callable[[list[Document]], Iterable[Ids | InputError]]:
    """What encodes the documents of one unit: gigatoken where it is given, else the codec itself."""
    if giga is not None:
        giga.begin_unit()
        return giga.encode
    return lambda documents: (encode_or_fault(tokenizer, document.text) for document in documents)


def make_parts(tasks: Sequence[EncodeTask], workers: Workers, program: str) -> list[Part]:
    """Every task's part, in order; equal tasks share one. Progress in lines."""
    unique = {task.stem: task for task in tasks}
    parts: dict[Path, Part] = {}
    todo = list(unique.values())
    new = [task.unit.num_bytes for task in todo if not task.stem.with_suffix(".json").exists()]
    progress = Progress("encode", sum(new))
    for index, part in workers.run(encode_unit, todo):
        parts[todo[index].stem] = part
        if not part.is_old:
            progress.add(todo[index].unit.num_bytes, part.documents, part.tokens)
    old = sum(part.is_old for part in parts.values())
    if old:
        print(f"{program}: {old} of {len(parts)} parts were there from an earlier run", file=sys.stderr, flush=True)
    return [parts[task.stem] for task in tasks]


@functools.lru_cache(maxsize=1)
def _tokenizer(directory: Path, tokenizer_hash: str) -> Tokenizer:
    """Each worker reads the tokenizer once. `tokenizer_hash` is there to tell it from an earlier one in its place."""
    tokenizer = load_tokenizer(directory)
    assert hash_of(tokenizer.describe()) == tokenizer_hash
    return tokenizer


@functools.lru_cache(maxsize=1)
def _giga(directory: Path, tokenizer_hash: str) -> GigaEncoder:
    return GigaEncoder(_tokenizer(directory, tokenizer_hash), directory / FOLDER / RANKS_FILE)


def write_part(stem: Path, key: dict[str, Any], batches: Iterable[Encoded], tally: Tally) -> Part:
    """Write documents' tokens as they come, then their places and hashes; the .json last, so that half a part has none.

    `tally` is read when all have come.
    """
    lengths: list[int] = []
    hashes: list[bytes] = []

    def blocks() -> Iterator[bytes | memoryview]:
        for tokens, more_lengths, more_hashes in batches:
            lengths.extend(more_lengths)
            hashes.extend(more_hashes)
            yield np.ascontiguousarray(tokens, dtype="<u2").data
        yield np.cumsum([0, *lengths], dtype="<u8")[:-1].tobytes()
        yield b"".join(hashes)

    path = stem.with_suffix(".part")
    sha256 = write_blocks_atomically(path, blocks())
    record = {
        "key": key,
        "tokens": sum(lengths),
        "documents": len(lengths),
        "sha256": sha256,
        "tally": dataclasses.asdict(tally),
    }
    write_json_atomically(stem.with_suffix(".json"), record)
    return Part(path, sum(lengths), len(lengths), tally)


def read_part(stem: Path, key: dict[str, Any]) -> Part | None:
    """The finished part of that name, if it is whole, sound and of exactly this `key`."""
    path = stem.with_suffix(".part")
    try:
        record = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
        tally = Tally(**record["tally"])
        part = Part(path, int(record["tokens"]), int(record["documents"]), tally, is_old=True)
        if record["key"] == key and sha256_of_file(path) == record["sha256"]:
            return part
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError):
        pass  # made again
    return None
