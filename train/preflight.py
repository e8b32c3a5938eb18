"""Is this world fit to train? Hosts, GPUs, versions, clocks, the shared run directory and the network, looked over.

    torchrun --nproc_per_node=8 train/preflight.py --run-dir runs/x
    srun --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 python train/preflight.py --run-dir runs/x
    torchrun --nproc_per_node=8 train/main.py --preflight   # the same before a run, which does not begin if unfit

Takes seconds after the start of the processes, and about half a second more for every host; half a minute where the run
directory is not shared. Expect a row for each host, the time of an all-reduce by size, and `preflight: fit to train`
(exit status 0) or `preflight: unfit: ...` with what was found, where, and what to do (2). Nothing is left in the run
directory, whose lock is neither taken nor asked for: a run that is going on there is not disturbed.
"""

import functools
import itertools
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from train.processes import parent_watch

parent_watch.remember()

import torch
import tyro

from common.errors import InputError, one_line_errors
from train.guards.preflight_checks import (
    Link,
    Rank,
    compare_clocks,
    describe,
    exchange_files,
    measure_links,
    time_all_reduces,
)
from train.guards.stragglers import median_of_others
from train.processes.group import ProcessGroup, open_process_group

MOST_SKEW_SECONDS = 5.0  # a choice: the lock goes by the file server's clock, but logs of hosts are read side by side
LEAST_FREE = 0.5  # of the median of the other GPUs' free memory
SLOWER = 4.0  # than the median of the other hosts


@dataclass(frozen=True)
class Host:
    """What was found out about one host."""

    name: str
    ranks: list[int]
    clock_seconds: float
    """Ahead of rank 0's."""
    fault: str | None = None
    """Why it cannot write into the run directory."""
    does_not_see: Collection[str] = ()
    """Hosts whose file in the run directory it cannot read."""


def preflight(group: ProcessGroup, run_dir: Path, say: Callable[[str], None]) -> None:
    """Look over the world; rank 0 says what was found. InputError on every rank if it is unfit. Collective."""
    ranks = group.gather(describe(group.device))
    ranks_of: dict[str, list[int]] = {}
    for number, rank in enumerate(ranks):
        ranks_of.setdefault(rank.host, []).append(number)
    firsts = {name: numbers[0] for name, numbers in ranks_of.items()}
    clocks = compare_clocks(group, firsts)
    faults, unseen = exchange_files(group, run_dir, firsts)
    hosts = [Host(name, numbers, clocks[name], faults.get(name), unseen[name]) for name, numbers in ranks_of.items()]
    reduces = time_all_reduces(group)
    speeds = measure_links(group, firsts)
    if group.device.type == "cuda":  # the run begins with a GPU as it found it
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(group.device)

    def judge() -> None:
        for line in (*table_of_hosts(ranks, hosts, speeds), *table_of_reduces(reduces, group.world)):
            say(line)
        reasons = unfit_because(ranks, hosts, speeds, run_dir)
        if reasons:
            raise InputError(f"preflight: unfit: {'; '.join(reasons)}")
        say("preflight: fit to train")

    group.on_main(judge)


def unfit_because(
    ranks: Sequence[Rank], hosts: Sequence[Host], speeds: Mapping[Link, float], run_dir: Path
) -> list[str]:
    """One clause for each thing that is wrong: what, where, what to do. `speeds`: bytes per second between hosts."""
    reasons = []
    versions = [f"torch {rank.torch} with CUDA {rank.cuda}" for rank in ranks]
    if len(set(versions)) > 1:
        reasons.append(f"{who_has(versions)}: start all ranks from one environment")
    devices = [rank.device for rank in ranks]
    if len(set(devices)) > 1:
        reasons.append(f"{who_has(devices)}: ask for one kind of GPU (--gpus-per-node TYPE:N)")
    gpus = [number for number, rank in enumerate(ranks) if rank.index is not None]
    free: list[float] = [ranks[number].free_bytes for number in gpus]
    for place, number in enumerate(gpus if len(gpus) > 1 else []):
        median = median_of_others(free, place)
        if free[place] < LEAST_FREE * median:
            reasons.append(
                f"rank {number} on {ranks[number].host} has {free[place] / 2**30:.1f} GiB free on GPU "
                f"{ranks[number].index}, the others' median is {median / 2**30:.1f} GiB: end the other process "
                "that fills it (nvidia-smi lists it), or leave the host out"
            )
    for fault in sorted({host.fault for host in hosts if host.fault is not None}):
        names = [host.name for host in hosts if host.fault == fault]
        reasons.append(f"{run_dir} cannot be written from {some(names)} ({fault}): mend that, or change --run-dir")
    unseen = [f"{host.name} does not see what {writer} writes" for host in hosts for writer in host.does_not_see]
    if unseen:
        reasons.append(f"{run_dir} is not shared, {some(unseen)}: choose a --run-dir that all hosts share")
    right = statistics.median_low([host.clock_seconds for host in hosts])  # one of them: that of most hosts
    for host in hosts:
        ahead = host.clock_seconds - right
        if abs(ahead) > MOST_SKEW_SECONDS:
            way = "ahead of" if ahead > 0 else "behind"
            reasons.append(
                f"the clock of {host.name} is {abs(ahead):.1f} s {way} the others': have it set (chronyc makestep)"
            )
    for name, slow in slow_networks(speeds).items():
        does = [
            f"{verb} {max(speeds[link] for link in slow if link[end] == name) / 1e6:.1f} MB/s"
            for end, verb in enumerate(("sends", "receives"))
            if any(link[end] == name for link in slow)
        ]
        others = median_of_best(speeds, without=name)
        reasons.append(
            f"{name} {' and '.join(does)}, the others' median is {others / 1e6:.1f} MB/s: look at its network, "
            f"or leave it out with --exclude {name}"
        )
    return reasons


