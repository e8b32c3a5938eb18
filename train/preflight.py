"""Check hosts before a run: versions, GPUs, free memory, the system's limits and the shared run directory.

    python train/preflight.py --run-dir runs/x               # this host, before a torchrun
    torchrun --local-addr=127.0.0.1 --nproc_per_node=8 train/preflight.py --run-dir runs/x
    srun --nodes=4 --ntasks-per-node=8 --gres=gpu:8 python train/preflight.py --run-dir runs/x
    torchrun --local-addr=127.0.0.1 --nproc_per_node=8 train/main.py --preflight   # before a run, which starts if fit

It takes a second after the start of the processes, and half a minute if the run directory is not shared. Expect a row
for each host and `preflight: fit to train` (exit status 0), or `preflight: unfit: ...` with each fault, its host and
its remedy (2). Nothing stays in the run directory, and its lock is not touched: a run in it is not disturbed. Network
speed is not measured (use nccl-tests), and clocks are not compared (use chrony).
"""

import contextlib
import functools
import itertools
import os
import platform
import resource
import secrets
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from train.processes import parent_watch

parent_watch.remember()

import torch

from common.errors import InputError, one_line_errors
from train.guards.stragglers import median_of_others
from train.processes.group import ProcessGroup, open_process_group
from train.run.card import CPU
from train.run.directory import SECONDS_TO_SEE

MIN_FREE = 0.5  # of the median of the other GPUs' free memory
MIN_SHM_BYTES = 2**30  # NVIDIA's advice for containers, whose default of 64 MiB is too little for several GPUs
DRIVER_VERSION = Path("/sys/module/nvidia/version")
SHM, INFINIBAND = Path("/dev/shm"), Path("/sys/class/infiniband")
NAMELESS = (
    "its own name, for which torchrun waits 5 minutes: give torchrun --local-addr=127.0.0.1 where it is the only host, "
    "else add the name to its /etc/hosts"
)


@dataclass(frozen=True)
class Rank:
    """One process's report of itself; "-" stands for a version that does not exist there."""

    host: str
    device: str
    index: int | None  # of the GPU within this process; None on a CPU
    driver: str
    cuda: str
    nccl: str
    torch: str
    python: str
    free_bytes: int
    shm_bytes: int  # free in /dev/shm
    open_files: int | None  # the hard limit of a process, which the run may raise its own to; None: unlimited
    locked_bytes: int | None  # that a process may lock in memory, which RDMA needs; None: unlimited or no RDMA here
    fault: str | None = None  # why the host cannot write into the run directory; None: it can, or another rank tried
    unseen: tuple[str, ...] = ()  # hosts whose files in the run directory this process cannot read
    knows_itself: bool = True  # whether the host's own name has an address there


def preflight(group: ProcessGroup, run_dir: Path, log: Callable[[str], None]) -> None:
    """Check all ranks; rank 0 logs a table and the verdict. Raise InputError on every rank if unfit. Collective."""
    ranks = group.gather(with_files_exchanged(describe(group.device), group, run_dir))

    def judge() -> None:
        for line in table_of_hosts(ranks):
            log(line)
        for warning in warnings_about(ranks):
            log(f"preflight: warning: {warning}")
        reasons = unfit_because(ranks, run_dir)
        if reasons:
            raise InputError(f"preflight: unfit: {'; '.join(reasons)}")
        log("preflight: fit to train")

    group.on_main(judge)


def describe(device: torch.device) -> Rank:
    """Return this process's report."""
    host = socket.gethostname()
    known: dict[str, Any] = {
        "host": host,
        "cuda": torch.version.cuda or "-",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "knows_itself": has_address(host),
        "shm_bytes": free_disk_bytes(SHM) if SHM.exists() else 0,
        "open_files": limit(resource.RLIMIT_NOFILE, is_hard=True),
        "locked_bytes": limit(resource.RLIMIT_MEMLOCK) if INFINIBAND.exists() else None,
    }
    if device.type != "cuda":
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free_kib = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
        return Rank(device=CPU, index=None, driver="-", nccl="-", free_bytes=free_kib * 1024, **known)
    name, (free_bytes, _) = torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)
    driver = DRIVER_VERSION.read_text(encoding="ascii").strip() if DRIVER_VERSION.exists() else "-"
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return Rank(device=name, index=device.index, driver=driver, nccl=nccl, free_bytes=free_bytes, **known)


