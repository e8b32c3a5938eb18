"""Sequences per second out of shards: cold and warm page cache, one to four reading processes.

    python benchmarks/bench_batches.py                           # 1 GB of random tokens; 65 s on 2 CPU cores
    python benchmarks/bench_batches.py --data data/fineweb-edu   # your shards, on your file system
    TMPDIR=/scratch python benchmarks/bench_batches.py           # random tokens on another file system

Expect on 2 CPU cores (torch 2.13, ext4 on a virtual disk with read_ahead_kb 8192, other work on the machine, so that
warm rounds differ by 3 to 4 times): cold 190 sequences/s (0.2 M tokens/s), whatever the readers, until the first step
has brought in half of the data; warm 26,000 with one reader (18,000 to 33,000; 39,000 when quieter), no more with four.
Eight H100 at 470,000 tokens/s each, the best known for GPT-2 small, need 3.8 M tokens/s.

Each reader is a process with one thread that reads its rank's contiguous part of every step as train/data.py
does, without a model and without waiting for the others. What the trainer needs is its tokens/s.

Cold: before each round the shards' pages are dropped from the page cache (posix_fadvise), and mincore counts how
many are left; where they stay (tmpfs, some network file systems), the round is reported as warm. The kernel brings in
far more than a sequence's 2 KiB (read_ahead_kb of the device), so a few reads cache everything: a cold round stops, at
a whole step, when a quarter of the data may be in, and `resident` says how much was cached before and after. On a
virtual machine the host may have a cache of its own. Warm: the shards are read through first.

Rounds run over all cases in turn. Last line: JSON, with medians and the lowest and highest round.
"""

import ctypes
import functools
import json
import math
import mmap
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
import tyro

from common.errors import InputError, one_line_errors
from data_prep.shards import HEADER_INTS, MAGIC, VERSION, TokenStream, open_shard
from train.data import TrainingSequences

MB, GB = 10**6, 10**9
SHARD_TOKENS = 100_000_000  # as data_prep cuts them
VOCAB_SIZE = 50_257
TOKEN_BYTES = 2
SEED = 1
START_SECONDS = 120.0  # for the readers to import torch, and to meet at the start of a round
WARM_FROM = 0.9  # share of resident pages from which a round counts as warm
COLD_UPTO = 0.05  # and up to which as cold
READ_AROUND_KB = 128  # Linux's default: what one page fault in a mapped file brings in
COLD_SHARE = 0.25  # of the data, in read-arounds, that a cold round may bring in


@dataclass(frozen=True)
class Options:
    """Sequences per second out of shards: cold and warm page cache, one to four reading processes."""

    data: Path | None = None
    """Directory with train_*.bin; None: random tokens in a temporary folder (of TMPDIR)."""
    gigabytes: float = 1.0
    """Size of the random tokens."""
    seq_len: int = 1024
    """Tokens per sequence."""
    sequences: int = 96
    """Sequences per step, of all readers together; each number of readers must divide it."""
    readers: tuple[int, ...] = (1, 2, 3, 4)
    """Numbers of processes to time."""
    seconds: float = 1.0
    """Time per case and round, at most."""
    rounds: int = 5
    """Rounds over all cases."""


@dataclass(frozen=True)
class Reading:
    """One reader's part of a round."""

    steps: int
    seconds: float


@dataclass(frozen=True)
class Round:
    """All readers' parts, and the share of the shards' pages in memory before and after."""

    readings: tuple[Reading, ...]
    resident_before: float
    resident_after: float

    def sequences_per_second(self, sequences_per_reader: int) -> float:
        return sum(reading.steps * sequences_per_reader / reading.seconds for reading in self.readings)


def check(options: Options) -> None:
    for name in ("gigabytes", "seq_len", "sequences", "seconds", "rounds"):
        if getattr(options, name) <= 0:
            raise InputError(f"--{name.replace('_', '-')} {getattr(options, name)} must be above 0")
    if not options.readers or min(options.readers) < 1:
        raise InputError(f"--readers {list(options.readers)} must be one or more numbers of at least 1")
    for readers in options.readers:
        if options.sequences % readers:
            fitting = math.lcm(*options.readers)
            raise InputError(
                f"--sequences {options.sequences} is not divisible by --readers {readers}; "
                f"try --sequences {-(-options.sequences // fitting) * fitting}"
            )


