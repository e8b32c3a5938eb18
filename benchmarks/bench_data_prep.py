"""data_prep/fineweb.py in bytes of text per second, against bare encoders and the usual pattern in the same run.

    python benchmarks/bench_data_prep.py                              # 1 GB of text; 13 min on 2 CPU cores
    python benchmarks/bench_data_prep.py --data data/pages --workers 8
    python benchmarks/bench_data_prep.py --megabytes 100              # 3 min, and start-up most of it

The aim, with W workers on W cores of their own: with tiktoken at least 0.85 x W x the bare encoder in one process, and
at least 2 x the usual pattern; with gigatoken at least 7 x the usual pattern. Each is held or not in the table. Expect
on 2 cores: bare 8 to 10 MB/s, usual 9 MB/s, ours 14 MB/s with tiktoken and 66 MB/s with gigatoken.

bare      `encode_to_numpy` over documents that are already in memory, in one process; `bare gigatoken` likewise
together  W of these at the same time: what the machine allows, whoever asks
usual     benchmarks/usual_pattern.py: a parent that iterates rows, a Pool.imap of W processes
ours      `data_prep/fineweb.py --source local --workers W` from start to end: text read, encoded and hashed,
          duplicates found, documents shuffled, split and packed into shards, every byte verified

In every round all cases take all files, in another order, with a bare measurement before and after each, and ratios
are taken within a round. Start-up (imports, worker processes, the tokenizer) is the time that the same command takes
for next to nothing, just before; it is taken off and reported apart. `encode` counts from the first part begun, when
its worker has yet to import `datasets`, to the last one finished. Files come from the page cache. Memory is each
process's VmHWM. Last line: JSON.
"""

import contextlib
import functools
import json
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, Literal

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import pyarrow.compute as pc  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import tiktoken
import tyro

from benchmarks import fineweb_like
from common.errors import InputError, one_line_errors
from data_prep.manifest import read_manifest
from data_prep.pipeline.encode import Backend

ROOT = Path(__file__).resolve().parents[1]
MB = 10**6
START_SECONDS = 120.0  # for bare encoders to meet
WATCH_SECONDS = 0.05

Tool = Literal["tiktoken", "gigatoken"]


@dataclass(frozen=True)
class Options:
    """data_prep/fineweb.py in bytes of text per second, against bare encoders and the usual pattern."""

    data: Path | None = None
    """Folder of parquet files to read; None: generated ones, in a temporary folder (of TMPDIR)."""
    megabytes: float = 1000.0
    """Text to generate."""
    text: tuple[Path, ...] = ()
    """UTF-8 files to generate it from; the Python documentation inside CPython unless given."""
    workers: int = 2
    """Worker processes of every case."""
    backends: tuple[Backend, ...] = ("tiktoken", "gigatoken")
    """Ours, with which encoders."""
    rounds: int = 3
    """Rounds over all cases."""
    files: int = 14
    """Files to generate."""
    slice_megabytes: float = 32.0
    """Text of one bare measurement."""


def check(options: Options) -> None:
    for name in ("megabytes", "workers", "rounds", "files", "slice_megabytes"):
        if getattr(options, name) <= 0:
            raise InputError(f"--{name.replace('_', '-')} {getattr(options, name)} must be above 0")
    if not options.backends:
        raise InputError("--backends: give one or more of tiktoken, gigatoken")


# ---- bare encoders, in processes of their own

MEETING: list[Barrier] = []  # in a bare encoder: where they meet when they run together


def enter_pool(meeting: Barrier) -> None:
    MEETING.append(meeting)


@functools.lru_cache(maxsize=1)
def texts_of(path: Path, num_bytes: float) -> list[str]:
    """The first documents of a file, about num_bytes."""
    opened = pq.ParquetFile(path)
    texts: list[str] = []
    size = 0
    for group in range(opened.metadata.num_row_groups):
        for text in opened.read_row_group(group, columns=["text"]).column(0).to_pylist():
            if size >= num_bytes:
                return texts
            if text:
                texts.append(text)
                size += len(text.encode("utf-8"))
    return texts


@functools.cache
def gigatoken(folder: Path) -> Any:
    """One for all measurements of a process: the words that it keeps make it fast."""
    from gigatoken.gigatoken_rs import BPETokenizer

    from data_prep.tokenizer import FOLDER, RANKS_FILE, make_tokenizer

    with tempfile.TemporaryDirectory(dir=folder) as own:
        make_tokenizer("gpt2", "").save(Path(own))
        return BPETokenizer.from_tiktoken(Path(own) / FOLDER / RANKS_FILE, "gpt2", None)


