"""The process groups as on GPUs, where the default group has another backend than the agreements in host memory.

Here the default group's backend is gloo under a name of its own.
"""

import dataclasses
import functools
import os
import resource
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed import device_mesh
from torch.distributed.device_mesh import DeviceMesh

from tests.distributed.test_exact import cut_back
from tests.helpers.groups import keep_frozen, run_on_ranks
from tests.helpers.runs import assert_same_tensors, curve, final_tensors, tiny_config
from train.config import Config, ParallelConfig, SaveConfig
from train.main import run
from train.parallel import apply
from train.processes import group as groups
from train.processes.group import ProcessGroup, backend_of, open_process_group
from train.processes.ranks import LOOPBACK

OWN_NAME = "ownname"
FEW_FILES = 64  # enough for the store of 32 ranks, which rank 0 serves, but not for their gloo group too


def test_no_group_that_a_device_mesh_may_split_has_gloo() -> None:
    backends = dist.distributed_c10d.BackendConfig(dist.Backend(backend_of(torch.device("cuda"))))
    assert backends.get_device_backend_map() == {"cuda": "nccl"}


def become_rank(rank: int, world: int, port: int) -> None:
    """Set what a launcher sets."""
    torch.set_num_threads(1)
    os.environ.update(
        {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
        | {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(port)}
    )


def free_port() -> int:
    with socket.create_server((LOOPBACK, 0)) as server:
        port: int = server.getsockname()[1]
        return port


def as_on_gpus(rank: int, world: int, port: int, data: Path, folder: Path) -> None:
    """Train in a group whose default backend is not called gloo and is bound to its device."""
    keep_frozen()
    become_rank(rank, world, port)
    dist.Backend.register_backend(OWN_NAME, own_backend, devices=["cpu"])
    groups.backend_of = lambda device: OWN_NAME
    for name in ("all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list"):
        setattr(dist, name, refusing_the_default_group(getattr(dist, name)))
    with open_process_group(60, folder) as group:
        assert dist.get_backend(group.hosts) == "gloo" and dist.get_backend() == OWN_NAME
        apply.init_device_mesh = with_bound_group(apply.init_device_mesh)
        device_mesh.split_group = split_by_new_groups  # type: ignore[assignment]
        torch.accelerator.is_available = lambda: True
        torch.accelerator.current_accelerator = lambda *_, **__: torch.device("cpu")
        os.environ["SPLITS"] = str(folder)
        train_and_resume(group, data, folder)


def own_backend(store: dist.Store, rank: int, world: int, timeout: timedelta) -> dist.ProcessGroupGloo:
    return dist.ProcessGroupGloo(store, rank, world, timeout)


def refusing_the_default_group(collective: Callable[..., Any]) -> Callable[..., Any]:
    """Return an object collective that refuses the default group: NCCL would take the objects to a GPU and back."""

    def checked(*args: Any, group: dist.ProcessGroup | None = None, **kwargs: Any) -> None:
        assert dist.get_backend(group) == "gloo", "an agreement in the default group"
        collective(*args, group=group, **kwargs)

    return checked


def with_bound_group(make_mesh: Callable[..., DeviceMesh]) -> Callable[..., DeviceMesh]:
    """Return init_device_mesh, called while the default group is bound to a device, which torch refuses for CPUs."""

    def made(*args: Any, **kwargs: Any) -> DeviceMesh:
        default: Any = dist.group.WORLD
        default.bound_device_id = torch.device("cpu", 0)
        try:
            return make_mesh(*args, **kwargs)
        finally:
            default.bound_device_id = None

    return made


def split_by_new_groups(parent_pg: dist.ProcessGroup, split_ranks: list[list[int]], **kwargs: Any) -> Any:
    """Make the groups of `dist.split_group`, which gloo cannot be trusted with, and note that it was asked."""
    assert dist.get_backend(parent_pg) == OWN_NAME
    parent_pg.bound_device_id = None
    kwargs.pop("pg_options")
    (Path(os.environ["SPLITS"]) / f"split_{dist.get_rank()}").touch()
    made = [dist.new_group(ranks, backend=OWN_NAME, **kwargs) for ranks in split_ranks]
    return next(each for ranks, each in zip(split_ranks, made, strict=True) if dist.get_rank() in ranks)


def configs(data: Path, runs: Path) -> dict[str, Config]:
    """Return a run of 6 steps for each mode, with asynchronous saves."""
    modes = {"ddp": ParallelConfig(), "hsdp": ParallelConfig(mode="hsdp", shard_size=2)}
    save = SaveConfig(every=2, keep=100, mode="async")
    return {
        mode: dataclasses.replace(tiny_config(data, runs / mode, steps=6, micro_batch=3), parallel=parallel, save=save)
        for mode, parallel in modes.items()
    }


def train_and_resume(group: ProcessGroup, data: Path, folder: Path) -> None:
    """Train each run, and once more from the checkpoint of step 4."""
    for mode, config in configs(data, folder).items():
        run(config, group)
        resumed = dataclasses.replace(config, run_dir=folder / f"{mode}_resumed")
        group.on_main(functools.partial(cut_back, config.directory, resumed.directory, step=4))
        run(resumed, group)


def test_ddp_and_hsdp_train_and_resume_alike_over_groups_of_two_backends(tiny_data: Path, tmp_path: Path) -> None:
    plainly, as_gpus = tmp_path / "plainly", tmp_path / "as_on_gpus"
    run_on_ranks(4, train_and_resume, tiny_data, plainly)
    as_gpus.mkdir()
    mp.start_processes(as_on_gpus, args=(4, free_port(), tiny_data, as_gpus), nprocs=4, start_method="forkserver")
    assert len(list(as_gpus.glob("split_*"))) == 4, "the device mesh did not ask for the splitting of a group"
    for name in ("ddp", "ddp_resumed", "hsdp", "hsdp_resumed"):
        assert curve(as_gpus / name) == curve(plainly / name) and curve(as_gpus / name)
        assert_same_tensors(final_tensors(as_gpus / name), final_tensors(plainly / name))


# --- Open files -------------------------------------------------------------------------------------------------------


def files_at_work(group: ProcessGroup) -> tuple[int, int]:
    """Return the open files of this rank before the first collective, and at most after every kind there is."""
    first = num_open_files()
    group.sum_(torch.ones(1000))
    group.gather("text")
    group.on_main(lambda: "text")
    group.barrier()
    return first, num_open_files()


def num_open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_512_processes_have_fewer_open_files_than_the_usual_limit() -> None:
    """Each rank has one connection to every other and no other group: counted for few ranks, it is a line."""
    worlds = (4, 8, 16)
    most = [max(max(counts) for counts in run_on_ranks(world, files_at_work)) for world in worlds]
    beside = {number - world for number, world in zip(most, worlds, strict=True)}
    assert len(beside) == 1, most
    assert 512 + beside.pop() < 600 < 1024


def meet_with_few_files(rank: int, world: int, port: int, folder: Path, soft: int, hard: int) -> None:
    keep_frozen()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    become_rank(rank, world, port)
    with open_process_group(60, folder) as group:
        assert group.gather(rank) == list(range(world))
        _, count = files_at_work(group)
        (folder / f"files_{rank}").write_text(str(count))


@pytest.mark.parametrize(("soft", "hard"), [(FEW_FILES, 4096), (FEW_FILES, FEW_FILES)])
def test_a_low_limit_of_open_files_is_raised_or_connections_are_made_when_needed(
    tmp_path: Path, soft: int, hard: int
) -> None:
    world = 32
    mp.start_processes(
        meet_with_few_files,
        args=(world, free_port(), tmp_path, soft, hard),
        nprocs=world,
        start_method="forkserver",
    )
    counts = [int((tmp_path / f"files_{rank}").read_text()) for rank in range(world)]
    assert (max(counts) > FEW_FILES) == (hard > FEW_FILES), counts
