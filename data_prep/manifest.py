"""manifest.json: source, options and hashes of a data directory. It is written last; without it, data is unfinished."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import InputError, first_line, reading_from
from common.files import write_json_atomically
from common.reading import NATURAL, Form, child, is_there, misfit, parse_json, read_regular
from data_prep.shards import FORMATS, MAX_VOCAB_SIZE, Shard, ShardInfo, TokenStream, open_shard
from data_prep.tokenizer import read_description

FORMAT_VERSION = 2
FILE_NAME = "manifest.json"

SOME = range(1, NATURAL.stop)
FORM: Form = {
    "source": dict,
    "options": dict,
    "tokenizer": {"kind": str, "vocab_size": range(1, MAX_VOCAB_SIZE + 1), "eot_id": (range(MAX_VOCAB_SIZE), None)},
    "splits": dict,
    "fingerprint": str,
}
SPLIT: Form = {"shards": list, "tokens": SOME, "documents": NATURAL, "stream_sha256": str}
SHARD: Form = {
    "file": str,
    "format": frozenset(FORMATS),
    "tokens": SOME,
    "documents": NATURAL,
    "bytes": SOME,
    "sha256": str,
    "idx_sha256": (str, None),
}


@dataclass(frozen=True)
class SplitInfo:
    """A split: its shards in order, their totals, and the hash of its tokens as one stream."""

    shards: tuple[ShardInfo, ...]
    tokens: int
    documents: int
    stream_sha256: str

    @classmethod
    def of(cls, shards: Sequence[ShardInfo], stream_sha256: str) -> "SplitInfo":
        tokens, documents = (sum(getattr(shard, name) for shard in shards) for name in ("tokens", "documents"))
        return cls(tuple(shards), tokens, documents, stream_sha256)


@dataclass(frozen=True)
class Manifest:
    """The description of a data directory.

    source: the input files and their hashes. options: those that change the bytes. tokenizer: `Tokenizer.describe()`.
    """

    source: dict[str, Any]
    options: dict[str, Any]
    tokenizer: dict[str, Any]
    splits: dict[str, SplitInfo]
    format_version: int = FORMAT_VERSION

    @property
    def fingerprint(self) -> str:
        """The hash of all splits' streams: two data sets with the same fingerprint hold the same tokens."""
        text = "".join(f"{name}:{split.stream_sha256}\n" for name, split in sorted(self.splits.items()))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def vocab_size(self) -> int:
        return int(self.tokenizer["vocab_size"])

    @property
    def eot_id(self) -> int | None:
        """The token that begins a document; None: the tokenizer has no such token."""
        eot_id: int | None = self.tokenizer["eot_id"]
        return eot_id

    def open_shard(self, directory: Path, info: ShardInfo) -> Shard:
        """Map one of the shards; for another project's shard the manifest supplies what its header does not state.

        Raise InputError if the file is missing, cannot be read, or is not what the manifest says.
        """
        path = child(directory, info.file)
        if not is_there(path):
            raise InputError(f"{path}: missing, though {FILE_NAME} lists it")
        shard = open_shard(path, info.format)
        if info.format != "ladder":
            shard = dataclasses.replace(shard, vocab_size=self.vocab_size, eot_id=self.eot_id, documents=info.documents)
        with reading_from(path):
            num_bytes = path.stat().st_size
        for name, actual, stated in (
            ("as its format", shard.format, info.format),
            ("tokens", len(shard.tokens), info.tokens),
            ("documents", shard.documents, info.documents),
            ("bytes", num_bytes, info.bytes),
            ("as its vocabulary", shard.vocab_size, self.vocab_size),
            ("as its EOT", shard.eot_id, self.eot_id),
        ):
            if actual != stated:
                raise InputError(f"{path}: {actual} {name}, but {FILE_NAME} says {stated}")
        return shard

    def write(self, directory: Path) -> None:
        """Write the manifest into `directory`, atomically."""
        write_json_atomically(directory / FILE_NAME, dataclasses.asdict(self) | {"fingerprint": self.fingerprint})


