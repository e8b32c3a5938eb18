"""What a preparation of FineWeb-Edu is of: options that decide the bytes, files, units, and one task's share of them.

Two files lie with the parts, written by whoever comes first: plan.json, the options that parts depend on, which whoever
comes later, from any machine, must have alike; and listing.json, the Hub's answer, so that only one needs the network.
"""

import contextlib
import dataclasses
import glob
import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common.errors import InputError, reading_from
from common.files import write_json_atomically
from data_prep.hub import files as hub
from data_prep.hub.files import HubFile, HubListing
from data_prep.pipeline.encode import Backend, hash_of
from data_prep.pipeline.partial_dir import KEPT, PARTS, differences
from data_prep.pipeline.selection import Split
from data_prep.pipeline.sources import InputFile, Reading, Unit, plan_units
from data_prep.tokenizer import Tokenizer

PLAN, LISTING = KEPT
ARRAY_VARIABLES = ("ID", "COUNT", "MIN", "MAX")
# Some seconds of work. Row groups of 1,000 pages (5 MB) would make 10,000 parts of sample-10BT, in one folder.
UNIT_BYTES = 2**25
# GPT-2's ids hold 4.7 bytes of English on average: what --max-tokens reads has some to spare for duplicates.
BYTES_FOR_A_TOKEN = 6


@dataclass(frozen=True)
class Options:
    """FineWeb-Edu, or a data set laid out like it, to training shards."""

    name: str = "sample-10BT"
    """Which part: sample-10BT, sample-100BT, sample-350BT, default (all of it), or a crawl like CC-MAIN-2024-10."""
    dataset: str = "HuggingFaceFW/fineweb-edu"
    """The data set on the Hub; HuggingFaceFW/fineweb is laid out in the same way."""
    revision: str | None = None
    """A commit of it. For fineweb-edu one is pinned; for others it is main's, and kept from then on."""
    source: Literal["hub", "local"] = "hub"
    """hub downloads (into `downloads` beside --out); local reads --data-files and never uses the network."""
    data_files: tuple[str, ...] = ()
    """With --source local: parquet files, folders of them or patterns like 'pages/*.parquet'."""
    text_column: str = "text"
    """The column that holds the text."""
    out: Path | None = None
    """The data directory to make; data/fineweb_edu_10B for sample-10BT of fineweb-edu, and so on, with _first_N after
    it for --max-tokens N. --source local needs it."""
    tokenizer: str = "gpt2"
    """gpt2, byte, a .tiktoken rank file, or a folder with a saved tokenizer, such as data_prep/bpe.py makes."""
    backend: Backend = "tiktoken"
    """gigatoken gives the same ids some times faster, which it is held to as it goes (pip install -e '.[fast]')."""
    workers: int | None = None
    """Processes. All cores that are available unless given; the output does not depend on it."""
    shard_tokens: int = 100_000_000
    """Tokens per shard; the last one of a split may be shorter."""
    max_tokens: int | None = None
    """For a small try: only the first documents, at most so many tokens. Only the files they need are downloaded."""
    split_mode: Split = "hash"
    """hash: validation is the documents of lowest text hash, wherever they come from. first-shard: the first shard,
    as build-nanogpt has it, whose texts occur in training too."""
    val_tokens: int | None = None
    """With --split-mode hash: how many tokens validation has at least; 10,485,760 (20 batches of 524,288) or a
    hundredth of all, whichever is less, unless given."""
    dedup: Literal["exact", "none"] = "exact"
    """exact: of documents with the same text the first is kept. 4.18 % of sample-10BT are such copies."""
    shuffle: Literal["documents", "none"] = "documents"
    """documents: in random order, for those who read the shards in turn (train/main.py permutes windows in any case).
    none: in the order of the files, of which pages of one crawl lie together."""
    seed: int = 0
    """Of the shuffle."""
    task_index: int | None = None
    """Which of --num-tasks this one is, from 0; from SLURM_ARRAY_TASK_ID in a Slurm array."""
    num_tasks: int | None = None
    """How many machines or jobs share --stage tokenize; from SLURM_ARRAY_TASK_COUNT in a Slurm array."""
    stage: Literal["all", "download", "tokenize", "pack", "verify"] = "all"
    """all: one after the other, on one machine. tokenize may be many tasks with one --out, pack is one after them."""
    dry_run: bool = False
    """Say what would be done: files, bytes, disk, time."""
    overwrite: bool = False
    """Make it anew, replacing the data directory that is there once the new one is complete."""

    @property
    def directory(self) -> Path:
        """--out, or the name that stands for it."""
        if self.out is not None:
            return self.out.resolve() if self.out.is_symlink() else self.out
        short = self.dataset.rsplit("/", 1)[-1].replace("-", "_")
        part = self.name.removeprefix("sample-").removesuffix("T") if self.name.startswith("sample-") else self.name
        first = f"_first_{self.max_tokens}" if self.max_tokens is not None else ""
        return Path("data") / f"{short}_{part}{first}"

    @property
    def reading(self) -> Reading:
        return Reading(text_column=self.text_column, tolerant=True)


