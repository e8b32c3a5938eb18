"""One cluster for all tests. Each test leaves it idle and without a process."""

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.slurm import Cluster, make_checkout, script

NUM_NODES = 4
SECONDS_TO_LEAVE = 60.0  # for a job's last process, the helper that ends its W&B run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.cluster)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(600))


@pytest.fixture(scope="session")
def session_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(
        prefix="slurm-"
    ) as parent:  # short, since paths of sockets have at most 107 characters
        folder = Path(parent) / "c"
        reason = script(folder, "check").stderr.strip()
        if reason:
            pytest.skip(reason)
        started = script(folder, "up", str(NUM_NODES))
        assert started.returncode == 0, started.stderr
        print(started.stderr, end="")
        try:
            env = clean_environment() | {
                "SLURM_CONF": str(folder / "etc" / "slurm.conf"),
                "PATH": os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]),
                "OMP_NUM_THREADS": "1",
            }
            proctrack = started.stderr.rpartition("proctrack/")[2].split(";")[0]
            cluster = Cluster(
                folder, make_checkout(tmp_path_factory.mktemp("cluster") / "checkout"), env, [], proctrack
            )
            cluster.nodes = sorted(set(cluster.run("sinfo", "-h", "-N", "-o", "%N").stdout.split()))
            yield cluster
        finally:
            stopped = script(folder, "down")
            assert stopped.returncode == 0 and not stopped.stderr and not folder.exists(), stopped.stderr


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "SRUN_"))}


@pytest.fixture
def cluster(session_cluster: Cluster) -> Iterator[Cluster]:
    """The idle cluster; after the test no job and no process of a job may be left."""
    yield session_cluster
    left = session_cluster.run("squeue", "-h", "-o", "%i %j %T").stdout.strip()
    session_cluster.run("scancel", "--user=root", "--signal=KILL", "--full")
    session_cluster.run("scancel", "--user=root")
    end = time.monotonic() + SECONDS_TO_LEAVE
    while processes := session_cluster.everything_of_jobs():
        assert time.monotonic() < end, [Path(f"/proc/{pid}/cmdline").read_text() for pid in processes]
        time.sleep(0.1)
    while session_cluster.run("squeue", "-h").stdout.strip():
        assert time.monotonic() < end, session_cluster.run("squeue").stdout
        time.sleep(0.1)
    assert not left, f"jobs left: {left}"
