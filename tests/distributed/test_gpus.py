"""Ranks tell each other through the store, before any process group, which GPUs they have."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from common.errors import InputError
from tests.helpers.groups import PRELOADED
from tests.helpers.runs import ROOT
from train.processes import devices
from train.processes.group import open_process_group
from train.processes.ranks import RankInfo, port_of

TORCHRUN = ("-m", "torch.distributed.run", "--local-addr=127.0.0.1", "--nproc_per_node=3")


def start(rank: int, folder: Path, port: int, uuids: list[str | None], num_visible: int | None) -> None:
    """Write the outcome of a rank whose torch sees GPUs of these UUIDs, as one of three tasks without torchrun."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(len(uuids)), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    cuda: Any = torch.cuda
    uuid = uuids[rank]
    chosen: list[torch.device] = []
    cuda.is_available = lambda: uuid is not None
    cuda.device_count = lambda: num_visible or len(uuids)
    cuda.set_device = chosen.append
    where = {"pci_domain_id": 0, "pci_bus_id": 0xFF, "pci_device_id": 0}
    cuda.get_device_properties = lambda device: SimpleNamespace(uuid=uuid, **where)
    taken: list[torch.device] = []
    take = devices.take_device

    def take_for_gloo(rank_info: RankInfo, store: dist.Store | None) -> torch.device:
        """Return the CPU in place of the GPU that was taken: NCCL is not in a CPU's torch."""
        taken.append(take(rank_info, store))
        return torch.device("cpu")

    devices.take_device = take_for_gloo
    try:
        with open_process_group(60, folder, longest_seconds=600) as group:
            group.barrier()
            outcome = f"{taken} {chosen} {os.environ['TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC']}"
    except InputError as error:
        outcome = str(error)
    (folder / f"outcome_{rank}").write_text(outcome)


def outcomes(folder: Path, uuids: list[str | None], num_visible: int | None = None) -> list[str]:
    multiprocessing.set_forkserver_preload(PRELOADED)
    folder.mkdir()
    args = (folder, port_of(os.getpid(), len(folder.name)), uuids, num_visible)
    mp.start_processes(start, args=args, nprocs=len(uuids), start_method="forkserver")
    return [(folder / f"outcome_{rank}").read_text() for rank in range(len(uuids))]


def test_each_process_has_a_gpu_of_its_own(tmp_path: Path) -> None:
    for folder, num_visible in (("one", 1), ("all the host's", 3)):
        for rank, outcome in enumerate(outcomes(tmp_path / folder, ["a", "b", "c"], num_visible)):
            gpu = repr([torch.device("cuda", 0 if num_visible == 1 else rank)])
            assert outcome == f"{gpu} {gpu} 660", "NCCL gives up a minute after our watchdog may"


@pytest.mark.parametrize(
    ("uuids", "num_visible", "expected"),
    [
        (
            ["a", "b", "a"],
            1,
            r"rank [02] on \S+ and rank [02] on \S+ have one and the same GPU \(a\); start as many pro",
        ),
        (
            ["a", None, "c"],
            1,
            r"(a|no) GPU on rank \d on \S+, but (a|no) GPU on rank \d on \S+: all ranks need one, or ",
        ),
        (
            ["a", "b", "c"],
            2,
            r"process 2 of 3 on \S+ has no GPU: it sees 2; start as many processes as GPUs \(torchrun",
        ),
    ],
)
def test_every_rank_gives_the_same_line_if_one_has_no_gpu_of_its_own(
    tmp_path: Path, uuids: list[str | None], num_visible: int, expected: str
) -> None:
    texts = outcomes(tmp_path / "run", uuids, num_visible)
    assert len(set(texts)) == 1
    with pytest.raises(InputError, match=f"^{expected}"):
        raise InputError(texts[0])


WORKERS = """
from train.processes.devices import take_device
from train.processes.ranks import RankInfo
take_device(RankInfo(0, 2, 0, 2), None)
import torch._inductor.config
print(torch._inductor.config.compile_threads)
"""


def test_inductor_starts_as_many_workers_as_the_process_has_cores() -> None:
    """torch itself would start one for each core of the host, in every process."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "TORCHINDUCTOR_"))}
    for chosen, expected in (
        ({}, max(1, len(os.sched_getaffinity(0)) // 2)),
        ({"TORCHINDUCTOR_COMPILE_THREADS": "7"}, 7),
    ):
        done = subprocess.run(
            [sys.executable, "-c", WORKERS], cwd=ROOT, env=clean | chosen, capture_output=True, text=True, check=False
        )
        assert done.stdout == f"{expected}\n", done.stderr


SHARING = """
import sys, torch
from types import SimpleNamespace
from train import preflight
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_properties = lambda device: SimpleNamespace(uuid="a")
preflight.main(["--run-dir", sys.argv[1]])
"""


def test_processes_of_torchrun_on_one_gpu_end_with_one_line(tmp_path: Path) -> None:
    script = tmp_path / "sharing.py"
    script.write_text(SHARING)
    done = subprocess.run(
        [sys.executable, *TORCHRUN, script, tmp_path / "run"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("train: ")]
    assert done.returncode == 1 and len(lines) == 1 and "have one and the same GPU (a)" in lines[0], done.stderr
    assert done.stderr.startswith("train: rank ") and "exitcode  : 2" in done.stderr, "below is torchrun's own report"