def byte_options(options: Options) -> dict[str, Any]:
    """The options that change the bytes; the tokenizer and the files are recorded by their hashes."""
    return {
        "text_column": options.text_column,
        "shard_tokens": options.shard_tokens,
        "max_tokens": options.max_tokens,
        "split_mode": options.split_mode,
        "val_tokens": options.val_tokens if options.split_mode == "hash" else None,
        "dedup": options.dedup,
        "shuffle": options.shuffle,
        "seed": options.seed if options.shuffle == "documents" else None,
    }


def request(options: Options, files: Sequence[InputFile] = ()) -> dict[str, Any]:
    """Which input: what the Hub was asked for, or the local files' names and sizes."""
    if options.source == "hub":
        return {"dataset": options.dataset, "name": options.name, "revision": options.revision}
    with reading_from("--data-files"):
        return {"data_files": [[file.name, Path(file.path).stat().st_size] for file in files]}


def part_options(options: Options, files: Sequence[InputFile], tokenizer: Tokenizer) -> dict[str, Any]:
    """What all tasks with one --out must have alike, since parts depend on it."""
    description = tokenizer.describe()
    return request(options, files) | {
        "max_tokens": options.max_tokens,
        "text_column": options.text_column,
        "tokenizer": f"{description.get('name', description['kind'])} ({hash_of(description)[:8]})",
        "backend": options.backend,
    }


def keep_plan(partial: Path, wanted: dict[str, Any], *, replace: bool) -> None:
    """Leave it for the tasks to come; InputError if another was left by those before.

    replace: this process is alone, and the other plan's parts will go.
    """
    found = _keep(partial / PARTS / PLAN, wanted, replace=replace)
    if found != wanted:
        raise InputError(
            f"--out: other tasks make other parts there: {', '.join(differences(found, wanted))}; "
            f"give the same options, another --out, or remove {partial} with what they made"
        )


def keep_listing(partial: Path, options: Options) -> HubListing:
    """The Hub's answer, asked for once and kept for all tasks: they need no network then."""
    path = partial / PARTS / LISTING
    asked = request(options)
    found = _read(path)
    if found is None or found["asked"] != asked:
        listing = hub.list_files(options.dataset, options.name, options.revision)
        found = _keep(path, {"asked": asked, "listing": dataclasses.asdict(listing)}, replace=options.stage == "all")
    if found["asked"] != asked:
        raise InputError(
            f"--out: files are there of another input: {', '.join(differences(found['asked'], asked))}; give the same "
            f"options, another --out, or remove {partial}"
        )
    kept = dict(found["listing"])
    files = tuple(HubFile(**file) for file in kept.pop("files"))
    return HubListing(**kept, files=files)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: damaged ({error}); remove it") from error
    return value


def _keep(path: Path, value: dict[str, Any], *, replace: bool) -> dict[str, Any]:
    """What the file says: this value now, unless there is one already that must not be replaced."""
    if replace:
        write_json_atomically(path, value)
    elif not path.exists():
        own = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
        write_json_atomically(own, value)
        with contextlib.suppress(FileExistsError):  # another task was first
            path.hardlink_to(own)
        own.unlink()
    found = _read(path)
    assert found is not None
    return found


