"""The ways in which sites ask for GPUs: every task of the job sees those of its node, and the cores of its share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.slurm import SITE, Cluster, Job
from tests.cluster.test_submit import jobs_in, submit
from tests.cluster.tiny import flags
from tests.helpers.runs import status

# Each task prints what Slurm gives it and what it is to run, and ends.
TELLING = """container=(bash -c 'echo "GPUs $SLURM_STEP_GPUS, cores $SLURM_CPUS_PER_TASK: $*"; sleep 1; exit 1' -)\n"""
ASKING = [
    ("--gres=gpu:2",),
    ("--gres=gpu:2", "--exclusive"),
    ("--gres=none", "--gpus-per-node=2"),
    ("--gres=none", "--gpus-per-task=2"),
    ("--gres=none", "--gpus-per-task=1", "--ntasks-per-node=2", "--cpus-per-task=1"),
    ("--gres=none", "--gpus=2", "--nodes=1"),
]
REFUSED = {
    ("--gpus-per-node=2",): "slurm: the job asks for 2 and for 8 GPUs of each node: give sbatch --gres=gpu:N",
    ("--gres=none",): "slurm: the job has no GPUs: ask for them by sbatch --gres=gpu:N",
    ("--gres=none", "--gpus=4"): "slurm: Slurm gives unlike numbers of the 4 GPUs to the 2 nodes",
}


@pytest.fixture
def telling(cluster: Cluster) -> Iterator[Cluster]:
    site = cluster.checkout / "slurm" / "site.sh"
    site.write_text(TELLING)
    yield cluster
    site.write_text(SITE)


def start(cluster: Cluster, folder: Path, asking: tuple[str, ...]) -> Job:
    folder.mkdir()
    shape = ("--nodes=2", "--cpus-per-task=2", *asking)
    return cluster.sbatch(folder / "log", *shape, "slurm/gpt2_small.sh", "--run-dir", str(folder / "run"))


def test_a_job_has_the_gpus_and_cores_that_were_asked_for_in_any_way(telling: Cluster, tmp_path: Path) -> None:
    for number, asking in enumerate(ASKING):
        job = start(telling, tmp_path / str(number), asking)
        assert job.wait() == "FAILED"
        num_nodes = 1 if "--nodes=1" in asking else 2
        assert len(job.lines(f"{num_nodes} x 2 processes on ")) == 1, job.text()
        assert len(job.lines(f"GPUs 0,1, cores 2: torchrun --nnodes={num_nodes} --nproc-per-node=2 ")) == num_nodes


def test_a_job_whose_gpus_cannot_be_shared_out_is_refused_in_one_line(telling: Cluster, tmp_path: Path) -> None:
    for number, (asking, line) in enumerate(REFUSED.items()):
        job = start(telling, tmp_path / str(number), asking)
        assert job.wait() == "FAILED"
        assert job.text().startswith(line) and job.text().count("\n") == 1, job.text()


def test_a_site_that_wants_gpus_per_task_gets_jobs_of_submit(cluster: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    shape = ("--nodes", "1", "--gpus-per-node", "2", "--cpus-per-gpu", "1", "--time", "30")
    more = ("--sbatch", "gpus-per-task=1", "--wait")
    output = submit(cluster, *shape, *more, arguments=flags(tiny_data, tmp_path / "run"))
    (job,) = jobs_in(cluster, output)
    assert job.wait() == "COMPLETED" and len(job.lines("1 x 2 processes on ")) == 1, job.text()
    assert status(tmp_path / "run")["state"] == "done"
