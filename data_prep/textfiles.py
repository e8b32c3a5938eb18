"""Turn text into training shards: plain text, .jsonl and .parquet files, folders of them, or a preset corpus.
    python data_prep/textfiles.py tinyshakespeare
    python data_prep/textfiles.py tinystories [--input TRAIN.txt --val-input VALID.txt]
    python data_prep/textfiles.py --input FILE|FOLDER... --out data/NAME --tokenizer char|byte|gpt2|FILE
    python data_prep/textfiles.py --input python-docs --out data/python-docs --tokenizer char

Presets (hub/corpora.py): tinyshakespeare, tinystories and openwebtext-1of80, whose files are downloaded and checked,
and openwebtext, which checks the 80 files that --input gives.

100 MB of short stories take 12 s with `gpt2` in one process, 7.6 s in two (two cores, 0.16 GB each), and 6.5 s with
`char`; as one document 14 s and 0.42 GB, 4 s and 0.34 GB. The disk must hold twice the output during the preparation.
Tiny Shakespeare with `char` gives 1,003,854 training and 111,540 validation tokens.

Input: plain text, .jsonl and .parquet (one document per row, its text in --text-column), .txt.gz and .jsonl.gz, and
folders of these. A plain file is one document, unless --split-documents-on names the separator of its documents. Every
byte of the text is kept, line ends around a document too, but for a byte-order mark at the beginning of a file. Only
empty documents are dropped, and counted, and with --on-bad-row skip those that cannot be read.

The validation split is the last --val-fraction of all characters, or --val-input. A plain file that is one document is
cut at exactly that character; with one file this is nanoGPT's cut. Other documents are kept whole: the cut moves back
to the beginning of the document, so that no row or story lies in both splits.

The output is the same for any number of --workers. It appears under its name only when it is complete. After a stop or
a kill, the same command continues from the finished parts (in .NAME.partial, beside --out). Parts of a file that has
changed since, or of other options, are made again.
"""

import dataclasses
import functools
import itertools
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.errors import InputError, one_line_errors, warn
from common.files import sha256_of_json
from data_prep.hub.corpora import CORPORA
from data_prep.hub.download import fetch
from data_prep.manifest import Manifest
from data_prep.pipeline.bad_rows import (
    MAX_DOCUMENT_BYTES,
    OnBadRow,
    check_max_document_bytes,
    count_reasons,
    options_of_bad_rows,
    shown_reasons,
    skipped_line,
)
from data_prep.pipeline.encode import EncodeTask, Survey, describe_file, make_parts, survey_unit
from data_prep.pipeline.input_files import InputFile, file_state, find_files
from data_prep.pipeline.pack import pack_split
from data_prep.pipeline.partial_dir import (
    PARTS,
    existing_data,
    free_other_parts,
    named_directory,
    put_in_place,
    unfinished_directory,
)
from data_prep.pipeline.sources import (
    Reading,
    Unit,
    describe_skipped,
    is_one_document,
    plan_units,
    read_documents,
    warn_of_marks,
    warn_of_reading,
    warn_of_separator,
)
from data_prep.pipeline.workers import Progress, Workers, available_cores
from data_prep.shards import check_shard_tokens
from data_prep.tokenizer import make_tokenizer

# With less input, starting processes (0.5 s) costs more than it saves.
FEW_BYTES = 2**24


@dataclass(frozen=True)
class Options:
    """Turn text into training shards."""

    input: tuple[str, ...]
    """Files (text in UTF-8, .jsonl, .parquet, .txt.gz, .jsonl.gz) or folders of them; or `python-docs`, the text
    inside every CPython. With a preset: copies of its files, instead of the download."""
    out: Path
    """Data directory to make."""
    tokenizer: str
    """char, byte, gpt2, a .tiktoken rank file, or a folder with a saved tokenizer."""
    val_fraction: float = 0.1
    """Fraction of all characters, at the end, that is kept for validation. Rows and split documents stay whole."""
    shard_tokens: int = 100_000_000
    """Tokens per shard. The last shard of a split may be shorter."""
    overwrite: bool = False
    """Replace the data directory that is there, once the new one is complete."""
    val_input: tuple[str, ...] = ()
    """Files or folders that are the validation split, instead of --val-fraction."""
    split_documents_on: str | None = None
    """Separator of the documents in plain text files, for example '<|endoftext|>'. It is dropped itself; the line ends
    around it are kept. None: each plain text file is one document."""
    text_column: str = "text"
    """Field of .jsonl rows and column of .parquet files that holds the text."""
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    """Most bytes of one document, by which memory is bounded: about ten times as much for each worker. A longer one is
    a bad row."""
    on_bad_row: OnBadRow = "stop"
    """stop: a row that cannot be read ends the command, with its place. skip: such rows are left out, counted by reason
    in the report and in the manifest (docs/data.md)."""
    workers: int | None = None
    """Number of processes. None: all available cores, or one where there is little text. The output does not depend on
    it."""


