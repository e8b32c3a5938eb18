"""The plan of a FineWeb-Edu preparation: options, input files, units, and one task's share of the units.

Two files lie with the parts. plan.json holds the options that the parts depend on; every later task, on any machine,
must have the same ones. listing.json holds the Hub's answer, so that only one task needs the network. The first task
writes them.
"""

import contextlib
import dataclasses
import glob
import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common.errors import InputError, reading_from
from common.files import sha256_of_json, write_json_atomically
from common.reading import read_own_json
from data_prep.hub import files as hub
from data_prep.hub.files import HubFile, HubListing
from data_prep.pipeline.bad_rows import MAX_DOCUMENT_BYTES, OnBadRow, options_of_bad_rows
from data_prep.pipeline.encode import Backend
from data_prep.pipeline.input_files import InputFile
from data_prep.pipeline.partial_dir import PARTS, PLAN_FILES, differences, named_directory
from data_prep.pipeline.selection import Split
from data_prep.pipeline.sources import Reading, Unit, plan_units
from data_prep.tokenizer import Tokenizer

PLAN, LISTING = PLAN_FILES
# A unit is a few seconds of work. One row group per unit (1,000 pages, 5 MB) would put 10,000 parts of sample-10BT
# into one folder.
UNIT_BYTES = 2**25
# A GPT-2 token holds 4.7 bytes of English on average. --max-tokens reads more, because duplicates are dropped.
READ_BYTES_PER_TOKEN = 6


@dataclass(frozen=True)
class Options:
    """Prepare FineWeb-Edu, or a data set with its layout, as training shards."""

    name: str = "sample-10BT"
    """Part of the data set: sample-10BT, sample-100BT, sample-350BT, default (all of it), or a crawl such as
    CC-MAIN-2024-10."""
    dataset: str = "HuggingFaceFW/fineweb-edu"
    """Data set on the Hub. HuggingFaceFW/fineweb has the same layout."""
    revision: str | None = None
    """Commit of the data set. None: the pinned commit of fineweb-edu; for others the newest commit of main, which is
    then kept."""
    source: Literal["hub", "local"] = "hub"
    """hub: download into the folder `downloads` beside --out. local: read --data-files and never use the network."""
    data_files: tuple[str, ...] = ()
    """Parquet files, folders of them, or patterns such as 'pages/*.parquet'. Only with --source local."""
    text_column: str = "text"
    """Column that holds the text."""
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    """Most bytes of one document, by which memory is bounded: about ten times as much for each worker. A longer one is
    a bad row."""
    on_bad_row: OnBadRow = "stop"
    """stop: a row that cannot be read ends the command, with its place. skip: such rows are left out, counted by reason
    in the report and in the manifest (docs/data.md)."""
    out: Path | None = None
    """Data directory to make. None: data/fineweb_edu_10B for sample-10BT of fineweb-edu (other parts alike), with
    _first_N appended for --max-tokens N. --source local needs it."""
    tokenizer: str = "gpt2"
    """gpt2, byte, a .tiktoken rank file, or a folder with a saved tokenizer, such as data_prep/bpe.py makes."""
    backend: Backend = "tiktoken"
    """Encoder. gigatoken is several times faster; its ids are checked against tiktoken's during the run. It needs
    pip install -e '.[fast]'."""
    workers: int | None = None
    """Number of processes. None: all available cores. The output does not depend on it."""
    shard_tokens: int = 100_000_000
    """Tokens per shard. The last shard of a split may be shorter."""
    max_tokens: int | None = None
    """Most tokens to keep, of the first documents, for a small try. Only the files that they need are downloaded.
    None: all documents."""
    split_mode: Split = "hash"
    """hash: validation is the documents with the lowest text hashes, from all files. first-shard: validation is the
    first shard, as in build-nanogpt; its texts occur in training too."""
    val_tokens: int | None = None
    """Fewest validation tokens with --split-mode hash. None: 10,485,760 (20 batches of 524,288) or a hundredth of all
    tokens, whichever is less."""
    dedup: Literal["exact", "none"] = "exact"
    """exact: keep the first of the documents with equal text. 4.18 % of sample-10BT are copies."""
    shuffle: Literal["documents", "none"] = "documents"
    """documents: random order, for programs that read the shards in order (train/main.py permutes sequences anyway).
    none: the order of the files, where pages of one crawl lie together."""
    seed: int = 0
    """Seed of the shuffle."""
    task_index: int | None = None
    """Index of this task among --num-tasks, from 0. None: SLURM_ARRAY_TASK_ID in a Slurm array, else 0."""
    num_tasks: int | None = None
    """Number of machines or jobs that share --stage tokenize. None: SLURM_ARRAY_TASK_COUNT in a Slurm array, else 1."""
    stage: Literal["all", "download", "tokenize", "pack", "verify"] = "all"
    """all: every stage in turn, on one machine. tokenize: may run as many tasks with one --out. pack: runs once, after
    all of them."""
    dry_run: bool = False
    """Print files, bytes, disk and time, and write nothing."""
    overwrite: bool = False
    """Replace the data directory that is there, once the new one is complete."""

    @property
    def directory(self) -> Path:
        """Return --out, or its default."""
        if self.out is not None:
            return named_directory(self.out)
        dataset = self.dataset.rsplit("/", 1)[-1].replace("-", "_")
        part = self.name.removeprefix("sample-").removesuffix("T") if self.name.startswith("sample-") else self.name
        suffix = f"_first_{self.max_tokens}" if self.max_tokens is not None else ""
        return Path("data") / f"{dataset}_{part}{suffix}"

    @property
    def reading(self) -> Reading:
        return Reading(
            text_column=self.text_column,
            tolerant=True,
            max_document_bytes=self.max_document_bytes,
            on_bad_row=self.on_bad_row,
        )


