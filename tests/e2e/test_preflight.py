"""The verdict on worlds of every kind, and each thing that is looked at, measured between real processes."""

import dataclasses
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from common.errors import InputError
from tests.helpers.groups import run_on_ranks
from tests.helpers.runs import called, rows, status, tiny_flags, torchrun
from train import main
from train.guards import preflight_checks
from train.guards.preflight_checks import Link, Rank, driver_version
from train.preflight import Host, slow_networks, spans, unfit_because
from train.preflight import preflight as look_over
from train.processes.group import ProcessGroup
from train.run.lock import RunLock

GIB = 2**30
RUN = Path("runs/x")
GPU = Rank("n1", "NVIDIA H100", 0, "570.124.06", "12.8", "2.13.0+cu128", "3.11.7", 78 * GIB)
FAST = 1e9


def gpus(num_hosts: int, each: int = 2) -> list[Rank]:
    return [dataclasses.replace(GPU, host=f"n{1 + n // each}", index=n % each) for n in range(num_hosts * each)]


def cpus(num_hosts: int) -> list[Rank]:
    return [dataclasses.replace(GPU, host=f"n{1 + n}", device="CPU process", index=None) for n in range(num_hosts)]


def hosts_of(ranks: Sequence[Rank]) -> list[Host]:
    names = dict.fromkeys(rank.host for rank in ranks)
    return [Host(name, [n for n, rank in enumerate(ranks) if rank.host == name], 0.0) for name in names]


def links(num_hosts: int, slow: Mapping[Link, float] | None = None) -> dict[Link, float]:
    names = [f"n{1 + n}" for n in range(num_hosts)]
    pairs = [(names[n], names[(n + way) % num_hosts]) for n in range(num_hosts) for way in (1, 2)]
    return {(a, b): FAST for a, b in pairs if a != b} | dict(slow or {})


def with_rank(ranks: list[Rank], number: int, **changes: object) -> list[Rank]:
    return [dataclasses.replace(rank, **changes) if n == number else rank for n, rank in enumerate(ranks)]  # type: ignore[arg-type]


def with_clocks(*seconds: float) -> list[Host]:
    return [dataclasses.replace(host, clock_seconds=its) for host, its in zip(hosts_of(cpus(9)), seconds, strict=False)]


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        (gpus(1, 1), []),
        (gpus(4), []),
        (cpus(3), []),
        (with_rank(gpus(2), 3, python="3.12.1", driver="580.1"), []),
        (
            with_rank(gpus(2), 2, torch="2.12.0+cu128"),
            [
                "torch 2.13.0+cu128 with CUDA 12.8 on ranks 0-1, 3, torch 2.12.0+cu128 with CUDA 12.8 on rank 2: "
                "start all ranks from one environment"
            ],
        ),
        (
            with_rank(gpus(1), 1, cuda="12.6"),
            [
                "torch 2.13.0+cu128 with CUDA 12.8 on rank 0, torch 2.13.0+cu128 with CUDA 12.6 on rank 1: "
                "start all ranks from one environment"
            ],
        ),
        (
            with_rank(gpus(2), 3, device="NVIDIA A100"),
            ["NVIDIA H100 on ranks 0-2, NVIDIA A100 on rank 3: ask for one kind of GPU (--gpus-per-node TYPE:N)"],
        ),
        (with_rank(gpus(2), 3, free_bytes=40 * GIB), []),
        (
            with_rank(gpus(2), 3, free_bytes=38 * GIB),
            [
                "rank 3 on n2 has 38.0 GiB free on GPU 1, the others' median is 78.0 GiB: end the other process that "
                "fills it (nvidia-smi lists it), or leave the host out"
            ],
        ),
        (with_rank(cpus(3), 2, free_bytes=GIB), []),
    ],
    ids=[
        "1",
        "8",
        "CPUs",
        "Python and driver",
        "torch",
        "CUDA",
        "GPUs",
        "enough free",
        "little free",
        "a CPU's memory",
    ],
)
def test_the_verdict_on_ranks(ranks: list[Rank], expected: list[str]) -> None:
    hosts = hosts_of(ranks)
    assert unfit_because(ranks, hosts, links(len(hosts)) if len(hosts) > 1 else {}, RUN) == expected


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        (with_clocks(0.0, 4.9, -4.9), []),
        (
            with_clocks(0.0, 0.1, -61.5),
            ["the clock of n3 is 61.5 s behind the others': have it set (chronyc makestep)"],
        ),
        (with_clocks(0.0, 9.0, 9.1), ["the clock of n1 is 9.0 s behind the others': have it set (chronyc makestep)"]),
        (with_clocks(0.0, 5.5), ["the clock of n2 is 5.5 s ahead of the others': have it set (chronyc makestep)"]),
        (
            [Host("n1", [0], 0.0, does_not_see=["n2"]), Host("n2", [1], 0.0, does_not_see=["n1"])],
            [
                "runs/x is not shared, n1 does not see what n2 writes, n2 does not see what n1 writes: "
                "choose a --run-dir that all hosts share"
            ],
        ),
        (
            [Host(f"n{n}", [n], 0.0, fault="Read-only file system") for n in range(5)],
            [
                "runs/x cannot be written from n0, n1, n2 and 2 more (Read-only file system): mend that, or change "
                "--run-dir"
            ],
        ),
    ],
    ids=["clocks", "behind", "the first", "two", "not shared", "read-only"],
)
def test_the_verdict_on_hosts(hosts: list[Host], expected: list[str]) -> None:
    assert unfit_because(cpus(len(hosts)), hosts, links(len(hosts)), RUN) == expected


