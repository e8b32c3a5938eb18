"""Prepare FineWeb-Edu: pages from the Hub or from local parquet files become training shards.

    python data_prep/fineweb.py                                              # sample-10BT -> data/fineweb_edu_10B
    python data_prep/fineweb.py --max-tokens 10000000 --out data/try         # the first 10M tokens: one file of 14
    python data_prep/fineweb.py --source local --data-files 'pages/*.parquet' --out data/mine
    python data_prep/fineweb.py --dry-run                                    # files, bytes, disk, time

Many machines can share one folder without a coordinator. Run `--stage download` once, `--stage tokenize` in every task
of a Slurm array (or with --task-index I --num-tasks N), then `--stage pack` once.

sample-10BT is 28.5 GB of parquet: 9.67 million pages, 47 GB of text, about 10 billion tokens. Its shards take 20 GB,
and the parts take another 20 GB until the shards are written. Two workers on two cores made shards of 1 GB of text in
75 s, and in 18 s with --backend gigatoken (LOG.md). All of sample-10BT would take about 60 and 14 minutes at that rate,
and less with more cores; packing uses one core. Memory: 0.5 GB, plus 0.25 GB (gigatoken: 0.35 GB) for each worker;
above 8 million documents, 0.7 GB plus 5 bytes for each document.

Why the defaults are what they are:
- GPT-2's tokens, because runs are compared by them.
- Exact duplicates are dropped. They are 4.18 % of sample-10BT; they would leak into validation and be trained on twice.
- The text's hash decides which documents are validation, so that validation is a sample of all files.
- Documents are shuffled. The files are sorted by crawl, and a reader of shards in order would see a periodic loss.

`--split-mode first-shard --dedup none --shuffle none` gives the stream of build-nanogpt's fineweb.py, byte for byte.
One difference remains: that script keeps an EOT for a page without text, which sample-10BT should not contain.

The output is the same for any number of --workers, of tasks and of kills, and for both backends. It appears under its
name only when it is complete. After a stop or a kill, the same command continues from the parts in .NAME.partial.
Pages that are null or empty are dropped and counted. Bytes that are not UTF-8 become U+FFFD. A page of more than
--max-document-bytes ends the command, or is left out and counted with --on-bad-row skip. '<|endoftext|>' in a page is
ordinary text.
"""

import functools
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.errors import InputError, one_line_errors, warn
from common.files import sha256_of_json
from data_prep.fineweb_plan import (
    Options,
    byte_options,
    describe_request,
    downloads_directory,
    hub_files,
    list_hub_files,
    local_files,
    part_options,
    plan_all_units,
    required_files,
    task_share,
    write_plan,
)
from data_prep.fineweb_report import dry_run, report
from data_prep.hub import files as hub
from data_prep.hub.files import HubListing
from data_prep.manifest import Manifest, read_manifest
from data_prep.pipeline.bad_rows import check_max_document_bytes, count_reasons
from data_prep.pipeline.encode import EncodeTask, Part, describe_file, finished_part, make_parts
from data_prep.pipeline.input_files import FileState, InputFile, file_state
from data_prep.pipeline.pack import documents_in_order, pack_split
from data_prep.pipeline.partial_dir import PARTS, existing_data, free_other_parts, put_in_place, unfinished_directory
from data_prep.pipeline.selection import Rules, Selection, select
from data_prep.pipeline.sources import Unit, describe_skipped
from data_prep.pipeline.workers import Progress, Workers, available_cores
from data_prep.shards import check_shard_tokens
from data_prep.tokenizer import Tokenizer, load_tokenizer, make_tokenizer


