"""Jobs that Slurm cancels for others, by PreemptMode=CANCEL: they come back, and those that a person cancels do not."""

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.cluster.slurm import Cluster, Job, environment_of
from tests.cluster.test_jobs import attempt, steps_saved
from tests.cluster.test_submit import jobs_in, submit
from tests.cluster.tiny import STEPS, assert_same_curve, flags, train_plainly
from tests.helpers.runs import assert_same_tensors, final_tensors, status

ENDLESS = ("--train.steps", "100000")
CANCELLED = "back to the queue: Slurm cancels the job for another one (preemption)"


def preempt(cluster: Cluster, log: Path, nodes: Sequence[str] | None = None) -> Job:
    """Submit a job of higher priority that wants these nodes for itself, or all nodes, for a second."""
    nodes = nodes or cluster.nodes
    shape = (f"--nodes={len(nodes)}", f"--nodelist={','.join(nodes)}", "--exclusive")
    return cluster.sbatch(log, "--partition=high", *shape, "--wrap", "sleep 1")


def record(cluster: Cluster, job: Job) -> dict[str, str]:
    words = cluster.run("scontrol", "show", "job", "--oneliner", str(job.id)).stdout.split()
    return dict(word.split("=", 1) for word in words if "=" in word)


def assert_goes_on_bitwise(job: Job, run_dir: Path, data: Path, folder: Path) -> None:
    """Wait for the second start and some steps of it, stop it, and compare the run with an uninterrupted one."""
    job.wait_for(lambda: attempt(run_dir) == 2, "the second start")
    job.wait_for(lambda: 1 in job.ranks(restart=1), "its ranks")
    assert environment_of(job.ranks(restart=1)[1])["SLURM_RESTART_COUNT"] == "1"
    first_end = status(run_dir)["step"]
    job.wait_for(lambda: steps_saved(run_dir) >= first_end + 10, "a checkpoint of the second start")
    (run_dir / "STOP").touch()
    assert job.wait() == "COMPLETED", job.text()
    last = status(run_dir)["step"]
    assert status(run_dir) == {"state": "stopped", "step": last, "reason": "STOP file", "attempt": 2}
    uninterrupted = train_plainly(2, data, folder / "plain", "--train.steps", str(last))
    assert_same_curve(run_dir, uninterrupted)
    assert_same_tensors(final_tensors(run_dir), final_tensors(uninterrupted))


