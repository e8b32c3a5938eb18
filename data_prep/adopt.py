"""Adopt ready-made token files of other projects: write a manifest beside them; the files themselves are only read.

The first bytes of a file tell its format: llm.c's magic number, numpy's, or neither. A .bin with neither is taken for
nanoGPT's bare uint16; the scan of its ids confirms that, since other data holds ids beyond the vocabulary. The name
tells the split: `train` or `val` before the number, as in fineweb_train_000001.bin, edufineweb_val_000000.npy or
train.bin.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import InputError, reading_from, writing_to
from common.reading import child, open_regular, sha256_of_regular
from data_prep.manifest import FILE_NAME, Manifest, SplitInfo, read_manifest
from data_prep.shards import MAGIC, NPY_MAGIC, VERSION, Format, ShardInfo, open_shard, outside_vocabulary
from data_prep.tokenizer import Tokenizer

NAME = re.compile(r"(?:(?P<stem>[^.].*)_)?(?P<split>train|val)(?:_(?P<number>\d+))?\.(?:bin|npy)")
# llm.c, dev/data/data_common.py: version 7 is Llama 3's uint32 ids; dev/data/hellaswag.py: 20240522.
OTHER_MAGICS = {20240801: "Llama 3's uint32 tokens; ids here are uint16", 20240522: "HellaSwag items, not tokens"}
BLOCK_TOKENS = 2**24


@dataclass(frozen=True)
class TokenFile:
    """A token file to adopt."""

    path: Path
    format: Format
    stem: str
    split: str
    number: int


def adopt(directory: Path, tokenizer: Tokenizer) -> bool:
    """Write manifest.json and tokenizer/ for the token files in `directory`; False if they were adopted before."""
    with reading_from(directory):
        earlier = read_manifest(directory) if (directory / FILE_NAME).exists() else None
    if earlier is not None and "adopted" not in earlier.source:
        raise InputError(f"{directory}: has a manifest from its preparation; there is nothing to adopt")
    files = find_token_files(directory)
    infos = {file.path: describe(file, tokenizer) for file in files}
    splits = {}
    for split in ("train", "val"):
        in_order = sorted((file for file in files if file.split == split), key=lambda file: file.number)
        if not in_order:
            continue
        stream = hashlib.sha256()
        for file in in_order:
            add_tokens(stream, open_shard(file.path, file.format).tokens)
        splits[split] = SplitInfo.of([infos[file.path] for file in in_order], stream.hexdigest())
    manifest = Manifest({"adopted": files[0].format}, {}, tokenizer.describe(), splits)
    if earlier is not None:
        check_same(directory, earlier, manifest)
        return False
    with writing_to(directory):
        tokenizer.save(directory)
        manifest.write(directory)
    return True


def check_same(directory: Path, earlier: Manifest, manifest: Manifest) -> None:
    """Raise InputError unless the earlier manifest describes the same files and tokenizer."""
    if earlier.tokenizer != manifest.tokenizer:
        raise InputError(f"{directory}: was adopted with another --tokenizer; to change that, remove its {FILE_NAME}")
    old, new = ({info for split in each.splits.values() for info in split.shards} for each in (earlier, manifest))
    if old != new:
        names = ", ".join(sorted({info.file for info in old ^ new}))
        raise InputError(f"{directory}: {names} changed since it was adopted; to adopt it anew, remove its {FILE_NAME}")


def find_token_files(directory: Path) -> list[TokenFile]:
    """Return every token file in `directory`. Raise InputError if they are not one set of one format."""
    files = []
    with reading_from(directory):
        if not directory.is_dir():
            raise InputError(f"{directory}: no such directory (--adopt)")
        for path in sorted(directory.iterdir()):
            match = NAME.fullmatch(path.name)
            if match:
                child(directory, path.name)  # a name that the manifest may hold
                number = int(match["number"] or 0)
                files.append(TokenFile(path, format_of(path), match["stem"] or "", match["split"], number))
    if not files:
        raise InputError(f"{directory}: no token file named *train*.bin, *val*.bin or .npy (--adopt)")
    for aspect in ("format", "stem"):
        kinds = {getattr(file, aspect): file.path.name for file in files}
        if len(kinds) > 1:
            sets = ", ".join(kinds.values())
            raise InputError(f"{directory}: files of several sets ({sets}); adopt one per directory")
    if len({(file.split, file.number) for file in files}) < len(files):
        raise InputError(f"{directory}: several files of the same split and number (--adopt)")
    return files


def format_of(path: Path) -> Format:
    """Return the format that the file's first bytes show. Raise InputError for a format that is not read here."""
    with open_regular(path, inside=path.parent) as file, reading_from(path):
        head = file.read(16)
    if head.startswith(NPY_MAGIC):
        return "npy"
    if path.suffix == ".npy":
        raise InputError(f"{path}: does not begin like a .npy file")
    magic, version, _, vocab_size = np.frombuffer(head.ljust(16, b"\0"), dtype="<i4").tolist()
    if magic in OTHER_MAGICS:
        raise InputError(f"{path}: {OTHER_MAGICS[magic]} (header {magic}, version {version})")
    if magic != MAGIC:
        return "headerless"
    if version != VERSION:
        raise InputError(f"{path}: version {version} of llm.c's format; only {VERSION}, uint16 tokens, is read")
    if vocab_size:
        raise InputError(f"{path}: a shard of this project's own whose preparation did not finish; prepare it again")
    return "llm.c"


def describe(file: TokenFile, tokenizer: Tokenizer) -> ShardInfo:
    """Return the file's entry in the manifest, after checking every id against the vocabulary."""
    tokens = open_shard(file.path, file.format).tokens
    documents = 0
    for begin in range(0, len(tokens), BLOCK_TOKENS):
        block = np.asarray(tokens[begin : begin + BLOCK_TOKENS])
        if (fault := outside_vocabulary(block, tokenizer.vocab_size, first=begin)) is not None:
            raise InputError(f"{file.path}: {fault}; give another --tokenizer, or remove what is no token file")
        if tokenizer.eot_id is not None:
            documents += int(np.count_nonzero(block == tokenizer.eot_id))
    with reading_from(file.path):
        num_bytes = file.path.stat().st_size
    sha256 = sha256_of_regular(file.path, inside=file.path.parent)
    return ShardInfo(file.path.name, file.format, len(tokens), documents, num_bytes, sha256, idx_sha256=None)


def add_tokens(stream: "hashlib._Hash", tokens: np.ndarray) -> None:
    """Add tokens to the hash of a stream, block by block, so that they are never copied as a whole."""
    for begin in range(0, len(tokens), BLOCK_TOKENS):
        stream.update(tokens[begin : begin + BLOCK_TOKENS].tobytes())