def bare_rate(tool: Tool, path: Path, num_bytes: float, folder: Path, *, together: bool) -> float:
    """MB/s of one encoder over documents in memory. Runs in a process of the pool."""
    texts = texts_of(path, num_bytes)
    encoded = [text.encode("utf-8") for text in texts]
    size = sum(map(len, encoded)) / MB
    encoding = tiktoken.get_encoding("gpt2")
    tokenizer = gigatoken(folder) if tool == "gigatoken" else None
    if together:
        MEETING[0].wait(START_SECONDS)
    started = time.perf_counter()
    if tokenizer is None:
        for text in texts:
            encoding.encode_to_numpy(text, disallowed_special=())
    else:
        tokenizer.encode_batch(encoded, parallel=False)
    return size / (time.perf_counter() - started)


# ---- whole commands, watched from outside


@dataclass
class Seen:
    """A command's time and tokens; the moments at which its first part was begun, its last finished, its data whole.

    Moments are seconds after its start, None where they were not seen. Memory in bytes: its own process, and the
    largest of its workers. cpu_seconds: of all its processes, which others on the machine change little.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    tokens: int = 0
    fingerprint: str = ""
    first_part: float | None = None
    last_part: float | None = None
    packed: float | None = None
    parent_bytes: int = 0
    worker_bytes: int = 0
    _parts: int = field(default=0, repr=False)

    def look(self, process: int, out: Path, seconds: float) -> None:
        self.parent_bytes = max(self.parent_bytes, peak_bytes(process))
        self.worker_bytes = max([self.worker_bytes, *map(peak_bytes, children_of(process))])
        parts = out.with_name(f".{out.name}.partial") / "parts"
        names = [path.name for path in parts.iterdir()] if parts.is_dir() else []
        if self.first_part is None and any(".part" in name for name in names):
            self.first_part = seconds
        finished = sum(name.endswith(".part") for name in names)
        if finished > self._parts:
            self._parts, self.last_part = finished, seconds
        if self.packed is None and out.is_dir():
            self.packed = seconds


def peak_bytes(process: int) -> int:
    """VmHWM of a process; 0 where there is none, or no /proc."""
    with contextlib.suppress(OSError, ProcessLookupError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def children_of(process: int) -> list[int]:
    found: list[int] = []
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(OSError, ProcessLookupError):
            found += map(int, path.read_text().split())
    return found


def cpu_seconds_of_children() -> float:
    """User and system time of all children that have ended, and of theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run_watched(command: Sequence[str], out: Path) -> tuple[Seen, str]:
    """(what was seen, standard output). InputError with its last line where the command fails."""
    environment = os.environ | {"HF_HOME": str(out.parent / "huggingface"), "HF_HUB_OFFLINE": "1"}
    seen, is_over = Seen(), threading.Event()
    cpu_before = cpu_seconds_of_children()
    started = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:

        def watch() -> None:
            while not is_over.wait(WATCH_SECONDS):
                seen.look(process.pid, out, time.perf_counter() - started)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        told, complaint = process.communicate()
        seen.seconds = time.perf_counter() - started
        is_over.set()
        watcher.join()
    seen.cpu_seconds = cpu_seconds_of_children() - cpu_before
    if process.returncode:
        raise InputError(f"{command[0]} failed: {(complaint.strip().splitlines() or ['without a word'])[-1]}")
    return seen, told


def run_usual(paths: Sequence[Path], workers: int, out: Path) -> Seen:
    flags = ["--out", str(out), "--workers", str(workers), "--files", *map(str, paths)]
    seen, told = run_watched(["benchmarks/usual_pattern.py", *flags], out)
    seen.tokens = json.loads(told.splitlines()[-1])["tokens"]
    return seen


def run_ours(paths: Sequence[Path], workers: int, out: Path, backend: Backend) -> Seen:
    flags = ["--source", "local", "--workers", str(workers), "--backend", backend, "--out", str(out)]
    seen, _ = run_watched(["data_prep/fineweb.py", *flags, "--data-files", *map(str, paths)], out)
    manifest = read_manifest(out)
    seen.tokens = sum(split.tokens for split in manifest.splits.values())
    seen.tokens += manifest.source["documents"]["duplicate_tokens"]
    seen.fingerprint = manifest.fingerprint
    return seen


# ---- rounds


@dataclass(frozen=True)
class Round:
    """What one round measured: rates in MB/s, and commands on all files and on next to nothing."""

    bare: list[float]
    bare_gigatoken: list[float]
    together: float
    commands: dict[str, Seen]
    startups: dict[str, Seen]


def text_bytes_of(paths: Sequence[Path]) -> int:
    total = 0
    for path in paths:
        opened = pq.ParquetFile(path)
        for group in range(opened.metadata.num_row_groups):
            column = opened.read_row_group(group, columns=["text"]).column(0)
            total += pc.sum(pc.binary_length(column)).as_py() or 0
    return total