def test_cancelled_without_notice_a_job_comes_back(cluster: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    """The run still saves within KillWait; the requeue does not wait for it."""
    run_dir = tmp_path / "run"
    job = cluster.train(tmp_path / "log", flags(tiny_data, run_dir, *ENDLESS), "--partition=cancel", "--exclusive")
    job.wait_for(lambda: steps_saved(run_dir) >= 10, "a checkpoint")
    preempt(cluster, tmp_path / "preemptor")
    assert_goes_on_bitwise(job, run_dir, tiny_data, tmp_path)
    assert len(job.lines("DUE TO PREEMPTION")) >= 1 and len(job.lines(CANCELLED)) == 1, job.text()
    assert len(job.lines(": asking the run to save and stop")) == 1, job.text()


@pytest.mark.parametrize(
    "is_frozen",
    [pytest.param(False, id="which saves in time"), pytest.param(True, id="which does not", marks=pytest.mark.slow)],
)
def test_cancelled_with_notice_a_job_comes_back(
    cluster: Cluster, tiny_data: Path, tmp_path: Path, is_frozen: bool
) -> None:
    """A frozen run saves neither within the five seconds of grace nor within KillWait."""
    run_dir = tmp_path / "run"
    job = cluster.train(tmp_path / "log", flags(tiny_data, run_dir, *ENDLESS), "--partition=notice", "--exclusive")
    job.wait_for(lambda: steps_saved(run_dir) >= 10, "a checkpoint")
    if is_frozen:
        freeze(job)
    preempt(cluster, tmp_path / "preemptor")
    assert_goes_on_bitwise(job, run_dir, tiny_data, tmp_path)
    assert len(job.lines(CANCELLED)) == is_frozen, job.text()
    assert len(job.lines("back to the queue: ")) == 1 and len(job.lines("SIGUSR1: asking")) == 1, job.text()


def freeze(job: Job) -> None:
    for pid in job.ranks().values():
        os.kill(pid, signal.SIGSTOP)


@pytest.mark.parametrize(
    "in_grace",
    [pytest.param(False, id="training"), pytest.param(True, id="in the time of grace", marks=pytest.mark.slow)],
)
def test_what_a_person_cancels_stays_so(cluster: Cluster, tiny_data: Path, tmp_path: Path, in_grace: bool) -> None:
    run_dir = tmp_path / "run"
    job = cluster.train(tmp_path / "log", flags(tiny_data, run_dir, *ENDLESS), "--partition=notice", "--exclusive")
    job.wait_for(lambda: steps_saved(run_dir) >= 10, "a checkpoint")
    if in_grace:
        freeze(job)
        preemptor = preempt(cluster, tmp_path / "preemptor")
        job.wait_for(lambda: job.lines("SIGUSR1: asking") != [], "the notice")
        time.sleep(2)
    cluster.run("scancel", str(job.id))
    assert job.wait() == "CANCELLED", job.text()
    assert not in_grace or preemptor.wait() == "COMPLETED"
    job.wait_for(lambda: not job.processes(), "the end of its processes")
    time.sleep(2)
    assert job.state() == "CANCELLED" and not job.lines("back to the queue"), job.text()
    assert record(cluster, job)["Restarts"] == "0"


def test_cancellations_are_counted_and_bounded(cluster: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shape = ("--partition=cancel", "--exclusive")
    arguments = flags(tiny_data, run_dir, *ENDLESS)
    job = cluster.train(tmp_path / "log", arguments, *shape, env={"MAX_REQUEUES": "1"})
    for number in (1, 2):
        job.wait_for(lambda number=number: attempt(run_dir) == number, f"start {number}")  # type: ignore[misc]
        preemptor = preempt(cluster, tmp_path / f"preemptor_{number}")
        assert preemptor.wait() == "COMPLETED"
    job.wait_for(lambda: job.state() == "PREEMPTED", "its last end")
    assert len(job.lines(CANCELLED)) == 1, job.text()
    line = "ends: restarted 1 times (MAX_REQUEUES 1); Slurm cancels the job for another one (preemption)"
    assert len(job.lines(line)) == 1 and record(cluster, job)["Restarts"] == "1", job.text()


def test_a_job_that_is_cancelled_as_it_begins_comes_back(cluster: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    """Slurm signals every process of the batch shell, which is just asking where the run is, or copying the code."""
    run_dir = tmp_path / "run"
    arguments = flags(tiny_data, run_dir)
    job = cluster.train(tmp_path / "log", arguments, "--partition=cancel", "--exclusive")
    job.wait_for(lambda: bool(job.processes()), "its first process")
    preempt(cluster, tmp_path / "preemptor")
    assert job.wait() == "COMPLETED", job.text()
    assert len(job.lines(CANCELLED)) == 1 and status(run_dir)["step"] == STEPS, job.text()


def test_one_task_of_a_grid_is_cancelled_and_comes_back_alone(
    cluster: Cluster, tiny_data: Path, tmp_path: Path
) -> None:
    """Jobs of launch/submit.py; in the end `stop` leaves nothing in the queue."""
    base = tmp_path / "grid"
    words: tuple[str, ...] = (
        "--nodes",
        "1",
        "--gpus-per-node",
        "2",
        "--cpus-per-gpu",
        "1",
        "--time",
        "30",
        "--grid",
        "seed=1,2",
    )
    words += ("--partition", "cancel", "--sbatch", "exclusive")
    other, task = jobs_in(cluster, submit(cluster, *words, arguments=flags(tiny_data, base, *ENDLESS)))
    left_alone, run_dir = base / "seed=1", base / "seed=2"
    task.wait_for(lambda: min(steps_saved(left_alone), steps_saved(run_dir)) >= 10, "checkpoints of both")
    preempt(cluster, tmp_path / "preemptor", task.nodes())
    task.wait_for(lambda: attempt(run_dir) == 2, "the second start")
    first_end = status(run_dir)["step"]
    task.wait_for(lambda: steps_saved(run_dir) >= first_end + 10, "a checkpoint of the second start")
    stopped = cluster.run("python", "launch/submit.py", "stop", str(base))
    assert stopped.returncode == 0 and stopped.stdout.count(" stopped ") == 2, stopped.stderr
    assert (other.wait(), task.wait()) == ("COMPLETED", "COMPLETED"), task.text()
    assert (len(other.lines("back to the queue")), len(task.lines(CANCELLED))) == (0, 1), task.text()
    assert (status(left_alone)["attempt"], status(run_dir)["attempt"]) == (1, 2)
    flags_of_task = ("--seed", "2", "--train.steps", str(status(run_dir)["step"]))
    uninterrupted = train_plainly(2, tiny_data, tmp_path / "plain", *flags_of_task)
    assert_same_curve(run_dir, uninterrupted)
    assert_same_tensors(final_tensors(run_dir), final_tensors(uninterrupted))
