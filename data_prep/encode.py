"""A worker's part: one unit of input -> its own file of tokens, so that a later run need not make it again.

    parts/NAME.part    uint16 tokens, then uint64 places in them at which documents begin
    parts/NAME.json    written after it: what it was made of, counts, sha256

NAME is a hash of all that decides the bytes (file, place in it, reading, tokenizer): a part of another input or of
other options has another name, and is never taken for this one.
"""

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.atomic import sha256_of_file, write_blocks_atomically, write_json_atomically
from data_prep.codec import EOT, Codec, alphabet_of, load_codec
from data_prep.errors import InputError
from data_prep.shards import Offsets, Tokens
from data_prep.sources import PYTHON_DOCS, InputFile, Reading, Unit, place_of, read_documents

BLOCK_TOKENS = 2**22
BLOCK_CHARACTERS = 2**20


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
    return {"name": file.name, "bytes": path.stat().st_size, "sha256": sha256_of_file(path)}


@dataclass(frozen=True)
class EncodeTask:
    """codec_directory: where the tokenizer was saved. tokenizer: its description's hash, which it must have."""

    unit: Unit
    reading: Reading
    file_sha256: str
    codec_directory: Path
    tokenizer: str
    parts: Path

    @property
    def key(self) -> dict[str, Any]:
        """Everything that decides the part's bytes."""
        unit = self.unit
        return {
            "file": [self.file_sha256, unit.file.kind, unit.file.compressed],
            "place": [unit.start, unit.stop, unit.first, unit.last],
            "reading": [self.reading.split_on, self.reading.text_column],
            "tokenizer": self.tokenizer,
        }

    @property
    def stem(self) -> Path:
        """The part's files without their suffixes."""
        return self.parts / hash_of(self.key)[:24]


@dataclass(frozen=True)
class Part:
    """A finished part. `is_old`: it was there before this run."""

    path: Path
    tokens: int
    documents: int
    is_old: bool = False

    def blocks(self) -> Iterator[tuple[Tokens, Offsets]]:
        """(tokens, places in them at which documents begin), some million tokens at a time."""
        starts = np.fromfile(self.path, dtype="<u8", offset=2 * self.tokens).astype(np.int64)
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
    codec = _codec(task.codec_directory, task.tokenizer)
    return write_part(task.stem, task.key, _encoded(task, codec))


def _encoded(task: EncodeTask, codec: Codec) -> Iterator[Tokens]:
    """The ids of every document that is not empty, begun by EOT where the codec has one."""
    for position, text in read_documents(task.unit, task.reading):
        if not text:
            continue
        try:
            ids = codec.encode(text)
        except InputError as error:
            raise InputError(f"{place_of(task.unit, task.reading, position)}: {error}") from error
        if codec.eot_id is not None:
            yield np.concatenate([np.array([codec.eot_id], dtype="<u2"), ids.astype("<u2", copy=False)])
        else:
            yield ids.astype("<u2", copy=False)


@functools.lru_cache(maxsize=1)
def _codec(directory: Path, tokenizer: str) -> Codec:
    """Each worker reads the tokenizer once. `tokenizer` is there to tell it from an earlier one in its place."""
    codec = load_codec(directory)
    assert hash_of(codec.describe()) == tokenizer
    return codec


def write_part(stem: Path, key: dict[str, Any], documents: Iterable[Tokens]) -> Part:
    """Write documents' tokens as they come, then their places; the .json last, so that half a part has none."""
    starts: list[int] = []
    num_tokens = 0

    def blocks() -> Iterator[bytes]:
        nonlocal num_tokens
        for ids in documents:
            starts.append(num_tokens)
            num_tokens += len(ids)
            for begin in range(0, len(ids), BLOCK_TOKENS):
                yield ids[begin : begin + BLOCK_TOKENS].tobytes()
        yield np.array(starts, dtype="<u8").tobytes()

    path = stem.with_suffix(".part")
    sha256 = write_blocks_atomically(path, blocks())
    record = {"key": key, "tokens": num_tokens, "documents": len(starts), "sha256": sha256}
    write_json_atomically(stem.with_suffix(".json"), record)
    return Part(path, num_tokens, len(starts))


def read_part(stem: Path, key: dict[str, Any]) -> Part | None:
    """The finished part of that name, if it is whole, sound and of exactly this `key`."""
    path = stem.with_suffix(".part")
    try:
        record = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
        part = Part(path, int(record["tokens"]), int(record["documents"]), is_old=True)
        if record["key"] == key and sha256_of_file(path) == record["sha256"]:
            return part
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError):
        pass  # made again
    return None