def needed(listing: HubListing, options: Options) -> tuple[HubFile, ...]:
    """The Hub's files; with --max-tokens only the first ones, which should hold as many tokens."""
    if options.max_tokens is None:
        return listing.files
    ends = list(itertools.accumulate(file.num_bytes for file in listing.files))
    return listing.files[: _how_many(ends, options.max_tokens)]


def _how_many(ends: list[int], max_tokens: int) -> int:
    """How many files or units to take, whose ends in bytes these are."""
    return next((n for n, end in enumerate(ends, start=1) if end >= BYTES_FOR_A_TOKEN * max_tokens), len(ends))


def downloads_of(options: Options, listing: HubListing) -> Path:
    """Where the Hub's files go: beside --out, below the commit's name."""
    return options.directory.parent / "downloads" / options.dataset.replace("/", "--") / listing.revision


def local_files(patterns: tuple[str, ...]) -> list[InputFile]:
    """The parquet files that --data-files names, in the order of their names below each folder or pattern."""
    with reading_from("--data-files"):
        return _local_files(patterns)


def _local_files(patterns: tuple[str, ...]) -> list[InputFile]:
    found: dict[Path, str] = {}
    for pattern in patterns:
        folder, paths = _matching(pattern)
        if not paths:
            raise InputError(f"--data-files {pattern}: no .parquet file there")
        for path in paths:
            if path.suffix != ".parquet" or not path.is_file():
                raise InputError(f"--data-files: {path} is no .parquet file; data_prep/textfiles.py reads other kinds")
            found.setdefault(path.absolute(), path.relative_to(folder).as_posix())
    return [
        InputFile(str(path), name, "parquet", flag="--data-files")
        for path, name in sorted(found.items(), key=lambda item: item[1])
    ]


def _matching(pattern: str) -> tuple[Path, list[Path]]:
    """(the folder that names are below, the paths) of a file, a folder or a pattern."""
    path = Path(pattern)
    if path.is_dir():
        below = path.rglob("*.parquet")
        return path, [file for file in below if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    if path.exists() or not glob.has_magic(pattern):
        return path.parent, [path] if path.exists() else []
    plain = itertools.takewhile(lambda part: not glob.has_magic(part), path.parts)
    return Path(*plain), [Path(name) for name in glob.glob(pattern, recursive=True)]  # noqa: PTH207


def hub_files(folder: Path, files: Sequence[HubFile]) -> list[InputFile]:
    """The Hub's files where `download` puts them."""
    return [InputFile(str(folder / file.path), file.path, "parquet", flag="--source hub") for file in files]


def units_of(files: Sequence[InputFile], options: Options) -> list[Unit]:
    """All units in order; with --max-tokens the first ones, which should hold as many tokens."""
    units = [unit for file in files for unit in plan_units(file, options.reading, UNIT_BYTES)]
    if not units:
        raise InputError(f"{files[0].path}: no rows in it, nor in any other of {len(files)} files")
    if options.max_tokens is None:
        return units
    ends = list(itertools.accumulate(unit.num_bytes for unit in units))
    return units[: _how_many(ends, options.max_tokens)]


def share(options: Options) -> tuple[int, int]:
    """(task_index, num_tasks) as given, or as a Slurm array has them, or (0, 1)."""
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
    try:
        number, count, first, last = (int(os.environ[f"SLURM_ARRAY_TASK_{name}"]) for name in ARRAY_VARIABLES)
    except KeyError as error:
        raise InputError(
            f"SLURM_ARRAY_TASK_ID is set, {error.args[0]} is not; give --task-index and --num-tasks"
        ) from error
    step = int(os.environ.get("SLURM_ARRAY_TASK_STEP", "1"))
    if (last - first) // step + 1 != count:
        raise InputError(f"the {count} ids of this Slurm array have gaps; give --task-index and --num-tasks")
    return (number - first) // step, count
