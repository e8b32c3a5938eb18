"""Run a function on n gloo processes of this machine and bring every rank's result back."""

import multiprocessing
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from train.mesh import Mesh


def run_on_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """function(mesh, *args) on `world` processes -> its results in rank order; an error anywhere is raised.

    Several are forked from a clean process that has imported torch already and started no thread, which spares each
    the seconds of importing it; a world of one is this process, which computes with one thread too (conftest.py).
    """
    if world == 1:
        return [function(Mesh(0, 1, torch.device("cpu")), *args)]
    with tempfile.TemporaryDirectory() as folder:
        processes = start_on_ranks(world, folder, function, *args)
        while not processes.join():
            pass
        return [pickle.loads((Path(folder) / f"result_{rank}").read_bytes()) for rank in range(world)]


def start_on_ranks(world: int, folder: str, function: Callable[..., Any], *args: Any) -> mp.ProcessContext:
    """The same without waiting for them; `folder`: an empty one that outlives them."""
    multiprocessing.set_forkserver_preload(["train.main", "torch._dynamo"])  # which making an optimizer imports
    return mp.start_processes(
        _enter, args=(world, folder, function, args), nprocs=world, join=False, start_method="forkserver"
    )


def _enter(rank: int, world: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    result = function(Mesh(rank, world, torch.device("cpu")), *args)
    (Path(folder) / f"result_{rank}").write_bytes(pickle.dumps(result))
    dist.destroy_process_group()
