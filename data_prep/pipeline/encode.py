"""Encoding: a worker turns one unit of input into a part, a file of tokens that a later run can reuse.

    parts/NAME.part    uint16 tokens; uint64 offsets of the documents in them; 16-byte hashes of the documents' texts
    parts/NAME.json    written afterwards: the key (everything the part depends on), counts, sha256

NAME is a hash of the key: file, range in it, reading, tokenizer. A part of another input or of other options therefore
has another name, and is never taken for this one.
"""

import dataclasses
import functools
import hashlib
import re
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from common.errors import InputError, reading_from
from common.files import sha256_of_file, sha256_of_json, write_blocks_atomically, write_json_atomically
from common.reading import NATURAL, misfit, read_own_json, sha256_of_regular
from data_prep.pipeline.bad_rows import Skipped
from data_prep.pipeline.gigatoken_encoder import GigaEncoder
from data_prep.pipeline.input_files import PYTHON_DOCS, FileState, InputFile, file_state
from data_prep.pipeline.sources import Document, Reading, Unit, document_location, read_documents
from data_prep.pipeline.workers import Progress, Workers
from data_prep.shards import Offsets, Tokens
from data_prep.tokenizer import EOT, FOLDER, RANKS_FILE, Ids, Tokenizer, alphabet_of, encode_or_fault, load_tokenizer

BLOCK_TOKENS = 2**22
BLOCK_CHARACTERS = 2**20
BLOCK_DOCUMENTS = 2**20
PART_FORMAT = 3
HASH_BYTES = 16
RECORD: dict[str, Any] = {
    "key": dict,
    "tokens": NATURAL,
    "documents": NATURAL,
    "sha256": str,
    "tally": {"empty": NATURAL, "repaired": NATURAL, "skipped": {"reasons": dict, "first": list}},
}
SURROGATE = re.compile("[\ud800-\udfff]")

Backend = Literal["tiktoken", "gigatoken"]
Encoded = tuple[Tokens, list[int], list[bytes]]  # a batch of documents: ids (concatenated), lengths, text hashes
Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Survey:
    """The counts of one unit. alphabet: "" unless requested. eot_marks: occurrences of "<|endoftext|>".

    skipped: the rows that were left out, which are in no other count.
    """

    documents: int
    empty_documents: int
    characters: int
    alphabet: str
    eot_marks: int
    skipped: Skipped


def survey_unit(unit: Unit, reading: Reading, *, with_alphabet: bool) -> Survey:
    """Read a unit for the first time, and count. Raise InputError at a fault, before anything is written."""
    documents = empty = characters = eot_marks = 0
    alphabet: set[str] = set()
    skipped = Skipped()
    pending: list[str] = []  # a block at a time: the alphabet of each document takes four times as long
    pending_until = BLOCK_CHARACTERS
    for _, text in read_documents(unit, reading, skipped):
        documents += bool(text)
        empty += not text
        characters += len(text)
        eot_marks += text.count(EOT)
        if with_alphabet:
            pending.append(text)
            if characters >= pending_until:
                alphabet.update(alphabet_of("".join(pending)))
                pending, pending_until = [], characters + BLOCK_CHARACTERS
    alphabet.update(alphabet_of("".join(pending)))
    return Survey(documents, empty, characters, "".join(sorted(alphabet)), eot_marks, skipped)


