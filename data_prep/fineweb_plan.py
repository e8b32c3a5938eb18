"""What a preparation of FineWeb-Edu is of: options that decide the bytes, files, units, and one task's share of them.

plan.json lies with the parts and is written by whoever comes first. Whoever comes later, from any machine, must have
the same options; the Hub's answer is in it too, so that only the first one needs the network.
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

from data_prep.atomic import write_json_atomically
from data_prep.encode import Backend
from data_prep.errors import InputError
from data_prep.hub import HubFile, HubListing
from data_prep.selection import Split
from data_prep.sources import InputFile, Reading, Unit, find_files, plan_units
from data_prep.unfinished import PARTS, PLAN, differences

UNIT_BYTES = (
    2**25
)  # some seconds of work; FineWeb-Edu's row groups of 1,000 pages (5 MB) would make 10,000 files of parts
# No text has more bytes per token than this: GPT-2's ids hold 4.7 bytes of English on average.
MOST_BYTES_PER_TOKEN = 6


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
    """The data directory to make; data/fineweb_edu_10B for sample-10BT of fineweb-edu, and so on."""
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
        return Path("data") / f"{short}_{part}"

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
        "val_tokens": options.val_tokens,
        "dedup": options.dedup,
        "shuffle": options.shuffle,
        "seed": options.seed if options.shuffle == "documents" else None,
    }


def request(options: Options, files: Sequence[InputFile] = ()) -> dict[str, Any]:
    """Which input: what the Hub was asked for, or the local files' names and sizes."""
    if options.source == "hub":
        return {"dataset": options.dataset, "name": options.name, "revision": options.revision}
    return {"data_files": [[file.name, Path(file.path).stat().st_size] for file in files]}


@dataclass(frozen=True)
class Plan:
    """The input of all tasks: `wanted` is compared between them, `listing` is the Hub's answer."""

    wanted: dict[str, Any]
    listing: HubListing | None

    def needed(self, options: Options) -> tuple[HubFile, ...]:
        """The Hub's files; with --max-tokens only the first ones, which surely hold as many tokens."""
        assert self.listing is not None
        if options.max_tokens is None:
            return self.listing.files
        ends = list(itertools.accumulate(file.num_bytes for file in self.listing.files))
        return self.listing.files[: _how_many(ends, options.max_tokens)]


def _how_many(ends: list[int], max_tokens: int) -> int:
    """How many files or units to take, whose ends in bytes these are."""
    return next((n for n, end in enumerate(ends, start=1) if end >= MOST_BYTES_PER_TOKEN * max_tokens), len(ends))


def read_plan(partial: Path) -> Plan | None:
    """The plan that whoever came first has left."""
    path = partial / PARTS / PLAN
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    listing = raw["listing"]
    if listing is not None:
        files = tuple(HubFile(**file) for file in listing.pop("files"))
        listing = HubListing(**listing, files=files)
    return Plan(raw["wanted"], listing)


def keep_plan(partial: Path, plan: Plan, *, replace: bool) -> Plan:
    """Write the plan, or take the one that is there if it wants the same. InputError if it does not.

    replace: this process is alone, and the other plan's parts will go.
    """
    path = partial / PARTS / PLAN
    before = read_plan(partial)
    if before is None or (replace and before.wanted != plan.wanted):
        own = path.with_name(f".{PLAN}.{os.uname().nodename}.{os.getpid()}")
        write_json_atomically(own, dataclasses.asdict(plan))
        if replace:
            own.replace(path)
        else:
            with contextlib.suppress(FileExistsError):  # another task was first
                path.hardlink_to(own)
            own.unlink()
        before = read_plan(partial)
        assert before is not None
    if before.wanted != plan.wanted:
        raise InputError(
            f"{path}: other tasks prepare something else there: {', '.join(differences(before.wanted, plan.wanted))}; "
            "give the same options, another --out, or remove that folder"
        )
    return before


def downloads_of(options: Options, plan: Plan) -> Path:
    """Where the Hub's files go: beside --out, below the commit's name."""
    assert plan.listing is not None
    return options.directory.parent / "downloads" / options.dataset.replace("/", "--") / plan.listing.revision


def local_files(patterns: tuple[str, ...]) -> list[InputFile]:
    """The parquet files that --data-files names, in the order of their names below the folder that holds them all."""
    paths: set[Path] = set()
    for pattern in patterns:
        found = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern]  # noqa: PTH207
        if not found:
            raise InputError(f"--data-files {pattern}: no such file")
        paths.update(Path(file.path).absolute() for file in find_files(tuple(found), "--data-files")[0])
    others = sorted(path for path in paths if path.suffix != ".parquet")
    if others:
        raise InputError(f"--data-files: {others[0]} is no .parquet file; data_prep/textfiles.py reads other kinds")
    common = Path(os.path.commonpath([path.parent for path in paths]))
    names = sorted((path.relative_to(common).as_posix(), str(path)) for path in paths)
    return [InputFile(path, name, "parquet", flag="--data-files") for name, path in names]


def hub_files(folder: Path, files: Sequence[HubFile]) -> list[InputFile]:
    """The Hub's files where `download` puts them."""
    return [InputFile(str(folder / file.path), file.path, "parquet", flag="--source hub") for file in files]


def units_of(files: Sequence[InputFile], options: Options) -> list[Unit]:
    """All units in order; with --max-tokens the first ones, which surely hold as many tokens."""
    units = [unit for file in files for unit in plan_units(file, options.reading, UNIT_BYTES)]
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
            f"{origin} {count}: --stage {options.stage} is the work of one task; many share --stage tokenize, after "
            "--stage download and before --stage pack"
        )
    return index, count


def _share_of_slurm_array() -> tuple[int, int]:
    number, count, first = (int(os.environ[f"SLURM_ARRAY_TASK_{name}"]) for name in ("ID", "COUNT", "MIN"))
    index, rest = divmod(number - first, int(os.environ.get("SLURM_ARRAY_TASK_STEP", "1")))
    if rest or index >= count:
        raise InputError(
            f"the {count} ids of this Slurm array have gaps ({number} is one); give --task-index and --num-tasks"
        )
    return index, count
