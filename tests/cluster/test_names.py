"""Runs with names that a shell, Slurm or W&B may take for something else, through sbatch and submitit."""

import re
from pathlib import Path

from tests.cluster.slurm import Cluster
from tests.cluster.tiny import flags
from tests.helpers.names import ODD, ODD_FOR_SUBMIT, REFUSED
from tests.helpers.runs import status

SHORT = ("--train.steps", "3", "--track.wandb", "offline")
SHAPE = ("--nodes", "1", "--gpus-per-node", "1", "--cpus-per-gpu", "1", "--time", "30")


def trained(run_dir: Path) -> bool:
    return status(run_dir)["state"] == "done" and len(list((run_dir / "wandb").glob("offline-run-*"))) == 1


def test_any_name_goes_through_sbatch_and_every_script(cluster: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    """The run directory is named from the folder of the submission, and begins like a flag."""
    run_dir = cluster.checkout / "runs" / ODD
    one = ("--nodes=1", "--gres=gpu:1", "--cpus-per-task=1")
    arguments = flags(tiny_data, run_dir, *SHORT, "--sample.prompts", "two\nlines", ODD)
    job = cluster.train(tmp_path / "log", arguments, *one)
    words = ["gpt2-small", "--grid", "seed=7", "--", *arguments]
    sweep = cluster.sbatch(tmp_path / "sweep", *one, "slurm/sweep.sh", *words)
    for each in (job, sweep):
        each.wait_for(lambda each=each: "ends: " in each.text(), "the end")  # type: ignore[misc]
    assert trained(run_dir) and trained(run_dir / "seed=7"), job.text() + sweep.text()
    for name in ("gpt2_small", "prep_fineweb", "sweep"):
        done = cluster.run("sbatch", "--test-only", f"--job-name={ODD_FOR_SUBMIT}", f"slurm/{name}.sh", ODD)
        assert done.returncode == 0 and "to start at" in done.stderr, done.stderr
    assert not list(cluster.checkout.rglob("pwned"))


def test_any_name_goes_through_submitit(cluster: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / ODD_FOR_SUBMIT
    words = ["gpt2-small", *SHAPE, "--wait", "--", *flags(tiny_data, run_dir, *SHORT)]
    done = cluster.run("python", "launch/submit.py", *words)
    assert done.returncode == 0, done.stderr
    assert trained(run_dir)
    (number,) = re.findall(r"^job (\d+)\S* trains ", done.stdout, re.MULTILINE)
    shown = cluster.run("squeue", "-h", "-t", "all", "-j", number, "-o", "%j")
    assert shown.stdout == f"{ODD_FOR_SUBMIT}\n"
    assert len(list((run_dir / "submitit").glob("*_0_log.out"))) == 1
    for command in (["train/curves.py", str(run_dir)], ["launch/submit.py", "status", str(run_dir)]):
        assert cluster.run("python", *command).returncode == 0
    assert not list(cluster.checkout.rglob("pwned")) and not list(tmp_path.rglob("pwned"))


def test_a_name_that_does_not_print_is_one_line_and_makes_nothing(
    cluster: Cluster, tiny_data: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "runs" / REFUSED[0]
    job = cluster.train(tmp_path / "log", flags(tiny_data, run_dir), "--nodes=1")
    assert job.wait() == "FAILED"
    line = f"slurm: --run-dir {str(run_dir)!r}: it has characters that do not print; give a name without them\n"
    assert job.text() == line and not run_dir.parent.exists()
