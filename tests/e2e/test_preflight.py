"""What is wrong with worlds of every kind, and what preflight checks between real processes."""

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import InputError
from tests.helpers.groups import run_on_ranks
from tests.helpers.runs import ROOT, called, rows, status, tiny_flags
from train import main, preflight
from train.preflight import Rank, spans, table_of_hosts, unfit_because, warnings_about
from train.processes.group import ProcessGroup
from train.run.lock import RunLock

GIB = 2**30
RUN = Path("runs/x")
VERSIONS = ("570.124.06", "12.8", "2.27.5", "2.13.0+cu128", "3.11.7")  # driver, CUDA, NCCL, torch, Python
GPU = Rank("n1", "NVIDIA H100", 0, *VERSIONS, 78 * GIB, 500 * GIB, 1_048_576, None)


def gpus(num_hosts: int, each: int = 2) -> list[Rank]:
    return [replace(GPU, host=f"n{1 + n // each}", index=n % each) for n in range(num_hosts * each)]


def cpus(num_hosts: int) -> list[Rank]:
    return [replace(GPU, host=f"n{1 + n}", device="CPU process", index=None) for n in range(num_hosts)]


def with_rank(ranks: list[Rank], number: int, **changes: object) -> list[Rank]:
    return [replace(rank, **changes) if n == number else rank for n, rank in enumerate(ranks)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        (gpus(1, 1), None),
        (gpus(4), None),
        (cpus(3), None),
        (with_rank(gpus(2), 3, python="3.12.1", driver="580.1"), None),
        (with_rank(gpus(2), 3, free_bytes=40 * GIB), None),
        (with_rank(cpus(3), 2, free_bytes=GIB), None),
        (
            with_rank(gpus(2), 2, torch="2.12.0+cu128"),
            "torch 2.13.0+cu128 with CUDA 12.8 and NCCL 2.27.5 on ranks 0-1, 3, torch 2.12.0+cu128 with CUDA 12.8 and "
            "NCCL 2.27.5 on rank 2: start all ranks from one environment",
        ),
        (
            with_rank(gpus(1), 1, cuda="12.6"),
            "torch 2.13.0+cu128 with CUDA 12.8 and NCCL 2.27.5 on rank 0, torch 2.13.0+cu128 with CUDA 12.6 and NCCL "
            "2.27.5 on rank 1: start all ranks from one environment",
        ),
        (
            with_rank(gpus(1), 1, nccl="2.26.2"),
            "torch 2.13.0+cu128 with CUDA 12.8 and NCCL 2.27.5 on rank 0, torch 2.13.0+cu128 with CUDA 12.8 and NCCL "
            "2.26.2 on rank 1: start all ranks from one environment",
        ),
        (with_rank(cpus(64), 63, open_files=128), None),
        (with_rank(cpus(65), 64, open_files=None), None),
        (
            with_rank(with_rank(cpus(65), 64, open_files=128), 0, open_files=64),
            "a process on n1, n65 may have 64 open files, and one of 65 needs about 129: raise the hard limit there "
            "(ulimit -Hn; LimitNOFILE of slurmd or of the container)",
        ),
        (
            with_rank(gpus(2), 3, device="NVIDIA A100"),
            "NVIDIA H100 on ranks 0-2, NVIDIA A100 on rank 3: ask for one kind of GPU (--gres=gpu:TYPE:N)",
        ),
        (
            with_rank(gpus(2), 3, free_bytes=38 * GIB),
            "rank 3 on n2 has 38.0 GiB free on GPU 1, the others' median is 78.0 GiB: end the other process that "
            "fills it (nvidia-smi lists it), or leave the host out",
        ),
        (
            with_rank(with_rank(with_rank(gpus(2), 0, unseen=("n2",)), 2, unseen=("n1",)), 3, unseen=("n1",)),
            "runs/x is not shared, n1 does not see what n2 writes, n2 does not see what n1 writes: "
            "choose a --run-dir that all hosts share",
        ),
        (
            [replace(rank, fault="Read-only file system") for rank in cpus(5)],
            "runs/x cannot be written from n1, n2, n3 and 2 more (Read-only file system): fix that, or change "
            "--run-dir",
        ),
    ],
)
def test_each_fault_has_its_ranks_and_remedy(ranks: list[Rank], expected: str | None) -> None:
    assert unfit_because(ranks, RUN) == ([] if expected is None else [expected])


SHM = "64 MiB are free in /dev/shm of n2, through which NCCL may connect GPUs: remove files there, or give a container"
MEMLOCK = "a process on n1, n2 may lock 64 KiB of memory, and NCCL over InfiniBand needs more: ulimit -l unlimited"


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        (gpus(2), None),
        (with_rank(gpus(2), 3, shm_bytes=64 * 2**20), SHM),
        (with_rank(gpus(2, 1), 1, shm_bytes=64 * 2**20), None),
        ([replace(rank, shm_bytes=0) for rank in cpus(2)], None),
        ([replace(rank, locked_bytes=65536) for rank in gpus(2)], MEMLOCK),
        ([replace(rank, locked_bytes=65536) for rank in gpus(1)], None),
        ([replace(rank, locked_bytes=65536) for rank in cpus(2)], None),
        (
            with_rank(gpus(2), 3, knows_itself=False),
            "n2 cannot resolve its own name, for which torchrun waits 5 minutes",
        ),
    ],
)
def test_what_may_make_nccl_fail_is_a_warning(ranks: list[Rank], expected: str | None) -> None:
    warnings = warnings_about(ranks)
    assert len(warnings) == (expected is not None)
    assert expected is None or warnings[0].startswith(expected)


