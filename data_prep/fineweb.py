"""FineWeb-Edu -> training shards.

    python data_prep/fineweb.py                                              # sample-10BT -> data/fineweb_edu_10B
    python data_prep/fineweb.py --max-tokens 10000000 --out data/try         # the first 10M tokens: one file of 14
    python data_prep/fineweb.py --source local --data-files 'pages/*.parquet' --out data/mine
    python data_prep/fineweb.py --dry-run                                    # files, bytes, disk, time

Many machines with one folder, no coordinator: `--stage download` once, `--stage tokenize` in every task of a Slurm
array (or with --task-index I --num-tasks N), then `--stage pack` once.

sample-10BT is 28.5 GB of parquet, 9.67 million pages, 47 GB of text and about 10 billion tokens: 20 GB of shards, and
20 GB of parts while they are made. Two workers on two cores made shards of 1 GB of text in 75 s, with --backend
gigatoken in 18 s (LOG.md): about 60 and 14 minutes for all of it, less with more cores, of which packing uses one.
Memory: 0.5 GB, and 0.25 GB (gigatoken 0.35) for each worker; above 8 million documents 0.7 GB and 5 bytes for each.

Defaults, and why: GPT-2's tokens, since runs are compared by them. Exact duplicates go (4.18 % of sample-10BT are
copies), since the split would leak through them and they are trained on twice. Validation is by text hash, so that it
is a sample of everything. Documents are shuffled, since the files are sorted by crawl and a reader that takes shards in
turn would see a periodic loss. `--split-mode first-shard --dedup none --shuffle none` gives the stream of
build-nanogpt's fineweb.py, byte for byte (of a page without any text, which sample-10BT should not have, that script
would keep an EOT).

The output is the same for any number of --workers, tasks and kills, and for both backends. It appears whole, under its
name, when everything is written; stopped or killed, the same command goes on from the parts in .NAME.partial.
A page of null or no text is dropped and counted, so is one that the tokenizer gives up on (a run of a million blanks);
bytes that are not UTF-8 become U+FFFD. '<|endoftext|>' in a page is ordinary text.
"""

import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.errors import InputError, one_line_errors
from data_prep.fineweb_plan import (
    Options,
    byte_options,
    downloads_of,
    hub_files,
    keep_listing,
    keep_plan,
    local_files,
    needed,
    part_options,
    request,
    share,
    units_of,
)
from data_prep.fineweb_report import dry_run, report
from data_prep.hub import files as hub
from data_prep.hub.files import HubListing
from data_prep.manifest import Manifest, read_manifest
from data_prep.pipeline.encode import EncodeTask, Part, describe_file, hash_of, make_parts, read_part
from data_prep.pipeline.pack import documents_in_order, pack_split
from data_prep.pipeline.partial_dir import PARTS, existing_data, free_other_parts, put_in_place, unfinished_directory
from data_prep.pipeline.selection import Rules, Selection, select
from data_prep.pipeline.sources import FileState, InputFile, Unit, file_state
from data_prep.pipeline.workers import Progress, Workers, available_cores
from data_prep.tokenizer import Tokenizer, load_tokenizer, make_tokenizer


@dataclass(frozen=True)
class Job:
    """One process's work: the options, the tokenizer, the folder that grows, and what the Hub has (None for local).

    known: files that were hashed already, with their size and time of change before that.
    """

    options: Options
    tokenizer: Tokenizer
    partial: Path
    listing: HubListing | None
    known: dict[InputFile, tuple[dict[str, Any], FileState]] = field(default_factory=dict)

    def files(self) -> list[InputFile]:
        """The input, which must be there by now."""
        if self.listing is None:
            return local_files(self.options.data_files)
        files = hub_files(downloads_of(self.options, self.listing), needed(self.listing, self.options))
        missing = [file.path for file in files if not Path(file.path).is_file()]
        if missing:
            raise InputError(
                f"{missing[0]}: not there ({len(missing)} of {len(files)} files are not); --stage download fetches them"
            )
        return files

    def workers(self, num_tasks: int) -> Workers:
        return Workers(max(1, min(self.options.workers or available_cores(), num_tasks)))

    def describe(self, files: list[InputFile], workers: Workers) -> None:
        """Have `files` in `known`; those of the Hub were hashed when they came."""
        states = {file: file_state(file) for file in files}
        if self.listing is not None:
            named = {file.path: file for file in self.listing.files}
            hub.download(self.listing, [named[file.name] for file in files], downloads_of(self.options, self.listing))
            for file in files:
                described: dict[str, Any] = {
                    "name": file.name,
                    "bytes": states[file][0],
                    "sha256": named[file.name].sha256,
                }
                self.known[file] = described, states[file]
            return
        progress = Progress("hash", sum(size for size, _ in states.values()))
        for index, described in workers.run(describe_file, files):
            self.known[files[index]] = described, states[files[index]]
            progress.add(described["bytes"])

    def tasks(self, units: list[Unit]) -> list[EncodeTask]:
        """One for each unit, whose files are known."""
        tokenizer_hash = hash_of(self.tokenizer.describe())
        parts = self.partial / PARTS
        return [
            EncodeTask(
                unit,
                self.options.reading,
                described["sha256"],
                state,
                parts,
                tokenizer_hash,
                parts,
                self.options.backend,
            )
            for unit in units
            for described, state in [self.known[unit.file]]
        ]


