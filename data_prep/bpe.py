"""Train a byte-level BPE tokenizer with GPT-2's split pattern; tiktoken serves it like every other.

    python data_prep/bpe.py --input TinyStories.txt --split-documents-on '<|endoftext|>' --vocab-size 10000 \\
        --out tokenizers/tinystories-10k [--compare other.txt] [--trainer reference]
    python data_prep/textfiles.py --input ... --tokenizer tokenizers/tinystories-10k --out data/mine

10,000 ids from 2 MB of TinyStories: 0.6 to 0.9 s of training, 1.5 to 2 s in all, 0.07 GB, and 4.170 bytes per token
on held-out text. 32,000 ids from 15 MB of mixed text: 4 to 5 s, 5 to 7 s in all, 0.15 GB; from 100 MB 37 s, 0.42 GB
(two cores, not alone on them). --trainer reference: 0.7 s for the first, 11 s for the second.

The input is what data_prep/textfiles.py reads: text, .jsonl, .parquet, .gz, folders. The command reads all of it and
trains on at most --sample-bytes, spread over all documents (pipeline/text_sample.py). A small part that is never
trained on measures bytes per token and speed.

The vocabulary is the 256 bytes in GPT-2's order, then the merges, then EOT, the last id, which no text becomes.
`<|endoftext|>` in the text is ordinary text unless --split-documents-on names it. The pattern splits it in three, so
it is never one token. No merge crosses a word of the pattern, so none crosses a document either.

Hugging Face `tokenizers` makes the merges. --trainer reference (data_prep/bpe_reference.py, written to be read) makes
the same merges and says where the time goes. Hugging Face merges listed pairs; tiktoken merges any two neighbours
whose bytes together are a token. The ids are the same: the bytes between two ends of tokens are merged as if they
stood alone, so bytes that are a token never appear as two other tokens. For the same reason no two merges make the
same bytes.

--out holds ranks.tiktoken, codec.json and training.json (inputs, options, versions and results). The same input and
options give the same bytes. The folder appears whole or not at all, and only --overwrite replaces it.
"""

import dataclasses
import importlib.metadata
import resource
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import tyro

from common.errors import InputError, one_line_errors, reading_from, warn
from common.files import write_json_atomically
from common.reading import NATURAL, read_own_json
from data_prep import bpe_reference
from data_prep.pipeline.bad_rows import (
    MAX_DOCUMENT_BYTES,
    OnBadRow,
    Skipped,
    check_max_document_bytes,
    options_of_bad_rows,
    skipped_line,
)
from data_prep.pipeline.encode import describe_file
from data_prep.pipeline.input_files import InputFile, file_state, find_files
from data_prep.pipeline.partial_dir import is_free, named_directory, put_in_place, unfinished_directory
from data_prep.pipeline.sources import (
    Reading,
    Unit,
    describe_skipped,
    warn_of_marks,
    warn_of_reading,
    warn_of_separator,
)
from data_prep.pipeline.text_sample import HELD_OUT_BYTES, RULE, Drawn, draw, pieces, read_texts, spread
from data_prep.pipeline.workers import Progress
from data_prep.shards import MAX_VOCAB_SIZE
from data_prep.tokenizer import BYTE_ORDER, FOLDER, BpeTokenizer, Tokenizer, load_tokenizer
from data_prep.words import GPT2_PATTERN

RECORD_FILE = "training.json"
# Gao et al. 2020, arXiv:2101.00027, table 1: 825.18 GiB of text.
PILE_BYTES = 825.18 * 2**30
TIMED_SECONDS = 0.3
NUM_LONGEST = 8
FORM = {
    "inputs": list,
    "options": dict,
    "tokenizer": dict,
    "held_out": {"bytes": NATURAL, "tokens": range(1, 2**63)},
}
LIBRARIES = {"tokenizers": ["tokenizers"], "reference": ["regex"]}