def write_random_shards(directory: Path, num_bytes: int) -> None:
    """train_*.bin of uniformly random ids in the shard format; synced, so that their pages can be dropped."""
    generator = np.random.default_rng(SEED)
    left = max(num_bytes // TOKEN_BYTES, 1)
    for number in range(-(-left // SHARD_TOKENS)):
        num_tokens = min(left, SHARD_TOKENS)
        header = np.zeros(HEADER_INTS, dtype="<i4")
        header[:5] = MAGIC, VERSION, num_tokens, VOCAB_SIZE, -1
        with (directory / f"train_{number:06d}.bin").open("wb") as file:
            file.write(header.tobytes())
            file.write(generator.integers(VOCAB_SIZE, size=num_tokens, dtype=np.uint16).tobytes())
            file.flush()
            os.fsync(file.fileno())
        left -= num_tokens


def shard_paths(directory: Path) -> list[Path]:
    paths = sorted(directory.glob("train_*.bin"))
    if not paths:
        raise InputError(f"--data {directory}: no train_*.bin in it")
    return paths


def resident_share(paths: Sequence[Path]) -> float:
    """Share of the files' pages that are in the page cache, by mincore(2).

    Linux tells only the owner of a file, or who may write it; to others every page looks resident.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    resident = total = 0
    for path in paths:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
            data = np.frombuffer(mapping, dtype=np.uint8)
            pages = np.empty(-(-len(data) // mmap.PAGESIZE), dtype=np.uint8)
            address, length = ctypes.c_void_p(data.ctypes.data), ctypes.c_size_t(len(data))
            if libc.mincore(address, length, ctypes.c_void_p(pages.ctypes.data)) != 0:
                raise OSError(ctypes.get_errno(), "mincore", str(path))
            del data  # the mapping cannot be closed while an array shows it
            resident += int((pages & 1).sum())
            total += len(pages)
    return resident / total


def drop_from_cache(paths: Sequence[Path]) -> None:
    """Ask the kernel to forget the files' pages. It keeps those that are mapped by a living process, or dirty."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bring_into_cache(paths: Sequence[Path]) -> None:
    for path in paths:
        with path.open("rb") as file:
            while file.read(16 * 2**20):
                pass


START_LINES: dict[int, Barrier] = {}  # in a reader: where the readers of a round meet, by how many they are


def enter_pool(start_lines: dict[int, Barrier]) -> None:
    torch.set_num_threads(1)  # as torchrun sets it for several processes on a node
    START_LINES.update(start_lines)


def read_for(
    paths: Sequence[Path], options: Options, *, readers: int, rank: int, first_step: int, max_steps: int | None
) -> Reading:
    """One reader's round: its part of step after step until time or steps are up. Runs in a process of the pool.

    The shards are opened anew, so that nothing of the round before is still mapped.
    """
    sequences = TrainingSequences(TokenStream([open_shard(path) for path in paths]), options.seq_len, SEED)
    per_reader = options.sequences // readers
    START_LINES[readers].wait(START_SECONDS)
    started, steps = time.perf_counter(), 0
    while (seconds := time.perf_counter() - started) < options.seconds and steps != max_steps:
        position = (first_step + steps) * options.sequences + rank * per_reader
        inputs_BT, targets_BT = sequences.read(sequences.ids_at(position, per_reader))
        assert inputs_BT.shape == targets_BT.shape == (per_reader, options.seq_len)
        steps += 1
    return Reading(steps, seconds)


def read_around_kb(path: Path) -> int:
    """What the kernel brings in around a page that is missed in a file: its device's setting, or Linux's default."""
    device = path.stat().st_dev
    setting = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    return int(setting.read_text()) if setting.is_file() else READ_AROUND_KB


def cold_steps(paths: Sequence[Path], options: Options) -> int:
    """Steps that bring in COLD_SHARE of the data when every sequence costs one read-around; at least one."""
    num_bytes = sum(path.stat().st_size for path in paths)
    step_bytes = options.sequences * max(1, read_around_kb(paths[0])) * 1024
    return max(1, int(COLD_SHARE * num_bytes / step_bytes))


def time_round(
    pool: ProcessPoolExecutor, paths: Sequence[Path], options: Options, *, state: str, readers: int, number: int
) -> Round:
    """All readers at once, from a position of the round's own, with the cache in the asked-for state."""
    if state == "cold":
        drop_from_cache(paths)
    else:
        bring_into_cache(paths)
    before = resident_share(paths)
    part = functools.partial(
        read_for,
        paths,
        options,
        readers=readers,
        first_step=number * 1_000_003,
        max_steps=cold_steps(paths, options) if state == "cold" else None,
    )
    tasks = [pool.submit(part, rank=rank) for rank in range(readers)]
    readings = tuple(task.result() for task in tasks)
    return Round(readings, before, resident_share(paths))


def spread(values: Sequence[float], digits: int = 1) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), digits),
        "low": round(min(values), digits),
        "high": round(max(values), digits),
    }


