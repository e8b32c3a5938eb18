"""Plain text in, training shards out.

    python data_prep/textfiles.py --input FILE... --out data/NAME --tokenizer char|byte|gpt2|FILE
    python data_prep/textfiles.py --input python-docs --out data/python-docs --tokenizer char

On one core 100 MB take 7 s and 2.3 GB of memory with `char`, 20 MB take 2 s and 0.25 GB with `gpt2`; memory grows with
the largest file.
Tiny Shakespeare with `--tokenizer char` gives 1,003,854 training and 111,540 validation tokens.

Every file is one document. The last `--val-fraction` of all characters is the validation split: with one file
that is nanoGPT's cut. The output directory appears whole, under its name, only when everything is written.
"""

import contextlib
import dataclasses
import functools
import hashlib
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import tyro

from data_prep import python_docs
from data_prep.atomic import fsync_directory
from data_prep.codec import Codec, make_codec
from data_prep.errors import InputError, one_line_errors
from data_prep.manifest import FILE_NAME, Manifest, SplitInfo, open_split, read_manifest
from data_prep.shards import ShardWriter


@dataclass(frozen=True)
class Options:
    """Plain text in, training shards out."""

    input: tuple[str, ...]
    """Text files (UTF-8), each one document; or `python-docs`, the text inside every CPython."""
    out: Path
    """The data directory to make."""
    tokenizer: str
    """char, byte, gpt2, a .tiktoken rank file, or a folder with a saved tokenizer."""
    val_fraction: float = 0.1
    """The last part of all characters, kept for validation."""
    shard_tokens: int = 100_000_000
    """Tokens per shard; the last one of a split may be shorter."""
    overwrite: bool = False
    """Make it anew, replacing the data directory that is there once the new one is complete."""


@dataclass(frozen=True)
class Text:
    """One document that is read when needed, so that memory holds one at a time."""

    name: str
    read: Callable[[], str]


@dataclass(frozen=True)
class Survey:
    """What the first pass over the texts found, before anything is written."""

    num_characters: int
    alphabet: str
    files: list[dict[str, Any]]


def open_texts(inputs: tuple[str, ...]) -> list[Text]:
    """The documents that `--input` names, in order."""
    texts: list[Text] = []
    for name in inputs:
        if name == "python-docs":
            texts.append(Text("pydoc_data.topics", python_docs.topics))
            texts.append(Text("standard library docstrings", python_docs.docstrings))
        else:
            texts.append(Text(name, functools.partial(read_utf8, Path(name))))
    if not texts:
        raise InputError("--input needs at least one file, or python-docs")
    return texts


def read_utf8(path: Path) -> str:
    """A file's text byte for byte, line ends untouched; InputError with file and place if it is not UTF-8."""
    if not path.exists():
        raise InputError(f"{path}: no such file (--input)")
    if not path.is_file():
        raise InputError(f"{path}: not a file; --input takes text files")
    data = path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = data[error.start]
        raise InputError(f"{path}:{line}: not UTF-8 (byte 0x{byte:02x} at {error.start}); convert it first") from error