@dataclass(frozen=True)
class Job:
    """The work of one process.

    partial: the directory in which the output grows. listing: the Hub's files, None for local files. described: the
    manifest's record of each file that was hashed, with the file's size and modification time before that.
    """

    options: Options
    tokenizer: Tokenizer
    partial: Path
    listing: HubListing | None
    described: dict[InputFile, tuple[dict[str, Any], FileState]] = field(default_factory=dict)

    def files(self) -> list[InputFile]:
        """Return the input files. Raise InputError if one was not downloaded."""
        if self.listing is None:
            return local_files(self.options.data_files)
        files = hub_files(downloads_directory(self.options, self.listing), required_files(self.listing, self.options))
        missing = [file.path for file in files if not Path(file.path).is_file()]
        if missing:
            fault = f"not there ({len(missing)} of {len(files)} files are not)"
            raise InputError(f"{missing[0]}: {fault}; --stage download fetches them")
        return files

    def workers(self, num_tasks: int) -> Workers:
        return Workers(max(1, min(self.options.workers or available_cores(), num_tasks)))

    def describe(self, files: list[InputFile], workers: Workers) -> None:
        """Add `files` to `described`. The Hub's files were hashed when they were downloaded."""
        states = {file: file_state(file) for file in files}
        if self.listing is not None:
            by_path = {file.path: file for file in self.listing.files}
            folder = downloads_directory(self.options, self.listing)
            hub.download(self.listing, [by_path[file.name] for file in files], folder)
            records: list[dict[str, Any]] = [
                {"name": file.name, "bytes": size, "sha256": by_path[file.name].sha256}
                for file, (size, _) in states.items()
            ]
        else:
            progress = Progress("hash", sum(size for size, _ in states.values()))
            records = workers.map(describe_file, files, lambda _, record: progress.add(record["bytes"]))
        self.described.update(zip(files, zip(records, states.values(), strict=True), strict=True))

    def tasks(self, units: list[Unit]) -> list[EncodeTask]:
        """Return one task for each unit, whose file must be in `described`."""
        tokenizer_hash = sha256_of_json(self.tokenizer.describe())
        parts, reading, backend = self.partial / PARTS, self.options.reading, self.options.backend
        return [
            EncodeTask(unit, reading, record["sha256"], state, parts, tokenizer_hash, parts, backend)
            for unit in units
            for record, state in [self.described[unit.file]]
        ]


