"""Time data_prep/fineweb.py in bytes of text per second, against bare encoders and the usual pattern.

    python benchmarks/bench_data_prep.py                              # 1 GB of text; 13 min on 2 CPU cores
    python benchmarks/bench_data_prep.py --data data/pages --workers 8
    python benchmarks/bench_data_prep.py --megabytes 100              # 3 min, and start-up most of it

The aim, with W workers on W cores of their own: with tiktoken at least 0.85 x W x the bare encoder in one process, and
at least 2 x the usual pattern; with gigatoken at least 7 x the usual pattern. The table says whether each one holds.
Expect on 2 cores: bare 8 to 10 MB/s, usual 9 MB/s, ours 14 MB/s with tiktoken and 66 MB/s with gigatoken.

bare      `encode_to_numpy` over documents that are already in memory, in one process; `bare gigatoken` likewise
together  W bare encoders at the same time: the most that the machine allows
usual     benchmarks/usual_pattern.py: a parent that iterates rows, a Pool.imap of W processes
ours      `data_prep/fineweb.py --source local --workers W` from start to end: text read, encoded and hashed,
          duplicates found, documents shuffled, split and packed into shards, every byte verified

In every round all cases read all files, each time in another order, with a bare measurement before and after each.
Ratios are taken within a round. Start-up (imports, worker processes, the tokenizer) is the time that the same command
takes on a tiny input just before; it is subtracted and reported separately. `encode` lasts from the start of the first
part, when its worker has yet to import its libraries, to the end of the last one. Files come from the page cache.
Memory is each process's VmHWM. Last line: JSON.
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
START_SECONDS = 120.0  # time-out for bare encoders to meet
WATCH_SECONDS = 0.05

Tool = Literal["tiktoken", "gigatoken"]


@dataclass(frozen=True)
class Options:
    """Options of the benchmark."""

    data: Path | None = None
    """Folder of Parquet files to read; None: files generated in a temporary folder (under TMPDIR)."""
    megabytes: float = 1000.0
    """Megabytes of text to generate."""
    text: tuple[Path, ...] = ()
    """UTF-8 files to generate it from; none: the Python documentation inside CPython."""
    workers: int = 2
    """Worker processes in every case."""
    backends: tuple[Backend, ...] = ("tiktoken", "gigatoken")
    """Encoders to time ours with."""
    rounds: int = 3
    """Number of rounds over all cases."""
    files: int = 14
    """Number of files to generate."""
    slice_megabytes: float = 32.0
    """Megabytes of text in one bare measurement."""


def check(options: Options) -> None:
    """Raise InputError for options that cannot be measured."""
    for name in ("megabytes", "workers", "rounds", "files", "slice_megabytes"):
        if getattr(options, name) <= 0:
            raise InputError(f"--{name.replace('_', '-')} {getattr(options, name)} must be above 0")
    if not options.backends:
        raise InputError("--backends: give one or more of tiktoken, gigatoken")


# --- Bare encoders, in processes of their own -------------------------------------------------------------------------

MEETING: list[Barrier] = []  # set in each pool process: the barrier for bare encoders that run together


def enter_pool(meeting: Barrier) -> None:
    """Keep the barrier for `bare_rate`. Runs once in each process of the pool."""
    MEETING.append(meeting)


@functools.lru_cache(maxsize=1)
def texts_of(path: Path, num_bytes: float) -> list[str]:
    """Return the first documents of a file, of about `num_bytes` in all."""
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
    """Return gigatoken's tokenizer, one for all measurements of a process since its cache of words makes it fast."""
    from gigatoken.gigatoken_rs import BPETokenizer

    from data_prep.tokenizer import FOLDER, RANKS_FILE, make_tokenizer

    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        make_tokenizer("gpt2", "").save(Path(temporary))
        return BPETokenizer.from_tiktoken(Path(temporary) / FOLDER / RANKS_FILE, "gpt2", None)