def slow_networks(speeds: Mapping[Link, float]) -> dict[str, set[Link]]:
    """Hosts at fault for slow links, with these links: whichever has most of them, and so on with those that are left.

    Of two hosts the one that sends is named. Among more, one slow link of a host is the matter of neither of its ends.
    """
    slow = {link for link, speed in speeds.items() if SLOWER * speed < median_of_best(speeds, without=link[0])}
    found: dict[str, set[Link]] = {}
    while slow:
        counts = Counter(itertools.chain.from_iterable(sorted(slow)))
        sending = Counter(source for source, _ in slow)
        worst = max(counts, key=lambda name: (counts[name], sending[name]))
        if counts[worst] < min(2, len(speeds) - 1):
            break
        found[worst] = {link for link in slow if worst in link}
        slow -= found[worst]
    return found


def median_of_best(speeds: Mapping[Link, float], *, without: str) -> float:
    """Of the best speed at which each other host sends."""
    best: dict[str, float] = {}
    for (source, _), speed in speeds.items():
        best[source] = max(speed, best.get(source, 0.0))
    return statistics.median(speed for source, speed in best.items() if source != without)


def who_has(values: Sequence[str]) -> str:
    """Each value and the ranks that have it."""
    ranks = {value: [rank for rank, its in enumerate(values) if its == value] for value in dict.fromkeys(values)}
    return ", ".join(f"{value} on rank{'s' * (len(its) > 1)} {spans(its)}" for value, its in ranks.items())


def spans(numbers: Iterable[int]) -> str:
    """0-3, 6 of ascending numbers."""
    groups = itertools.groupby(enumerate(numbers), key=lambda item: item[1] - item[0])
    runs = [[number for _, number in group] for _, group in groups]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def some(texts: Sequence[str], most: int = 3) -> str:
    """A line stays a line in a world of a thousand hosts."""
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")


def table_of_hosts(ranks: Sequence[Rank], hosts: Sequence[Host], speeds: Mapping[Link, float]) -> list[str]:
    """A row for each host. A link's speed is the better of the two that were measured."""
    names = ("host", "ranks", "device", "driver", "CUDA", "torch", "Python", "free GiB", "clock ms", "sends MB/s")
    rows: list[Sequence[str]] = [(*names, "receives MB/s")]
    for host in hosts:
        its = [ranks[number] for number in host.ranks]
        texts = [(rank.device, rank.driver, rank.cuda, rank.torch, rank.python) for rank in its]
        both = [[speed for link, speed in speeds.items() if link[end] == host.name] for end in (0, 1)]
        rows.append(
            (
                host.name,
                spans(host.ranks),
                *(" / ".join(dict.fromkeys(column)) for column in zip(*texts, strict=True)),
                f"{min(rank.free_bytes for rank in its) / 2**30:.1f}",
                f"{host.clock_seconds * 1e3:+.2f}",
                *(f"{max(ways) / 1e6:.1f}" if ways else "-" for ways in both),
            )
        )
    note = [] if speeds else ["one host: no network between hosts to measure"]
    return [*aligned(rows), *note]


def table_of_reduces(reduces: Sequence[tuple[int, float]], world: int) -> list[str]:
    """Bus bandwidth: what each link carries, so that it compares with a link's own (nccl-tests, doc/PERFORMANCE.md)."""
    if not reduces:
        return ["one process: nothing to all-reduce"]
    rows = [("all-reduce of", "takes ms", "bus MB/s")]
    for num_bytes, seconds in reduces:
        size = f"{num_bytes >> 20} MiB" if num_bytes >= 2**20 else f"{num_bytes >> 10} KiB"
        rows.append((size, f"{seconds * 1e3:.3f}", f"{2 * (world - 1) / world * num_bytes / seconds / 1e6:.1f}"))
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


@dataclass(frozen=True)
class Options:
    """Is this world fit to train? Exit status 0 if so, 2 with the reasons if not."""

    run_dir: Path
    """Directory in which the run will be; nothing is left there."""
    timeout_seconds: float = 300.0
    """A host that does not answer for so long ends this."""


def main(args: Sequence[str] | None = None) -> None:
    with one_line_errors("train"):
        options = tyro.cli(Options, description=__doc__, args=args)
        with open_process_group(options.timeout_seconds, options.run_dir) as group:
            preflight(group, options.run_dir, functools.partial(print, flush=True))


if __name__ == "__main__":
    main()
