"""FineWeb-Edu -> training shards.

    python data_prep/fineweb.py                                              # sample-10BT -> data/fineweb_edu_10B
    python data_prep/fineweb.py --max-tokens 10000000 --out data/try         # the first 10M tokens: one file of 14
    python data_prep/fineweb.py --source local --data-files 'pages/*.parquet' --out data/mine
    python data_prep/fineweb.py --dry-run                                    # files, bytes, disk, time

Many machines with one folder, no coordinator: `--stage download` once, `--stage tokenize` in every task of a Slurm
array (or with --task-index I --num-tasks N), then `--stage pack` once.

sample-10BT is 28.5 GB of parquet, 9.67 million pages and about 10 billion tokens: 20 GB of shards, and 20 GB more while
they are made. tiktoken encodes 8 to 13 MB/s per core (LOG.md), so its 47 GB of text take about 80 minutes on 8 cores;
--backend gigatoken is bound by reading instead. Each worker takes about 0.3 GB, the choice of documents 5 bytes for
each and up to 2.7 GB.

Defaults, and why: GPT-2's tokens, since runs are compared by them. Exact duplicates go (4.18 % of sample-10BT are
copies), since the split would leak through them and they are trained on twice. Validation is by text hash, so that it
is a sample of everything. Documents are shuffled, since the files are sorted by crawl and a reader that takes shards in
turn would see a periodic loss. `--split-mode first-shard --dedup none --shuffle none` gives the stream of
build-nanogpt's fineweb.py, byte for byte.

The output is the same for any number of --workers, tasks and kills, and for both backends. It appears whole, under its
name, when everything is written; stopped or killed, the same command goes on from the parts in .NAME.partial.
A page of null or no text is dropped and counted, so is one that the tokenizer gives up on (a run of a million blanks);
bytes that are not UTF-8 become U+FFFD. '<|endoftext|>' in a page is ordinary text.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data_prep import hub
from data_prep.codec import Codec, make_codec
from data_prep.encode import EncodeTask, Part, describe_file, hash_of, make_parts, read_part
from data_prep.errors import InputError, one_line_errors
from data_prep.fineweb_plan import (
    Options,
    Plan,
    byte_options,
    downloads_of,
    hub_files,
    keep_plan,
    local_files,
    read_plan,
    request,
    share,
    units_of,
)
from data_prep.fineweb_report import dry_run, report
from data_prep.manifest import Manifest, read_manifest
from data_prep.pack import documents_in_order, pack_split
from data_prep.selection import Rules, Selection, select
from data_prep.sources import InputFile, Unit, file_states
from data_prep.unfinished import PARTS, existing_data, free_other_parts, put_in_place, unfinished_directory
from data_prep.workers import Workers, available_cores

VAL_TOKENS = 10_485_760
VAL_SHARE = 100


@dataclass(frozen=True)
class Job:
    """One process's work: the options, the tokenizer, the folder that grows and the plan kept in it."""

    options: Options
    codec: Codec
    partial: Path
    plan: Plan

    @property
    def downloads(self) -> Path:
        return downloads_of(self.options, self.plan)

    def files(self) -> list[InputFile]:
        """The input, which must be there by now."""
        if self.options.source == "local":
            return local_files(self.options.data_files)
        files = hub_files(self.downloads, self.plan.needed(self.options))
        missing = [file.path for file in files if not Path(file.path).is_file()]
        if missing:
            raise InputError(
                f"{missing[0]}: not there ({len(missing)} of {len(files)} files are not); --stage download fetches them"
            )
        return files

    def workers(self, num_tasks: int) -> Workers:
        return Workers(max(1, min(self.options.workers or available_cores(), num_tasks)))

    def hashes(self, files: list[InputFile]) -> dict[InputFile, dict[str, Any]]:
        """Each file's name, bytes and sha256, as the manifest records them; the Hub's were checked when they came."""
        if self.plan.listing is not None:
            known = {file.path: file for file in self.plan.needed(self.options)}
            hub.download(self.plan.listing, [known[file.name] for file in files], self.downloads)
            return {
                file: {"name": file.name, "bytes": known[file.name].num_bytes, "sha256": known[file.name].sha256}
                for file in files
            }
        with self.workers(len(files)) as workers:
            return {files[index]: described for index, described in workers.run(describe_file, files)}

    def tasks(self, units: list[Unit], hashes: dict[InputFile, dict[str, Any]]) -> list[EncodeTask]:
        tokenizer = hash_of(self.codec.describe())
        parts = self.partial / PARTS
        backend = self.options.backend
        return [
            EncodeTask(unit, self.options.reading, hashes[unit.file]["sha256"], parts, tokenizer, parts, backend)
            for unit in units
        ]


def make_plan(options: Options, codec: Codec, partial: Path) -> Plan:
    """The plan that is there if it is this one, else a new one; the Hub is asked where it has to be."""
    files = local_files(options.data_files) if options.source == "local" else []
    wanted = request(options, files) | byte_options(options) | {"tokenizer": hash_of(codec.describe())[:16]}
    before = read_plan(partial)
    if before is not None and before.wanted == wanted:
        return before
    listing = hub.list_files(options.dataset, options.name, options.revision) if options.source == "hub" else None
    return keep_plan(partial, Plan(wanted, listing), replace=options.stage == "all")


def download(job: Job) -> None:
    """The files from the Hub, those that are not there yet."""
    if job.plan.listing is None:
        if job.options.stage == "download":
            print("fineweb: --source local: nothing to download")
        return
    hub.download(job.plan.listing, job.plan.needed(job.options), job.downloads)