def read_manifest(directory: Path) -> Manifest:
    """Read the manifest of a finished data directory. Raise InputError if there is none or it is damaged."""
    path = directory / FILE_NAME
    with reading_from(path):
        if not directory.is_dir():
            raise InputError(
                f"{directory}: no such data directory; make it with data_prep/textfiles.py or set --data.dir"
            )
    if not is_there(path):
        raise InputError(
            f"{directory}: no {FILE_NAME}, so its preparation did not finish; prepare it again "
            "(or, if its token files come from elsewhere, adopt them with data_prep/verify.py --adopt)"
        )
    content = read_regular(path, inside=directory)
    try:
        raw = parse_json(content)
    except ValueError as error:
        raise InputError(f"{path}: damaged ({first_line(error)[:200]}); prepare the data again") from error
    fault = misfit(raw, {"format_version": NATURAL})
    if fault is None and raw["format_version"] != FORMAT_VERSION:
        raise InputError(
            f"{path}: format version {raw['format_version']}; this code reads {FORMAT_VERSION}: "
            "prepare the data again, with --overwrite"
        )
    if fault := fault or misfit(raw, FORM) or _fault_of_splits(raw["splits"]):
        raise InputError(f"{path}: damaged ({fault}); prepare the data again")
    splits = {
        name: SplitInfo(
            tuple(ShardInfo(**{key: shard[key] for key in SHARD}) for shard in split["shards"]),
            *(split[key] for key in SPLIT if key != "shards"),
        )
        for name, split in raw["splits"].items()
    }
    manifest = Manifest(raw["source"], raw["options"], raw["tokenizer"], splits)
    if manifest.eot_id is not None and manifest.eot_id >= manifest.vocab_size:
        raise InputError(
            f"{path}: damaged (its EOT {manifest.eot_id} is outside its vocabulary); prepare the data again"
        )
    if raw["fingerprint"] != manifest.fingerprint:
        raise InputError(f"{path}: its fingerprint does not fit its splits; prepare the data again")
    return manifest


def _fault_of_splits(splits: dict[str, Any]) -> str | None:
    """Return how splits that were read differ from any that are written, or None."""
    if not splits:
        return "it has no splits"
    for name, split in splits.items():
        fault = misfit(split, SPLIT, f"split {name!r}")
        shards = [] if fault else split["shards"]
        faults = [fault, *(misfit(shard, SHARD, f"a shard of {name!r}") for shard in shards)]
        if fault := next(filter(None, faults), None):
            return fault
        for total in ("tokens", "documents"):
            counted = sum(shard[total] for shard in shards)
            if counted != split[total]:
                return f"{counted} {total} in the shards of {name!r}, {split[total]} in all"
    files = Counter(shard["file"] for split in splits.values() for shard in split["shards"])
    if twice := next((file for file in files if files[file] > 1), None):
        return f"{twice!r} is listed {files[twice]} times"
    for name, split in splits.items():  # the order of shards is that of the tokens, which no hash of a file bears out
        for number, shard in enumerate(split["shards"]):
            if shard["format"] == "ladder" and shard["file"] != f"{name}_{number:06d}.bin":
                return f"shard {number} of {name!r} is {shard['file']!r}"
    return None


def open_split(directory: Path, split: str) -> TokenStream:
    """Open a split as one stream. Raise InputError if a shard or the tokenizer is not what the manifest says."""
    manifest = read_manifest(directory)
    if split not in manifest.splits:
        raise InputError(f"{directory}: has no split {split!r}, only {', '.join(sorted(manifest.splits))}")
    if read_description(directory)[1] != manifest.tokenizer:
        raise InputError(f"{directory}: its tokenizer is not the one in {FILE_NAME}")
    shards = [manifest.open_shard(directory, info) for info in manifest.splits[split].shards]
    return TokenStream(shards, manifest.vocab_size)
