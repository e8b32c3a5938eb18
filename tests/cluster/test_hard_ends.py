"""Ends of jobs that take minutes: the time limit, an early signal, dead nodes, a job in a job, four nodes."""

import shlex
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.slurm import Cluster, Job, script
from tests.cluster.test_jobs import attempt, steps_saved
from tests.cluster.tiny import STEPS, assert_close_losses, assert_same_curve, flags, train_plainly
from tests.helpers.runs import assert_same_tensors, final_tensors, status

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def plain(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("plain")
    return {world: train_plainly(world, tiny_data, folder / str(world)) for world in (1, 2)}


def test_at_its_time_limit_a_job_saves_and_goes_on_in_another(
    cluster: Cluster, tiny_data: Path, tmp_path: Path
) -> None:
    """Slurm sends the signal up to a minute early, so at least 40 s of two minutes are left for training."""
    run_dir = tmp_path / "run"
    arguments = flags(tiny_data, run_dir, "--train.steps", "100000")
    job = cluster.train(tmp_path / "log", arguments, "--time=2", "--signal=B:USR1@20")
    job.wait_for(lambda: attempt(run_dir) == 2, "the second start")
    first_end = status(run_dir)["step"]
    job.wait_for(lambda: steps_saved(run_dir) >= first_end + 10, "a checkpoint of the second start")
    (run_dir / "STOP").touch()
    assert job.wait() == "COMPLETED", job.text()
    assert len(job.lines(f"back to the queue: stopped by SIGUSR1 at step {first_end}")) == 1, job.text()
    uninterrupted = train_plainly(2, tiny_data, tmp_path / "plain", "--train.steps", str(status(run_dir)["step"]))
    assert_same_curve(run_dir, uninterrupted)


def test_a_signal_before_there_is_a_handler_loses_nothing(
    cluster: Cluster, tiny_data: Path, tmp_path: Path, plain: dict[int, Path]
) -> None:
    run_dir = tmp_path / "run"
    job = cluster.train(tmp_path / "log", flags(tiny_data, run_dir))
    job.wait_for(lambda: "rendezvous at" in job.text(), "torchrun's start")
    assert attempt(run_dir) == 0
    cluster.run("scancel", "--batch", "--signal=USR1", str(job.id))
    assert job.wait() == "COMPLETED", job.text()
    assert len(job.lines("back to the queue: stopped by SIGUSR1 at step 0")) == 1, job.text()
    assert status(run_dir)["state"] == "done"
    assert_same_curve(run_dir, plain[2])


def test_a_stop_file_that_nobody_can_see_is_followed_by_a_signal_through_torchrun(
    cluster: Cluster, tiny_data: Path, tmp_path: Path
) -> None:
    """The signal goes to torchrun alone, which passes it on and waits for the checkpoint."""
    run_dir = tmp_path / "run"
    job = cluster.train(tmp_path / "log", flags(tiny_data, run_dir, "--train.steps", "100000"))
    job.wait_for(lambda: steps_saved(run_dir) >= 10, "a checkpoint")
    (run_dir / "STOP").symlink_to(tmp_path / "no folder" / "STOP")  # it can neither be written nor be seen
    cluster.run("scancel", "--batch", "--signal=USR1", str(job.id))
    job.wait_for(lambda: attempt(run_dir) == 2, "the second start")
    (run_dir / "STOP").touch()
    assert job.wait() == "COMPLETED", job.text()
    requeued = job.lines("back to the queue: stopped by SIGUSR1 at step ")
    assert len(requeued) == 1, job.text()
    assert job.time_of("back to the queue") - job.time_of("SIGUSR1: asking") >= 20
    assert f"step_{int(requeued[0].split()[-1]):08d}" in job.text().partition("continuing from ")[2].splitlines()[0]


@pytest.fixture
def booted_again(cluster: Cluster) -> Iterator[list[int]]:
    """Collect the numbers of the nodes that the test kills, and boot them again after it."""
    killed: list[int] = []
    yield killed
    for number in killed:
        assert script(cluster.folder, "start-node", str(number)).returncode == 0
    deadline = time.monotonic() + 60
    while cluster.run("sinfo", "-h", "-N", "-p", "debug", "-o", "%t").stdout.split() != ["idle"] * len(cluster.nodes):
        assert time.monotonic() < deadline, cluster.run("sinfo", "-N").stdout
        time.sleep(0.2)


@pytest.mark.parametrize("which", [0, 1], ids=["the batch shell's", "the other"])
def test_when_a_node_dies_the_run_goes_on_with_another(
    cluster: Cluster, tiny_data: Path, tmp_path: Path, booted_again: list[int], which: int
) -> None:
    """The node's processes and network vanish. Slurm notices after 10 s, and the dead rank 0's lock is waited for.

    The partition is one where preemption cancels: that has no influence on what happens to the jobs of a dead node.
    """
    run_dir = tmp_path / "run"
    job = cluster.train(tmp_path / "log", flags(tiny_data, run_dir, "--train.steps", "100000"), "--partition=cancel")
    job.wait_for(lambda: steps_saved(run_dir) >= 10, "a checkpoint")
    victim = cluster.nodes.index(job.nodes()[which]) + 1
    booted_again.append(victim)
    assert script(cluster.folder, "kill-node", str(victim)).returncode == 0
    job.wait_for(lambda: attempt(run_dir) == 2, "the second start")
    assert cluster.nodes[victim - 1] not in job.nodes()
    first_step = status(run_dir)["step"]
    job.wait_for(lambda: steps_saved(run_dir) >= first_step + 10, "a checkpoint of the second start")
    (run_dir / "STOP").touch()
    assert job.wait() == "COMPLETED", job.text()
    last = status(run_dir)["step"]
    uninterrupted = train_plainly(2, tiny_data, tmp_path / "plain", "--train.steps", str(last))
    assert_same_curve(run_dir, uninterrupted)
    assert_same_tensors(final_tensors(run_dir), final_tensors(uninterrupted))


def test_a_job_submitted_out_of_another_takes_nothing_from_it(
    cluster: Cluster, tiny_data: Path, tmp_path: Path, plain: dict[int, Path]
) -> None:
    """The outer job is a restarted task of an array, has another shape, and has a torchrun's environment."""
    run_dir = tmp_path / "run"
    inner = ["sbatch", "--parsable", f"--output={tmp_path / 'log'}", "--nodes=2", "--gres=gpu:1"]
    inner += ["--cpus-per-task=2", "slurm/gpt2_small.sh", *flags(tiny_data, run_dir, "--train.steps", "20")]
    command = f"""
        export RANK=5 WORLD_SIZE=64 LOCAL_RANK=5 MASTER_ADDR=gone MASTER_PORT=1 TORCHELASTIC_RUN_ID=other
        if [ "${{SLURM_RESTART_COUNT:-0}}" = 0 ]; then
            scontrol requeue ${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID && sleep 60
        fi
        srun --ntasks=1 --overlap {shlex.join(inner)}"""
    shape = ("--array=3", "--nodes=1", "--ntasks=3", "--mem-per-cpu=100", "--gres=gpu:2", "--wrap")
    outer = cluster.sbatch(tmp_path / "outer", *shape, command)
    outer.wait_for(lambda: outer.text().split()[-1:] != [] and outer.text().split()[-1].isdigit(), "the inner job")
    job = Job(cluster, int(outer.text().split()[-1]), tmp_path / "log")
    assert job.wait() == "COMPLETED", job.text()
    assert len(job.lines(f"[job {job.id}.0 ")) == 2, job.text()
    assert status(run_dir)["state"] == "done"
    assert_same_curve(run_dir, plain[2])


def test_four_nodes_train_the_run_that_one_process_does(
    cluster: Cluster, tiny_data: Path, tmp_path: Path, plain: dict[int, Path]
) -> None:
    job = cluster.train(tmp_path / "log", flags(tiny_data, tmp_path / "run"), "--nodes=4")
    assert job.wait() == "COMPLETED", job.text()
    assert status(tmp_path / "run")["step"] == STEPS
    assert_close_losses(tmp_path / "run", plain[1])