def free_disk_bytes(folder: Path) -> int:
    system = os.statvfs(folder)
    return system.f_bavail * system.f_frsize


def limit(kind: int, *, is_hard: bool = False) -> int | None:
    """Return this process's soft or hard limit; None for no limit."""
    value = resource.getrlimit(kind)[is_hard]
    return None if value == resource.RLIM_INFINITY else value


def has_address(host: str) -> bool:
    """Return whether this host can resolve the name."""
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


def with_files_exchanged(rank: Rank, group: ProcessGroup, run_dir: Path) -> Rank:
    """Return the rank with `fault` and `unseen`, found by exchanging files in the run directory. Collective.

    The first rank of each host writes a file, and every rank reads all of them. A missing directory is made; afterwards
    everything is as it was.
    """
    path, new_folders, fault = run_dir / f".preflight_{secrets.token_hex(8)}", list[Path](), None
    is_first = group.gather(rank.host).index(rank.host) == group.rank
    try:
        if is_first:
            try:
                new_folders = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
                run_dir.mkdir(parents=True, exist_ok=True)
                path.write_text(path.name, encoding="ascii")
            except OSError as error:
                fault = error.strerror or str(error)
        written = group.gather((path.name, rank.host) if is_first and fault is None else None)
        unseen = dict(file for file in written if file is not None)
        end = time.monotonic() + SECONDS_TO_SEE
        while unseen := {name: host for name, host in unseen.items() if not is_readable(run_dir / name)}:
            if time.monotonic() > end:
                break
            time.sleep(0.1)
        group.barrier()
    finally:
        if is_first:
            with contextlib.suppress(OSError):
                path.unlink()
    group.barrier()
    for folder in new_folders:  # Innermost first. Another host may have removed or filled a folder already.
        with contextlib.suppress(OSError):
            folder.rmdir()
    return replace(rank, fault=fault, unseen=tuple(unseen.values()))


def is_readable(path: Path) -> bool:
    """Return whether this host sees the file with its whole content."""
    try:
        return path.read_text(encoding="ascii") == path.name
    except OSError:
        return False


def unfit_because(ranks: Sequence[Rank], run_dir: Path) -> list[str]:
    """Return a clause for each fault: what is wrong, where, and what to do."""
    reasons = []
    versions = [f"torch {rank.torch} with CUDA {rank.cuda} and NCCL {rank.nccl}" for rank in ranks]
    if len(set(versions)) > 1:
        reasons.append(f"{who_has(versions)}: start all ranks from one environment")
    devices = [rank.device for rank in ranks]
    if len(set(devices)) > 1:
        reasons.append(f"{who_has(devices)}: ask for one kind of GPU (--gres=gpu:TYPE:N)")
    gpus = [number for number, rank in enumerate(ranks) if rank.index is not None]
    free: list[float] = [ranks[number].free_bytes for number in gpus]
    for index, number in enumerate(gpus if len(gpus) > 1 else []):
        median = median_of_others(free, index)
        if free[index] < MIN_FREE * median:
            reasons.append(
                f"rank {number} on {ranks[number].host} has {free[index] / 2**30:.1f} GiB free on GPU "
                f"{ranks[number].index}, the others' median is {median / 2**30:.1f} GiB: end the other process "
                "that fills it (nvidia-smi lists it), or leave the host out"
            )
    needed = len(ranks) + 64  # a connection to each rank, and what a process has open besides
    low = {rank.host: rank.open_files for rank in ranks if rank.open_files is not None and rank.open_files < needed}
    if low:
        reasons.append(
            f"a process on {some(list(low))} may have {min(low.values())} open files, and one of {len(ranks)} needs "
            f"about {needed}: raise the hard limit there (ulimit -Hn; LimitNOFILE of slurmd or of the container)"
        )
    for fault in sorted({rank.fault for rank in ranks if rank.fault is not None}):
        hosts = hosts_of([rank for rank in ranks if rank.fault == fault])
        reasons.append(f"{run_dir} cannot be written from {some(hosts)} ({fault}): fix that, or change --run-dir")
    unseen = dict.fromkeys(f"{rank.host} does not see what {host} writes" for rank in ranks for host in rank.unseen)
    if unseen:
        reasons.append(f"{run_dir} is not shared, {some(list(unseen))}: choose a --run-dir that all hosts share")
    return reasons


