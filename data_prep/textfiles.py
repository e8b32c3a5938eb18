"""Text in, training shards out.

    python data_prep/textfiles.py tinyshakespeare
    python data_prep/textfiles.py tinystories [--input TRAIN.txt --val-input VALID.txt]
    python data_prep/textfiles.py --input FILE|FOLDER... --out data/NAME --tokenizer char|byte|gpt2|FILE
    python data_prep/textfiles.py --input python-docs --out data/python-docs --tokenizer char

Presets (hub/corpora.py), whose files are fetched and checked: tinyshakespeare, tinystories, openwebtext-1of80;
openwebtext checks the 80 files that --input gives.

100 MB of short stories with `gpt2` take 12 s in one process and 7.6 s in two on two cores, 0.16 GB of memory each;
with `char` 6.5 s (one process; the disk decides). One document of 100 MB takes 14 s and 0.42 GB with `gpt2`, 4 s and
0.34 GB with `char`. Disk: twice the output while it is made. Tiny Shakespeare with `char` gives 1,003,854 training
and 111,540 validation tokens.

Input: plain text, .jsonl and .parquet (one document per row, its text in --text-column), .txt.gz and .jsonl.gz, and
folders of these. A plain file is one document unless --split-documents-on says what stands between two. Text is kept
to the byte, line ends around a document too; only documents without any character are dropped, and counted.

The validation split is the last --val-fraction of all characters, or --val-input. A plain file that is one document
is cut at that very character: with one file that is nanoGPT's cut. Any other document is kept whole: the cut moves
back to its beginning, so that no row or story lies in both splits.

The output is the same for any number of --workers. It appears whole, under its name, only when everything is written.
Stopped or killed, the same command goes on from the parts that are finished (in .NAME.partial, beside --out); a part
of a file that has changed since, or of other options, is made again.
"""

import dataclasses
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.errors import InputError, one_line_errors, reading_from
from data_prep.hub.corpora import CORPORA
from data_prep.hub.download import fetch
from data_prep.manifest import Manifest
from data_prep.pipeline.encode import (
    EncodeTask,
    Part,
    Survey,
    SurveyTask,
    describe_file,
    hash_of,
    make_parts,
    survey_unit,
)
from data_prep.pipeline.pack import pack_split, parts_in_turn
from data_prep.pipeline.partial_dir import PARTS, existing_data, free_other_parts, put_in_place, unfinished_directory
from data_prep.pipeline.sources import (
    FileState,
    InputFile,
    Reading,
    Unit,
    file_state,
    find_files,
    is_one_document,
    plan_units,
    read_documents,
)
from data_prep.pipeline.workers import Progress, Workers, available_cores
from data_prep.tokenizer import EOT, Tokenizer, make_tokenizer

# Below this, starting processes (0.5 s) costs more than it saves.
FEW_BYTES = 2**24


@dataclass(frozen=True)
class Options:
    """Text in, training shards out."""

    input: tuple[str, ...]
    """Files (text in UTF-8, .jsonl, .parquet, .txt.gz, .jsonl.gz) or folders of them; or `python-docs`, the text
    inside every CPython. With a preset: a copy of its file, instead of the download."""
    out: Path
    """The data directory to make."""
    tokenizer: str
    """char, byte, gpt2, a .tiktoken rank file, or a folder with a saved tokenizer."""
    val_fraction: float = 0.1
    """The last part of all characters, kept for validation. Rows and split documents stay whole."""
    shard_tokens: int = 100_000_000
    """Tokens per shard; the last one of a split may be shorter."""
    overwrite: bool = False
    """Make it anew, replacing the data directory that is there once the new one is complete."""
    val_input: tuple[str, ...] = ()
    """Files or folders that are the validation split, instead of --val-fraction."""
    split_documents_on: str | None = None
    """Plain text files hold many documents with this between them, for example '<|endoftext|>'. It is dropped
    itself; the line ends around it are kept."""
    text_column: str = "text"
    """The field of .jsonl rows and the column of .parquet files that holds the text."""
    workers: int | None = None
    """Processes. All cores that are available unless given; the output does not depend on it."""


