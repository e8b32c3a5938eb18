"""This process's rank, world size and device, and the few collectives that the engine itself needs."""

import datetime
import ipaddress
import os
import resource
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import InputError, print_error
from train.processes import devices, flight_recorder, parent_watch
from train.processes.ranks import LOOPBACK, RankInfo, take_rank

# Collectives time out so much later than the watchdog (train/guards/watchdog.py) acts, since it names the culprit.
LATER_SECONDS = 60.0
OTHER_FILES = 256  # open files of a rank beside its connections, generously: libraries, shards, compilation
LAZY_CONNECTIONS = "lazy connections"  # in the store: some rank may not have as many open files as there are ranks
WAITING_CONNECTIONS = 4096  # as torch's own store has it: all ranks connect at once
STATUS_OF_ONE_LINE = {InputError: 2, KeyboardInterrupt: 130}  # as in common/errors.py

Result = TypeVar("Result")


@dataclass(frozen=True)
class ProcessGroup:
    """One process among `world`. With one process every collective here is a no-op.

    On GPUs the default group is NCCL's alone, and `hosts` is a group of gloo's for what the processes agree on in host
    memory. On CPUs both are the default group, and `hosts` is None. A default group of both would not do: a device mesh
    splits every backend of a group that is bound to a GPU, and the splitting of gloo hangs (seen in torch 2.11 and
    2.13).

    One process has no process group of torch's unless `need_group` made one. As a context it takes the groups down at
    the end; after an error, it prints the error and exits hard.
    """

    rank: int
    world: int
    device: torch.device
    program: str = "train"  # the word with which error messages begin
    hosts: dist.ProcessGroup | None = None

    def __enter__(self) -> "ProcessGroup":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or self.world == 1:
            if dist.is_initialized():
                dist.destroy_process_group()
            return
        # Tearing down a group whose peers may be gone hangs, so the process prints the error and exits hard.
        status = next((number for type_, number in STATUS_OF_ONE_LINE.items() if issubclass(kind, type_)), 1)
        if status == 1:
            traceback.print_exception(kind, error, trace)
        elif self.is_main and error is not None:
            print_error(self.program, error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add a tensor on this process's device up over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast_(self, tensor: Tensor, rank: int, among: dist.ProcessGroup | None = None) -> None:
        """Overwrite a tensor on this process's device with the one that `rank` has, on all ranks or `among` these."""
        if self.world > 1:
            dist.broadcast(tensor, src=rank, group=among)

    def sum_numbers(self, numbers: Sequence[float]) -> list[float]:
        """Return the sum of each number over all ranks. The host waits until every rank has called this."""
        totals = torch.tensor(numbers, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(totals, group=self.hosts)
        return totals.tolist()

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank. The host waits until every rank has called this."""
        return self.sum_numbers([flag])[0] > 0

    def barrier(self) -> None:
        """Make the host wait until every rank has called this."""
        self.sum_numbers([0])

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's picklable value in rank order, on every rank."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value, group=self.hosts)
        return values

    def gather_on_main(self, value: Any) -> list[Any]:
        """Return every rank's picklable value in rank order on rank 0, and an empty list on the others."""
        if self.world == 1:
            return [value]
        values = [None] * self.world if self.is_main else None
        dist.gather_object(value, values, dst=0, group=self.hosts)
        return values or []

    def on_all(self, function: Callable[[], Result]) -> Result:
        """Run `function` on every rank; if any raises InputError or OSError, all raise InputError with its text.

        Otherwise a rank that alone cannot read a file would leave the others waiting. `function` must not be
        collective.
        """
        results: list[Result] = []
        fault: str | None = None
        try:
            results.append(function())
        except (InputError, OSError) as error:
            if self.world == 1:
                raise
            fault = str(error)
        for rank, text in enumerate(self.gather(fault)):
            if text is not None:
                raise InputError(text if rank == 0 else f"rank {rank}: {text}")
        return results[0]

    def on_main(self, function: Callable[[], Result]) -> Result:
        """Run `function` on rank 0 alone; every rank returns its result or raises its error as InputError."""
        if self.world == 1:
            return function()
        outcome: list[Any] = [None, None]
        raised: BaseException | None = None
        if self.is_main:
            try:
                outcome[0] = function()
            except (InputError, OSError) as error:
                raised = error
                outcome[1] = str(error)
        dist.broadcast_object_list(outcome, src=0, group=self.hosts, device=torch.device("cpu"))
        if outcome[1] is not None:
            raise InputError(outcome[1]) from raised
        result: Result = outcome[0]
        return result

    def need_group(self) -> None:
        """Make a process group for a single process too, since FSDP2 needs one."""
        if not dist.is_initialized():
            dist.init_process_group(backend_of(self.device), store=dist.HashStore(), rank=self.rank, world_size=1)

    def set_timeout(self, seconds: float) -> None:
        """Let collectives of all groups last `seconds` and LATER_SECONDS more from now on."""
        for group in dist.distributed_c10d._world.pg_map:
            dist.distributed_c10d._set_pg_timeout(group_timeout(seconds), group)


def backend_of(device: torch.device) -> str:
    """Return the only backend of the default group: NCCL for processes on GPUs, gloo for those on CPUs."""
    return "nccl" if device.type == "cuda" else "gloo"


def group_timeout(seconds: float) -> datetime.timedelta:
    return datetime.timedelta(seconds=seconds + LATER_SECONDS)


def open_process_group(
    timeout_seconds: float, run_dir: Path, *, longest_seconds: float = 0.0, program: str = "train"
) -> ProcessGroup:
    """Return the group of this process (train/processes/ranks.py): CUDA and NCCL if there are GPUs, else CPU and gloo.

    Collectives may last `timeout_seconds` until `set_timeout` changes that, to at most `longest_seconds` if that is
    more. The flight recorder writes its files of one that lasted longer to `run_dir`. Raise InputError if a process has
    no GPU of its own.

    gloo listens at the interface that GLOO_SOCKET_IFNAME names. Without it, gloo asks for the address of the host's own
    name, which may have none; ranks that share one host need no interface but the loopback.
    """
    refuse_broken_restarts()
    rank_info = take_rank()
    rank, world = rank_info.rank, rank_info.world
    if world == 1:
        return ProcessGroup(rank, world, devices.take_device(rank_info, None), program)
    needs_lazy_connections = allow_open_files(world)
    longest = group_timeout(max(timeout_seconds, longest_seconds))
    flight_recorder.turn_on(run_dir, longest.total_seconds())
    if rank_info.host == LOOPBACK:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    timeout = group_timeout(timeout_seconds)
    with parent_watch.exit_with_launcher():
        store = open_store(rank_info, timeout)
        if needs_lazy_connections:
            store.set(LAZY_CONNECTIONS, "")
        device = devices.take_device(rank_info, store)  # returns when every rank has come
        if store.check([LAZY_CONNECTIONS]):
            os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
        dist.init_process_group(
            backend_of(device),
            timeout=timeout,
            store=store,
            rank=rank,
            world_size=world,
            device_id=device if device.type == "cuda" else None,
        )
        hosts = dist.new_group(backend="gloo", timeout=timeout) if backend_of(device) != "gloo" else None
    return ProcessGroup(rank, world, device, program, hosts)


def allow_open_files(world: int) -> bool:
    """Raise this process's limit of open files as far as it may: gloo keeps a connection to every other rank.

    The usual limit of 1,024 is for programs that use select(2). Return whether a connection to every rank is too much
    even so. Then all ranks connect when they first need to. That is not the rule, since a rank that is gone is noticed
    only by those connected to it. Otherwise gloo would say nothing but "Connection closed by peer".
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return most != resource.RLIM_INFINITY and world + OTHER_FILES > most


def open_store(rank_info: RankInfo, timeout: datetime.timedelta) -> dist.Store:
    """Return the store in which the ranks find each other. torchrun serves it; without torchrun rank 0 does.

    Rank 0 then listens at MASTER_ADDR alone if that is an address. A name may stand for another address on other hosts,
    so for a name it listens at all interfaces, as torchrun's store always does.
    """
    host, port = rank_info.host, rank_info.port
    is_served_here = rank_info.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    listener: int | None = None
    if is_served_here:
        try:
            listener = listen(host, port).detach()
        except OSError as error:
            raise InputError(
                f"rank 0 cannot listen at MASTER_ADDR={host} MASTER_PORT={port} ({os.strerror(error.errno or 0)}); "
                "give an address or the name of its host, and a free port"
            ) from error
    store = dist.TCPStore(host, port, rank_info.world, is_served_here, timeout, master_listen_fd=listener)
    return dist.PrefixStore("default_pg", store)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address, or at all interfaces if `host` is a name."""
    try:
        version = ipaddress.ip_address(host).version
    except ValueError:
        if socket.has_dualstack_ipv6():
            return socket.create_server(
                ("", port), family=socket.AF_INET6, backlog=WAITING_CONNECTIONS, dualstack_ipv6=True
            )
        return socket.create_server(("", port), backlog=WAITING_CONNECTIONS)
    family = socket.AF_INET6 if version == 6 else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=WAITING_CONNECTIONS)


def refuse_broken_restarts() -> None:
    """Raise InputError for torchrun's restarts with a shared store: an attempt would read the last one's keys and hang.

    Seen in torch 2.13.
    """
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if restarts != "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise InputError(
            f"torchrun --max-restarts={restarts} hangs or fails with the store it shares between attempts; "
            "run `export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1` first, or use --max-restarts=0"
        )