@dataclass(frozen=True)
class Options:
    """Train a byte-level BPE tokenizer with GPT-2's split pattern."""

    input: tuple[str, ...]
    """Files (text in UTF-8, .jsonl, .parquet, .txt.gz, .jsonl.gz) or folders of them; or `python-docs`, the text
    inside every CPython."""
    vocab_size: int
    """Number of ids: 256 bytes, the merges and EOT."""
    out: Path
    """The folder to make, which --tokenizer of data_prep/textfiles.py takes."""
    trainer: Literal["tokenizers", "reference"] = "tokenizers"
    """The trainer that makes the merges: Hugging Face's library, or our own readable one."""
    sample_bytes: int = 100_000_000
    """Largest number of bytes to train on. More than the default gains little: with 32,000 ids, 100 MB of Python and
    its documentation gave 0.2 % fewer tokens than 50 MB (25 MB 0.7 % fewer than 12.5 MB), for twice the time."""
    compare: tuple[str, ...] = ()
    """Other files or folders, read like --input, whose bytes per token are printed too."""
    split_documents_on: str | None = None
    """Separator between the documents of a plain text file, for example '<|endoftext|>'."""
    text_column: str = "text"
    """The field of .jsonl rows and the column of .parquet files that hold the text."""
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    """Most bytes of one row or split document, by which memory is bounded. A longer one is a bad row."""
    on_bad_row: OnBadRow = "stop"
    """stop: a row that cannot be read ends the command, with its place. skip: such rows are left out and counted
    (docs/data.md)."""
    overwrite: bool = False
    """Make the tokenizer anew and replace the existing one once the new one is complete."""