@dataclass(frozen=True)
class Source:
    """The input files of one run, and how they are read. val is empty if --val-fraction decides."""

    train: list[InputFile]
    val: list[InputFile]
    reading: Reading
    urls: list[str]

    @property
    def files(self) -> list[InputFile]:
        return self.train + self.val


def find_source(options: Options, preset: str | None) -> Source:
    """Return the files of --input, or download those of the preset."""
    reading = Reading(
        options.split_documents_on,
        options.text_column,
        max_document_bytes=options.max_document_bytes,
        on_bad_row=options.on_bad_row,
    )
    urls: list[str] = []
    train, val = options.input, options.val_input
    if preset is not None:
        corpus = CORPORA[preset]
        if bool(val) != bool(train and corpus.val):
            flags = "both --input and --val-input" if corpus.val else "--input alone"
            raise InputError(f"{preset} takes {flags}, or neither to download it")
        if not train:
            train, val = download(preset, options.out.parent / "downloads")
        urls = [file.url for file in corpus.train + corpus.val]
    if not train:
        raise InputError("--input needs at least one file or folder, or python-docs")
    train_files, train_warnings = find_files(train)
    val_files, val_warnings = find_files(val, "--val-input")
    for warning in train_warnings + val_warnings:
        warn("textfiles", warning)
    warn_of_reading("textfiles", reading, train_files + val_files)
    warn_of_separator("textfiles", reading, train_files + val_files)
    return Source(train_files, val_files, reading, urls)


