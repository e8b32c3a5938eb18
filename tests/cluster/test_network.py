"""`--preflight` between nodes: healthy nodes are fit, and a node whose network was made slow is named."""

import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.slurm import SECONDS_TO_END, Cluster, script
from tests.cluster.tiny import flags

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SLOW_NODE = 2
# tc-tbf(8) limits what the node sends to 40 Mbit/s, at most a hundredth of what these nodes reach
SLOW = ("tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", "40mbit", "burst", "32kbit", "latency", "400ms")


def preflight(cluster: Cluster, run_dir: Path) -> "subprocess.CompletedProcess[str]":
    shape = ("--nodes=4", "--ntasks=4", "--gpus-per-node=1", "--cpus-per-task=1")
    command = ("env", "CUDA_VISIBLE_DEVICES=", "python", "train/preflight.py", "--run-dir", str(run_dir))
    done = cluster.run("srun", *shape, *command)
    print(done.stdout, done.stderr)
    deadline = time.monotonic() + SECONDS_TO_END
    while cluster.run("squeue", "-h").stdout.strip():  # srun returns before Slurm has finished the job
        assert time.monotonic() < deadline, cluster.run("squeue").stdout
        time.sleep(0.1)
    return done


@pytest.fixture
def slow_node(cluster: Cluster) -> Iterator[str]:
    """A node that sends at most 5 MB/s, for one test."""
    slowed = script(cluster.folder, "exec", str(SLOW_NODE), *SLOW)
    try:
        assert slowed.returncode == 0, slowed.stderr
        yield cluster.nodes[SLOW_NODE - 1]
    finally:
        script(cluster.folder, "exec", str(SLOW_NODE), "tc", "qdisc", "del", "dev", "eth0", "root")


def test_healthy_nodes_are_fit_and_nothing_is_left(cluster: Cluster, tmp_path: Path) -> None:
    done = preflight(cluster, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("preflight: fit to train\n") and "unfit" not in done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[1:5]] == cluster.nodes
    assert list(tmp_path.iterdir()) == []


def test_the_node_with_a_slow_network_is_named_and_no_other(cluster: Cluster, slow_node: str, tmp_path: Path) -> None:
    done = preflight(cluster, tmp_path / "run")
    assert done.returncode == 2, done.stdout
    (verdict,) = [line for line in done.stderr.splitlines() if "preflight: unfit: " in line]
    (speed,) = re.findall(rf": {slow_node} sends (\d+\.\d) MB/s", verdict)
    assert 2.5 < float(speed) < 6.0, "5 MB/s, and the burst of the token bucket"
    assert verdict.endswith(f"leave it out with --exclude {slow_node}")
    assert [node for node in cluster.nodes if node in verdict] == [slow_node]
    assert list(tmp_path.iterdir()) == []


def test_a_job_does_not_begin_its_run_on_a_slow_network(
    cluster: Cluster, slow_node: str, tiny_data: Path, tmp_path: Path
) -> None:
    """Two nodes under torchrun, so one direction is compared with the other."""
    run_dir = tmp_path / "run"
    nodes = f"--nodelist={cluster.nodes[0]},{slow_node}"
    job = cluster.train(tmp_path / "log", flags(tiny_data, run_dir, "--preflight"), nodes)
    assert job.wait() == "FAILED"
    assert len(job.lines(f"train: preflight: unfit: {slow_node} sends ")) == 1, job.text()
    assert len(job.lines("ends: training did not begin; the first error above says why")) == 1, job.text()
    assert not run_dir.exists() or not list(run_dir.iterdir())