@pytest.mark.parametrize(
    ("speeds", "named"),
    [
        (links(4, {("n2", "n3"): 2.6e8, ("n2", "n4"): 2.6e8}), []),
        (links(4, {("n2", "n3"): 5e6, ("n2", "n4"): 4e6}), ["n2"]),
        (links(4, {("n1", "n2"): 5e6, ("n4", "n2"): 5e6}), ["n2"]),
        (links(4, {("n2", "n3"): 5e6}), []),
        (links(3, {("n2", "n3"): 5e6, ("n2", "n1"): 5e6, ("n1", "n2"): 5e6, ("n3", "n2"): 5e6}), ["n2"]),
        (links(5, {("n1", "n2"): 5e6, ("n1", "n3"): 5e6, ("n2", "n3"): 5e6, ("n2", "n4"): 5e6}), ["n2"]),
        (links(6, {("n1", "n2"): 5e6, ("n1", "n3"): 5e6, ("n4", "n5"): 5e6, ("n4", "n6"): 5e6}), ["n1", "n4"]),
        (links(2, {("n2", "n1"): 5e6}), ["n2"]),
        (links(2, {("n2", "n1"): 2.6e8}), []),
        ({}, []),
    ],
    ids=["fine", "sends", "receives", "one link", "both of 3", "neighbours", "two", "of 2", "2 fine", "one host"],
)
def test_the_host_at_fault_for_slow_links_is_named(speeds: dict[Link, float], named: list[str]) -> None:
    """Of neighbours that are both slow one at a time: without it, the next look names the other."""
    assert sorted(slow_networks(speeds)) == named


def test_the_clause_on_a_slow_network_has_both_figures_and_the_flag() -> None:
    ranks = cpus(4)
    speeds = links(4, {("n2", "n3"): 4.8e6, ("n2", "n4"): 4.7e6, ("n4", "n2"): 6e6})
    assert unfit_because(ranks, hosts_of(ranks), speeds, RUN) == [
        "n2 sends 4.8 MB/s and receives 6.0 MB/s, the others' median is 1000.0 MB/s: look at its network, "
        "or leave it out with --exclude n2"
    ]
    assert unfit_because(cpus(2), hosts_of(cpus(2)), links(2, {("n1", "n2"): 5e6}), RUN)[0].startswith(
        "n1 sends 5.0 MB/s, the others' median is 1000.0 MB/s"
    )