def byte_options(options: Options) -> dict[str, Any]:
    """Return the options that change the bytes. The manifest records tokenizer and files by their hashes."""
    return {
        "text_column": options.text_column,
        "shard_tokens": options.shard_tokens,
        "max_tokens": options.max_tokens,
        "split_mode": options.split_mode,
        "val_tokens": options.val_tokens if options.split_mode == "hash" else None,
        "dedup": options.dedup,
        "shuffle": options.shuffle,
        "seed": options.seed if options.shuffle == "documents" else None,
    } | options_of_bad_rows(options.max_document_bytes)


def describe_request(options: Options, files: Sequence[InputFile] = ()) -> dict[str, Any]:
    """Return the request to the Hub, or the names and sizes of local files."""
    if options.source == "hub":
        return {"dataset": options.dataset, "name": options.name, "revision": options.revision}
    with reading_from("--data-files"):
        return {"data_files": [[file.name, Path(file.path).stat().st_size] for file in files]}


def part_options(options: Options, files: Sequence[InputFile], tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the options that parts depend on, which all tasks with one --out must share."""
    description = tokenizer.describe()
    return describe_request(options, files) | {
        "max_tokens": options.max_tokens,
        "text_column": options.text_column,
        "max_document_bytes": options.max_document_bytes,
        "tokenizer": f"{description.get('name', description['kind'])} ({sha256_of_json(description)[:8]})",
        "backend": options.backend,
    }


def write_plan(partial: Path, plan: dict[str, Any], *, replace: bool) -> None:
    """Write the plan for later tasks. Raise InputError if an earlier task wrote another one.

    replace: this process works alone, so the parts of another plan may go.
    """
    existing = _write_once(partial / PARTS / PLAN, plan, replace=replace)
    if existing != plan:
        raise InputError(
            f"--out: other tasks make other parts there: {', '.join(differences(existing, plan))}; "
            f"give the same options, another --out, or remove {partial} with their parts"
        )


def list_hub_files(partial: Path, options: Options) -> HubListing:
    """Return the Hub's list of files. The first task asks for it and writes it; the others need no network."""
    path = partial / PARTS / LISTING
    request = describe_request(options)
    stored = read_own_json(path)
    if stored is None or stored["asked"] != request:
        listing = hub.list_files(options.dataset, options.name, options.revision)
        record = {"asked": request, "listing": dataclasses.asdict(listing)}
        stored = _write_once(path, record, replace=options.stage == "all")
    if stored["asked"] != request:
        fault = f"files are there of another input: {', '.join(differences(stored['asked'], request))}"
        raise InputError(f"--out: {fault}; give the same options, another --out, or remove {partial}")
    fields = dict(stored["listing"])
    files = tuple(HubFile(**file) for file in fields.pop("files"))
    return HubListing(**fields, files=files)


def _write_once(path: Path, value: dict[str, Any], *, replace: bool) -> dict[str, Any]:
    """Write `value`, unless the file exists and `replace` is not set; return the file's content."""
    if replace:
        write_json_atomically(path, value)
    elif not path.exists():
        own = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
        write_json_atomically(own, value)
        with contextlib.suppress(FileExistsError):  # another task was first
            path.hardlink_to(own)
        own.unlink()
    content = read_own_json(path)
    assert content is not None
    return content


def required_files(listing: HubListing, options: Options) -> tuple[HubFile, ...]:
    """Return the Hub's files; with --max-tokens, the first ones that should hold that many tokens."""
    return listing.files[: _num_required(listing.files, options)]


def _num_required(items: Sequence[HubFile] | Sequence[Unit], options: Options) -> int | None:
    """Return how many of the items should hold --max-tokens; None: all of them."""
    if options.max_tokens is None:
        return None
    ends = itertools.accumulate(item.num_bytes for item in items)
    needed_bytes = READ_BYTES_PER_TOKEN * options.max_tokens
    return next((count for count, end in enumerate(ends, start=1) if end >= needed_bytes), None)


def downloads_directory(options: Options, listing: HubListing) -> Path:
    """Return the directory of the Hub's files: beside --out, named by the commit."""
    return options.directory.parent / "downloads" / options.dataset.replace("/", "--") / listing.revision


@reading_from("--data-files")
def local_files(patterns: tuple[str, ...]) -> list[InputFile]:
    """Return the parquet files of --data-files, sorted by their names below each folder or pattern."""
    names: dict[Path, str] = {}
    for pattern in patterns:
        folder, paths = _expand(pattern)
        if not paths:
            raise InputError(f"--data-files {pattern}: no .parquet file there")
        for path in paths:
            if path.suffix != ".parquet" or not path.is_file():
                raise InputError(f"--data-files: {path} is no .parquet file; data_prep/textfiles.py reads other kinds")
            names.setdefault(path.absolute(), path.relative_to(folder).as_posix())
    in_order = sorted(names.items(), key=lambda item: item[1])
    return [InputFile(str(path), name, "parquet", flag="--data-files") for path, name in in_order]


def _expand(pattern: str) -> tuple[Path, list[Path]]:
    """Return (the folder that names are relative to, the paths) of a file, a folder or a pattern."""
    path = Path(pattern)
    if path.is_dir():
        files = path.rglob("*.parquet")
        return path, [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    if path.exists() or not glob.has_magic(pattern):
        return path.parent, [path] if path.exists() else []
    fixed_parts = itertools.takewhile(lambda part: not glob.has_magic(part), path.parts)
    return Path(*fixed_parts), [Path(name) for name in glob.glob(pattern, recursive=True)]  # noqa: PTH207


def hub_files(folder: Path, files: Sequence[HubFile]) -> list[InputFile]:
    """Return the Hub's files as they are downloaded into `folder`."""
    return [InputFile(str(folder / file.path), file.path, "parquet", flag="--source hub") for file in files]


def plan_all_units(files: Sequence[InputFile], options: Options) -> list[Unit]:
    """Return all units in order; with --max-tokens, the first ones that should hold that many tokens."""
    units = [unit for file in files for unit in plan_units(file, options.reading, UNIT_BYTES)]
    if not units:
        raise InputError(f"{files[0].path}: no rows in it, nor in any other of {len(files)} files")
    return units[: _num_required(units, options)]


def task_share(options: Options) -> tuple[int, int]:
    """Return (task_index, num_tasks) from the flags, else from a Slurm array, else (0, 1)."""
    if (options.task_index is None) != (options.num_tasks is None):
        raise InputError("--task-index and --num-tasks need each other")
    origin = "--num-tasks"
    if options.task_index is not None and options.num_tasks is not None:
        index, count = options.task_index, options.num_tasks
    elif "SLURM_ARRAY_TASK_ID" in os.environ:
        index, count = _share_of_slurm_array()
        origin = "SLURM_ARRAY_TASK_COUNT"
    else:
        index, count = 0, 1
    if not 0 <= index < count:
        raise InputError(f"--task-index {index} must be at least 0 and below --num-tasks {count}")
    if count > 1 and options.stage != "tokenize":
        raise InputError(
            f"{origin} {count}: --stage {options.stage} is the work of one task; many share --stage tokenize, "
            "between --stage download and --stage pack (or give --task-index 0 --num-tasks 1 if they share nothing)"
        )
    return index, count


def _share_of_slurm_array() -> tuple[int, int]:
    numbers = []
    for name, default in {"ID": None, "COUNT": None, "MIN": None, "MAX": None, "STEP": "1"}.items():
        variable = f"SLURM_ARRAY_TASK_{name}"
        text = os.environ.get(variable, default)
        if text is None:
            raise InputError(f"SLURM_ARRAY_TASK_ID is set, {variable} is not; give --task-index and --num-tasks")
        if not re.fullmatch("[0-9]{1,18}", text):
            raise InputError(f"{variable}={text!r}: not a whole number; give --task-index and --num-tasks")
        numbers.append(int(text))
    number, count, first, last, step = numbers
    if step == 0:
        raise InputError("SLURM_ARRAY_TASK_STEP='0': at least 1 is needed; give --task-index and --num-tasks")
    if (last - first) // step + 1 != count:
        raise InputError(f"the {count} ids of this Slurm array have gaps; give --task-index and --num-tasks")
    return (number - first) // step, count
