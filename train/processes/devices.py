"""The GPU of this process, and the CPU cores that it may use.

A process takes the GPU whose number is its local rank. Where it sees one GPU only, it takes that: srun
--gpus-per-task=1, and sites that bind GPUs by cgroups, show each task its own. Two processes on one GPU are found by
its UUID, before NCCL fails with "Duplicate GPU detected".
"""

import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from common.errors import InputError
from train.processes.ranks import RankInfo, number_in

SYSFS = Path("/sys")
MAX_COMPILE_WORKERS = 32  # Inductor's own limit, which it sets for a process that has the machine to itself
ENOUGH_CORES = 4  # for the loop, the backward pass, the reader of batches and NCCL
START_FEWER = "start as many processes as GPUs (torchrun --nproc_per_node, srun --ntasks-per-node)"


def take_device(rank_info: RankInfo, store: dist.Store | None) -> torch.device:
    """Return the GPU of this process, or the CPU where no rank has a GPU. Collective; `store` is None for one process.

    Also bind this process to the cores near its GPU, and share the cores out for torch.compile's workers. Raise
    InputError on all ranks if one of them has no GPU of its own.
    """
    cores = cores_per_process(os.environ, len(os.sched_getaffinity(0)), rank_info.local_world)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(min(cores, MAX_COMPILE_WORKERS)))
    device, gpu, fault = torch.device("cpu"), None, None
    if torch.cuda.is_available():
        try:
            device = torch.device("cuda", gpu_index(rank_info, torch.cuda.device_count()))
            gpu = torch.cuda.get_device_properties(device)
        except InputError as error:
            fault = str(error)
    if store is not None:
        agree_on_gpus(dist.PrefixStore("devices", store), rank_info, str(gpu.uuid) if gpu else None, fault)
    if gpu is not None:
        torch.cuda.set_device(device)
        bind_near(gpu, cores)
    return device


def gpu_index(rank_info: RankInfo, num_visible: int) -> int:
    """Return the number of this process's GPU among those that it sees. Raise InputError if there is none for it."""
    if rank_info.local_rank < num_visible:
        return rank_info.local_rank
    if num_visible == 1:
        return 0
    raise InputError(
        f"process {rank_info.local_rank} of {rank_info.local_world} on {socket.gethostname()} has no GPU: it sees "
        f"{num_visible}; {START_FEWER}"
    )


def agree_on_gpus(store: dist.Store, rank_info: RankInfo, uuid: str | None, fault: str | None = None) -> None:
    """Raise the same InputError on all ranks if one has a fault, or shares its GPU, or alone has none. Collective.

    `uuid` is that of this rank's GPU, None on a CPU. All goes through the store, because NCCL connects as soon as the
    process group exists. Each rank makes a handful of requests, however many ranks there are.
    """
    own = f"rank {rank_info.rank} on {socket.gethostname()}"
    if fault is None:
        kind = f"{'no GPU' if uuid is None else 'a GPU'} on {own}"
        first_kind = store.compare_set("kind", "", kind).decode()
        if first_kind.partition(" on ")[0] != kind.partition(" on ")[0]:
            fault = f"{first_kind}, but {kind}: all ranks need one, or none; ask for GPUs on every host (--gres=gpu:N)"
    if fault is None and uuid is not None:
        owner = store.compare_set(uuid, "", own).decode()
        if owner != own:
            fault = f"{own} and {owner} have one and the same GPU ({uuid}); {START_FEWER}"
    if fault is not None:
        store.compare_set("fault", "", fault)
    count_in(store, "asked", rank_info, everybody_waits=True)
    if store.check(["fault"]):
        text = store.get("fault").decode()
        count_in(store, "told", rank_info, everybody_waits=rank_info.rank == 0)  # rank 0 may serve the store
        raise InputError(text)


def count_in(store: dist.Store, name: str, rank_info: RankInfo, *, everybody_waits: bool) -> None:
    """Count this rank in. With `everybody_waits`, return once all ranks have come."""
    if store.add(name, 1) == rank_info.world:
        store.set(f"all {name}", "")
    if everybody_waits:
        store.wait([f"all {name}"])


def cores_per_process(environ: Mapping[str, str], num_cores: int, local_world: int) -> int:
    """Return this process's share of the `num_cores` that it may run on, at least 1.

    torchrun's processes share the launcher's cores. A task of srun has its own where --cpus-per-task was given.
    """
    share = num_cores // local_world
    if "TORCHELASTIC_RUN_ID" not in environ and "SLURM_STEP_NUM_TASKS" in environ:
        share = min(num_cores, number_in(environ, "SLURM_CPUS_PER_TASK", share))
    return max(share, 1)


def bind_near(gpu: Any, cores: int) -> None:
    """Bind this thread, and all that it starts, to those of its cores that are on the GPU's NUMA node.

    Nothing is bound where the system does not tell the node, or if too few of the allowed cores are there: a process
    needs its share of `cores`, or ENOUGH_CORES.
    torchrun --numa-binding does the same, but stops where there is no GPU, no numactl or no allowed core near the GPU.
    """
    near = os.sched_getaffinity(0) & cores_near(gpu.pci_domain_id, gpu.pci_bus_id, gpu.pci_device_id)
    if len(near) >= min(cores, ENOUGH_CORES):
        os.sched_setaffinity(0, near)


def cores_near(domain: int, bus: int, device: int, sysfs: Path = SYSFS) -> set[int]:
    """Return the cores on the NUMA node of a PCI device; none where the system does not tell."""
    try:
        node = int((sysfs / f"bus/pci/devices/{domain:04x}:{bus:02x}:{device:02x}.0/numa_node").read_text("ascii"))
        cores = (sysfs / f"devices/system/node/node{node}/cpulist").read_text("ascii")  # there is no node -1
    except (OSError, ValueError):
        return set()
    spans = re.findall(r"(\d+)(?:-(\d+))?", cores)
    return {core for first, last in spans for core in range(int(first), int(last or first) + 1)}