class Bench:
    """The pool of bare encoders, and rounds with it."""

    def __init__(self, options: Options, folder: Path, small: Sequence[Path], pool: ProcessPoolExecutor) -> None:
        self.options, self.folder, self.small, self.pool = options, folder, small, pool

    def bare(self, tool: Tool, paths: Sequence[Path], *, together: bool = False) -> list[float]:
        count = self.options.workers if together else 1
        num_bytes = self.options.slice_megabytes * MB
        tasks = [
            self.pool.submit(bare_rate, tool, paths[k % len(paths)], num_bytes, self.folder, together=together)
            for k in range(count)
        ]
        return [task.result() for task in tasks]

    def command(self, case: str, paths: Sequence[Path]) -> Seen:
        with tempfile.TemporaryDirectory(dir=self.folder) as own:
            out = Path(own) / "out"
            if case == "usual":
                return run_usual(paths, self.options.workers, out)
            return run_ours(paths, self.options.workers, out, "gigatoken" if case == "gigatoken" else "tiktoken")

    def round(self, number: int, paths: Sequence[Path]) -> Round:
        cases = ["usual", *self.options.backends]
        cases = cases[number % len(cases) :] + cases[: number % len(cases)]
        paths = [*paths[number % len(paths) :], *paths[: number % len(paths)]]  # other slices for the bare encoders
        bare, bare_gigatoken, commands, startups = [], [], {}, {}
        for case in cases:
            bare += self.bare("tiktoken", paths)
            if "gigatoken" in self.options.backends:
                bare_gigatoken += self.bare("gigatoken", paths)
            startups[case] = self.command(case, self.small)
            commands[case] = self.command(case, paths)
        bare += self.bare("tiktoken", paths)
        together = sum(self.bare("tiktoken", paths, together=True))
        check_results(commands)
        return Round(bare, bare_gigatoken, together, commands, startups)


def check_results(commands: dict[str, Seen]) -> None:
    """All made the same tokens, and both backends the same bytes: otherwise there is nothing to compare."""
    tokens = {case: seen.tokens for case, seen in commands.items()}
    fingerprints = {seen.fingerprint for case, seen in commands.items() if case != "usual"}
    if len(set(tokens.values())) > 1 or len(fingerprints) > 1:
        raise InputError(f"the cases do not make the same: tokens {tokens}, {len(fingerprints)} fingerprints of ours")


@contextlib.contextmanager
def opened_bench(options: Options, folder: Path) -> Iterator[Bench]:
    small = folder / "small"
    fineweb_like.make(
        fineweb_like.Options(small, megabytes=0.1, files=options.workers, rows_per_group=10, text=options.text)
    )
    context = multiprocessing.get_context("spawn")
    meeting = context.Barrier(options.workers)
    with ProcessPoolExecutor(options.workers, context, enter_pool, (meeting,)) as pool:
        yield Bench(options, folder, sorted(small.iterdir()), pool)


# ---- results


def spread(values: Sequence[float], digits: int = 2) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), digits),
        "low": round(min(values), digits),
        "high": round(max(values), digits),
    }


def rates_of(case: str, rounds: Sequence[Round], text_bytes: int) -> list[float]:
    """MB/s of text of the whole command without its start-up, in every round."""
    startup = statistics.median(one.startups[case].seconds for one in rounds)
    working = [one.commands[case].seconds - one.startups[case].seconds for one in rounds]
    if min(working) < startup:
        print(
            f"warning: {case} starts up in {startup:.1f} s and works for {min(working):.1f} s: too little --megabytes"
        )
    return [text_bytes / MB / max(seconds, WATCH_SECONDS) for seconds in working]