@dataclass(frozen=True)
class Source:
    """The input of one run: files of both kinds, and how they are read. val is empty where a fraction is taken."""

    train: list[InputFile]
    val: list[InputFile]
    reading: Reading
    urls: list[str]

    @property
    def files(self) -> list[InputFile]:
        return self.train + self.val


def find_source(options: Options, preset: str | None) -> Source:
    """The files that the options name, or that the preset names and that are downloaded now."""
    reading = Reading(options.split_documents_on, options.text_column)
    urls: list[str] = []
    train, val = options.input, options.val_input
    if preset is not None:
        corpus = CORPORA[preset]
        if bool(val) != bool(train and corpus.val):
            needed = "both --input and --val-input" if corpus.val else "--input alone"
            raise InputError(f"{preset} takes {needed}, or neither to download it")
        if not train:
            train, val = download(preset, options.out.parent / "downloads")
        urls = [file.url for file in corpus.train + corpus.val]
    if not train:
        raise InputError("--input needs at least one file or folder, or python-docs")
    train_files, warnings = find_files(train)
    val_files, more = find_files(val, "--val-input")
    source = Source(train_files, val_files, reading, urls)
    kinds = {file.kind for file in source.files}
    if reading.split_on is not None and "text" not in kinds:
        more.append("--split-documents-on has no effect: no plain text among the files")
    if reading.text_column != "text" and not kinds & {"jsonl", "parquet"}:
        more.append("--text-column has no effect: no .jsonl or .parquet among the files")
    for warning in warnings + more:
        print(f"textfiles: warning: {warning}", file=sys.stderr, flush=True)
    return source


