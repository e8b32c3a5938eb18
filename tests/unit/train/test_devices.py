"""Which GPU and how many cores a process takes; tests/distributed/test_gpus.py has processes that agree on GPUs."""

import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from common.errors import InputError
from train.processes import devices
from train.processes.devices import bind_near, cores_near, cores_per_process, gpu_index
from train.processes.ranks import RankInfo


def of_host(local_rank: int, local_world: int) -> RankInfo:
    return RankInfo(local_rank, local_world, local_rank, local_world)


def test_a_process_takes_the_gpu_of_its_local_rank_or_the_only_one_that_it_sees() -> None:
    assert [gpu_index(of_host(rank, 8), 8) for rank in range(8)] == list(range(8))
    assert [gpu_index(of_host(rank, 8), 1) for rank in range(8)] == [0] * 8
    assert [gpu_index(of_host(rank, 2), 8) for rank in range(2)] == [0, 1]
    with pytest.raises(InputError) as raised:
        gpu_index(of_host(4, 8), 4)
    assert str(raised.value) == (
        f"process 4 of 8 on {socket.gethostname()} has no GPU: it sees 4; start as many processes as GPUs (torchrun "
        "--nproc_per_node, srun --ntasks-per-node)"
    )


TORCHRUN = {"TORCHELASTIC_RUN_ID": "7", "SLURM_STEP_NUM_TASKS": "1", "SLURM_CPUS_PER_TASK": "32"}


@pytest.mark.parametrize(
    ("environ", "num_cores", "local_world", "expected"),
    [
        ({}, 32, 1, 32),
        ({}, 32, 8, 4),
        ({}, 2, 8, 1),
        (TORCHRUN, 32, 8, 4),
        ({"SLURM_STEP_NUM_TASKS": "16", "SLURM_CPUS_PER_TASK": "4"}, 4, 8, 4),
        ({"SLURM_STEP_NUM_TASKS": "16", "SLURM_CPUS_PER_TASK": "4"}, 32, 8, 4),
        ({"SLURM_STEP_NUM_TASKS": "16"}, 32, 8, 4),
    ],
)
def test_the_cores_are_shared_out(environ: dict[str, str], num_cores: int, local_world: int, expected: int) -> None:
    assert cores_per_process(environ, num_cores, local_world) == expected


def make_sysfs(folder: Path, address: str, node: int, cpulist: str) -> Path:
    """Write the two files that tell the cores near a device, as Linux has them."""
    (folder / f"bus/pci/devices/{address}").mkdir(parents=True)
    (folder / f"bus/pci/devices/{address}/numa_node").write_text(f"{node}\n")
    (folder / "devices/system/node/node1").mkdir(parents=True)
    (folder / "devices/system/node/node1/cpulist").write_text(cpulist)
    return folder


def test_the_cores_near_a_gpu_are_read_from_sysfs(tmp_path: Path) -> None:
    sysfs = make_sysfs(tmp_path / "two", "0001:dc:00.0", 1, "8-11,24,30-31\n")
    assert cores_near(1, 0xDC, 0, sysfs) == {8, 9, 10, 11, 24, 30, 31}
    assert cores_near(0, 0xDC, 0, sysfs) == set(), "no such device"
    assert cores_near(0, 3, 0, make_sysfs(tmp_path / "one", "0000:03:00.0", -1, "0-1\n")) == set(), "no NUMA"


@pytest.mark.parametrize(("cpulist", "expected"), [("0-8", {0, 1, 2, 3, 8}), ("8-9", {8, 9}), ("9", None)])
def test_a_process_is_bound_to_its_near_cores_if_they_are_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpulist: str, expected: set[int] | None
) -> None:
    bound = list[set[int]]()
    allowed = {0, 1, 2, 3, 8, 9} if expected != {8, 9} else set(range(6, 10))
    calls = SimpleNamespace(sched_getaffinity=lambda _: allowed, sched_setaffinity=lambda _, cores: bound.append(cores))
    monkeypatch.setattr(devices, "os", calls)
    monkeypatch.setattr(cores_near, "__defaults__", (make_sysfs(tmp_path, "0000:1b:00.0", 1, cpulist),))
    bind_near(SimpleNamespace(pci_domain_id=0, pci_bus_id=0x1B, pci_device_id=0), cores=2)
    assert bound == ([] if expected is None else [expected])


def test_a_process_can_be_bound_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.sched_getaffinity(0)
    one = max(before)
    monkeypatch.setattr(cores_near, "__defaults__", (make_sysfs(tmp_path, "0000:1b:00.0", 1, f"{one}\n"),))
    try:
        bind_near(SimpleNamespace(pci_domain_id=0, pci_bus_id=0x1B, pci_device_id=0), cores=1)
        assert os.sched_getaffinity(0) == {one}
    finally:
        os.sched_setaffinity(0, before)