def describe_file(file: InputFile) -> dict[str, Any]:
    """Return the manifest's record of an input file: name, bytes, sha256."""
    if file.kind == "python-docs":
        data = PYTHON_DOCS[file.name]().encode("utf-8")
        return {"name": file.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    path = Path(file.path)
    with reading_from(path):
        return {"name": file.name, "bytes": path.stat().st_size, "sha256": sha256_of_file(path)}


@dataclass(frozen=True)
class EncodeTask:
    """One unit to encode.

    file_sha256: the file's hash while its state was file_state, which must not change. tokenizer_directory: where the
    tokenizer is saved. tokenizer_hash: the hash of its description.
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
        """Return what the part's bytes depend on, and the backend: parts of a faulty one never serve the other.

        Parts without skipped rows are the same for every --on-bad-row; see `finished_part` for the others.
        """
        unit, reading = self.unit, self.reading
        return {
            "format": PART_FORMAT,
            "backend": self.backend,
            "file": [self.file_sha256, unit.file.kind, unit.file.compressed],
            "place": [unit.start, unit.stop, unit.first, unit.last],
            "reading": [reading.split_on, reading.text_column, reading.tolerant, reading.max_document_bytes],
            "tokenizer": self.tokenizer_hash,
        }

    @property
    def stem(self) -> Path:
        """Return the path of the part's files, without suffix."""
        return self.parts / sha256_of_json(self.key)[:24]


@dataclass
class Tally:
    """Counts of what became of a unit's texts.

    empty: texts that are null or empty. repaired: texts that held bytes that are not UTF-8, now U+FFFD. skipped: bad
    rows that were left out.
    """

    empty: int = 0
    repaired: int = 0
    skipped: Skipped = field(default_factory=Skipped)


@dataclass(frozen=True)
class Part:
    """A finished part. is_reused: an earlier run made it."""

    path: Path
    tokens: int
    documents: int
    tally: Tally = field(default_factory=Tally)
    is_reused: bool = False

    def starts(self) -> Offsets:
        """Return the offsets of the documents in the tokens: int64 [documents]."""
        return np.fromfile(self.path, dtype="<i8", offset=2 * self.tokens, count=self.documents)

    def hashes(self) -> Hashes:
        """Return the texts' hashes as two numbers of eight bytes each: uint64 [documents, 2]."""
        offset = 2 * self.tokens + 8 * self.documents
        return np.fromfile(self.path, dtype=">u8", offset=offset).astype(np.uint64).reshape(self.documents, 2)

    def blocks(self) -> Iterator[tuple[Tokens, Offsets]]:
        """Yield (tokens, offsets of documents in them), BLOCK_TOKENS at a time."""
        starts = self.starts()
        with self.path.open("rb") as file:
            for begin in range(0, self.tokens, BLOCK_TOKENS):
                count = min(BLOCK_TOKENS, self.tokens - begin)
                inside = starts[np.searchsorted(starts, begin) : np.searchsorted(starts, begin + count)]
                yield np.fromfile(file, dtype="<u2", count=count), inside - begin


def encode_unit(task: EncodeTask) -> Part:
    """Return the unit's part: the existing one if it is sound, else a new one."""
    part = finished_part(task)
    if part is not None:
        return part
    tokenizer = _tokenizer(task.tokenizer_directory, task.tokenizer_hash)
    tally = Tally()
    return write_part(task.stem, task.key, _encoded(task, tokenizer, tally), tally)


def finished_part(task: EncodeTask) -> Part | None:
    """Return the unit's part if it is there and sound.

    If --on-bad-row is stop, one without some bad rows does not count, so that the first of them ends the command.
    """
    part = read_part(task.stem, task.key)
    if part is not None and part.tally.skipped.reasons and task.reading.on_bad_row == "stop":
        return None
    return part


def _encoded(task: EncodeTask, tokenizer: Tokenizer, tally: Tally) -> Iterator[Encoded]:
    """Yield every document that is not empty, in batches. EOT precedes each, if the tokenizer has one."""
    eot = np.array([] if tokenizer.eot_id is None else [tokenizer.eot_id], dtype="<u2")
    giga = _giga(task.tokenizer_directory, task.tokenizer_hash) if task.backend == "gigatoken" else None
    encode = encoder(tokenizer, giga)
    check_unchanged(task)
    for batch in _batches(task, tally):
        pieces: list[Ids] = []
        lengths: list[int] = []
        hashes: list[bytes] = []
        for document, ids in zip(batch, encode(batch), strict=True):
            if isinstance(ids, InputError):
                location = document_location(task.unit, task.reading, document.position)
                raise InputError(f"{location}: {ids}") from ids
            pieces += (eot, ids)
            lengths.append(len(eot) + len(ids))
            hashes.append(hashlib.blake2b(document.utf8, digest_size=HASH_BYTES).digest())
        if batch:
            yield np.concatenate(pieces, dtype="<u2", casting="unsafe"), lengths, hashes
    check_unchanged(task)


def check_unchanged(task: EncodeTask) -> None:
    """Raise InputError if the file is no longer the one that was hashed."""
    if file_state(task.unit.file) != task.file_state:
        raise InputError(f"{task.unit.file.path}: changed while it was read; run the same command again")


def _batches(task: EncodeTask, tally: Tally) -> Iterator[list[Document]]:
    """Yield documents that are not empty, about BLOCK_CHARACTERS at a time; count the others."""
    batch: list[Document] = []
    characters = 0
    for position, text in read_documents(task.unit, task.reading, tally.skipped):
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
    """Return the function that encodes the documents of one unit."""
    if giga is not None:
        giga.begin_unit()
        return giga.encode
    return lambda documents: (encode_or_fault(tokenizer, document.text) for document in documents)


def make_parts(tasks: Sequence[EncodeTask], workers: Workers, program: str) -> list[Part]:
    """Return every task's part, in order, and print the progress. Equal tasks share one part."""
    unique = {task.stem: task for task in tasks}
    new_bytes = sum(task.unit.num_bytes for stem, task in unique.items() if not stem.with_suffix(".json").exists())
    progress = Progress("encode", new_bytes)

    def report(task: EncodeTask, part: Part) -> None:
        if not part.is_reused:
            progress.add(task.unit.num_bytes, part.documents, part.tokens)

    parts = dict(zip(unique, workers.map(encode_unit, list(unique.values()), report), strict=True))
    reused = sum(part.is_reused for part in parts.values())
    if reused:
        print(f"{program}: {reused} of {len(parts)} parts were there from an earlier run", file=sys.stderr, flush=True)
    return [parts[task.stem] for task in tasks]


@functools.lru_cache(maxsize=1)
def _tokenizer(directory: Path, tokenizer_hash: str) -> Tokenizer:
    """Load the tokenizer once per worker. tokenizer_hash tells it from an earlier one in the same directory."""
    tokenizer = load_tokenizer(directory)
    assert sha256_of_json(tokenizer.describe()) == tokenizer_hash
    return tokenizer


@functools.lru_cache(maxsize=1)
def _giga(directory: Path, tokenizer_hash: str) -> GigaEncoder:
    return GigaEncoder(_tokenizer(directory, tokenizer_hash), directory / FOLDER / RANKS_FILE)


def write_part(stem: Path, key: dict[str, Any], batches: Iterable[Encoded], tally: Tally) -> Part:
    """Write a part: the tokens as they come, then offsets and hashes. `tally` is read after the last batch.

    The .json is written last, so that an unfinished part has none.
    """
    lengths = array("I")  # these two take 20 bytes for each document: a .gz file, which is one unit, may hold millions
    hashes = bytearray()

    def blocks() -> Iterator[bytes | memoryview]:
        for tokens, more_lengths, more_hashes in batches:
            lengths.extend(more_lengths)
            hashes.extend(b"".join(more_hashes))
            yield np.ascontiguousarray(tokens, dtype="<u2").data
        start = 0
        for begin in range(0, len(lengths), BLOCK_DOCUMENTS):
            offsets = np.cumsum([start, *lengths[begin : begin + BLOCK_DOCUMENTS]], dtype="<u8")
            yield offsets[:-1].data
            start = int(offsets[-1])
        yield memoryview(hashes)

    path = stem.with_suffix(".part")
    sha256 = write_blocks_atomically(path, blocks())
    counts = {"tokens": sum(lengths), "documents": len(lengths)}
    record = {"key": key, **counts, "sha256": sha256, "tally": dataclasses.asdict(tally)}
    write_json_atomically(stem.with_suffix(".json"), record)
    return Part(path, sum(lengths), len(lengths), tally)


def read_part(stem: Path, key: dict[str, Any]) -> Part | None:
    """Return the part of that name if it is complete, sound and of exactly this key, else None: to be made again."""
    path = stem.with_suffix(".part")
    try:
        record = read_own_json(stem.with_suffix(".json"), RECORD)
        if record is None or record["key"] != key or sha256_of_regular(path) != record["sha256"]:
            return None
        tally = record["tally"]
        skipped = Skipped.of(tally["skipped"])
    except (InputError, TypeError, ValueError):
        return None
    if any(misfit(count, NATURAL) for count in skipped.reasons.values()):
        return None
    counts = Tally(tally["empty"], tally["repaired"], skipped)
    return Part(path, record["tokens"], record["documents"], counts, is_reused=True)
