"""manifest.json: source, options and hashes of a data directory. It is written last; without it, data is unfinished."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import InputError, reading_from
from common.files import write_json_atomically
from data_prep.shards import Shard, ShardInfo, TokenStream, open_shard

FORMAT_VERSION = 2
FILE_NAME = "manifest.json"


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
        """Map one of the shards; for another project's shard the manifest supplies vocabulary and EOT."""
        path = directory / info.file
        with reading_from(path):
            if not path.is_file():
                raise InputError(f"{path}: missing, though {FILE_NAME} lists it")
        shard = open_shard(path, info.format)
        if info.format != "ladder":
            shard = dataclasses.replace(shard, vocab_size=self.vocab_size, eot_id=self.eot_id)
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
        if not path.is_file():
            raise InputError(
                f"{directory}: no {FILE_NAME}, so its preparation did not finish; prepare it again "
                "(or, if its token files come from elsewhere, adopt them with data_prep/verify.py --adopt)"
            )
        content = path.read_bytes()
    try:
        raw = json.loads(content.decode("utf-8"))
        if raw["format_version"] != FORMAT_VERSION:
            raise InputError(
                f"{path}: format version {raw['format_version']}; this code reads {FORMAT_VERSION}: "
                "prepare the data again, with --overwrite"
            )
        splits = {
            name: SplitInfo(**split | {"shards": tuple(ShardInfo(**shard) for shard in split["shards"])})
            for name, split in raw["splits"].items()
        }
        manifest = Manifest(raw["source"], raw["options"], raw["tokenizer"], splits)
        fingerprint = raw["fingerprint"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: damaged ({type(error).__name__}: {error}); prepare the data again") from error
    if fingerprint != manifest.fingerprint:
        raise InputError(f"{path}: its fingerprint does not fit its splits; prepare the data again")
    return manifest


def open_split(directory: Path, split: str) -> TokenStream:
    """Open a split as one stream. Raise InputError if a shard is missing or has another size than the manifest says."""
    manifest = read_manifest(directory)
    if split not in manifest.splits:
        raise InputError(f"{directory}: has no split {split!r}, only {', '.join(sorted(manifest.splits))}")
    shards = []
    for info in manifest.splits[split].shards:
        shard = manifest.open_shard(directory, info)
        if len(shard.tokens) != info.tokens:
            raise InputError(f"{shard.path}: {len(shard.tokens)} tokens, but {FILE_NAME} says {info.tokens}")
        shards.append(shard)
    return TokenStream(shards, manifest.vocab_size)