def test_ranks_in_a_row_are_written_short() -> None:
    assert spans([0]) == "0"
    assert spans([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n", "535.104.05"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65  Release Build  (a@b)\n", "580.65"),
        ("", "-"),
    ],
)
def test_the_driver_names_its_version(text: str, version: str) -> None:
    assert driver_version(text) == version


def outcome_of(group: ProcessGroup, run_dir: Path) -> list[str]:
    """What this rank says, and last how it ends."""
    said: list[str] = []
    try:
        look_over(group, run_dir, said.append)
    except InputError as error:
        return [*said, str(error)]
    return [*said, "no error"]


def on_a_host(name: str) -> None:
    """This process is on a host of that name from now on; for one that ends with its test. All-reduces are few."""
    socket.gethostname = lambda: name
    preflight_checks.REDUCE_KIB = (4, 16384, 65536)


def look_from_hosts(group: ProcessGroup, run_dir: Path, ranks_each: int) -> list[str]:
    on_a_host(f"n{1 + group.rank // ranks_each}")
    return outcome_of(group, run_dir)


def test_a_healthy_world_is_fit_and_nothing_is_left(tmp_path: Path) -> None:
    outcomes = run_on_ranks(4, look_from_hosts, tmp_path / "new" / "run", 2)
    assert outcomes[1:] == [["no error"]] * 3, "rank 0 alone says something"
    titles, first, second, reduces, *table, verdict, end = outcomes[0]
    assert (verdict, end) == ("preflight: fit to train", "no error")
    assert titles.split()[:3] == ["host", "ranks", "device"] and reduces.split()[0] == "all-reduce"
    assert first.startswith("n1    0-1    CPU process") and second.startswith("n2    2-3    CPU process")
    assert abs(float(second.split()[-3])) < 1000, "milliseconds between two readings of one clock"
    assert [" ".join(line.split()[:2]) for line in table][:2] == ["4 KiB", "16 MiB"]
    assert list(tmp_path.iterdir()) == []


def test_a_world_of_one_is_fit(tmp_path: Path) -> None:
    titles, _, *lines = outcome_of(ProcessGroup(0, 1, torch.device("cpu")), tmp_path / "run")
    assert titles.startswith("host")
    assert lines == [
        "one host: no network between hosts to measure",
        "one process: nothing to all-reduce",
        "preflight: fit to train",
        "no error",
    ]
    assert list(tmp_path.iterdir()) == []


def look_with_a_clock_of_its_own(group: ProcessGroup, run_dir: Path, seconds: float) -> list[str]:
    on_a_host(f"n{1 + group.rank}")
    if group.rank == 1:
        names = {name: getattr(time, name) for name in ("monotonic", "perf_counter", "sleep")}
        preflight_checks.time = SimpleNamespace(time=lambda: time.time() + seconds, **names)  # type: ignore[assignment]
    return outcome_of(group, run_dir)


def test_a_clock_that_is_ahead_is_found(tmp_path: Path) -> None:
    outcomes = run_on_ranks(3, look_with_a_clock_of_its_own, tmp_path / "run", 60.0)
    assert {outcome[-1] for outcome in outcomes} == {
        "preflight: unfit: the clock of n2 is 60.0 s ahead of the others': have it set (chronyc makestep)"
    }
    (row,) = [line for line in outcomes[0] if line.startswith("n2 ")]
    assert 59_000 < float(row.split()[-3]) < 61_000


def look_on_local_disks(group: ProcessGroup, folder: Path) -> list[str]:
    preflight_checks.SECONDS_TO_SEE = 0.5
    on_a_host(f"n{1 + group.rank // 2}")
    own = folder / f"disk_{group.rank // 2}"
    own.mkdir(exist_ok=True)
    os.chdir(own)
    return outcome_of(group, Path("runs/x"))


