"""Run a function on n gloo processes of this machine and bring every rank's result back."""

import contextlib
import ctypes
import gc
import multiprocessing
import os
import pickle
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from train.processes.group import ProcessGroup

PRELOADED = ["train.main", "torch._dynamo", "pytest", "tests.helpers.runs"]  # the second: by what makes an optimizer
CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000  # linux/sched.h


def run_on_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """function(mesh, *args) on `world` processes -> its results in rank order; an error anywhere is raised.

    Several are forked from a clean process that has imported torch already and started no thread, which spares each
    the seconds of importing it; a world of one is this process, which computes with one thread too (conftest.py).
    """
    if world == 1:
        return [function(ProcessGroup(0, 1, torch.device("cpu")), *args)]
    with tempfile.TemporaryDirectory() as folder:
        processes = start_on_ranks(world, folder, function, *args)
        while not processes.join():
            pass
        return [pickle.loads((Path(folder) / f"result_{rank}").read_bytes()) for rank in range(world)]


def start_on_ranks(world: int, folder: str, function: Callable[..., Any], *args: Any) -> mp.ProcessContext:
    """The same without waiting for them; `folder`: an empty one that outlives them."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    return mp.start_processes(
        _enter, args=(world, folder, function, args), nprocs=world, join=False, start_method="forkserver"
    )


def keep_frozen() -> None:
    """Leave all that was imported out of every collection of this process, also once a run has ended.

    A run begins with a collection and unfreezes at its end. The next one's would take a quarter of a second for
    torch's modules alone, and in a forked process copy them all by writing its marks there.
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
    """For a world of one, which is this process: the process group that a sharded model makes goes with it."""
    try:
        yield
    finally:
        if group.world == 1 and dist.is_initialized():
            dist.destroy_process_group()


def run_with_own_mounts(function: Callable[..., Any], *args: Any) -> Any:
    """function(can_mount, *args) in one forked process that may mount file systems which nobody else sees.

    By a user namespace, so without privileges (user_namespaces(7)); where the system refuses it, can_mount is False.
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
    except PermissionError:  # some systems grant the name space without its rights
        return False
    return subprocess.run(["mount", "--make-rprivate", "/"], check=False).returncode == 0