def tokenize(job: Job) -> list[Part]:
    """This task's share of the parts."""
    index, count = share(job.options)
    units = units_of(job.files(), job.options)
    units = units[len(units) * index // count : len(units) * (index + 1) // count]
    files = list(dict.fromkeys(unit.file for unit in units))
    before = file_states(files)
    job.codec.save(job.partial / PARTS)
    tasks = job.tasks(units, job.hashes(files))
    with job.workers(len(tasks)) as workers:
        parts = make_parts(tasks, workers, "fineweb")
    if file_states(files) != before:
        raise InputError("a file of the input changed while it was read; run the same command again")
    if count > 1:
        tokens = sum(part.tokens for part in parts)
        print(
            f"fineweb: task {index} of {count}: {len(parts)} parts, {tokens:,} tokens; when all are done --stage pack"
        )
    return parts


def finished_parts(job: Job, tasks: list[EncodeTask]) -> list[Part]:
    """Every part, made by whichever task."""
    with job.workers(len(tasks)) as workers:
        found = dict(workers.run(read_finished, tasks))
    missing = sum(part is None for part in found.values())
    if missing:
        raise InputError(
            f"{missing} of {len(tasks)} parts are not there or not sound; --stage tokenize makes them "
            "(the same command in any task)"
        )
    return [part for _, part in sorted(found.items()) if part is not None]


def read_finished(task: EncodeTask) -> Part | None:
    return read_part(task.stem, task.key)


def pack(job: Job) -> Manifest:
    """All parts -> the data directory, in its place."""
    options, codec, partial = job.options, job.codec, job.partial
    files = job.files()
    hashes = job.hashes(files)
    tasks = job.tasks(units_of(files, options), hashes)
    parts = finished_parts(job, tasks)
    free_other_parts(partial, {task.stem for task in tasks})
    tokens = sum(part.tokens for part in parts)
    order = partial / "order"
    order.mkdir()
    selection = select(parts, rules_of(options, tokens), order)
    splits = {
        name: pack_split(
            partial, name, documents_in_order(chosen, parts), codec=codec, shard_tokens=options.shard_tokens
        )
        for name, chosen in (("train", selection.train), ("val", selection.val))
    }
    for path in order.iterdir():
        path.unlink()
    order.rmdir()
    source = {
        "request": request(options, files),
        "revision": job.plan.listing.revision if job.plan.listing else None,
        "files": [hashes[file] for file in files],
        "documents": counts(parts, selection),
    }
    codec.save(partial)
    manifest = Manifest(source, byte_options(options), codec.describe(), splits)
    manifest.write(partial)
    put_in_place(partial, options.directory)
    return manifest


def rules_of(options: Options, tokens: int) -> Rules:
    val_tokens = options.val_tokens or min(VAL_TOKENS, max(1, min(tokens, options.max_tokens or tokens) // VAL_SHARE))
    return Rules(
        drop_duplicates=options.dedup == "exact",
        max_tokens=options.max_tokens,
        split=options.split_mode,
        val_tokens=val_tokens if options.split_mode == "hash" else options.shard_tokens,
        shuffle_seed=options.seed if options.shuffle == "documents" else None,
    )


def counts(parts: list[Part], selection: Selection) -> dict[str, Any]:
    """What became of every page that was read."""
    dropped = [place for part in parts for place in part.tally.dropped]
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


def verify(options: Options, codec: Codec) -> None:
    """Every byte against the manifest."""
    from data_prep.verify import faults_of  # which imports tyro, and workers import this module

    faults = faults_of(options.directory, read_manifest(options.directory), codec)
    if faults:
        raise InputError(f"{len(faults)} faults: {faults[0]}; prepare it again with --overwrite")
    print(f"fineweb: {options.directory}: sound")


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
    if options.source == "local" and not options.data_files:
        raise InputError("--source local needs --data-files")
    if not options.directory.name:
        raise InputError(f"--out {options.out}: give the data directory a name of its own")
    idle = [
        ("--data-files", options.source == "hub" and options.data_files, "with --source hub"),
        ("--revision", options.source == "local" and options.revision, "with --source local"),
        ("--val-tokens", options.split_mode == "first-shard" and options.val_tokens, "with --split-mode first-shard"),
        ("--seed", options.shuffle == "none" and options.seed, "with --shuffle none"),
    ]
    for flag, is_given, where in idle:
        if is_given:
            print(f"fineweb: warning: {flag} has no effect {where}", file=sys.stderr, flush=True)


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


def prepare(options: Options) -> None:
    """The stages that are asked for. InputError, with nothing finished touched, if the input is bad."""
    started = time.perf_counter()
    check_options(options)
    share(options)
    codec = make_codec(options.tokenizer, "")
    if options.dry_run:
        return dry_run(options, codec)
    if options.stage == "verify":
        return verify(options, codec)
    existing = existing_data(
        options.directory,
        lambda source: is_same_request(options, source),
        byte_options(options),
        codec,
        overwrite=options.overwrite,
    )
    if existing is not None:
        print(f"{options.directory}: already complete, nothing to do")
        return None
    with unfinished_directory(options.directory, shared=options.stage in ("download", "tokenize")) as partial:
        job = Job(options, codec, partial, make_plan(options, codec, partial))
        if options.stage in ("all", "download"):
            download(job)
        if options.stage in ("all", "tokenize"):
            tokenize(job)
        if options.stage in ("all", "pack"):
            manifest = pack(job)
    if options.stage in ("all", "pack"):
        report(options, manifest, time.perf_counter() - started)
    if options.stage == "all":
        verify(options, codec)
    return None


def main(args: list[str] | None = None) -> None:
    import tyro  # not in the workers, which import this module too

    try:
        with one_line_errors("fineweb"):
            prepare(tyro.cli(Options, args=args, description=__doc__))
    except KeyboardInterrupt as interruption:
        print(f"fineweb: {str(interruption) or 'interrupted'}", file=sys.stderr, flush=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
