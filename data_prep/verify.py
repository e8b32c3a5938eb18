"""Is a data directory what its manifest says? Re-hash, recount, decode a sample.

    python data_prep/verify.py data/NAME [--samples 3]
    python data_prep/verify.py data/NAME --sequence 7 1200 --seq-len 1024
    python data_prep/verify.py --adopt DIRECTORY --tokenizer gpt2

Reads every byte once (about 3 s per gigabyte, from memory). Ends with `sound` and exit status 0, or with
one line per fault and exit status 1 (2 when the manifest or the tokenizer cannot be read at all).

`--adopt` gives ready-made token files a manifest and a tokenizer first, in place, without touching them: the shards of
llm.c and modded-nanogpt (*_train_*.bin), nanoGPT's train.bin and val.bin, build-nanogpt's *.npy. Then they can be
trained on and verified like any other data. That reads every byte three times.

`--sequence` prints the text of these training sequences and does nothing else.
"""

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import tyro

from common.errors import InputError, one_line_errors
from common.files import sha256_of_file
from common.former_flags import refuse_former_flags
from data_prep.adopt import add_tokens, adopt
from data_prep.manifest import Manifest, SplitInfo, read_manifest
from data_prep.pipeline.workers import Progress
from data_prep.sequence_text import show_sequences
from data_prep.shards import ShardInfo
from data_prep.tokenizer import Tokenizer, load_tokenizer, make_tokenizer


@dataclass(frozen=True)
class Options:
    """Is a data directory what its manifest says?"""

    directory: Annotated[Path, tyro.conf.Positional]
    """The data directory."""
    samples: int = 1
    """Beginnings of documents to print per split."""
    adopt: bool = False
    """First give the token files of another project, which lie there, a manifest and a tokenizer."""
    tokenizer: str | None = None
    """With --adopt, what made the ids: gpt2, a .tiktoken rank file, or a folder with a saved tokenizer."""
    sequence: tuple[int, ...] = ()
    """Print the text of these training sequences, numbered from 0, and do nothing else."""
    seq_len: int = 1024
    """With --sequence, the run's --train.seq-len."""
    split: str = "train"
    """With --sequence, the split."""


def faults_of(directory: Path, manifest: Manifest, tokenizer: Tokenizer) -> list[str]:
    """Every way in which the files differ from the manifest, one line each."""
    faults = []
    if tokenizer.describe() != manifest.tokenizer:
        faults.append(f"{directory}: its tokenizer is not the one in the manifest")
    for split in manifest.splits.values():
        faults += faults_of_split(directory, split, manifest)
    return faults


def faults_of_split(directory: Path, split: SplitInfo, manifest: Manifest) -> list[str]:
    """Faults of every shard, then of the split's totals and of its tokens as one stream."""
    faults = []
    stream = hashlib.sha256()
    progress = Progress("verify", sum(info.bytes for info in split.shards))
    for info in split.shards:
        try:
            faults += faults_of_shard(directory, info, manifest, stream)
        except (InputError, FileNotFoundError) as error:
            faults.append(str(error))
        progress.add(info.bytes, info.documents)
    if faults:
        return faults
    if stream.hexdigest() != split.stream_sha256:
        faults.append(f"{directory}: the shards' tokens are not the stream that the manifest names")
    for total in ("tokens", "documents"):
        counted = sum(getattr(info, total) for info in split.shards)
        if counted != getattr(split, total):
            faults.append(f"{directory}: {counted} {total} in shards, {getattr(split, total)} in the manifest")
    return faults


