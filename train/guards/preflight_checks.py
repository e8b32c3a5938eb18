"""What train/preflight.py measures: facts of every rank, clocks, shared files, all-reduces, links between hosts.

Every rank of the mesh calls each of these. A host speaks by its first rank.
"""

import contextlib
import functools
import itertools
import math
import platform
import re
import secrets
import socket
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from train.processes.group import ProcessGroup
from train.run.card import CPU
from train.run.directory import SECONDS_TO_SEE

CLOCK_ROUNDS = 8
REDUCE_KIB: tuple[int, ...] = (4, 64, 1024, 4096, 16384, 65536, 262144)  # the last on GPUs only
REDUCE_REPEATS = 5  # at the most, and no more than fit the next
REDUCE_SECONDS = 1.0  # an all-reduce that takes longer is the last
LINK_KIB = 16  # of the first message, then four times more
LINK_MESSAGE_SECONDS = 0.05  # is enough to be measured: messages grow no further
LINK_MESSAGES, LINK_SECONDS, LINK_MOST_SECONDS = 10, 0.2, 1.0  # so many for so long; at the most

Link = tuple[str, str]  # from host to host


@dataclass(frozen=True)
class Rank:
    """What one process says of itself; "-" where there is nothing to say."""

    host: str
    device: str
    index: int | None
    """Of its GPU, as the process counts them; None on a CPU."""
    driver: str
    cuda: str
    torch: str
    python: str
    free_bytes: int


def describe(device: torch.device) -> Rank:
    host, python = socket.gethostname(), platform.python_version()
    if device.type != "cuda":
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free_kib = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
        return Rank(host, CPU, None, "-", torch.version.cuda or "-", torch.__version__, python, free_kib * 1024)
    name, (free, _) = torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)
    driver = Path("/proc/driver/nvidia/version")
    text = driver.read_text(encoding="ascii", errors="replace") if driver.exists() else ""
    cuda = torch.version.cuda or "-"
    return Rank(host, name, device.index, driver_version(text), cuda, torch.__version__, python, free)


def driver_version(text: str) -> str:
    """Of /proc/driver/nvidia/version, where the NVRM line holds the first number with a point in it."""
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
    return found[0] if found else "-"


def compare_clocks(group: ProcessGroup, firsts: Mapping[str, int]) -> dict[str, float]:
    """Seconds by which each host's clock is ahead of rank 0's.

    NTP's offset (RFC 5905, section 8), in which the way there and back cancel, of the fastest of some round trips.
    """
    ahead = dict.fromkeys(firsts, 0.0)
    for host, rank in firsts.items():
        if rank == 0:
            continue
        if group.is_main:
            ahead[host] = min(ask_clock(rank) for _ in range(CLOCK_ROUNDS))[1]
        elif group.rank == rank:
            for _ in range(CLOCK_ROUNDS):
                dist.recv(torch.zeros(1), 0)
                arrived = time.time()
                dist.send(torch.tensor([arrived, time.time()], dtype=torch.float64), 0)
    gathered: dict[str, float] = group.gather(ahead)[0]
    return gathered


def ask_clock(rank: int) -> tuple[float, float]:
    """Seconds on the way, and those by which that rank's clock is ahead."""
    answer = torch.zeros(2, dtype=torch.float64)
    asked = time.time()
    dist.send(torch.zeros(1), rank)
    dist.recv(answer, rank)
    answered = time.time()
    arrived, left = answer.tolist()
    return (answered - asked) - (left - arrived), ((arrived - asked) + (left - answered)) / 2


