"""sbatch slurm/gpt2_small.sh on a real Slurm: to the end, preempted, cancelled, and killed twice."""

import os
import signal
import time
from pathlib import Path

import pytest

from model.checkpoint import list_checkpoints, step_of
from tests.cluster.slurm import Cluster, Job, broken
from tests.cluster.tiny import STEPS, assert_close_losses, assert_same_curve, flags, train_plainly
from tests.helpers.runs import assert_same_tensors, final_tensors, rows, status


@pytest.fixture(scope="module")
def plain(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Run directories of one process and of two, without Slurm."""
    folder = tmp_path_factory.mktemp("plain")
    return {world: train_plainly(world, tiny_data, folder / str(world)) for world in (1, 2)}


def steps_saved(run_dir: Path) -> int:
    return max((step_of(path) for path in list_checkpoints(run_dir)), default=0)


def attempt(run_dir: Path) -> int:
    return int(status(run_dir)["attempt"]) if (run_dir / "status.json").exists() else 0


def test_two_nodes_train_the_run_that_one_process_does(
    cluster: Cluster, tiny_data: Path, tmp_path: Path, plain: dict[int, Path]
) -> None:
    run_dir = tmp_path / "run"
    job = cluster.train(tmp_path / "log", flags(tiny_data, run_dir))
    assert job.wait() == "COMPLETED", job.text()
    assert status(run_dir) == {"state": "done", "step": STEPS, "reason": None, "attempt": 1}
    assert len(job.lines(f"ends: done at step {STEPS}")) == 1
    assert_same_curve(run_dir, plain[2])
    assert_same_tensors(final_tensors(run_dir), final_tensors(plain[2]))
    assert_close_losses(run_dir, plain[1])


def test_a_preempted_job_comes_back_and_trains_what_an_uninterrupted_run_trains(
    cluster: Cluster, tiny_data: Path, tmp_path: Path
) -> None:
    """The checkout is broken once the job has started. A STOP file ends the run, whatever the speed of the machine.

    Then the same number of steps is trained without a preemption.
    """
    run_dir = tmp_path / "run"
    arguments = flags(tiny_data, run_dir, "--train.steps", "100000", "--track.wandb", "offline")
    job = cluster.train(tmp_path / "log", arguments, "--partition=low", "--exclusive")
    job.wait_for(lambda: steps_saved(run_dir) >= 10, "a checkpoint")
    with broken(cluster.checkout):
        everywhere = ("--partition=high", f"--nodes={len(cluster.nodes)}", "--exclusive", "--wrap", "sleep 1")
        preemptor = cluster.sbatch(tmp_path / "preemptor", *everywhere)
        assert preemptor.wait() == "COMPLETED"
        job.wait_for(lambda: attempt(run_dir) == 2, "the second start")
        first_end = status(run_dir)["step"]
        saved = (run_dir / "checkpoints" / f"step_{first_end:08d}").stat().st_ctime  # when the folder was renamed
        job.wait_for(lambda: rows(run_dir)[-1]["step"] > first_end, "a step of the second start")
        continued = time.time()
        job.wait_for(lambda: steps_saved(run_dir) >= first_end + 10, "a checkpoint of the second start")
    (run_dir / "STOP").touch()
    assert job.wait() == "COMPLETED", job.text()

    assert len(job.lines(f"back to the queue: stopped by SIGUSR1 at step {first_end}")) == 1, job.text()
    last = status(run_dir)["step"]
    assert status(run_dir) == {"state": "stopped", "step": last, "reason": "STOP file", "attempt": 2}
    assert len(job.lines(f"ends: stopped at step {last} as a person asked (STOP file)")) == 1, job.text()
    print(f"from the signal to the checkpoint {saved - job.time_of('SIGUSR1: asking'):.1f} s")
    print(f"from the requeue to the next step {continued - job.time_of('back to the queue'):.1f} s")
    tracked = [path.name.rpartition("-")[2] for path in (run_dir / "wandb").glob("offline-run-*")]
    assert len(tracked) == 2 and len(set(tracked)) == 1, "two attempts, one W&B run"
    assert f"wandb sync --id {tracked[0]}" in job.text()

    uninterrupted = train_plainly(2, tiny_data, tmp_path / "plain", "--train.steps", str(last))
    assert_same_curve(run_dir, uninterrupted)
    assert_same_tensors(final_tensors(run_dir), final_tensors(uninterrupted))


def test_a_second_job_is_refused_and_a_cancelled_job_saves_and_stays_cancelled(
    cluster: Cluster, tiny_data: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    arguments = flags(tiny_data, run_dir, "--train.steps", "100000")
    job = cluster.train(tmp_path / "log", arguments)
    job.wait_for(lambda: steps_saved(run_dir) >= 10, "a checkpoint")

    second = cluster.train(tmp_path / "second", arguments)
    assert second.wait() == "FAILED"
    assert (
        second.text() == f"slurm: {run_dir}: job {job.id} is training here; wait for it, or choose another --run-dir\n"
    )

    before = steps_saved(run_dir)
    cluster.run("scancel", str(job.id))
    assert job.wait() == "CANCELLED"
    job.wait_for(lambda: not job.processes(), "the end of its processes")
    ended = status(run_dir)
    assert (ended["state"], ended["attempt"]) == ("stopped", 1), job.text()
    assert ended["step"] == steps_saved(run_dir) >= before
    assert ended["step"] == rows(run_dir)[-1]["step"], "the last step that was done is saved"
    time.sleep(2)
    assert job.state() == "CANCELLED" and not job.lines("back to the queue"), job.text()


def kill_a_rank(job: Job, restart: int) -> None:
    job.wait_for(lambda: 1 in job.ranks(restart), f"rank 1 of start {restart}")
    os.kill(job.ranks(restart)[1], signal.SIGKILL)


def test_a_crash_after_a_checkpoint_comes_back_and_one_before_the_next_ends_the_job(
    cluster: Cluster, tiny_data: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = cluster.train(tmp_path / "log", flags(tiny_data, run_dir, "--train.steps", "100000"))
    job.wait_for(lambda: steps_saved(run_dir) >= 10, "a checkpoint")
    kill_a_rank(job, restart=0)
    job.wait_for(lambda: attempt(run_dir) == 2, "the second start")
    kill_a_rank(job, restart=1)
    assert job.wait() == "FAILED", job.text()
    assert len(job.lines("its checkpoints moved on from step 0 to ")) == 1, job.text()
    assert len(job.lines("ends: no new checkpoint since step ")) == 1, job.text()


def test_two_jobs_train_at_once_on_one_node(
    cluster: Cluster, tiny_data: Path, tmp_path: Path, plain: dict[int, Path]
) -> None:
    shape = ("--nodes=1", f"--nodelist={cluster.nodes[0]}", "--gres=gpu:2", "--cpus-per-task=4")
    runs = [tmp_path / name for name in ("one", "other")]
    jobs = [
        cluster.train(run_dir.with_suffix(".log"), flags(tiny_data, run_dir, "--train.steps", "20"), *shape)
        for run_dir in runs
    ]
    jobs[0].wait_for(lambda: all(len(job.ranks()) == 2 for job in jobs), "both at work")
    for job, run_dir in zip(jobs, runs, strict=True):
        assert job.wait() == "COMPLETED", job.text()
        assert status(run_dir)["state"] == "done"
        assert_same_curve(run_dir, plain[2])