def faults_of_shard(directory: Path, info: ShardInfo, manifest: Manifest, stream: "hashlib._Hash") -> list[str]:
    """Faults of one shard and its index; its tokens are added to the `stream` hash."""
    shard = manifest.open_shard(directory, info)
    path = shard.path
    add_tokens(stream, shard.tokens)
    faults = []
    if sha256_of_file(path) != info.sha256:
        faults.append(f"{path}: sha256 differs from the manifest's")
    if info.idx_sha256 is not None and sha256_of_file(path.with_suffix(".idx")) != info.idx_sha256:
        faults.append(f"{path.with_suffix('.idx')}: sha256 differs from the manifest's")
    starts = shard.document_starts()
    documents = shard.documents if info.format == "ladder" else len(starts)
    stated = (info.tokens, info.documents, info.bytes, manifest.vocab_size, manifest.tokenizer["eot_id"])
    actual = (len(shard.tokens), documents, path.stat().st_size, shard.vocab_size, shard.eot_id)
    if actual != stated:
        faults.append(f"{path}: (tokens, documents, bytes, vocabulary, EOT) {actual}, in the manifest {stated}")
    if len(shard.tokens) and int(shard.tokens.max()) >= manifest.vocab_size:
        faults.append(f"{path}: holds id {int(shard.tokens.max())}, vocabulary is {manifest.vocab_size}")
    if len(starts) != info.documents:
        faults.append(f"{path}: {len(starts)} documents in its index, {info.documents} in the manifest")
    elif shard.eot_id is not None and not np.array_equal(np.flatnonzero(shard.tokens == shard.eot_id), starts):
        faults.append(f"{path}: its index does not name exactly the places of EOT")
    return faults


def print_samples(directory: Path, manifest: Manifest, tokenizer: Tokenizer, num_samples: int) -> None:
    """The first tokens of documents spread over each split, as text."""
    for name, split in manifest.splits.items():
        shard = manifest.open_shard(directory, split.shards[0])
        starts = shard.document_starts()
        for start in starts[:: max(1, len(starts) // max(1, num_samples))][:num_samples]:
            ids = shard.tokens[int(start) : int(start) + 60].tolist()
            print(f"{name} at {int(start):,}: {tokenizer.decode_bytes(ids).decode('utf-8', errors='replace')!r}")


def adopt_directory(options: Options) -> None:
    if options.tokenizer in (None, "char"):
        raise InputError("--adopt needs the --tokenizer that made the ids: gpt2, byte, a rank file or a saved folder")
    tokenizer = make_tokenizer(options.tokenizer, "")
    is_new = adopt(options.directory, tokenizer)
    print(f"{options.directory}: {'adopted' if is_new else 'already adopted, nothing to do'}")


def settings_without_effect(options: Options) -> list[str]:
    """The flags that were given and do nothing, beside others of them."""
    said = []
    if options.tokenizer is not None and not options.adopt:
        said.append("--tokenizer has no effect without --adopt")
    if options.samples != Options.samples and options.sequence:
        said.append("--samples has no effect with --sequence")
    for flag, is_set in (
        ("--seq-len", options.seq_len != Options.seq_len),
        ("--split", options.split != Options.split),
    ):
        if is_set and not options.sequence:
            said.append(f"{flag} has no effect without --sequence")
    return said


def main(args: list[str] | None = None) -> None:
    with one_line_errors("verify"):
        refuse_former_flags(sys.argv[1:] if args is None else args)
        options = tyro.cli(Options, args=args, description=__doc__)
        for line in settings_without_effect(options):
            print(f"verify: warning: {line}", file=sys.stderr, flush=True)
        if options.adopt and options.sequence:
            raise InputError("--adopt and --sequence are two things: adopt first, then look at sequences")
        if options.adopt:
            adopt_directory(options)
        manifest = read_manifest(options.directory)
        tokenizer = load_tokenizer(options.directory)
        if options.sequence:
            show_sequences(
                options.directory,
                manifest,
                tokenizer,
                split=options.split,
                sequences=options.sequence,
                seq_len=options.seq_len,
            )
            return
        faults = faults_of(options.directory, manifest, tokenizer)
        if faults:
            print("\n".join(faults), file=sys.stderr)
            sys.exit(1)
        print_samples(options.directory, manifest, tokenizer, options.samples)
        totals = ", ".join(f"{name} {split.tokens:,} tokens" for name, split in manifest.splits.items())
        print(f"sound: {totals}; fingerprint {manifest.fingerprint[:16]}")


if __name__ == "__main__":
    main()