def exchange_files(
    group: ProcessGroup, run_dir: Path, firsts: Mapping[str, int]
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """{host: why it cannot write there} and {host: the hosts of which it does not see what they wrote}.

    The directory is made where it is missing, and is as it was afterwards.
    """
    host, token = socket.gethostname(), secrets.token_hex(8)
    path, made, fault = run_dir / f".preflight_{token}", list[Path](), None
    is_first = group.rank == firsts[host]
    try:
        if is_first:
            try:
                made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
                run_dir.mkdir(parents=True, exist_ok=True)
                path.write_text(token, encoding="ascii")
            except OSError as error:
                fault = error.strerror or str(error)
        said = group.gather((host, token if is_first and fault is None else None, fault))
        missing = {its: name for name, its, _ in said if its is not None}
        end = time.monotonic() + SECONDS_TO_SEE
        while missing := {its: name for its, name in missing.items() if not is_there(run_dir, its)}:
            if time.monotonic() > end:
                break
            time.sleep(0.1)
        unseen = group.gather(list(missing.values()))
    finally:
        if is_first:
            with contextlib.suppress(OSError):
                path.unlink()
    group.barrier()
    for folder in made:  # innermost first; one that another host's first rank has removed already, or fills, is left
        with contextlib.suppress(OSError):
            folder.rmdir()
    faults = {name: its for name, _, its in said if its is not None}
    of_host = {
        name: {other for (its, *_), others in zip(said, unseen, strict=True) if its == name for other in others}
        for name in firsts
    }
    return faults, {name: sorted(others) for name, others in of_host.items()}


def is_there(run_dir: Path, token: str) -> bool:
    try:
        return (run_dir / f".preflight_{token}").read_text(encoding="ascii") == token
    except OSError:
        return False


def time_all_reduces(group: ProcessGroup) -> list[tuple[int, float]]:
    """(bytes, seconds of the slowest rank) by size, on the device that trains."""
    timed: list[tuple[int, float]] = []
    sizes = REDUCE_KIB if group.device.type == "cuda" else REDUCE_KIB[:-1]
    for num_bytes in [kib * 1024 for kib in sizes if group.world > 1]:
        tensor = torch.zeros(num_bytes // 4, device=group.device)
        reduce = functools.partial(group.sum_, tensor)
        seconds = max(group.gather(seconds_of(group, reduce)))  # the first one warms up
        if seconds <= REDUCE_SECONDS:
            repeats = min(REDUCE_REPEATS, math.ceil(REDUCE_SECONDS / seconds))
            median = statistics.median(seconds_of(group, reduce) for _ in range(repeats))
            seconds = max(group.gather(median))
        timed.append((num_bytes, seconds))
        if seconds > REDUCE_SECONDS:
            break
    return timed


def seconds_of(group: ProcessGroup, function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    if group.device.type == "cuda":
        torch.cuda.synchronize(group.device)
    return time.perf_counter() - began


def measure_links(group: ProcessGroup, firsts: Mapping[str, int]) -> dict[Link, float]:
    """Bytes per second from each host to the next one and to the one after that, one link at a time."""
    names = list(firsts)
    pairs = [(place, (place + way) % len(names)) for place in range(len(names)) for way in (1, 2)]
    links = [(names[source], names[target]) for source, target in pairs if source != target]
    speeds = {}
    for source, target in links:
        speed = 0.0
        if group.rank == firsts[source]:
            speed = send(group, firsts[target])
        elif group.rank == firsts[target]:
            receive(group, firsts[source])
        speeds[source, target] = group.gather(speed)[firsts[source]]
    return speeds


def send(group: ProcessGroup, target: int) -> float:
    """The best speed of messages that grow until one takes long enough: a process that had to wait is no slow link."""
    payload, answer = link_buffers(group)
    num_bytes, best, spent = LINK_KIB * 1024, 0.0, 0.0

    def there_and_back() -> None:
        dist.send(payload[:num_bytes], target)
        dist.recv(answer, target)

    for number in itertools.count(1):
        dist.send(torch.tensor([num_bytes]), target)
        seconds = seconds_of(group, there_and_back)
        best = max(best, num_bytes / seconds)
        spent += seconds
        if (number >= LINK_MESSAGES and spent > LINK_SECONDS) or spent > LINK_MOST_SECONDS:
            break
        if seconds < LINK_MESSAGE_SECONDS:
            num_bytes = min(4 * num_bytes, payload.numel())
    dist.send(torch.tensor([0]), target)
    return best


def receive(group: ProcessGroup, source: int) -> None:
    payload, answer = link_buffers(group)
    num_bytes = torch.zeros(1, dtype=torch.int64)
    while True:
        dist.recv(num_bytes, source)
        if num_bytes == 0:
            return
        dist.recv(payload[: int(num_bytes)], source)
        dist.send(answer, source)


def link_buffers(group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Room for the largest message, and the one byte that says it has come."""
    kib = REDUCE_KIB[-1] if group.device.type == "cuda" else REDUCE_KIB[-2]
    buffers = torch.zeros(kib * 1024 + 1, dtype=torch.uint8, device=group.device)
    return buffers[:-1], buffers[-1:]