def warnings_about(ranks: Sequence[Rank]) -> list[str]:
    """Return a line for each thing that may make the start slow, or NCCL fail."""
    warnings = []
    if nameless := hosts_of([rank for rank in ranks if not rank.knows_itself]):
        warnings.append(f"{some(nameless)} cannot resolve {NAMELESS}")
    gpus = [rank for rank in ranks if rank.index is not None]
    several = Counter(rank.host for rank in gpus)
    if small := {r.host: r.shm_bytes for r in gpus if several[r.host] > 1 and r.shm_bytes < MIN_SHM_BYTES}:
        warnings.append(
            f"{min(small.values()) / 2**20:.0f} MiB are free in {SHM} of {some(list(small))}, through which NCCL may "
            "connect GPUs: remove files there, or give a container 1 GiB (docker run --shm-size=1g)"
        )
    locked = {rank.host: rank.locked_bytes for rank in gpus if rank.locked_bytes is not None}
    if locked and len(several) > 1:
        warnings.append(
            f"a process on {some(list(locked))} may lock {min(locked.values()) // 1024} KiB of memory, and NCCL over "
            "InfiniBand needs more: ulimit -l unlimited (LimitMEMLOCK=infinity for slurmd)"
        )
    return warnings


def hosts_of(ranks: Iterable[Rank]) -> list[str]:
    """Return each host once, in the order of its first rank."""
    return list(dict.fromkeys(rank.host for rank in ranks))


def who_has(values: Sequence[str]) -> str:
    """Return each distinct value with the ranks that have it."""
    ranks_of = {value: [rank for rank, other in enumerate(values) if other == value] for value in dict.fromkeys(values)}
    return ", ".join(f"{value} on rank{'s' * (len(ranks) > 1)} {spans(ranks)}" for value, ranks in ranks_of.items())


def spans(numbers: Iterable[int]) -> str:
    """Return ascending numbers in short form: 0-3, 6."""
    groups = itertools.groupby(enumerate(numbers), key=lambda item: item[1] - item[0])
    runs = [[number for _, number in group] for _, group in groups]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def some(texts: Sequence[str]) -> str:
    """Return the first three texts and the number of the others: a line must stay short with a thousand hosts."""
    return ", ".join(texts[:3]) + (f" and {len(texts) - 3} more" if len(texts) > 3 else "")


def table_of_hosts(ranks: Sequence[Rank]) -> list[str]:
    """Return the lines of a table with a row for each host."""
    titles = ("host", "ranks", "device", "driver", "CUDA", "NCCL", "torch", "Python", "files", "shm GiB", "free GiB")
    rows: list[Sequence[str]] = [titles]
    for host in hosts_of(ranks):
        numbers = [number for number, rank in enumerate(ranks) if rank.host == host]
        local = [ranks[number] for number in numbers]
        texts = [
            (rank.device, rank.driver, rank.cuda, rank.nccl, rank.torch, rank.python, str(rank.open_files or "any"))
            for rank in local
        ]
        columns = [" / ".join(dict.fromkeys(column)) for column in zip(*texts, strict=True)]
        least = [min(rank.shm_bytes for rank in local), min(rank.free_bytes for rank in local)]
        rows.append((host, spans(numbers), *columns, *(f"{num_bytes / 2**30:.1f}" for num_bytes in least)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


@dataclass(frozen=True)
class Options:
    """Check the hosts of a run: exit status 0 if they are fit to train, 2 with the reasons if not."""

    run_dir: Path
    """Directory of the planned run; nothing stays in it."""
    timeout_seconds: float = 300.0
    """Longest wait for a host that does not answer, in seconds."""


def main(args: Sequence[str] | None = None) -> None:
    import tyro  # here, because train/main.py imports this module

    with one_line_errors("train"):
        options = tyro.cli(Options, description=__doc__, args=args)
        with open_process_group(options.timeout_seconds, options.run_dir) as group:
            preflight(group, options.run_dir, functools.partial(print, flush=True))


if __name__ == "__main__":
    main()