def train_by_tokenizers(texts: Iterable[str], num_tokens: int) -> Any:
    """Return a trained Hugging Face tokenizers.Tokenizer whose ids are ours: bytes in GPT-2's order, then merges."""
    try:
        from tokenizers import Regex, models, pre_tokenizers, trainers
        from tokenizers import Tokenizer as HfTokenizer
    except ImportError as error:
        raise InputError(
            "--trainer tokenizers needs Hugging Face tokenizers: pip install -e '.[bpe]'; or use --trainer reference"
        ) from error
    hf_tokenizer = HfTokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(GPT2_PATTERN), behavior="isolated")
    as_characters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    hf_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, as_characters])
    trainer = trainers.BpeTrainer(
        vocab_size=num_tokens,
        min_frequency=1,
        special_tokens=[],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    hf_tokenizer.train_from_iterator(texts, trainer=trainer)
    return hf_tokenizer


def tokens_of(hf_tokenizer: Any) -> list[bytes]:
    """Return the bytes of every id of a byte-level Hugging Face tokenizer.

    Its vocabulary shows each byte as a character; sorted, these characters are GPT-2's order of the bytes.
    """
    vocabulary = hf_tokenizer.get_vocab()
    alphabet = sorted(token for token in vocabulary if len(token) == 1)
    byte_of = dict(zip(alphabet, BYTE_ORDER, strict=True))
    in_order = sorted(vocabulary, key=vocabulary.__getitem__)
    return [bytes(byte_of[character] for character in token) for token in in_order]


def train(sample: list[bytes], options: Options) -> BpeTokenizer:
    """Train on the sample. Raise InputError if it holds too few different pairs for the vocabulary."""
    texts = pieces(sample)
    num_tokens = options.vocab_size - 1  # EOT is not trained.
    if options.trainer == "reference":
        trained = bpe_reference.train(texts, num_tokens)
        tokens = trained.tokens
        for stage, seconds in trained.seconds.items():
            share = seconds / sum(trained.seconds.values())
            print(f"  reference: {stage:22} {seconds:8.2f} s  {share:4.0%}")
    else:
        tokens = tokens_of(train_by_tokenizers(texts, num_tokens))
    if len(tokens) < num_tokens:
        raise InputError(
            f"--vocab-size {options.vocab_size} needs {num_tokens - 256} merges, but in {sum(map(len, sample))} bytes "
            f"there are only {len(tokens) - 256}; give --vocab-size {len(tokens) + 1} or more text"
        )
    ranks = {token: rank for rank, token in enumerate(tokens)}
    assert len(ranks) == num_tokens, "two merges have the same bytes"
    return BpeTokenizer(ranks, name=options.out.name)


def count_tokens(tokenizer: Tokenizer, documents: list[bytes]) -> int:
    """Return the number of tokens of all documents together."""
    return sum(len(tokenizer.encode(text)) for text in pieces(documents))


def measure_speed(tokenizer: Tokenizer, documents: list[bytes]) -> float:
    """Return the bytes per second of one core: the median of as many passes as fit into TIMED_SECONDS.

    `count_tokens` must have made a first pass over the same documents, to warm up.
    """
    texts = list(pieces(documents))
    passes: list[float] = []
    while sum(passes) < TIMED_SECONDS:
        started = time.perf_counter()
        for text in texts:
            tokenizer.encode(text)
        passes.append(time.perf_counter() - started)
    return sum(map(len, documents)) / statistics.median(passes)


def peak_bytes() -> int:
    """Return the peak memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def check_options(options: Options) -> None:
    """Raise InputError if an option alone is impossible."""
    if not 257 <= options.vocab_size <= MAX_VOCAB_SIZE:
        raise InputError(
            f"--vocab-size {options.vocab_size} must lie between 257 (256 bytes and EOT) and {MAX_VOCAB_SIZE}, "
            "so that ids fit uint16"
        )
    if not 1 <= options.sample_bytes < 2**31:  # `tokenizers` counts pairs in 32 bits.
        raise InputError(f"--sample-bytes {options.sample_bytes} must lie between 1 and {2**31 - 1}")
    if not options.input:
        raise InputError("--input needs at least one file or folder, or python-docs")
    check_max_document_bytes(options.max_document_bytes)
    if options.split_documents_on == "":
        raise InputError("--split-documents-on needs at least one character")


def made_of(options: Options, described: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the part of training.json that decides the tokenizer: inputs and options."""
    names = ("vocab_size", "trainer", "sample_bytes", "split_documents_on", "text_column")
    values = {name: getattr(options, name) for name in names}
    return {"inputs": described, "options": values | options_of_bad_rows(options.max_document_bytes)}


def check_existing(options: Options, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """Return training.json of --out if inputs and options are the same; None if --out is free or is to be replaced.

    Raise InputError if --out holds anything else.
    """
    path = options.out / RECORD_FILE
    with reading_from(options.out):
        if is_free(options.out):
            return None
        if not path.is_file():
            fault = "exists and is no tokenizer of this script; choose another or remove it"
            raise InputError(f"--out {options.out}: {fault}")
        if options.overwrite:
            return None
    record = read_own_json(path, FORM, remedy="--overwrite makes it anew")
    assert record is not None
    differing = ["other input"] if record["inputs"] != wanted["inputs"] else []
    for name in {**wanted["options"], **record["options"]}:
        before, value = record["options"].get(name), wanted["options"].get(name)
        if before != value:
            differing.append(f"--{name.replace('_', '-')} {before} (now {value})")
    if "skipped" in record and options.on_bad_row == "stop":
        differing.append("--on-bad-row skip (now stop)")
    if differing:
        fault = f"already holds a tokenizer of {', '.join(differing)}"
        raise InputError(f"--out {options.out}: {fault}; choose another --out, or replace it with --overwrite")
    try:
        description = load_tokenizer(options.out).describe()
    except InputError as error:
        raise InputError(f"--out {options.out}: {error}; --overwrite makes it anew") from error
    if description != record["tokenizer"]:
        raise InputError(f"{path}: describes another tokenizer than the one beside it; --overwrite makes both anew")
    return record


def save(tokenizer: Tokenizer, record: dict[str, Any], options: Options) -> None:
    """Write all files of the tokenizer into --out, which appears at once."""
    with unfinished_directory(options.out) as partial:
        if check_existing(options, record) is not None:
            raise InputError(f"--out {options.out}: another process has made it meanwhile")
        tokenizer.save(partial)
        for path in (partial / FOLDER).iterdir():
            path.rename(partial / path.name)
        (partial / FOLDER).rmdir()
        write_json_atomically(partial / RECORD_FILE, record)
        put_in_place(partial, options.out)


def make(
    options: Options, drawn: Drawn, wanted: dict[str, Any], skipped: dict[str, Any], read_seconds: float
) -> dict[str, Any]:
    """Train, measure and save the tokenizer, and return training.json. An error leaves what --out held untouched."""
    sample_bytes, held_out_bytes = sum(map(len, drawn.sample)), sum(map(len, drawn.held_out))
    print(
        f"  read      {drawn.num_bytes:,} bytes, {drawn.documents:,} documents, in {read_seconds:.2f} s; "
        f"trained on {sample_bytes:,} bytes, {len(drawn.sample):,} documents"
    )
    started = time.perf_counter()
    tokenizer = train(drawn.sample, options)
    print(f"  train     {time.perf_counter() - started:.2f} s, peak memory {peak_bytes() / 1e9:.2f} GB")
    num_tokens = count_tokens(tokenizer, drawn.held_out)
    rate = measure_speed(tokenizer, drawn.held_out)
    hours = PILE_BYTES / rate / 3600
    print(
        f"  encode    {rate / 1e6:.1f} MB/s on one core; The Pile (825.18 GiB) would take {hours:.1f} hours on one "
        f"core, {hours / 30:.2f} on thirty"
    )
    record = (
        wanted
        | skipped
        | {
            "versions": {name: importlib.metadata.version(name) for name in LIBRARIES[options.trainer]},
            "read": {"documents": drawn.documents, "bytes": drawn.num_bytes},
            "sample": {"rule": RULE, "documents": len(drawn.sample), "bytes": sample_bytes},
            "held_out": {"documents": len(drawn.held_out), "bytes": held_out_bytes, "tokens": num_tokens},
            "merges": tokenizer.vocab_size - 257,
            "tokenizer": tokenizer.describe(),
        }
    )
    save(tokenizer, record, options)
    return record


def prepare(options: Options) -> BpeTokenizer:
    """Run the whole command: keep the tokenizer of the same input and options, or make it; then print its figures."""
    check_options(options)
    options = dataclasses.replace(options, out=named_directory(options.out))
    files, warnings = find_files(options.input)
    all_files = list(files)
    compare_files: dict[str, list[InputFile]] = {}
    for name in options.compare:
        compare_files[name], more = find_files((name,), "--compare")
        all_files += compare_files[name]
        warnings += more
    reading = Reading(
        options.split_documents_on,
        options.text_column,
        max_document_bytes=options.max_document_bytes,
        on_bad_row=options.on_bad_row,
    )
    for warning in warnings:
        warn("bpe", warning)
    warn_of_reading("bpe", reading, all_files)
    warn_of_separator("bpe", reading, files)
    compared = {name: sample_of(name, some, reading) for name, some in compare_files.items()}
    before = [file_state(file) for file in files]
    wanted = made_of(options, [describe_file(file) for file in files])
    print(f"{options.out}: {options.vocab_size:,} ids: 256 bytes, {options.vocab_size - 257:,} merges, EOT")
    record = check_existing(options, wanted)
    if record is not None:
        print("  already complete, nothing to do")
    else:
        started = time.perf_counter()
        progress = Progress("read", sum(described["bytes"] for described in wanted["inputs"]))
        skipped: list[tuple[Unit, Skipped]] = []
        drawn = draw(read_texts(files, reading, progress, skipped), options.sample_bytes)
        if [file_state(file) for file in files] != before:
            raise InputError("a file of --input changed while it was read; run the same command again")
        warn_of_marks("bpe", drawn.eot_marks, reading)
        described = describe_skipped(skipped, reading)
        if described:
            print(f"  skipped   {skipped_line(described['skipped'])}")
        record = make(options, drawn, wanted, described, time.perf_counter() - started)
    tokenizer = load_tokenizer(options.out)
    assert isinstance(tokenizer, BpeTokenizer)
    print(f"  longest   {longest_tokens(tokenizer)}")
    print(compression("held out", record["held_out"]["bytes"], record["held_out"]["tokens"]))
    for name, documents in compared.items():
        print(compression("compare", sum(map(len, documents)), count_tokens(tokenizer, documents)), f"of {name}")
    return tokenizer


def sample_of(name: str, files: list[InputFile], reading: Reading) -> list[bytes]:
    """Return about HELD_OUT_BYTES of text of a --compare input, spread over its documents."""
    progress = Progress("compare", sum(describe_file(file)["bytes"] for file in files))
    documents = spread(read_texts(files, reading, progress, []), HELD_OUT_BYTES)
    if not documents:
        raise InputError(f"--compare {name}: no text in it")
    return documents


def longest_tokens(tokenizer: BpeTokenizer) -> str:
    """Return the NUM_LONGEST longest tokens in bytes, earlier ones first, each cut to 40 characters."""
    lengths = tokenizer.byte_lengths()
    longest = sorted(range(tokenizer.vocab_size), key=lambda index: (-lengths[index], index))[:NUM_LONGEST]
    texts = [tokenizer.decode_bytes([index]).decode("utf-8", "replace") for index in longest]
    return " ".join(repr(text if len(text) <= 40 else f"{text[:37]}...") for text in texts)


def compression(title: str, num_bytes: int, num_tokens: int) -> str:
    """Return a line with the bytes per token."""
    return f"  {title:9} {num_bytes / num_tokens:.3f} bytes per token ({num_bytes:,} bytes, {num_tokens:,} tokens)"


def main(args: list[str] | None = None) -> None:
    with one_line_errors("bpe"):
        prepare(tyro.cli(Options, args=args, description=__doc__))


if __name__ == "__main__":
    main()