def test_the_table_has_a_row_for_each_host_and_the_least_of_its_ranks() -> None:
    ranks = with_rank(gpus(2), 3, free_bytes=77 * GIB, shm_bytes=3 * GIB, open_files=None)
    titles, first, second = table_of_hosts(ranks)
    assert first.split() == ["n1", "0-1", "NVIDIA", "H100", *VERSIONS, "1048576", "500.0", "78.0"]
    assert second.split() == ["n2", "2-3", "NVIDIA", "H100", *VERSIONS, "1048576", "/", "any", "3.0", "77.0"]
    assert titles.index("files") == first.index("1048576") and len(titles) < 130


def test_consecutive_ranks_are_written_as_spans() -> None:
    assert spans([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"


def outcome_of(group: ProcessGroup, run_dir: Path) -> list[str]:
    """Return the lines that this rank logs, and its error or "no error"."""
    lines: list[str] = []
    try:
        preflight.preflight(group, run_dir, lines.append)
    except InputError as error:
        return [*lines, str(error)]
    return [*lines, "no error"]


def check_from_hosts(group: ProcessGroup, folder: Path) -> list[list[str]]:
    """Return the outcomes on two hosts: a new run directory, one in use, one not writable, and one not shared."""
    preflight.SECONDS_TO_SEE = 0.5
    host = f"n{1 + group.rank // 2}"
    socket.gethostname = lambda: host
    outcomes = [outcome_of(group, folder / name) for name in ("new/run", "used", "blocked")]
    (folder / host).mkdir(exist_ok=True)
    os.chdir(folder / host)
    return [*outcomes, outcome_of(group, Path("runs/x"))]


def test_a_fit_world_is_listed_and_each_bad_run_directory_is_reported(tmp_path: Path) -> None:
    run_dir = tmp_path / "used"
    (run_dir / "checkpoints").mkdir(parents=True)
    (run_dir / "config.json").write_text("{}")
    (tmp_path / "blocked").write_text("a file instead of the run directory")
    lock = RunLock(run_dir)
    lock.acquire()
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    outcomes = run_on_ranks(3, check_from_hosts, tmp_path)
    after = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    lock.release()

    titles, first, second, nameless, verdict, end = outcomes[0][0]
    assert nameless.startswith("preflight: warning: n1, n2 cannot resolve its own name, for which torchrun waits")
    assert (verdict, end) == ("preflight: fit to train", "no error")
    assert titles.split()[:3] == ["host", "ranks", "device"]
    assert first.startswith("n1    0-1    CPU process") and second.startswith("n2    2      CPU process")
    assert float(first.split()[-1]) > 0
    assert [outcome[0] for outcome in outcomes[1:]] == [["no error"]] * 2, "only rank 0 logs"

    assert {outcome[1][-1] for outcome in outcomes} == {"no error"}
    assert {path for path in after if after[path] != before.get(path)} <= {run_dir / "lock.json"}, "its heartbeat"
    assert after.keys() == before.keys()

    assert {outcome[2][-1] for outcome in outcomes} == {
        f"preflight: unfit: {tmp_path / 'blocked'} cannot be written from n1, n2 (File exists): fix that, or change "
        "--run-dir"
    }
    assert {outcome[3][-1] for outcome in outcomes} == {
        "preflight: unfit: runs/x is not shared, n1 does not see what n2 writes, n2 does not see what n1 writes: "
        "choose a --run-dir that all hosts share"
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blocked", "n1", "n2", "used"], "no file may stay"
    assert not list((tmp_path / "n1").iterdir()) and not list((tmp_path / "n2").iterdir())


def test_the_command_alone_checks_one_process(tmp_path: Path) -> None:
    done = called(preflight.main, "--run-dir", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("host") and done.stdout.endswith("preflight: fit to train\n")
    assert list(tmp_path.iterdir()) == []


def test_a_hard_limit_of_open_files_that_is_too_low_is_unfit(tmp_path: Path) -> None:
    """One process needs 65; it has fewer open itself, and cannot raise a hard limit."""
    command = [sys.executable, "train/preflight.py", "--run-dir", str(tmp_path / "run")]
    limited = ["sh", "-c", 'ulimit -n 60 && exec "$@"', "-", *command]
    done = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stdout.splitlines()[1].split()[-3] == "60"
    line = f"train: preflight: unfit: a process on {socket.gethostname()} may have 60 open files, and one of 1 needs "
    assert done.stderr.startswith(line) and done.stderr.count("\n") == 1


def test_with_the_flag_a_run_starts_only_if_fit(tiny_data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    done = called(main.main, *tiny_flags(tiny_data, run_dir), "--train.steps", "2", "--preflight")
    assert done.returncode == 0, done.stderr
    assert done.stdout.index("preflight: fit to train\n") < done.stdout.index("done at step 2")
    assert status(run_dir)["state"] == "done" and rows(run_dir)
    assert [path.name for path in run_dir.iterdir() if "preflight" in path.name] == []
    (tmp_path / "blocked").write_text("a file instead of the run directory")
    done = called(main.main, *tiny_flags(tiny_data, tmp_path / "blocked"), "--preflight")
    assert done.returncode == 2
    assert done.stderr == (
        f"train: preflight: unfit: {tmp_path / 'blocked'} cannot be written from {socket.gethostname()} (File exists): "
        "fix that, or change --run-dir\n"
    )