def bare_rate(tool: Tool, path: Path, num_bytes: float, folder: Path, *, together: bool) -> float:
    """Return the MB/s of one encoder over documents in memory. Runs in a process of the pool."""
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


# --- Whole commands, watched from outside -----------------------------------------------------------------------------


@dataclass
class Seen:
    """A command as watched from outside: its times, tokens and memory.

    `first_part`, `last_part` and `packed` are the seconds after the start when the first part was begun, the last one
    finished and the data set named; None if that was not seen. `parent_bytes` and `worker_bytes` are the peaks of the
    command's own process and of its largest worker. `cpu_seconds` are those of all its processes, which other load on
    the machine changes little.
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

    def observe(self, process: int, out: Path, seconds: float) -> None:
        """Update memory and stages, `seconds` after the start."""
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
    """Return a process's VmHWM in bytes; 0 if the process or /proc does not exist."""
    with contextlib.suppress(OSError, ProcessLookupError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def children_of(process: int) -> list[int]:
    """Return the ids of a process's children."""
    children: list[int] = []
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(OSError, ProcessLookupError):
            children += map(int, path.read_text().split())
    return children


def cpu_seconds_of_children() -> float:
    """Return the user and system time of all ended descendants."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run_watched(command: Sequence[str], out: Path) -> tuple[Seen, str]:
    """Run a command and return (its observations, its standard output). Raise InputError if it fails."""
    environment = os.environ | {"HF_HOME": str(out.parent / "huggingface"), "HF_HUB_OFFLINE": "1"}
    seen, is_over = Seen(), threading.Event()
    cpu_before = cpu_seconds_of_children()
    started = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:

        def watch() -> None:
            while not is_over.wait(WATCH_SECONDS):
                seen.observe(process.pid, out, time.perf_counter() - started)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        output, errors = process.communicate()
        seen.seconds = time.perf_counter() - started
        is_over.set()
        watcher.join()
    seen.cpu_seconds = cpu_seconds_of_children() - cpu_before
    if process.returncode:
        raise InputError(f"{command[0]} failed: {(errors.strip().splitlines() or ['no message'])[-1]}")
    return seen, output


def run_usual(paths: Sequence[Path], workers: int, out: Path) -> Seen:
    """Run benchmarks/usual_pattern.py."""
    flags = ["--out", str(out), "--workers", str(workers), "--files", *map(str, paths)]
    seen, output = run_watched(["benchmarks/usual_pattern.py", *flags], out)
    seen.tokens = json.loads(output.splitlines()[-1])["tokens"]
    return seen


def run_ours(paths: Sequence[Path], workers: int, out: Path, backend: Backend) -> Seen:
    """Run data_prep/fineweb.py, and count the tokens before duplicates are dropped."""
    flags = ["--source", "local", "--workers", str(workers), "--backend", backend, "--out", str(out)]
    seen, _ = run_watched(["data_prep/fineweb.py", *flags, "--data-files", *map(str, paths)], out)
    manifest = read_manifest(out)
    seen.tokens = sum(split.tokens for split in manifest.splits.values())
    seen.tokens += manifest.source["documents"]["duplicate_tokens"]
    seen.fingerprint = manifest.fingerprint
    return seen


# --- Rounds -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Round:
    """One round: bare rates in MB/s, commands on all files, and the same on a tiny input (`startups`)."""

    bare: list[float]
    bare_gigatoken: list[float]
    together: float
    commands: dict[str, Seen]
    startups: dict[str, Seen]


def text_bytes_of(paths: Sequence[Path]) -> int:
    """Return the bytes of text in Parquet files."""
    total = 0
    for path in paths:
        opened = pq.ParquetFile(path)
        for group in range(opened.metadata.num_row_groups):
            column = opened.read_row_group(group, columns=["text"]).column(0)
            total += pc.sum(pc.binary_length(column)).as_py() or 0
    return total


class Bench:
    """A pool of bare encoders, and the rounds that use it."""

    def __init__(self, options: Options, folder: Path, small: Sequence[Path], pool: ProcessPoolExecutor) -> None:
        self.options, self.folder, self.small, self.pool = options, folder, small, pool

    def bare(self, tool: Tool, paths: Sequence[Path], *, together: bool = False) -> list[float]:
        """Return the MB/s of one bare encoder, or of W that run together."""
        count = self.options.workers if together else 1
        num_bytes = self.options.slice_megabytes * MB
        tasks = [
            self.pool.submit(bare_rate, tool, paths[k % len(paths)], num_bytes, self.folder, together=together)
            for k in range(count)
        ]
        return [task.result() for task in tasks]

    def command(self, case: str, paths: Sequence[Path]) -> Seen:
        """Run one case on the files."""
        with tempfile.TemporaryDirectory(dir=self.folder) as temporary:
            out = Path(temporary) / "out"
            if case == "usual":
                return run_usual(paths, self.options.workers, out)
            return run_ours(paths, self.options.workers, out, "gigatoken" if case == "gigatoken" else "tiktoken")

    def round(self, number: int, paths: Sequence[Path]) -> Round:
        """Run all cases, in an order and on slices that depend on the round's number."""
        cases = ["usual", *self.options.backends]
        cases = cases[number % len(cases) :] + cases[: number % len(cases)]
        paths = [*paths[number % len(paths) :], *paths[: number % len(paths)]]
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
    """Raise InputError unless all cases made the same tokens, and both backends the same bytes."""
    tokens = {case: seen.tokens for case, seen in commands.items()}
    fingerprints = {seen.fingerprint for case, seen in commands.items() if case != "usual"}
    if len(set(tokens.values())) > 1 or len(fingerprints) > 1:
        raise InputError(f"the cases do not make the same: tokens {tokens}, {len(fingerprints)} fingerprints of ours")


@contextlib.contextmanager
def opened_bench(options: Options, folder: Path) -> Iterator[Bench]:
    """Yield a Bench with its tiny input and its pool."""
    small = folder / "small"
    fineweb_like.make(
        fineweb_like.Options(small, megabytes=0.1, files=options.workers, rows_per_group=10, text=options.text)
    )
    context = multiprocessing.get_context("spawn")
    meeting = context.Barrier(options.workers)
    with ProcessPoolExecutor(options.workers, context, enter_pool, (meeting,)) as pool:
        yield Bench(options, folder, sorted(small.iterdir()), pool)


# --- Results ----------------------------------------------------------------------------------------------------------


def spread(values: Sequence[float], digits: int = 2) -> dict[str, float]:
    """Return the median and the range of values."""
    return {
        "median": round(statistics.median(values), digits),
        "low": round(min(values), digits),
        "high": round(max(values), digits),
    }


def rates_of(case: str, rounds: Sequence[Round], text_bytes: int) -> list[float]:
    """Return the MB/s of text of the whole command without its start-up, for every round."""
    startup = statistics.median(one.startups[case].seconds for one in rounds)
    working = [one.commands[case].seconds - one.startups[case].seconds for one in rounds]
    if min(working) < startup:
        print(f"warning: {case} starts up in {startup:.1f} s and works for {min(working):.1f} s: raise --megabytes")
    return [text_bytes / MB / max(seconds, WATCH_SECONDS) for seconds in working]


def limits(bare: list[float], rates: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Return each required ratio over the rounds, which holds if its median does. `bare`: W x one encoder."""
    required = [
        ("tiktoken", "W x bare", bare, 0.85),
        ("tiktoken", "usual", rates["usual"], 2.0),
        ("gigatoken", "usual", rates["usual"], 7.0),
    ]
    results = []
    for backend, peer, rates_of_peer, needed in required:
        if backend in rates:
            ratios = [ours / other for ours, other in zip(rates[backend], rates_of_peer, strict=True)]
            limit: dict[str, Any] = {"ours": backend, "over": peer, "needed": needed, **spread(ratios, 3)}
            limit |= {"holds": limit["median"] >= needed, "rounds": [round(ratio, 3) for ratio in ratios]}
            results.append(limit)
    return results


def seconds_between(rounds: Sequence[Round], case: str, begin: str | None, end: str) -> dict[str, float] | None:
    """Return the seconds of a stage between two moments of every round; None if one was not seen."""
    pairs = [
        (0.0 if begin is None else getattr(one.commands[case], begin), getattr(one.commands[case], end))
        for one in rounds
    ]
    if any(None in pair for pair in pairs):
        return None
    return spread([after - before for before, after in pairs])


def summary(rounds: Sequence[Round], text_bytes: int, options: Options) -> dict[str, Any]:
    """Return the results of all rounds, for the JSON line."""
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
    gigatoken_rates = [rate for one in rounds for rate in one.bare_gigatoken]
    return {
        "text_bytes": text_bytes,
        "tokens": rounds[0].commands["usual"].tokens,
        "workers": options.workers,
        "rounds": len(rounds),
        "bare_megabytes_per_second": spread([rate for one in rounds for rate in one.bare]),
        "bare_of_rounds": [[round(rate, 2) for rate in one.bare] for one in rounds],
        "bare_gigatoken_megabytes_per_second": spread(gigatoken_rates) if gigatoken_rates else None,
        "together_over_w_bare": spread([one.together / w_bare for one, w_bare in zip(rounds, bare, strict=True)], 3),
        "commands": commands,
        "limits": limits(bare, rates),
    }


def table(results: dict[str, Any]) -> Iterator[str]:
    """Yield the printed lines of a summary."""

    def rate(name: str, spread: dict[str, float], remark: str = "") -> str:
        return f"{name:<15} {spread['median']:7.1f} MB/s ({spread['low']:.1f} to {spread['high']:.1f}){remark}"

    yield rate("bare tiktoken", results["bare_megabytes_per_second"])
    if results["bare_gigatoken_megabytes_per_second"]:
        yield rate("bare gigatoken", results["bare_gigatoken_megabytes_per_second"])
    together = results["together_over_w_bare"]
    yield f"{results['workers']} bare together: {together['median']:.2f} x {results['workers']} x bare"
    for case, command in results["commands"].items():
        remark = (
            f"  start-up {command['startup_seconds']['median']:.1f} s  peak {command['parent_peak_mb']:,} MB, "
            f"each worker {command['worker_peak_mb']:,} MB"
        )
        yield rate(case if case == "usual" else f"ours, {case}", command["megabytes_per_second"], remark)
        if command.get("encode_seconds") and command["pack_seconds"]:
            stages = [f"{name} {command[f'{name}_seconds']['median']:.1f} s" for name in ("encode", "pack", "verify")]
            yield f"{'':<15} a round: {', '.join(stages)}"
    for limit in results["limits"]:
        yield (
            f"{limit['ours']} / {limit['over']}: {limit['median']:.2f} ({limit['low']:.2f} to {limit['high']:.2f}), "
            f"needed {limit['needed']}: {'holds' if limit['holds'] else 'DOES NOT HOLD'}"
        )


def measure(options: Options, folder: Path, data: Path) -> dict[str, Any]:
    """Run all rounds on the Parquet files in `data`, print the table and return the results."""
    paths = sorted(data.glob("**/*.parquet"))
    if not paths:
        raise InputError(f"{data}: no parquet file in it; give --data a folder that has some")
    load_before = os.getloadavg()
    with opened_bench(options, folder) as bench:
        for tool in options.backends:
            bench.bare(tool, paths, together=True)  # warm-up
        rounds = [bench.round(number, paths) for number in range(options.rounds)]
    results = summary(rounds, text_bytes_of(paths), options) | {
        "files": len(paths),
        "load_before": [round(load, 2) for load in load_before],
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "tiktoken": tiktoken.__version__,
    }
    print("\n".join(table(results)))
    return results


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