def download(preset: str, folder: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Download a preset's files into `folder`, if all have a pinned hash; return the paths of train and val."""
    corpus = CORPORA[preset]
    paths = {file: folder / f"{preset}-{file.name}" for file in corpus.train + corpus.val}
    for file in paths:
        if file.sha256 is None:
            raise InputError(f"no sha256 is pinned for {file.url}; fetch {preset}'s files and give them with --input")
    for file, path in paths.items():
        fetch(file.url, str(file.sha256), path, Progress("download", file.num_bytes or 0))
    train, val = (tuple(str(paths[file]) for file in files) for files in (corpus.train, corpus.val))
    return train, val


def check_pins(preset: str, described: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the descriptions of the files, with the preset's names; raise InputError if they are other files."""
    corpus = CORPORA[preset]
    pinned = corpus.train + corpus.val
    if len(described) != len(pinned):
        raise InputError(f"{preset} is {len(pinned)} files, not the {len(described)} given")
    for file, record in zip(pinned, described, strict=True):
        if file.sha256 is not None and record["sha256"] != file.sha256:
            raise InputError(
                f"{record['name']}: its sha256 is {record['sha256'][:16]}..., but {preset}'s {file.name} has "
                f"{file.sha256[:16]}...; to use it anyway give --input without the preset"
            )
    return [record | {"name": file.name} for file, record in zip(pinned, described, strict=True)]


def survey(units: list[Unit], options: Options, source: Source, workers: Workers) -> list[Survey]:
    """Read all units once: find every fault, and the counts that place the cut, before anything is written."""
    survey_one = functools.partial(survey_unit, reading=source.reading, with_alphabet=options.tokenizer == "char")
    progress = Progress("survey", sum(unit.num_bytes for unit in units))
    return workers.map(survey_one, units, lambda unit, result: progress.add(unit.num_bytes, result.documents))


def divide(
    units: list[Unit], surveys: list[Survey], val_fraction: float, reading: Reading
) -> tuple[list[Unit], list[Unit]]:
    """Return the units of train and of val. The unit that is cut is in both, with a different part in each."""
    num_characters = sum(result.characters for result in surveys)
    cut = int(num_characters * (1 - val_fraction))
    refusal = f"--val-fraction {val_fraction} of {num_characters} characters leaves a split empty"
    if not num_characters:
        reasons = count_reasons(result.skipped for result in surveys)
        raise InputError(f"no text in --input{f', without its bad rows ({shown_reasons(reasons)})' if reasons else ''}")
    if not 0 < cut < num_characters:
        raise InputError(refusal)
    index = start = 0
    while start + surveys[index].characters <= cut:
        start += surveys[index].characters
        index += 1
    position, characters_before = cut - start, cut - start
    if not is_one_document(units[index].file, reading):
        position, characters_before = document_at(units[index], reading, cut - start)
    if start + characters_before == 0 and sum(result.documents for result in surveys) == 1:
        needed = "give --val-input" + (", or a --split-documents-on that occurs in it" if reading.split_on else "")
        raise InputError(f"one document holds all of the text, so a cut leaves a split empty; {needed}")
    if start + characters_before == 0:
        fault = "the cut falls in the first document, which is kept whole"
        raise InputError(f"{refusal}: {fault}; raise --val-fraction or give --val-input")
    head = [dataclasses.replace(units[index], last=position)] if position else []
    tail = dataclasses.replace(units[index], first=position)
    return units[:index] + head, [tail, *units[index + 1 :]]


def document_at(unit: Unit, reading: Reading, character: int) -> tuple[int, int]:
    """Return the index of the unit's document that holds `character`, and the number of characters before it."""
    before = 0
    for number, (_, text) in enumerate(read_documents(unit, reading)):
        if before + len(text) > character:
            return number, before
        before += len(text)
    raise AssertionError(f"{unit} has only {before} characters")


def byte_options(options: Options) -> dict[str, Any]:
    """Return the options that change the bytes. The manifest records tokenizer and files by their hashes."""
    return {
        "val_fraction": None if options.val_input else options.val_fraction,
        "shard_tokens": options.shard_tokens,
        "split_documents_on": options.split_documents_on,
        "text_column": options.text_column,
    } | options_of_bad_rows(options.max_document_bytes)


def check_options(options: Options) -> None:
    if not 0 < options.val_fraction < 1:
        raise InputError(f"--val-fraction {options.val_fraction} must lie between 0 and 1")
    check_shard_tokens(options.shard_tokens)
    if options.split_documents_on == "":
        raise InputError("--split-documents-on needs at least one character")
    check_max_document_bytes(options.max_document_bytes)
    if options.workers is not None and options.workers < 1:
        raise InputError(f"--workers {options.workers} must be at least 1")


def prepare(options: Options, preset: str | None = None) -> Manifest:
    """Make the data directory of the options, or of a preset's files. Bad input leaves finished data as it was."""
    check_options(options)
    options = dataclasses.replace(options, out=named_directory(options.out))
    started = time.perf_counter()
    source = find_source(options, preset)
    states = {file: file_state(file) for file in source.files}
    train, val = (
        [unit for file in files for unit in plan_units(file, source.reading)] for files in (source.train, source.val)
    )
    units = train + val
    processes = num_workers(options, units)
    with Workers(processes) as workers:
        described = workers.map(describe_file, source.files)
        if preset is not None:
            described = check_pins(preset, described)
        surveys = survey(units, options, source, workers)
        warn_of_marks("textfiles", sum(result.eot_marks for result in surveys), source.reading)
    if not source.val:
        train, val = divide(units, surveys, options.val_fraction, source.reading)
    elif not all(sum(result.characters for result in part) for part in (surveys[: len(train)], surveys[len(train) :])):
        raise InputError("--input and --val-input must both hold text")
    alphabet = "".join(sorted(set().union(*(result.alphabet for result in surveys))))
    tokenizer = make_tokenizer(options.tokenizer, alphabet)
    num_train, num_empty = len(source.train), sum(result.empty_documents for result in surveys)
    lists = {"files": described[:num_train], "val_files": described[num_train:], "urls": source.urls}
    record = {name: value for name, value in lists.items() if value} | {"empty_documents": num_empty}
    skipped = [(unit, result.skipped) for unit, result in zip(units, surveys, strict=True)]
    record |= describe_skipped(skipped, source.reading)

    def existing() -> Manifest | None:
        recorded = byte_options(options)
        return existing_data(options.out, record.__eq__, recorded, tokenizer, overwrite=options.overwrite)

    if (manifest := existing()) is not None:
        print(f"{options.out}: already complete, nothing to do")
        return manifest
    with unfinished_directory(options.out) as partial:
        if existing() is not None:
            raise InputError(f"--out {options.out}: another process has made it meanwhile")
        tokenizer.save(partial)
        tokenizer_hash = sha256_of_json(tokenizer.describe())
        hashes = {file: result["sha256"] for file, result in zip(source.files, described, strict=True)}
        tasks = [
            EncodeTask(unit, source.reading, hashes[file], states[file], partial, tokenizer_hash, partial / PARTS)
            for unit in train + val
            for file in [unit.file]
        ]
        free_other_parts(partial, {task.stem for task in tasks})
        # A second pool, so that its processes are gone before a failure clears the directory.
        with Workers(processes) as workers:
            parts = make_parts(tasks, workers, "textfiles")
        splits = {}
        for name, split_parts in (("train", parts[: len(train)]), ("val", parts[len(train) :])):
            blocks = itertools.chain.from_iterable(part.blocks() for part in split_parts)
            num_tokens = sum(part.tokens for part in split_parts)
            splits[name] = pack_split(partial, name, blocks, num_tokens, tokenizer, options.shard_tokens)
        manifest = Manifest(record, byte_options(options), tokenizer.describe(), splits)
        manifest.write(partial)
        put_in_place(partial, options.out)
    report(options, manifest, sum(unit.num_bytes for unit in units), time.perf_counter() - started)
    return manifest


def num_workers(options: Options, units: list[Unit]) -> int:
    """Return --workers, else one (this process) if there is little text, else the number of cores."""
    is_little = sum(unit.num_bytes for unit in units) < FEW_BYTES
    return min(options.workers or (1 if is_little else available_cores()), len(units))


def report(options: Options, manifest: Manifest, num_bytes: int, seconds: float) -> None:
    print(
        f"{options.out}: {num_bytes:,} bytes, tokenizer {manifest.tokenizer['kind']} "
        f"(vocabulary {manifest.vocab_size:,}), {seconds:.1f} s, {num_bytes / seconds / 1e6:.1f} MB/s"
    )
    for name, split in manifest.splits.items():
        print(f"  {name:5} {split.tokens:>14,} tokens  {split.documents:>9,} documents  {len(split.shards)} shards")
    if manifest.source["empty_documents"]:
        print(f"  {manifest.source['empty_documents']:,} empty documents dropped")
    if "skipped" in manifest.source:
        print(f"  {skipped_line(manifest.source['skipped'])}")
    print(f"  fingerprint {manifest.fingerprint[:16]}")


def parse(args: list[str]) -> tuple[Options, str | None]:
    """Parse `[PRESET] [--flag value ...]` into the options and the preset, which sets the flags' defaults."""
    import tyro  # here, because workers import this module and do not need it

    if not args or args[0].startswith("-"):
        return tyro.cli(Options, args=args, description=__doc__), None
    if args[0] not in CORPORA:
        raise InputError(f"no preset {args[0]!r}, only {', '.join(CORPORA)}; files are given with --input")
    corpus = CORPORA[args[0]]
    default = Options((), Path("data") / args[0], corpus.tokenizer, corpus.val_fraction)
    default = dataclasses.replace(default, split_documents_on=corpus.split_documents_on)
    return tyro.cli(Options, args=args[1:], default=default, description=__doc__), args[0]


def main(args: list[str] | None = None) -> None:
    with one_line_errors("textfiles"):
        prepare(*parse(sys.argv[1:] if args is None else args))


if __name__ == "__main__":
    main()
