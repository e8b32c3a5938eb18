"""Every script through sbatch, the messages for wrong input, and FineWeb's array with the job after it."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from data_prep import fineweb
from tests.cluster.slurm import SCRIPT, Cluster, Job, script
from tests.cluster.tiny import flags
from tests.helpers.data_dirs import contents
from tests.helpers.pages import make_pages, write_pages
from tests.helpers.runs import ROOT, called

JOBS = sorted(path.name for path in (ROOT / "slurm").glob("*.sh") if path.name not in ("body.sh", "site.sh"))


def test_shellcheck_reports_nothing() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck; apt-get install -y shellcheck")
    scripts = [*(ROOT / "slurm" / name for name in [*JOBS, "body.sh"]), SCRIPT, ROOT / ".ci" / "run"]
    done = subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", JOBS)
def test_sbatch_takes_every_script_as_it_is(cluster: Cluster, name: str) -> None:
    done = cluster.run("sbatch", "--test-only", f"slurm/{name}")
    assert done.returncode == 0 and "to start at" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("flag", "line"),
    [
        ("--partition=gone", "invalid partition specified: gone"),
        ("--gres=gpu:9", "Requested node configuration is not available"),
    ],
)
def test_slurm_refuses_jobs_that_it_cannot_run(cluster: Cluster, flag: str, line: str) -> None:
    done = cluster.run("sbatch", flag, "slurm/gpt2_small.sh")
    assert done.returncode != 0 and line in done.stderr, done.stderr


def test_a_job_submitted_from_elsewhere_says_so(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.sbatch(tmp_path / "log", str(ROOT / "slurm" / "gpt2_small.sh"), cwd=tmp_path)
    assert job.wait() == "FAILED"
    line = f"slurm: {tmp_path}/slurm/body.sh is not there: submit from the root of the checkout\n"
    assert job.text() == line


def test_wrong_flags_are_reported_in_one_line_and_the_job_ends(cluster: Cluster, tmp_path: Path) -> None:
    """Rank 0 prints the line, above the messages of torchrun and srun."""
    wrong = ["--optim.lr-peek", "1e-3", "--run-dir", str(tmp_path / "run")]
    job = cluster.train(tmp_path / "log", wrong, "--nodes=1")
    assert job.wait() == "FAILED"
    assert len(job.lines("train: unknown '--optim.lr-peek' (did you mean --optim.lr-peak?)")) == 1, job.text()
    assert len(job.lines("ends: training did not begin; the first error above says why")) == 1, job.text()


@contextmanager
def hidden(cluster: Cluster, node: int, folder: Path) -> Iterator[None]:
    """Make the folder empty on one node, as if it were not shared."""
    assert script(cluster.folder, "exec", str(node), "mount", "-t", "tmpfs", "tmpfs", str(folder)).returncode == 0
    try:
        yield
    finally:
        assert script(cluster.folder, "exec", str(node), "umount", str(folder)).returncode == 0


def test_a_node_without_the_checkout_is_named(cluster: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    nodes = f"--nodelist={cluster.nodes[0]},{cluster.nodes[1]}"
    with hidden(cluster, 2, cluster.checkout):
        job = cluster.train(tmp_path / "log", flags(tiny_data, tmp_path / "run"), nodes)
        assert job.wait() == "FAILED"
    lines = job.lines(f"slurm: {cluster.checkout}/train/main.py is not there on {cluster.nodes[1]}: submit from")
    assert len(lines) == 1, job.text()
    assert len(job.lines("ends: training did not begin")) == 1, job.text()


def test_preflight_sees_whether_nodes_share_the_run_directory(cluster: Cluster, tmp_path: Path) -> None:
    run_dir, nodes = tmp_path / "run", cluster.nodes[:2]
    shape = ("--nodes=2", "--ntasks=2", "--gpus-per-node=1", "--cpus-per-task=1", f"--nodelist={','.join(nodes)}")
    command = ("env", "CUDA_VISIBLE_DEVICES=", "python", "train/preflight.py", "--run-dir", str(run_dir))
    fit = cluster.run("srun", *shape, *command)
    assert fit.returncode == 0 and fit.stdout.endswith("preflight: fit to train\n"), fit.stderr
    assert [line.split()[0] for line in fit.stdout.splitlines()[1:3]] == nodes
    assert list(tmp_path.iterdir()) == []
    run_dir.mkdir()
    with hidden(cluster, 2, run_dir):
        unfit = cluster.run("srun", *shape, *command)
    assert unfit.returncode == 2, unfit.stdout
    assert f"{run_dir} is not shared, {nodes[0]} does not see what {nodes[1]} writes, " in unfit.stderr
    assert list(run_dir.iterdir()) == []


def test_fineweb_by_an_array_makes_what_one_process_makes(cluster: Cluster, tmp_path: Path) -> None:
    for number in range(4):
        write_pages(tmp_path / "pages" / f"{number:03d}_00000.parquet", make_pages(60, number))
    arguments = ["--source", "local", "--data-files", str(tmp_path / "pages"), "--tokenizer", "byte"]
    arguments += ["--shard-tokens", "20000", "--val-tokens", "5000"]
    first = cluster.sbatch(
        tmp_path / "tokenize_%a.log",
        *("--array=0-1", "--cpus-per-task=1", "slurm/prep_fineweb.sh", *arguments, "--out", str(tmp_path / "data")),
    )
    logs = [tmp_path / f"tokenize_{task}.log" for task in range(2)]
    first.wait_for(lambda: cluster.run("squeue", "-h", "-r", "-j", str(first.id)).stdout == "", "the array's end")
    assert all("of 2: 2 parts" in log.read_text() for log in logs), [log.read_text() for log in logs]
    submitted = [line for line in logs[0].read_text().splitlines() if line.startswith("Submitted batch job")]
    assert len(submitted) == 1 and "Submitted" not in logs[1].read_text()
    pack = Job(cluster, int(submitted[0].split()[-1]), cluster.checkout / f"pack-fineweb-{first.id}.log")
    assert pack.wait() == "COMPLETED", pack.text()
    assert "sound" in pack.text()
    assert called(fineweb.main, *arguments, "--out", str(tmp_path / "alone"), "--workers", "1").returncode == 0
    assert contents(tmp_path / "data") == contents(tmp_path / "alone")
