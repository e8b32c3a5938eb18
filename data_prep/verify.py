"""Check a data directory against its manifest: hash and count everything again, and decode a sample.

    python data_prep/verify.py data/NAME [--samples 3]
    python data_prep/verify.py data/NAME --sequence 7 1200 --seq-len 1024
    python data_prep/verify.py --adopt DIRECTORY --tokenizer gpt2

The command reads every byte once (about 3 s per gigabyte, from memory). It ends with `sound` and exit status 0, or
with one line per fault and exit status 1 (2 if the manifest or the tokenizer cannot be read at all).

`--adopt` first writes a manifest and a tokenizer beside ready-made token files, which stay untouched: the shards of
llm.c and modded-nanogpt (*_train_*.bin), nanoGPT's train.bin and val.bin, or build-nanogpt's *.npy. They can then be
trained on and verified like any other data. Adoption reads every byte three times.

`--sequence` only prints the text of these training sequences.
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

from common.errors import InputError, one_line_errors, warn
from common.former_flags import refuse_former_flags
from data_prep.adopt import add_tokens, adopt
from data_prep.manifest import Manifest, SplitInfo, read_manifest
from data_prep.pipeline.workers import Progress
from data_prep.sequence_text import show_sequences
from data_prep.shard_check import ShardCheck, stated_files
from data_prep.shards import ShardInfo
from data_prep.tokenizer import Tokenizer, load_tokenizer, make_tokenizer

SECONDS_BETWEEN_REPORTS = 0.2


@dataclass(frozen=True)
class Options:
    """Check a data directory against its manifest."""

    directory: Annotated[Path, tyro.conf.Positional]
    """The data directory."""
    samples: int = 1
    """Number of documents per split whose beginning is printed."""
    adopt: bool = False
    """First write a manifest and a tokenizer beside the token files of another project."""
    tokenizer: str | None = None
    """With --adopt, the tokenizer that made the ids: gpt2, byte, a .tiktoken rank file, or a saved folder."""
    sequence: tuple[int, ...] = ()
    """Only print the text of these training sequences, numbered from 0."""
    seq_len: int = 1024
    """With --sequence, the --train.seq-len of the run."""
    split: str = "train"
    """With --sequence, the split that holds the sequences."""


def faults_of(directory: Path, manifest: Manifest, tokenizer: Tokenizer) -> list[str]:
    """Return one line for each difference between the files and the manifest."""
    faults = []
    if tokenizer.describe() != manifest.tokenizer:
        faults.append(f"{directory}: its tokenizer is not the one in the manifest")
    file_faults = faults_of_files(directory, manifest)
    for split in manifest.splits.values():
        faults += faults_of_split(directory, split, manifest, file_faults)
    return faults


def faults_of_files(directory: Path, manifest: Manifest) -> dict[Path, str]:
    """Return the faults of shards and indexes as bytes, by path: their sizes, hashes and ids."""
    with ShardCheck(stated_files(directory, manifest.splits.values()), manifest.vocab_size) as check:
        progress, reported = Progress("verify", check.total_bytes), 0
        while not check.wait(SECONDS_BETWEEN_REPORTS):
            progress.add(check.done_bytes - reported)
            reported = check.done_bytes
    return check.faults


def faults_of_split(directory: Path, split: SplitInfo, manifest: Manifest, file_faults: dict[Path, str]) -> list[str]:
    """Return the faults of every shard or, if there are none, that of the split's stream.

    Shards with a fault in `file_faults` are not looked into.
    """
    faults = []
    stream = hashlib.sha256()
    for info in split.shards:
        path = directory / info.file
        own = [file_faults[file] for file in (path, path.with_suffix(".idx")) if file in file_faults]
        try:
            faults += own or faults_of_shard(directory, info, manifest, stream)
        except InputError as error:
            faults.append(str(error))
    if faults:
        return faults
    if stream.hexdigest() != split.stream_sha256:
        faults.append(f"{directory}: the shards' tokens are not the stream that the manifest names")
    return faults


def faults_of_shard(directory: Path, info: ShardInfo, manifest: Manifest, stream: "hashlib._Hash") -> list[str]:
    """Return how one shard and its index contradict the manifest, and add its tokens to the hash of the stream."""
    shard = manifest.open_shard(directory, info)
    path = shard.path
    add_tokens(stream, shard.tokens)
    faults = []
    starts = shard.document_starts()
    if len(starts) != info.documents:
        faults.append(f"{path}: {len(starts)} documents in its index, {info.documents} in the manifest")
    elif shard.eot_id is not None and not np.array_equal(np.flatnonzero(shard.tokens == shard.eot_id), starts):
        faults.append(f"{path}: its index does not name exactly the positions of EOT")
    return faults


def print_samples(directory: Path, manifest: Manifest, tokenizer: Tokenizer, num_samples: int) -> None:
    """Print the beginning of documents spread over the first shard of each split."""
    for name, split in manifest.splits.items():
        shard = manifest.open_shard(directory, split.shards[0])
        starts = shard.document_starts()
        for start in starts[:: max(1, len(starts) // max(1, num_samples))][:num_samples]:
            ids = shard.tokens[int(start) : int(start) + 60].tolist()
            print(f"{name} at {int(start):,}: {tokenizer.decode_bytes(ids).decode('utf-8', errors='replace')!r}")


def warn_of_idle_flags(options: Options) -> None:
    """Warn of each flag that has no effect with the other flags."""
    idle_flags = {
        "--tokenizer has no effect without --adopt": options.tokenizer is not None and not options.adopt,
        "--samples has no effect with --sequence": options.samples != Options.samples and bool(options.sequence),
        "--seq-len has no effect without --sequence": options.seq_len != Options.seq_len and not options.sequence,
        "--split has no effect without --sequence": options.split != Options.split and not options.sequence,
    }
    for warning, is_idle in idle_flags.items():
        if is_idle:
            warn("verify", warning)


def main(args: list[str] | None = None) -> None:
    with one_line_errors("verify"):
        refuse_former_flags(sys.argv[1:] if args is None else args)
        options = tyro.cli(Options, args=args, description=__doc__)
        warn_of_idle_flags(options)
        if options.adopt and options.sequence:
            raise InputError("--adopt and --sequence cannot be combined: adopt first, then print sequences")
        if options.adopt:
            if options.tokenizer in (None, "char"):
                made_by = "gpt2, byte, a rank file or a saved folder"
                raise InputError(f"--adopt needs the --tokenizer that made the ids: {made_by}")
            is_new = adopt(options.directory, make_tokenizer(options.tokenizer, ""))
            print(f"{options.directory}: {'adopted' if is_new else 'already adopted, nothing to do'}")
        manifest = read_manifest(options.directory)
        tokenizer = load_tokenizer(options.directory)
        if options.sequence:
            directory, split, seq_len = options.directory, options.split, options.seq_len
            show_sequences(directory, manifest, tokenizer, split=split, sequences=options.sequence, seq_len=seq_len)
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