def download(preset: str, folder: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The files of a preset's splits, fetched into `folder`; never one whose hash is not known."""
    corpus = CORPORA[preset]
    paths = {}
    for file in corpus.train + corpus.val:
        if file.sha256 is None:
            raise InputError(f"no sha256 is pinned for {file.url}; fetch {preset}'s files and give them with --input")
        paths[file] = folder / f"{preset}-{file.name}"
    for file, path in paths.items():
        fetch(file.url, str(file.sha256), path, num_bytes=file.num_bytes)
    train, val = (tuple(str(paths[file]) for file in files) for files in (corpus.train, corpus.val))
    return train, val


def check_pins(preset: str, described: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Files given in place of a preset's download must be its files -> described by the preset's names."""
    corpus = CORPORA[preset]
    pinned = corpus.train + corpus.val
    if len(described) != len(pinned):
        raise InputError(f"{preset} is {len(pinned)} files, not the {len(described)} given")
    for file, found in zip(pinned, described, strict=True):
        if file.sha256 is not None and found["sha256"] != file.sha256:
            raise InputError(
                f"{found['name']}: its sha256 is {found['sha256'][:16]}..., but {preset}'s {file.name} has "
                f"{file.sha256[:16]}...; to use it anyway give --input without the preset"
            )
    return [found | {"name": file.name} for file, found in zip(pinned, described, strict=True)]


def survey(units: list[Unit], options: Options, source: Source, workers: Workers) -> list[Survey]:
    """Read everything once, so that every fault is found and the place of the cut known before anything is written."""
    with_alphabet = options.tokenizer == "char"
    tasks = [SurveyTask(unit, source.reading, with_alphabet) for unit in units]
    found: list[Survey | None] = [None] * len(tasks)
    progress = Progress("survey", sum(unit.num_bytes for unit in units))
    for index, result in workers.run(survey_unit, tasks):
        found[index] = result
        progress.add(units[index].num_bytes, result.documents)
    return [result for result in found if result is not None]


def divide(units: list[Unit], found: list[Survey], options: Options, reading: Reading) -> tuple[list[Unit], list[Unit]]:
    """The units of train and of val. The unit in which the cut falls is in both, with another part of it in each."""
    num_characters = sum(result.characters for result in found)
    cut = int(num_characters * (1 - options.val_fraction))
    refusal = f"--val-fraction {options.val_fraction} of {num_characters} characters leaves a split empty"
    if not 0 < cut < num_characters:
        raise InputError(refusal)
    index = start = 0
    while start + found[index].characters <= cut:
        start += found[index].characters
        index += 1
    place, characters_before = cut - start, cut - start
    if not is_one_document(units[index].file, reading):
        place, characters_before = document_at(units[index], reading, cut - start)
    if start + characters_before == 0:
        raise InputError(f"{refusal}: the cut falls in the first document, which is kept whole")
    head = [dataclasses.replace(units[index], last=place)] if place else []
    tail = dataclasses.replace(units[index], first=place)
    return units[:index] + head, [tail, *units[index + 1 :]]


def document_at(unit: Unit, reading: Reading, character: int) -> tuple[int, int]:
    """Which of the unit's documents that character lies in, and how many characters come before that document."""
    before = 0
    for number, (_, text) in enumerate(read_documents(unit, reading)):
        if before + len(text) > character:
            return number, before
        before += len(text)
    raise AssertionError(f"{unit} has only {before} characters")


def warn_of_marks(eot_marks: int, options: Options) -> None:
    """A separator that was left in the text is trained on as ordinary characters, which is seldom meant."""
    if eot_marks:
        advice = "" if options.split_documents_on else f"; --split-documents-on '{EOT}' makes documents of it"
        print(f"textfiles: warning: the text holds {eot_marks} times '{EOT}'{advice}", file=sys.stderr, flush=True)


def byte_options(options: Options) -> dict[str, Any]:
    """The options that change the bytes; the tokenizer and the files are recorded by their hashes."""
    return {
        "val_fraction": None if options.val_input else options.val_fraction,
        "shard_tokens": options.shard_tokens,
        "split_documents_on": options.split_documents_on,
        "text_column": options.text_column,
    }


def describe_source(described: list[dict[str, Any]], found: list[Survey], source: Source) -> dict[str, Any]:
    """The manifest's `source`."""
    num_train = len(source.train)
    kinds = {"files": described[:num_train], "val_files": described[num_train:], "urls": source.urls}
    dropped = sum(result.empty_documents for result in found)
    return {name: value for name, value in kinds.items() if value} | {"empty_documents": dropped}


def encode(
    units: list[Unit],
    hashes: dict[InputFile, tuple[str, FileState]],
    partial: Path,
    tokenizer: Tokenizer,
    source: Source,
    workers: Workers,
) -> list[Part]:
    """Every unit's part, in order. Equal units (a file given twice) share one."""
    tokenizer.save(partial)
    tokenizer_hash = hash_of(tokenizer.describe())
    tasks = [
        EncodeTask(unit, source.reading, *hashes[unit.file], partial, tokenizer_hash, partial / PARTS) for unit in units
    ]
    free_other_parts(partial, {task.stem for task in tasks})
    return make_parts(tasks, workers, "textfiles")


def check_options(options: Options) -> None:
    if not 0 < options.val_fraction < 1:
        raise InputError(f"--val-fraction {options.val_fraction} must lie between 0 and 1")
    if not 0 < options.shard_tokens < 2**31:
        raise InputError(f"--shard-tokens {options.shard_tokens} must be between 1 and {2**31 - 1}")
    if options.split_documents_on == "":
        raise InputError("--split-documents-on needs at least one character")
    if options.workers is not None and options.workers < 1:
        raise InputError(f"--workers {options.workers} must be at least 1")
    if not options.out.name:
        raise InputError(f"--out {options.out}: give the data directory a name of its own")


def prepare(options: Options, preset: str | None = None) -> Manifest:
    """The whole stage, of a preset's files where one is named. InputError, with nothing finished touched, if bad."""
    check_options(options)
    with reading_from(options.out):
        if options.out.is_symlink():  # what it points to is made or replaced, not the link
            options = dataclasses.replace(options, out=options.out.resolve())
    started = time.perf_counter()
    source = find_source(options, preset)
    states = {file: file_state(file) for file in source.files}
    train, val = (
        [unit for file in files for unit in plan_units(file, source.reading)] for files in (source.train, source.val)
    )
    units = train + val
    processes = num_workers(options, units)
    with Workers(processes) as workers:
        described = [result for _, result in sorted(workers.run(describe_file, source.files))]
        if preset is not None:
            described = check_pins(preset, described)
        found = survey(units, options, source, workers)
        warn_of_marks(sum(result.eot_marks for result in found), options)
    if not source.val:
        train, val = divide(units, found, options, source.reading)
    elif not all(sum(result.characters for result in part) for part in (found[: len(train)], found[len(train) :])):
        raise InputError("--input and --val-input must both hold text")
    tokenizer = make_tokenizer(options.tokenizer, "".join(sorted(set().union(*(result.alphabet for result in found)))))
    about = describe_source(described, found, source)
    existing = existing_data(options.out, about.__eq__, byte_options(options), tokenizer, overwrite=options.overwrite)
    if existing is not None:
        print(f"{options.out}: already complete, nothing to do")
        return existing
    with unfinished_directory(options.out) as partial:
        if existing_data(options.out, about.__eq__, byte_options(options), tokenizer, overwrite=options.overwrite):
            raise InputError(f"--out {options.out}: another process has made it meanwhile")
        hashes = {file: (result["sha256"], states[file]) for file, result in zip(source.files, described, strict=True)}
        with Workers(processes) as workers:  # others: these are gone before a failure clears up after them
            parts = encode(train + val, hashes, partial, tokenizer, source, workers)
        splits = {
            name: pack_split(
                partial,
                name,
                parts_in_turn(some),
                num_tokens=sum(part.tokens for part in some),
                tokenizer=tokenizer,
                shard_tokens=options.shard_tokens,
            )
            for name, some in (("train", parts[: len(train)]), ("val", parts[len(train) :]))
        }
        manifest = Manifest(about, byte_options(options), tokenizer.describe(), splits)
        manifest.write(partial)
        put_in_place(partial, options.out)
    report(options, manifest, sum(unit.num_bytes for unit in units), time.perf_counter() - started)
    return manifest


def num_workers(options: Options, units: list[Unit]) -> int:
    """As many as there are cores, unless told; one, this process, where there is little to do."""
    few = sum(unit.num_bytes for unit in units) < FEW_BYTES
    wanted = options.workers or (1 if few else available_cores())
    return min(wanted, len(units))


def report(options: Options, manifest: Manifest, num_bytes: int, seconds: float) -> None:
    print(
        f"{options.out}: {num_bytes:,} bytes, tokenizer {manifest.tokenizer['kind']} "
        f"(vocabulary {manifest.vocab_size:,}), {seconds:.1f} s, {num_bytes / seconds / 1e6:.1f} MB/s"
    )
    for name, split in manifest.splits.items():
        print(f"  {name:5} {split.tokens:>14,} tokens  {split.documents:>9,} documents  {len(split.shards)} shards")
    if manifest.source["empty_documents"]:
        print(f"  {manifest.source['empty_documents']:,} empty documents dropped")
    print(f"  fingerprint {manifest.fingerprint[:16]}")


def parse(args: list[str]) -> tuple[Options, str | None]:
    """`[PRESET] [--flag value ...]` -> options and preset, which is the default of every flag."""
    import tyro  # not in the workers, which import this module too

    if not args or args[0].startswith("-"):
        return tyro.cli(Options, args=args, description=__doc__), None
    if args[0] not in CORPORA:
        raise InputError(f"no preset {args[0]!r}, only {', '.join(CORPORA)}; files are given with --input")
    corpus = CORPORA[args[0]]
    default = Options(
        input=(),
        out=Path("data") / args[0],
        tokenizer=corpus.tokenizer,
        val_fraction=corpus.val_fraction,
        split_documents_on=corpus.split_documents_on,
    )
    return tyro.cli(Options, args=args[1:], default=default, description=__doc__), args[0]


def main(args: list[str] | None = None) -> None:
    with one_line_errors("textfiles"):
        prepare(*parse(sys.argv[1:] if args is None else args))


if __name__ == "__main__":
    main()