def name_of_state(rounds: Sequence[Round]) -> str:
    """What the cache really was, whatever was asked for."""
    before = [one.resident_before for one in rounds]
    if max(before) <= COLD_UPTO:
        return "cold"
    return "warm" if min(before) >= WARM_FROM else "partly cached"


def summary(asked: str, readers: int, rounds: Sequence[Round], options: Options) -> dict[str, object]:
    per_reader = options.sequences // readers
    rates = [one.sequences_per_second(per_reader) for one in rounds]
    steps = [[reading.steps for reading in one.readings] for one in rounds]
    return {
        "asked": asked,
        "cache": name_of_state(rounds),
        "readers": readers,
        "sequences_per_reader_step": per_reader,
        "steps": steps,
        "sequences": [sum(counts) * per_reader for counts in steps],
        "sequences_per_second": spread(rates),
        "tokens_per_second": spread([rate * options.seq_len for rate in rates], 0),
        "megabytes_per_second": spread([rate * (options.seq_len + 1) * TOKEN_BYTES / MB for rate in rates]),
        "resident_before": spread([one.resident_before for one in rounds], 4),
        "resident_after": spread([one.resident_after for one in rounds], 4),
    }


def line_of(case: dict[str, object]) -> str:
    rate, tokens = case["sequences_per_second"], case["tokens_per_second"]
    megabytes, before, after = case["megabytes_per_second"], case["resident_before"], case["resident_after"]
    assert isinstance(rate, dict) and isinstance(tokens, dict) and isinstance(megabytes, dict)
    assert isinstance(before, dict) and isinstance(after, dict)
    return (
        f"{case['cache']:<13}  readers {case['readers']}  {rate['median']:>9,.0f} sequences/s "
        f"({rate['low']:,.0f} to {rate['high']:,.0f})  {tokens['median'] / 1e6:7.1f} M tokens/s  "
        f"{megabytes['median']:7.1f} MB/s  resident {before['median']:.0%} -> {after['median']:.0%}"
    )


def measure(options: Options, directory: Path) -> dict[str, object]:
    paths = shard_paths(directory)
    can_drop = hasattr(os, "posix_fadvise")
    if not can_drop:
        print("this system has no posix_fadvise: warm rounds only")
    states = ("cold", "warm") if can_drop else ("warm",)
    context = multiprocessing.get_context("spawn")
    start_lines = {readers: context.Barrier(readers) for readers in options.readers}
    done: dict[tuple[str, int], list[Round]] = {(state, n): [] for state in states for n in options.readers}
    with ProcessPoolExecutor(max(options.readers), context, enter_pool, (start_lines,)) as pool:
        for number in range(options.rounds):
            for (state, readers), rounds in done.items():
                rounds.append(time_round(pool, paths, options, state=state, readers=readers, number=number))
    cases = [summary(state, readers, rounds, options) for (state, readers), rounds in done.items()]
    for case in cases:
        print(line_of(case))
    if any(case["cache"] != case["asked"] for case in cases):
        print("warning: the cache was not always as asked for (see `resident`): these numbers are of what it was")
    return {
        "data_bytes": sum(path.stat().st_size for path in paths),
        "shards": len(paths),
        "read_around_kb": read_around_kb(paths[0]),
        "seq_len": options.seq_len,
        "sequences_per_step": options.sequences,
        "seconds": options.seconds,
        "rounds": options.rounds,
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cases": cases,
    }


def main(args: list[str] | None = None) -> None:
    with one_line_errors("bench_batches"):
        options = tyro.cli(Options, args=args, description=__doc__)
        check(options)
        if options.data is not None:
            print(json.dumps(measure(options, options.data)))
            return
        with tempfile.TemporaryDirectory() as folder:
            write_random_shards(Path(folder), int(options.gigabytes * GB))
            print(json.dumps(measure(options, Path(folder))))


if __name__ == "__main__":
    main()
