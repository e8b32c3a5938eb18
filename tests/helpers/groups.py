"""Run a function on n gloo processes of this machine and return every rank's result."""

import contextlib
import ctypes
import gc
import multiprocessing
import os
import pickle
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from train.processes.group import ProcessGroup

PRELOADED = ["train.main", "torch._dynamo", "pytest", "tests.helpers.runs"]  # FSDP2 loads the second
CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000  # linux/sched.h


def run_on_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Return the results of function(group, *args) on `world` processes in rank order. Raise a rank's error.

    Several processes are forked from a clean one that has imported torch and started no thread, which saves each of
    them the seconds of the import. A world of one is this process, which also uses one thread (conftest.py).
    """
    if world == 1:
        return [function(ProcessGroup(0, 1, torch.device("cpu")), *args)]
    with tempfile.TemporaryDirectory() as folder:
        processes = start_on_ranks(world, folder, function, *args)
        while not processes.join():
            pass
        return [pickle.loads((Path(folder) / f"result_{rank}").read_bytes()) for rank in range(world)]


def start_on_ranks(world: int, folder: str, function: Callable[..., Any], *args: Any) -> mp.ProcessContext:
    """Start the same processes without waiting for them. `folder` is empty and must outlive them."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    return mp.start_processes(
        _enter, args=(world, folder, function, args), nprocs=world, join=False, start_method="forkserver"
    )


def kill_on_ranks(
    world: int, metrics: Path, row: bytes, num_rows: int, function: Callable[..., Any], *args: Any
) -> None:
    """Run a function on `world` processes; kill -9 all of them once `metrics` has so many rows with `row` in them."""
    with tempfile.TemporaryDirectory() as folder:
        processes = start_on_ranks(world, folder, function, *args)
        while not metrics.exists() or metrics.read_bytes().count(row) < num_rows:
            time.sleep(0.01)
        for process in processes.processes:
            process.kill()  # all, before another sees that the first is gone and writes that the run failed
        for process in processes.processes:
            process.join()


def keep_frozen() -> None:
    """Keep imported modules out of all garbage collections of this process, also after a run has ended.

    A run begins with a collection and unfreezes at its end. The next collection would take a quarter of a second for
    torch's modules alone. In a forked process it would also copy them, since it writes its marks into them.
    """
    gc.freeze()
    gc.unfreeze = lambda: None


def _enter(rank: int, world: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    keep_frozen()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    result = function(ProcessGroup(rank, world, torch.device("cpu")), *args)
    (Path(folder) / f"result_{rank}").write_bytes(pickle.dumps(result))
    dist.destroy_process_group()


@contextlib.contextmanager
def leaving_no_group(group: ProcessGroup) -> Iterator[None]:
    """Destroy the process group that a sharded model makes in a world of one, which is this process."""
    try:
        yield
    finally:
        if group.world == 1 and dist.is_initialized():
            dist.destroy_process_group()


def run_with_own_mounts(function: Callable[..., Any], *args: Any) -> Any:
    """Return function(can_mount, *args) of one forked process that can mount file systems invisible to others.

    A user namespace needs no privileges (user_namespaces(7)). can_mount is False where the system refuses one.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_enter_namespace, args=(folder, function, args), nprocs=1, start_method="forkserver")
        return pickle.loads((Path(folder) / "result").read_bytes())


def _enter_namespace(rank: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    keep_frozen()
    torch.set_num_threads(1)
    result = function(_have_own_mounts(), *args)
    (Path(folder) / "result").write_bytes(pickle.dumps(result))


def _have_own_mounts() -> bool:
    user, group = os.getuid(), os.getgid()
    if ctypes.CDLL(None).unshare(CLONE_NEWUSER | CLONE_NEWNS) != 0:
        return False
    try:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    except PermissionError:  # some systems grant the namespace without its rights
        return False
    return subprocess.run(["mount", "--make-rprivate", "/"], check=False).returncode == 0