def tokenize(job: Job) -> tuple[list[EncodeTask], list[Part]]:
    """This task's share of the parts."""
    options = job.options
    files = job.files()
    keep_plan(job.partial, part_options(options, files, job.tokenizer), replace=options.stage == "all")
    index, count = share(options)
    units = units_of(files, options)
    units = units[len(units) * index // count : len(units) * (index + 1) // count]
    job.tokenizer.save(job.partial / PARTS)
    warn_of_disk(job, units)
    with job.workers(len(units)) as workers:
        job.describe(list(dict.fromkeys(unit.file for unit in units)), workers)
        tasks = job.tasks(units)
        parts = make_parts(tasks, workers, "fineweb")
    if options.stage == "tokenize":
        tokens = sum(part.tokens for part in parts)
        print(
            f"fineweb: task {index} of {count}: {len(parts)} parts, {tokens:,} tokens; when all are done --stage pack"
        )
    return tasks, parts


def warn_of_disk(job: Job, units: list[Unit]) -> None:
    """Parts and shards together are about as large as the text: four bytes for a token of four or five."""
    needed, free = sum(unit.num_bytes for unit in units), shutil.disk_usage(job.partial).free
    if free < needed:
        line = f"about {needed / 1e9:.1f} GB are needed for parts and shards, {free / 1e9:.1f} GB are free"
        print(f"fineweb: warning: {job.options.directory}: {line}", file=sys.stderr, flush=True)


def finished_parts(job: Job) -> tuple[list[EncodeTask], list[Part]]:
    """Every part, made by whichever task."""
    files = job.files()
    keep_plan(job.partial, part_options(job.options, files, job.tokenizer), replace=False)
    units = units_of(files, job.options)
    progress = Progress("check parts", sum(unit.num_bytes for unit in units))
    found: dict[int, Part] = {}
    with job.workers(len(units)) as workers:
        job.describe(files, workers)
        tasks = job.tasks(units)
        for index, part in workers.run(read_finished, tasks):
            progress.add(tasks[index].unit.num_bytes)
            if part is not None:
                found[index] = part
    missing = len(tasks) - len(found)
    if missing:
        raise InputError(
            f"{missing} of {len(tasks)} parts are not there or not sound; --stage tokenize makes them "
            "(the same command in any task)"
        )
    return tasks, [part for _, part in sorted(found.items())]


def read_finished(task: EncodeTask) -> Part | None:
    return read_part(task.stem, task.key)


def pack(job: Job, tasks: list[EncodeTask], parts: list[Part]) -> Manifest:
    """All parts -> the data directory, in its place."""
    options, tokenizer, partial = job.options, job.tokenizer, job.partial
    free_other_parts(partial, {task.stem for task in tasks})
    order = partial / "order"
    order.mkdir()
    selection = select(parts, rules_of(options), order)
    splits = {
        name: pack_split(
            partial,
            name,
            documents_in_order(chosen, parts),
            num_tokens=chosen.tokens,
            tokenizer=tokenizer,
            shard_tokens=options.shard_tokens,
        )
        for name, chosen in (("train", selection.train), ("val", selection.val))
    }
    shutil.rmtree(order)
    files = list(dict.fromkeys(task.unit.file for task in tasks))
    source = {
        "request": request(options, files),
        "revision": job.listing.revision if job.listing else None,
        "files": [job.known[file][0] for file in files],
        "documents": counts(tasks, parts, selection),
    }
    tokenizer.save(partial)
    manifest = Manifest(source, byte_options(options), tokenizer.describe(), splits)
    manifest.write(partial)
    put_in_place(partial, options.directory)
    kept = selection.train.tokens + selection.val.tokens
    if options.max_tokens is not None and not selection.documents_beyond and kept < options.max_tokens:
        line = (
            f"only {kept:,} tokens in the pages that --max-tokens {options.max_tokens} reads, without their duplicates"
        )
        print(f"fineweb: warning: {line}; set it higher if there are more", file=sys.stderr, flush=True)
    return manifest


def rules_of(options: Options) -> Rules:
    return Rules(
        drop_duplicates=options.dedup == "exact",
        max_tokens=options.max_tokens,
        split=options.split_mode,
        val_tokens=options.val_tokens if options.split_mode == "hash" else options.shard_tokens,
        shuffle_seed=options.seed if options.shuffle == "documents" else None,
    )


def counts(tasks: list[EncodeTask], parts: list[Part], selection: Selection) -> dict[str, Any]:
    """What became of every page that was read."""
    dropped = [
        f"{task.unit.file.name}, row {row:,}"
        for task, part in zip(tasks, parts, strict=True)
        for row in part.tally.dropped
    ]
    empty = sum(part.tally.empty for part in parts)
    return {
        "read": sum(part.documents for part in parts) + empty + len(dropped),
        "empty": empty,
        "duplicates": selection.duplicates,
        "duplicate_tokens": selection.duplicate_tokens,
        "beyond_max_tokens": selection.documents_beyond,
        "repaired": sum(part.tally.repaired for part in parts),
        "dropped": dropped,
    }


def verify(options: Options) -> None:
    """Every byte against the manifest."""
    from data_prep.verify import faults_of  # which imports tyro, and workers import this module

    directory = options.directory
    faults = faults_of(directory, read_manifest(directory), load_tokenizer(directory))
    if faults:
        raise InputError(f"{len(faults)} faults: {faults[0]}; prepare it again with --overwrite")
    print(f"fineweb: {directory}: sound")


def check_options(options: Options) -> None:
    """InputError for what is wrong by itself; a line for what has no effect."""
    for name in ("workers", "max_tokens", "val_tokens", "num_tasks"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value} must be at least 1")
    if not 0 < options.shard_tokens < 2**31:
        raise InputError(f"--shard-tokens {options.shard_tokens} must be between 1 and {2**31 - 1}")
    if not 0 <= options.seed < 2**63:
        raise InputError(f"--seed {options.seed} must be between 0 and {2**63 - 1}")
    if options.tokenizer == "char":
        raise InputError("--tokenizer char would need one reading more, for the alphabet; use byte or byte pairs")
    if options.source == "local" and not (options.data_files and options.out):
        raise InputError("--source local needs --data-files and --out")
    if not options.directory.name:
        raise InputError(f"--out {options.out}: give the data directory a name of its own")
    is_local, by_hash = options.source == "local", options.split_mode == "hash"
    flag, val_tokens = ("--val-tokens", options.val_tokens) if by_hash else ("--shard-tokens", options.shard_tokens)
    if options.max_tokens is not None and val_tokens is not None and val_tokens >= options.max_tokens:
        raise InputError(f"{flag} {val_tokens} leaves nothing to train on of --max-tokens {options.max_tokens}")
    default = Options()
    idle = [
        ("--data-files", not is_local and options.data_files, "--source hub"),
        ("--revision", is_local and options.revision, "--source local"),
        ("--name", is_local and options.name != default.name, "--source local"),
        ("--dataset", is_local and options.dataset != default.dataset, "--source local"),
        ("--val-tokens", not by_hash and options.val_tokens, "--split-mode first-shard"),
        ("--seed", options.shuffle == "none" and options.seed, "--shuffle none"),
    ]
    for flag, is_given, where in idle:
        if is_given:
            print(f"fineweb: warning: {flag} has no effect with {where}", file=sys.stderr, flush=True)


def is_same_request(options: Options, source: dict[str, Any]) -> bool:
    """Is finished data of this input? Local files by content, the Hub's by what was asked for."""
    before = source.get("request", {})
    if options.source == "hub":
        return before == request(options) or {**before, "revision": source.get("revision")} == request(options)
    files = local_files(options.data_files)
    if before != request(options, files):
        return False
    with Workers(min(options.workers or available_cores(), len(files))) as workers:
        return source["files"] == [described for _, described in sorted(workers.run(describe_file, files))]


def finished(options: Options, tokenizer: Tokenizer) -> Manifest | None:
    """The manifest of exactly this in --out, if it is there; InputError if something else is, unless --overwrite."""
    return existing_data(
        options.directory,
        lambda source: is_same_request(options, source),
        byte_options(options),
        tokenizer,
        overwrite=options.overwrite,
    )


def prepare(options: Options) -> None:
    """The stages that are asked for. InputError, with nothing finished touched, if the input is bad."""
    started = time.perf_counter()
    stage, directory = options.stage, options.directory
    check_options(options)
    share(options)
    if stage == "verify":
        return verify(options)
    tokenizer = make_tokenizer(options.tokenizer, "")
    if options.dry_run:
        return dry_run(options, tokenizer)
    if finished(options, tokenizer) is not None:
        print(f"{directory}: already complete, nothing to do")
        return None
    with unfinished_directory(directory, shared=stage in ("download", "tokenize")) as partial:
        if finished(options, tokenizer) is not None:
            raise InputError(f"--out {directory}: another process has made it meanwhile")
        listing = keep_listing(partial, options) if options.source == "hub" else None
        job = Job(options, tokenizer, partial, listing)
        if stage in ("all", "download"):
            if listing is not None:
                hub.download(listing, needed(listing, options), downloads_of(options, listing))
            elif stage == "download":
                print("fineweb: --source local: nothing to download")
        if stage in ("all", "tokenize"):
            tasks, parts = tokenize(job)
        if stage == "pack":
            tasks, parts = finished_parts(job)
        if stage in ("all", "pack"):
            manifest = pack(job, tasks, parts)
    if stage in ("all", "pack"):
        report(options, manifest, time.perf_counter() - started)
    if stage == "all":
        verify(options)
    return None


def main(args: list[str] | None = None) -> None:
    import tyro  # not in the workers, which import this module too

    with one_line_errors("fineweb"):
        prepare(tyro.cli(Options, args=args, description=__doc__))


if __name__ == "__main__":
    main()