def limits(bare: list[float], rates: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Each ratio that is asked for, over the rounds; it holds if its median does. bare: W times the one encoder."""
    asked = [
        ("tiktoken", "W x bare", bare, 0.85),
        ("tiktoken", "usual", rates["usual"], 2.0),
        ("gigatoken", "usual", rates["usual"], 7.0),
    ]
    found = []
    for backend, peer, rates_of_peer, needed in asked:
        if backend in rates:
            ratios = [ours / other for ours, other in zip(rates[backend], rates_of_peer, strict=True)]
            limit: dict[str, Any] = {"ours": backend, "over": peer, "needed": needed, **spread(ratios, 3)}
            limit |= {"holds": limit["median"] >= needed, "rounds": [round(ratio, 3) for ratio in ratios]}
            found.append(limit)
    return found


def seconds_between(rounds: Sequence[Round], case: str, begin: str | None, end: str) -> dict[str, float] | None:
    """Of a stage, between two moments of every round; None where they were not seen."""
    pairs = [
        (0.0 if begin is None else getattr(one.commands[case], begin), getattr(one.commands[case], end))
        for one in rounds
    ]
    if any(None in pair for pair in pairs):
        return None
    return spread([after - before for before, after in pairs])


def summary(rounds: Sequence[Round], text_bytes: int, options: Options) -> dict[str, Any]:
    bare = [options.workers * statistics.median(one.bare) for one in rounds]
    rates = {case: rates_of(case, rounds, text_bytes) for case in ("usual", *options.backends)}
    commands: dict[str, Any] = {}
    for case in rates:
        commands[case] = {
            "megabytes_per_second": spread(rates[case]),
            "seconds": spread([one.commands[case].seconds for one in rounds]),
            "seconds_of_rounds": [round(one.commands[case].seconds, 2) for one in rounds],
            "startup_seconds": spread([one.startups[case].seconds for one in rounds]),
            "cpu_seconds": spread([one.commands[case].cpu_seconds for one in rounds]),
            "parent_peak_mb": round(max(one.commands[case].parent_bytes for one in rounds) / MB),
            "worker_peak_mb": round(max(one.commands[case].worker_bytes for one in rounds) / MB),
        }
        if case != "usual":
            commands[case] |= {
                f"{stage}_seconds": seconds_between(rounds, case, begin, end)
                for stage, begin, end in (
                    ("before_first_part", None, "first_part"),
                    ("encode", "first_part", "last_part"),
                    ("pack", "last_part", "packed"),
                    ("verify", "packed", "seconds"),
                )
            }
    giga = [rate for one in rounds for rate in one.bare_gigatoken]
    return {
        "text_bytes": text_bytes,
        "tokens": rounds[0].commands["usual"].tokens,
        "workers": options.workers,
        "rounds": len(rounds),
        "bare_megabytes_per_second": spread([rate for one in rounds for rate in one.bare]),
        "bare_of_rounds": [[round(rate, 2) for rate in one.bare] for one in rounds],
        "bare_gigatoken_megabytes_per_second": spread(giga) if giga else None,
        "together_over_w_bare": spread([one.together / w_bare for one, w_bare in zip(rounds, bare, strict=True)], 3),
        "commands": commands,
        "limits": limits(bare, rates),
    }


def table(told: dict[str, Any]) -> Iterator[str]:
    def rate(name: str, found: dict[str, float], remark: str = "") -> str:
        return f"{name:<15} {found['median']:7.1f} MB/s ({found['low']:.1f} to {found['high']:.1f}){remark}"

    yield rate("bare tiktoken", told["bare_megabytes_per_second"])
    if told["bare_gigatoken_megabytes_per_second"]:
        yield rate("bare gigatoken", told["bare_gigatoken_megabytes_per_second"])
    together = told["together_over_w_bare"]
    yield f"{told['workers']} bare together: {together['median']:.2f} x {told['workers']} x bare"
    for case, found in told["commands"].items():
        name = case if case == "usual" else f"ours, {case}"
        yield rate(
            name,
            found["megabytes_per_second"],
            f"  start-up {found['startup_seconds']['median']:.1f} s  peak {found['parent_peak_mb']:,} MB, "
            f"each worker {found['worker_peak_mb']:,} MB",
        )
        if found.get("encode_seconds") and found["pack_seconds"]:
            stages = [f"{stage} {found[f'{stage}_seconds']['median']:.1f} s" for stage in ("encode", "pack", "verify")]
            yield f"{'':<15} a round: {', '.join(stages)}"
    for limit in told["limits"]:
        yield (
            f"{limit['ours']} / {limit['over']}: {limit['median']:.2f} ({limit['low']:.2f} to {limit['high']:.2f}), "
            f"needed {limit['needed']}: {'holds' if limit['holds'] else 'DOES NOT HOLD'}"
        )


def measure(options: Options, folder: Path, data: Path) -> dict[str, Any]:
    paths = sorted(data.glob("**/*.parquet"))
    if not paths:
        raise InputError(f"{data}: no parquet file in it")
    load_before = os.getloadavg()
    with opened_bench(options, folder) as bench:
        for tool in options.backends:
            bench.bare(tool, paths, together=True)  # warm-up
        rounds = [bench.round(number, paths) for number in range(options.rounds)]
    told = summary(rounds, text_bytes_of(paths), options) | {
        "files": len(paths),
        "load_before": [round(load, 2) for load in load_before],
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "tiktoken": tiktoken.__version__,
    }
    print("\n".join(table(told)))
    return told


def main(args: list[str] | None = None) -> None:
    with one_line_errors("bench_data_prep"):
        options = tyro.cli(Options, args=args, description=__doc__)
        check(options)
        with tempfile.TemporaryDirectory() as folder:
            data = options.data
            if data is None:
                data = Path(folder) / "data"
                made = fineweb_like.Options(data, options.megabytes, files=options.files, text=options.text)
                fineweb_like.make(made)
            print(json.dumps(measure(options, Path(folder), data)))


if __name__ == "__main__":
    main()
