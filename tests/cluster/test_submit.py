"""python launch/submit.py on a real Slurm: preempted while the checkout is edited, grids, FineWeb first, refusals."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest

from launch.sweeps import RUNGS
from model.checkpoint import list_checkpoints, step_of
from tests.cluster.slurm import Cluster, Job, broken
from tests.cluster.tiny import STEPS, assert_same_curve, flags, train_plainly
from tests.helpers.pages import make_pages, write_pages
from tests.helpers.runs import assert_same_tensors, final_tensors, rows, status

SHAPE = ("--nodes", "2", "--gpus-per-node", "1", "--cpus-per-gpu", "2", "--time", "30")


def submit(cluster: Cluster, *words: str, arguments: Sequence[str], exit_status: int = 0) -> str:
    """Run launch/submit.py with `words` before -- and `arguments` after it; return what it prints."""
    done = cluster.run("python", "launch/submit.py", "gpt2-small", *words, "--", *arguments)
    assert done.returncode == exit_status, done.stderr
    return done.stdout


def jobs_in(cluster: Cluster, output: str) -> list[Job]:
    jobs = re.findall(r"^job (\S+) trains \S+; log (\S+)$", output, re.MULTILINE)
    return [Job(cluster, job, Path(log)) for job, log in jobs]


def refused(cluster: Cluster, *words: str) -> str:
    done = cluster.run("python", "launch/submit.py", *words)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
    return done.stderr.rstrip()


def steps_saved(run_dir: Path) -> int:
    return max((step_of(path) for path in list_checkpoints(run_dir)), default=0)


def test_the_submitted_code_runs_and_preemption_changes_nothing(
    cluster: Cluster, tiny_data: Path, tmp_path: Path
) -> None:
    """The job is held in the queue while the checkout is edited, then started, preempted and stopped by `stop`."""
    run_dir = tmp_path / "run"
    arguments = flags(tiny_data, run_dir, "--train.steps", "100000", "--track.wandb", "offline")
    more = ("--partition", "low", "--sbatch", "exclusive", "hold")
    (job,) = jobs_in(cluster, submit(cluster, *SHAPE, *more, arguments=arguments))
    with broken(cluster.checkout, "slurm/body.sh", "launch/task.py"):
        assert cluster.run("scontrol", "release", str(job.id)).returncode == 0
        job.wait_for(lambda: steps_saved(run_dir) >= 10, "a checkpoint")
        everywhere = ("--partition=high", f"--nodes={len(cluster.nodes)}", "--exclusive", "--wrap", "sleep 1")
        assert cluster.sbatch(tmp_path / "preemptor", *everywhere).wait() == "COMPLETED"
        job.wait_for(lambda: status(run_dir)["attempt"] == 2, "the second start")
        first_end = status(run_dir)["step"]
        job.wait_for(lambda: steps_saved(run_dir) >= first_end + 10, "a checkpoint of the second start")
    stopped = cluster.run("python", "launch/submit.py", "stop", str(run_dir))
    assert stopped.returncode == 0 and "asked to save and stop" in stopped.stdout, stopped.stderr
    assert job.wait() == "COMPLETED", job.text()

    assert len(job.lines(f"back to the queue: stopped by SIGUSR1 at step {first_end}")) == 1, job.text()
    last = status(run_dir)["step"]
    assert status(run_dir) == {"state": "stopped", "step": last, "reason": "STOP file", "attempt": 2}
    tracked = [path.name.rpartition("-")[2] for path in (run_dir / "wandb").glob("offline-run-*")]
    assert len(tracked) == 2 and len(set(tracked)) == 1, "two attempts, one W&B run"
    assert not list((run_dir / "submitit").glob("*_result.pkl")), "no success of a run that is not done"
    uninterrupted = train_plainly(2, tiny_data, tmp_path / "plain", "--train.steps", str(last))
    assert_same_curve(run_dir, uninterrupted)
    assert_same_tensors(final_tensors(run_dir), final_tensors(uninterrupted))


@pytest.mark.slow
def test_an_array_of_four_with_a_point_that_fails(cluster: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    """Three runs are done. Then the failed one is trained alone, and then nothing."""
    base = tmp_path / "grid"
    arguments = flags(tiny_data, base)
    grid = ("--grid", "seed=1,2,3,4", "--max-parallel", "2", "--wait", *SHAPE)
    failing = base / "seed=3"
    (failing / "checkpoints").mkdir(parents=True)
    (failing / "checkpoints").chmod(0o500)
    (failing / "metrics.jsonl").mkdir()  # root writes everywhere, but not into this
    output = submit(cluster, *grid, arguments=arguments, exit_status=1)
    assert len(jobs_in(cluster, output)) == 4
    states = {line.split()[0]: line.split()[1] for line in output.splitlines() if line.startswith(f"{base}/seed")}
    assert states == {str(base / f"seed={seed}"): "failed" if seed == 3 else "done" for seed in (1, 2, 3, 4)}, output
    for seed in (1, 2, 4):
        assert_same_curve(base / f"seed={seed}", train_plainly(2, tiny_data, tmp_path / str(seed), "--seed", str(seed)))
    assert len({path.name for path in (base / "code").iterdir()}) == 1, "one copy of the code for all"

    (failing / "metrics.jsonl").rmdir()
    output = submit(cluster, *grid, "--only-failed", arguments=arguments)
    assert [line.split()[3].rstrip(";") for line in output.splitlines() if line.startswith("job ")] == [str(failing)]
    assert status(failing)["state"] == "done"
    again = submit(cluster, *grid, arguments=arguments)
    assert not jobs_in(cluster, again) and again.count(" done ") == 4
    shown = cluster.run("python", "launch/submit.py", "status", str(base))
    assert shown.stdout == again


@pytest.mark.slow
def test_a_sweep_by_sbatch_trains_each_run_in_a_task(cluster: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    base = tmp_path / "sweep"
    shape = ("--array=0-1%1", "--nodes=1", "--gres=gpu:2", "--cpus-per-task=2")
    words = ["gpt2-small", "--grid", "seed=5,6", "--", *flags(tiny_data, base, "--train.steps", "10")]
    first = cluster.sbatch(tmp_path / "log_%a", *shape, "slurm/sweep.sh", *words)
    first.wait_for(lambda: cluster.run("squeue", "-h", "-r", "-j", str(first.id)).stdout == "", "the array's end")
    for task, seed in enumerate((5, 6)):
        log = (tmp_path / f"log_{task}").read_text()
        assert f"[job {first.id}_{task}.0" in log and "ends: done at step 10" in log, log
        assert status(base / f"seed={seed}")["state"] == "done"


@pytest.mark.slow
def test_an_experiment_is_an_array_of_jobs_and_ends_with_its_table(
    cluster: Cluster, tiny_data: Path, tmp_path: Path
) -> None:
    base = tmp_path / "ladder"
    common = flags(tiny_data, Path("unused"))
    for flag in ("--run-dir", "--optim.lr-peak", "--sample.every"):  # which the sweep sets
        while flag in common:
            del common[common.index(flag) : common.index(flag) + 2]
    words = ["ladder", "--cluster", "slurm", *SHAPE, "--wait", "--run-dir", str(base), *common]
    done = cluster.run("python", "launch/sweep.py", *words)
    assert done.returncode == 0, done.stderr
    jobs = jobs_in(cluster, done.stdout)
    assert len({str(job.id).partition("_")[0] for job in jobs}) == 1 and len(jobs) == len(RUNGS), done.stdout
    assert [status(base / kind)["state"] for kind in RUNGS] == ["done"] * len(RUNGS)
    table = (base / "sweep.md").read_text()
    assert [line.split()[1] for line in table.splitlines()[2:]] == list(RUNGS) and table in done.stdout
    again = cluster.run("python", "launch/sweep.py", *words)
    assert again.returncode == 0 and not jobs_in(cluster, again.stdout) and table in again.stdout


@pytest.mark.slow
def test_one_command_from_pages_to_a_model(cluster: Cluster, tmp_path: Path) -> None:
    for number in range(2):
        write_pages(tmp_path / "pages" / f"{number:03d}_00000.parquet", make_pages(60, number))
    prep = ["--source", "local", "--data-files", str(tmp_path / "pages"), "--tokenizer", "byte"]
    prep += ["--shard-tokens", "20000", "--val-tokens", "5000"]
    run_dir = tmp_path / "run"
    words = ["--prep", "--prep-tasks", "2", "--prep-sbatch", "cpus-per-task=1", f"--prep-flags={shlex.join(prep)}"]
    words.append("--wait")
    output = submit(cluster, *SHAPE, *words, arguments=flags(tmp_path / "data", run_dir))
    assert status(run_dir) == {"state": "done", "step": STEPS, "reason": None, "attempt": 1}, output
    assert rows(run_dir)[-1]["val_loss"] < 5.0
    again = cluster.run(
        "python", "launch/submit.py", "gpt2-small", *SHAPE, *words, "--", *flags(tmp_path / "data", run_dir)
    )
    assert again.returncode == 0 and "job " not in again.stdout.split("\n", 1)[1], "done, so nothing is submitted"


def test_wrong_input_is_one_line(cluster: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    good = ["--", *flags(tiny_data, run_dir)]
    line = refused(cluster, "gpt2-small", *SHAPE, "--partition", "gone", *good)
    assert line == "submit: Slurm refuses: invalid partition specified: gone (see --partition; `sinfo -s` lists them)"
    line = refused(cluster, "gpt2-small", *SHAPE, "--gpus-per-node", "12", *good, "--train.batch-tokens", "3072")
    assert "node configuration is not available (see --gpus-per-node" in line
    assert not (run_dir / "submitted.json").exists()

    (job,) = jobs_in(cluster, submit(cluster, *SHAPE, "--sbatch", "hold", arguments=good[1:]))
    line = refused(cluster, "gpt2-small", *SHAPE, *good)
    assert line.startswith(f"submit: {run_dir}: job {job.id} waits in the queue; stop it first (launch/submit.py stop)")
    stopped = cluster.run("python", "launch/submit.py", "stop", str(run_dir))
    assert stopped.returncode == 0 and stopped.stdout.splitlines()[-1].split()[1] == "new", stopped
    assert job.wait() == "CANCELLED"