def tokenize(job: Job) -> tuple[list[EncodeTask], list[Part]]:
    """Make this task's share of the parts."""
    options = job.options
    files = job.files()
    write_plan(job.partial, part_options(options, files, job.tokenizer), replace=options.stage == "all")
    index, count = task_share(options)
    units = plan_all_units(files, options)
    units = units[len(units) * index // count : len(units) * (index + 1) // count]
    job.tokenizer.save(job.partial / PARTS)
    warn_of_disk(job, units)
    with job.workers(len(units)) as workers:
        job.describe(list(dict.fromkeys(unit.file for unit in units)), workers)
        tasks = job.tasks(units)
        parts = make_parts(tasks, workers, "fineweb")
    if options.stage == "tokenize":
        made = f"{len(parts)} parts, {sum(part.tokens for part in parts):,} tokens"
        print(f"fineweb: task {index} of {count}: {made}; when all are done --stage pack")
    return tasks, parts


def warn_of_disk(job: Job, units: list[Unit]) -> None:
    """Warn if the disk is too small for parts and shards: together four bytes for a token of four or five."""
    needed_bytes, free_bytes = sum(unit.num_bytes for unit in units), shutil.disk_usage(job.partial).free
    if free_bytes < needed_bytes:
        line = f"about {needed_bytes / 1e9:.1f} GB are needed for parts and shards, {free_bytes / 1e9:.1f} GB are free"
        warn("fineweb", f"{job.options.directory}: {line}")


def read_all_parts(job: Job) -> tuple[list[EncodeTask], list[Part]]:
    """Read the parts of all tasks. Raise InputError if one is missing."""
    files = job.files()
    write_plan(job.partial, part_options(job.options, files, job.tokenizer), replace=False)
    units = plan_all_units(files, job.options)
    progress = Progress("check parts", sum(unit.num_bytes for unit in units))
    with job.workers(len(units)) as workers:
        job.describe(files, workers)
        tasks = job.tasks(units)
        finished = workers.map(finished_part, tasks, lambda task, _: progress.add(task.unit.num_bytes))
    parts = [part for part in finished if part is not None]
    if len(parts) < len(tasks):
        fault = f"{len(tasks) - len(parts)} of {len(tasks)} parts are missing or damaged"
        raise InputError(f"{fault}; --stage tokenize makes them (the same command in any task)")
    return tasks, parts


def pack(job: Job, tasks: list[EncodeTask], parts: list[Part]) -> Manifest:
    """Write the data directory from all parts, and give it its name."""
    options, tokenizer, partial = job.options, job.tokenizer, job.partial
    free_other_parts(partial, {task.stem for task in tasks})
    order_folder = partial / "order"
    order_folder.mkdir()
    val_tokens = options.val_tokens if options.split_mode == "hash" else options.shard_tokens
    seed = options.seed if options.shuffle == "documents" else None
    rules = Rules(options.dedup == "exact", options.max_tokens, options.split_mode, val_tokens, seed)
    selection = select(parts, rules, order_folder)
    splits = {}
    for name, order in (("train", selection.train), ("val", selection.val)):
        documents = documents_in_order(order, parts)
        splits[name] = pack_split(partial, name, documents, order.tokens, tokenizer, options.shard_tokens)
    shutil.rmtree(order_folder)
    files = list(dict.fromkeys(task.unit.file for task in tasks))
    source = {
        "request": describe_request(options, files),
        "revision": job.listing.revision if job.listing else None,
        "files": [job.described[file][0] for file in files],
        "documents": count_pages(tasks, parts, selection),
    }
    tokenizer.save(partial)
    manifest = Manifest(source, byte_options(options), tokenizer.describe(), splits)
    manifest.write(partial)
    put_in_place(partial, options.directory)
    kept_tokens = selection.train.tokens + selection.val.tokens
    if options.max_tokens is not None and not selection.documents_beyond and kept_tokens < options.max_tokens:
        line = f"only {kept_tokens:,} tokens in the pages that --max-tokens {options.max_tokens} reads"
        warn("fineweb", f"{line}, without their duplicates; set it higher if there are more")
    return manifest


def count_pages(tasks: list[EncodeTask], parts: list[Part], selection: Selection) -> dict[str, Any]:
    """Return the manifest's counts of the pages that were read, by what became of them."""
    empty = sum(part.tally.empty for part in parts)
    skipped = [(task.unit, part.tally.skipped) for task, part in zip(tasks, parts, strict=True)]
    skipped_rows = sum(count_reasons(each for _, each in skipped).values())
    return {
        "read": sum(part.documents for part in parts) + empty + skipped_rows,
        "empty": empty,
        "duplicates": selection.duplicates,
        "duplicate_tokens": selection.duplicate_tokens,
        "beyond_max_tokens": selection.documents_beyond,
        "repaired": sum(part.tally.repaired for part in parts),
    } | describe_skipped(skipped, tasks[0].reading)


def verify(options: Options) -> None:
    """Check every byte of the data directory against its manifest. Raise InputError at a fault."""
    from data_prep.verify import faults_of  # here, because it imports tyro, and workers import this module

    directory = options.directory
    faults = faults_of(directory, read_manifest(directory), load_tokenizer(directory))
    if faults:
        raise InputError(f"{len(faults)} faults: {faults[0]}; prepare it again with --overwrite")
    print(f"fineweb: {directory}: sound")


def check_options(options: Options) -> None:
    """Raise InputError for options that are wrong by themselves; warn of those without effect."""
    for name in ("workers", "max_tokens", "val_tokens", "num_tasks"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value} must be at least 1")
    check_shard_tokens(options.shard_tokens)
    check_max_document_bytes(options.max_document_bytes)
    if not 0 <= options.seed < 2**63:
        raise InputError(f"--seed {options.seed} must be between 0 and {2**63 - 1}")
    if options.tokenizer == "char":
        raise InputError("--tokenizer char needs the alphabet, so a second pass over the text; use byte or byte pairs")
    if options.source == "local" and not (options.data_files and options.out):
        raise InputError("--source local needs --data-files and --out")
    is_local, by_hash = options.source == "local", options.split_mode == "hash"
    flag, val_tokens = ("--val-tokens", options.val_tokens) if by_hash else ("--shard-tokens", options.shard_tokens)
    if options.max_tokens is not None and val_tokens is not None and val_tokens >= options.max_tokens:
        raise InputError(f"{flag} {val_tokens} leaves nothing to train on of --max-tokens {options.max_tokens}")
    default = Options()
    without_effect = [
        ("--data-files", not is_local and options.data_files, "--source hub"),
        ("--revision", is_local and options.revision, "--source local"),
        ("--name", is_local and options.name != default.name, "--source local"),
        ("--dataset", is_local and options.dataset != default.dataset, "--source local"),
        ("--val-tokens", not by_hash and options.val_tokens, "--split-mode first-shard"),
        ("--seed", options.shuffle == "none" and options.seed, "--shuffle none"),
    ]
    for flag, is_set, cause in without_effect:
        if is_set:
            warn("fineweb", f"{flag} has no effect with {cause}")


def is_same_request(options: Options, source: dict[str, Any]) -> bool:
    """Return whether finished data has this input: local files by content, the Hub's by request."""
    recorded = source.get("request", {})
    if options.on_bad_row == "stop" and "skipped" in source.get("documents", {}):
        fault = "holds finished data without some bad rows"
        raise InputError(f"--out {options.directory}: {fault}; give --on-bad-row skip, another --out or --overwrite")
    if options.source == "hub":
        request = describe_request(options)
        return recorded == request or {**recorded, "revision": source.get("revision")} == request
    files = local_files(options.data_files)
    if recorded != describe_request(options, files):
        return False
    with Workers(min(options.workers or available_cores(), len(files))) as workers:
        return bool(source["files"] == workers.map(describe_file, files))


def existing_manifest(options: Options, tokenizer: Tokenizer) -> Manifest | None:
    """Return the manifest if --out holds exactly this data; see `existing_data`."""
    is_same = functools.partial(is_same_request, options)
    return existing_data(options.directory, is_same, byte_options(options), tokenizer, overwrite=options.overwrite)


def prepare(options: Options) -> None:
    """Run the stages of --stage. Raise InputError if the input is bad; finished data then stays as it was."""
    started = time.perf_counter()
    stage, directory = options.stage, options.directory
    check_options(options)
    task_share(options)  # which refuses a wrong share before any work
    if stage == "verify":
        return verify(options)
    tokenizer = make_tokenizer(options.tokenizer, "")
    if options.dry_run:
        return dry_run(options, tokenizer)
    if existing_manifest(options, tokenizer) is not None:
        print(f"{directory}: already complete, nothing to do")
        return None
    with unfinished_directory(directory, shared=stage in ("download", "tokenize")) as partial:
        if existing_manifest(options, tokenizer) is not None:
            raise InputError(f"--out {directory}: another process has made it meanwhile")
        listing = list_hub_files(partial, options) if options.source == "hub" else None
        job = Job(options, tokenizer, partial, listing)
        if stage in ("all", "download"):
            if listing is not None:
                hub.download(listing, required_files(listing, options), downloads_directory(options, listing))
            elif stage == "download":
                print("fineweb: --source local: nothing to download")
        if stage in ("all", "tokenize"):
            tasks, parts = tokenize(job)
        if stage == "pack":
            tasks, parts = read_all_parts(job)
        if stage in ("all", "pack"):
            manifest = pack(job, tasks, parts)
    if stage in ("all", "pack"):
        report(options, manifest, time.perf_counter() - started)
    if stage == "all":
        verify(options)
    return None


def main(args: list[str] | None = None) -> None:
    import tyro  # here, because workers import this module and do not need it

    with one_line_errors("fineweb"):
        prepare(tyro.cli(Options, args=args, description=__doc__))


if __name__ == "__main__":
    main()