def survey(texts: list[Text]) -> Survey:
    """Read everything once: hashes, the alphabet, and every fault of the input."""
    characters: set[str] = set()
    num_characters = 0
    files = []
    for text in texts:
        content = text.read()
        if not content:
            raise InputError(f"{text.name}: empty; leave it out of --input")
        data = content.encode("utf-8")
        files.append({"name": Path(text.name).name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
        characters.update(content)
        num_characters += len(content)
    return Survey(num_characters, "".join(sorted(characters)), files)


def write_shards(texts: list[Text], found: Survey, codec: Codec, options: Options, directory: Path) -> Manifest:
    """Encode every text into `directory`, the tail into the val split, and write the manifest last."""
    cut = place_of_cut(found, options)
    splits = {}
    for split, start, stop in (("train", 0, cut), ("val", cut, found.num_characters)):
        with ShardWriter(
            directory,
            split,
            vocab_size=codec.vocab_size,
            eot_id=codec.eot_id,
            shard_tokens=options.shard_tokens,
        ) as writer:
            position = 0
            for text in texts:
                content = text.read()
                part = content[max(0, start - position) : max(0, stop - position)]
                position += len(content)
                if part:
                    append_document(writer, codec, part, text.name)
        tokens = sum(shard.tokens for shard in writer.shards)
        documents = sum(shard.documents for shard in writer.shards)
        splits[split] = SplitInfo(tuple(writer.shards), tokens, documents, writer.stream_sha256)
    codec.save(directory)
    manifest = Manifest({"files": found.files}, byte_options(options), codec.describe(), splits)
    manifest.write(directory)
    return manifest


def place_of_cut(found: Survey, options: Options) -> int:
    """How many characters are training text; InputError if that leaves a split empty."""
    cut = int(found.num_characters * (1 - options.val_fraction))
    if not 0 < cut < found.num_characters:
        raise InputError(
            f"--val-fraction {options.val_fraction} of {found.num_characters} characters leaves a split empty"
        )
    return cut


def append_document(writer: ShardWriter, codec: Codec, text: str, name: str) -> None:
    """One document, begun by EOT where the codec has one. `name` is for what the codec refuses."""
    try:
        ids = codec.encode(text)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    if codec.eot_id is not None:
        ids = np.concatenate([np.array([codec.eot_id], dtype=ids.dtype), ids])
    writer.append(ids, document_starts=[0])


def byte_options(options: Options) -> dict[str, Any]:
    """The options that change the bytes; the tokenizer and the files are recorded by their hashes."""
    return {"val_fraction": options.val_fraction, "shard_tokens": options.shard_tokens}


def check_existing(options: Options, found: Survey, codec: Codec) -> Manifest | None:
    """The manifest in --out if it already holds exactly this; None if --out is free or to be replaced."""
    if not options.out.exists():
        return None
    if not (options.out / FILE_NAME).is_file():
        if options.out.is_dir() and not any(options.out.iterdir()):
            return None
        raise InputError(f"--out {options.out}: exists and is no data directory; choose another or remove it")
    if options.overwrite:
        return None
    manifest = read_manifest(options.out)
    had = (manifest.source, manifest.options, manifest.tokenizer)
    want = ({"files": found.files}, byte_options(options), codec.describe())
    if had == want:
        for split in manifest.splits:
            open_split(options.out, split)  # are all shards there, at their full size?
        return manifest
    names = ("input", "options", "tokenizer")
    differing = " and ".join(name for name, old, new in zip(names, had, want, strict=True) if old != new)
    raise InputError(
        f"--out {options.out}: already holds finished data of another {differing}; "
        "choose another --out, or replace it with --overwrite"
    )


def put_in_place(partial: Path, out: Path) -> None:
    """Give the finished directory its name; what stood there goes only once the new one is complete."""
    replaced = out.with_name(f".{out.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if out.exists():
        out.rename(replaced)
    partial.rename(out)
    fsync_directory(out.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def prepare(options: Options) -> Manifest:
    """The whole stage. Raises InputError, with nothing finished touched, when the input is bad."""
    if not 0 < options.val_fraction < 1:
        raise InputError(f"--val-fraction {options.val_fraction} must lie between 0 and 1")
    if not options.out.name:
        raise InputError(f"--out {options.out}: give the data directory a name of its own")
    if options.out.is_symlink():  # what it points to is made or replaced, not the link
        options = dataclasses.replace(options, out=options.out.resolve())
    started = time.perf_counter()
    texts = open_texts(options.input)
    found = survey(texts)
    place_of_cut(found, options)
    codec = make_codec(options.tokenizer, found.alphabet)
    existing = check_existing(options, found, codec)
    if existing is not None:
        print(f"{options.out}: already complete, nothing to do")
        return existing
    partial = options.out.with_name(f".{options.out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with contextlib.ExitStack() as undo:
        undo.callback(shutil.rmtree, partial, ignore_errors=True)  # a failure frees the disk it filled
        manifest = write_shards(texts, found, codec, options, partial)
        put_in_place(partial, options.out)
        undo.pop_all()
    report(options, manifest, time.perf_counter() - started)
    return manifest


def report(options: Options, manifest: Manifest, seconds: float) -> None:
    num_bytes = sum(file["bytes"] for file in manifest.source["files"])
    print(
        f"{options.out}: {num_bytes:,} bytes, tokenizer {manifest.tokenizer['kind']} "
        f"(vocabulary {manifest.vocab_size:,}), {seconds:.1f} s"
    )
    for name, split in manifest.splits.items():
        print(f"  {name:5} {split.tokens:>14,} tokens  {split.documents:>9,} documents  {len(split.shards)} shards")
    print(f"  fingerprint {manifest.fingerprint[:16]}")


def main(args: list[str] | None = None) -> None:
    with one_line_errors("textfiles"):
        prepare(tyro.cli(Options, args=args, description=__doc__))


if __name__ == "__main__":
    main()