def test_a_run_directory_that_is_not_shared_is_found_and_both_hosts_named(tmp_path: Path) -> None:
    outcomes = run_on_ranks(3, look_on_local_disks, tmp_path)
    assert {outcome[-1] for outcome in outcomes} == {
        "preflight: unfit: runs/x is not shared, n1 does not see what n2 writes, n2 does not see what n1 writes: "
        "choose a --run-dir that all hosts share"
    }
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["disk_0", "disk_1"], "nothing is left on either"


def test_a_run_directory_that_cannot_be_written_is_a_reason_like_others(tmp_path: Path) -> None:
    (tmp_path / "blocked").write_text("a file where the run directory should be")
    outcomes = run_on_ranks(2, look_from_hosts, tmp_path / "blocked", 1)
    assert {outcome[-1] for outcome in outcomes} == {
        f"preflight: unfit: {tmp_path / 'blocked'} cannot be written from n1, n2 (File exists): mend that, or change "
        "--run-dir"
    }
    assert [path.name for path in tmp_path.iterdir()] == ["blocked"]


def look_through_a_slow_network(group: ProcessGroup, run_dir: Path) -> list[str]:
    """What rank 1 sends is half a second under way, but for the words in which ranks agree."""
    on_a_host(f"n{1 + group.rank}")
    at_once = dist.send

    def send(tensor: torch.Tensor, rank: int) -> None:
        if group.rank == 1 and tensor.numel() > 2:
            time.sleep(0.5)
        at_once(tensor, rank)

    dist.send = send  # type: ignore[assignment]
    return outcome_of(group, run_dir)


def test_a_host_that_sends_slowly_is_named_and_no_other(tmp_path: Path) -> None:
    """Real traffic control on real nodes does this in tests/cluster/test_network.py."""
    outcomes = run_on_ranks(3, look_through_a_slow_network, tmp_path / "run")
    verdict = outcomes[0][-1]
    assert {outcome[-1] for outcome in outcomes} == {verdict}
    assert verdict.startswith("preflight: unfit: n2 sends ") and verdict.endswith("leave it out with --exclude n2")
    assert "n1" not in verdict and "n3" not in verdict and verdict.count(";") == 0


def test_a_run_that_is_going_on_is_not_disturbed(tmp_path: Path) -> None:
    """Another process holds the lock, and its files stay what they were."""
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints").mkdir(parents=True)
    (run_dir / "config.json").write_text("{}")
    lock = RunLock(run_dir)
    lock.acquire()
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    outcomes = run_on_ranks(2, outcome_of, run_dir)
    assert {outcome[-1] for outcome in outcomes} == {"no error"}
    after = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    lock.release()
    assert {path for path in after if after[path] != before.get(path)} <= {run_dir / "lock.json"}, "its own heartbeat"
    assert after.keys() == before.keys()


@pytest.mark.long(reason="a start of torchrun; what it does on each rank is tested above")
def test_alone_under_torchrun(tmp_path: Path) -> None:
    process = torchrun(2, "--run-dir", str(tmp_path / "run"), script="train/preflight.py")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert output.count("preflight: fit to train\n") == 1 and output.count("free GiB") == 1, output
    assert list(tmp_path.iterdir()) == []


def test_before_a_run(tiny_data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    done = called(main.main, *tiny_flags(tiny_data, run_dir), "--train.steps", "2", "--preflight")
    assert done.returncode == 0, done.stderr
    assert done.stdout.index("preflight: fit to train\n") < done.stdout.index("done at step 2")
    assert status(run_dir)["state"] == "done" and rows(run_dir)
    assert [path.name for path in run_dir.iterdir() if "preflight" in path.name] == []


def test_an_unfit_world_begins_no_run(tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "blocked").write_text("a file where the run directory should be")
    done = called(main.main, *tiny_flags(tiny_data, tmp_path / "blocked"), "--preflight")
    assert done.returncode == 2
    host = socket.gethostname()
    assert done.stderr == (
        f"train: preflight: unfit: {tmp_path / 'blocked'} cannot be written from {host} (File exists): mend that, or "
        "change --run-dir\n"
    )
