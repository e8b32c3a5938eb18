"""launch/submit.py as far as it goes without Slurm: what it refuses, its plan, local and debug; status and stop."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import tyro

from common.errors import InputError
from launch import runs, submit
from launch.grid import points_of, split
from launch.local import shares_of_gpus
from launch.options import SubmitOptions, minutes_of
from launch.runs import look, runs_in
from launch.slurm_jobs import refusal, sbatch_flags
from model.checkpoint import list_checkpoints, step_of
from tests.helpers.runs import ROOT, assert_same_tensors, called, curve, final_tensors, losses, status, tiny_flags
from train import main as trainer
from train.config import parse
from train.presets import PRESETS

QUIET = ("--track.wandb", "disabled", "--sample.every", "None")


@pytest.fixture
def no_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A PATH with git and nothing of Slurm."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "git").symlink_to(shutil.which("git") or "")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


def flags(data: Path, run_dir: Path, *more: str) -> list[str]:
    """After the preset."""
    return [*tiny_flags(data, run_dir)[1:], "--train.steps", "12", *QUIET, *more]


PRESET = "shakespeare-char-cpu"
SHOWN = [
    line.strip()
    for name in ("README.md", "docs/cluster.md", "launch/submit.py")
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines()
    if re.match(r"    \S*python launch/submit.py", line)
]


@pytest.mark.parametrize("line", SHOWN)
def test_the_command_lines_that_are_shown_parse(line: str) -> None:
    words, flags = split(shlex.split(line, comments=True)[2:])
    if words[0] in submit.COMMANDS:
        assert len(words) == 2
        return
    options = tyro.cli(SubmitOptions, args=words[1:])
    for point in points_of(words[0], options.grid, flags):
        parse(point.args, PRESETS)


def test_command_lines_are_shown() -> None:
    assert len(SHOWN) >= 13


def refused(*words: str) -> str:
    done = called(submit.main, *words)
    assert (done.returncode, done.stdout) == (2, ""), done
    assert done.stderr.startswith("submit: ") and done.stderr.count("\n") == 1
    return done.stderr[len("submit: ") : -1]


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("90:30", 91), ("12:00:00", 720), ("0:00:01", 1), ("2-0", 2880), ("1-2:30", 1590), ("1-0:0:30", 1441)],
)
def test_times_as_sbatch_reads_them(text: str, minutes: int) -> None:
    assert minutes_of(text) == minutes


@pytest.mark.parametrize("text", ["", "12h", "1:2:3:4", "-5", "1-"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(InputError, match="write minutes, HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS"):
        minutes_of(text)


@pytest.mark.parametrize(
    ("said", "line"),
    [
        (
            "sbatch: error: invalid partition specified: p\nsbatch: error: Batch job submission failed: x",
            "Slurm refuses: invalid partition specified: p (see --partition; `sinfo -s` lists them)",
        ),
        (
            "sbatch: error: Batch job submission failed: Socket timed out",
            "Slurm refuses: Batch job submission failed: ",
        ),
        ("", "Slurm refuses: no reason given"),
    ],
)
def test_what_slurm_says_comes_in_one_line(said: str, line: str) -> None:
    assert refusal(said).startswith(line)


@pytest.mark.usefixtures("no_slurm")
def test_wrong_input_is_one_line_and_nothing_is_written(tiny_data: Path, tmp_path: Path) -> None:
    good = ["--", *flags(tiny_data, tmp_path / "run")]
    local = (PRESET, "--cluster", "local", "--gpus-per-node", "2")
    assert refused(PRESET, *good) == "no Slurm here: no sbatch on PATH; --cluster local trains on this machine"
    assert refused(*local, "--nodes", "2", *good).startswith("--nodes 2 with --cluster local: this machine is one")
    assert refused(*local, "--prep", *good).startswith("--prep with --cluster local: run python data_prep/fineweb.py")
    assert refused(PRESET, "--cluster", "debug", *good).startswith("--gpus-per-node 8 with --cluster debug: it is one")
    assert refused(*local, "--gpus-per-node", "0", *good) == "--gpus-per-node 0: at least 1 is needed"
    assert (
        refused(*local, "--grid", "seed=1,2", "--max-parallel", "0", *good) == "--max-parallel 0: at least 1 is needed"
    )
    assert refused(*local, "--grid", "data.dir=a/b,a_b", *good).endswith("make them differ in more than / and _")
    assert refused(*local, "--only-failed", *good) == "--only-failed and --max-parallel are for a --grid"
    assert refused(*local, "--time", "soon", *good).startswith("--time soon: write minutes")
    assert refused(*local, "--gpus-per-node", "5", *good).startswith("--train.batch-tokens 384")
    assert refused(*local, *good, "--optim.lr-peek", "1").startswith("unknown '--optim.lr-peek' (did you mean")
    assert refused("gpt2", *local[1:], *good).startswith("no preset 'gpt2'")
    assert refused(*local, *good, "--data.dir", str(tmp_path / "gone")).startswith(f"{tmp_path}/gone: no manifest.json")
    assert refused(*local, "--grid", "seed", *good).startswith("--grid seed: write FLAG=VALUE,VALUE")
    assert refused("status") == "status: which? give run directories, or a sweep's folder"
    assert refused("stop", str(tmp_path)).startswith(f"{tmp_path}: no run here, and no folder with runs")
    assert not (tmp_path / "run").exists()


def test_sbatch_flags_that_have_one_of_ours_are_refused() -> None:
    assert sbatch_flags(("qos=high", "--exclude=n1,n2", "exclusive")) == {
        **{"qos": "high", "exclude": "n1,n2", "exclusive": True}
    }
    for flag, ours in (
        ("cpus-per-task=16", "--cpus-per-gpu"),
        ("cpus_per_task=16", "--cpus-per-gpu"),
        ("nodes=2", "--nodes"),
        ("array=0-3", "--grid"),
    ):
        with pytest.raises(InputError, match=f"--sbatch {flag}: use {ours}"):
            sbatch_flags((flag,))


def test_runs_at_a_time_do_not_share_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shares_of_gpus(2, 3) == [(), (), ()], "on a CPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert shares_of_gpus(2, 2) == [(0, 1), (2, 3)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    assert shares_of_gpus(1, 3) == [(4,), (5,), (7,)]
    with pytest.raises(InputError, match=r"2 runs at a time with --gpus-per-node 2 need 4 GPUs; there are 3; use a sm"):
        shares_of_gpus(2, 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1234")
    with pytest.raises(InputError, match=r"CUDA_VISIBLE_DEVICES=GPU-1234: --cluster local needs GPUs by number"):
        shares_of_gpus(1, 1)


@pytest.mark.usefixtures("no_slurm")
def test_a_dry_run_names_the_runs_and_writes_nothing(tiny_data: Path, tmp_path: Path) -> None:
    words = ("--cluster", "local", "--gpus-per-node", "2", "--dry-run", "--grid", "seed=1,2", "--")
    done = called(submit.main, PRESET, *words, *flags(tiny_data, tmp_path / "grid"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == [f"would train {tmp_path}/grid/seed={seed}" for seed in (1, 2)]
    assert "2 processes" in done.stdout
    assert not (tmp_path / "grid" / "seed=1").exists() and not (tmp_path / "grid" / "code").exists()


def test_what_each_run_does_is_seen_from_outside(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is done, one that was killed, one that was only submitted, one that waits; and no question to Slurm
    where no job was ever submitted."""
    done, killed, submitted = (tmp_path / "sweep" / name for name in ("done", "killed", "submitted"))
    assert called(trainer.main, PRESET, *flags(tiny_data, done)).returncode == 0
    shutil.copytree(done, killed)
    (killed / "status.json").write_text(json.dumps(status(done) | {"state": "running", "step": 10}))
    monkeypatch.setattr(runs, "ask_slurm", lambda *_: pytest.fail("asked"))
    assert [(run.doing, run.step) for run in look([done, killed])] == [("done", 12), ("killed", 10)]

    submitted.mkdir()
    (submitted / "submitted.json").write_text(json.dumps({"job": "12_0", "args": []}))
    monkeypatch.setattr(runs, "queued_jobs", lambda jobs: {"12_0": "PENDING"})
    assert [run.doing for run in look(runs_in(tmp_path / "sweep"))] == ["done", "killed", "queued"]
    lines = called(submit.main, "status", str(tmp_path / "sweep")).stdout.splitlines()
    assert lines[0].split() == ["run", "step", "of", "loss", "val", "loss", "job"]
    assert lines[1].split()[:5] == [str(done), "done", "12", "12", f"{losses(done)[-1].item():.4f}"]
    assert lines[3].split() == [str(submitted), "queued", "0", "-", "-", "-", "12_0"]
    monkeypatch.setattr(runs, "queued_jobs", lambda jobs: {"12_0": "RUNNING"})
    assert look([submitted])[0].doing == "running"
    monkeypatch.setattr(runs, "queued_jobs", lambda jobs: {})
    assert look([submitted])[0].doing == "new"

    # In a person's shell that is a job, and goes on when a run has ended.
    provenance = json.loads((done / "provenance.json").read_text()) | {"job": "77"}
    for run_dir in (done, killed):
        (run_dir / "provenance.json").write_text(json.dumps(provenance))
    (killed / "status.json").write_text(json.dumps(status(done) | {"state": "failed"}))
    monkeypatch.setattr(runs, "queued_jobs", lambda jobs: dict.fromkeys(jobs, "RUNNING"))
    assert [run.doing for run in look([done, killed])] == ["done", "failed"]


@pytest.mark.long(reason="a living run of its own; test_stops.py has STOP files in `make test`")
def test_stop_asks_a_living_run_and_waits_for_its_checkpoint(tiny_data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = [
        "train/main.py",
        PRESET,
        *flags(tiny_data, run_dir, "--train.steps", "1000000", "--optim.schedule", "constant"),
    ]
    with subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        while not ((run_dir / "metrics.jsonl").exists() and '"loss"' in (run_dir / "metrics.jsonl").read_text()):
            assert process.poll() is None
            time.sleep(0.05)
        assert look([run_dir])[0].doing == "running"
        done = called(submit.main, "stop", str(run_dir))
        assert process.wait(timeout=60) == 0
    found = status(run_dir)
    assert (found["state"], found["reason"]) == ("stopped", "STOP file") and found["step"] > 0
    assert (
        done.stdout.splitlines()[0] == f"{run_dir}: asked to save and stop (pid {process.pid} on {os.uname().nodename})"
    )
    assert done.stdout.splitlines()[-1].split()[:3] == [str(run_dir), "stopped", str(found["step"])]
    assert not (run_dir / "STOP").exists()
    assert called(submit.main, "stop", str(run_dir)).returncode == 0, "of one that has ended there is nothing to ask"
    assert not (run_dir / "STOP").exists()


def submitted(words: list[str]) -> "subprocess.CompletedProcess[str]":
    """In a process of its own: submitit leaves files open."""
    command = [sys.executable, "launch/submit.py", *words]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_local_trains_a_grid_two_at_a_time(tiny_data: Path, tmp_path: Path) -> None:
    base = tmp_path / "grid"
    words = [PRESET, "--cluster", "local", "--gpus-per-node", "2", "--grid", "seed=1,2,3", "--max-parallel", "2", "--"]
    words += flags(tiny_data, base)
    done = submitted(words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" done ") == 3
    for seed in (1, 2, 3):
        plain = tmp_path / str(seed)
        assert called(trainer.main, PRESET, *flags(tiny_data, plain, "--seed", str(seed))).returncode == 0
        assert curve(base / f"seed={seed}") == curve(plain)
        assert_same_tensors(final_tensors(base / f"seed={seed}"), final_tensors(plain))
        provenance = json.loads((base / f"seed={seed}" / "provenance.json").read_text())
        assert f"train/main.py {PRESET} --track.group grid --data.dir" in provenance["command"]
        assert provenance["world"] == 2 and provenance["code"].startswith(f"{base}/code/")
    assert len(list((base / "submitit").glob("*_result.pkl"))) == 6, "of each rank of each run"


@pytest.mark.slow
def test_ctrl_c_saves_the_local_runs_and_begins_no_more(tiny_data: Path, tmp_path: Path) -> None:
    """To the whole group, as a terminal does; then a stop by command, and at the time limit it comes back."""
    base = tmp_path / "grid"
    words = [PRESET, "--cluster", "local", "--gpus-per-node", "2", "--grid", "seed=1,2", "--time", "1", "--"]
    words += flags(tiny_data, base, "--train.steps", "1000000", "--optim.schedule", "constant")
    first, second = base / "seed=1", base / "seed=2"

    def started() -> "subprocess.Popen[str]":
        command = [sys.executable, "launch/submit.py", *words]
        return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, start_new_session=True)

    def wait_for(condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 120
        while not condition():
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.1)

    with started() as process:
        wait_for(lambda: bool(list_checkpoints(first)))
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=60) == 130
    assert status(first)["state"] == "stopped" and step_of(list_checkpoints(first)[-1]) == status(first)["step"]
    assert not (second / "status.json").exists()

    with started() as process:
        wait_for(lambda: status(first)["attempt"] == 3)
        assert "SIGUSR1" in (first / "log.txt").read_text()
        wait_for(lambda: look([first])[0].holder is not None)
        assert called(submit.main, "stop", str(first)).returncode == 0
        said = process.communicate(timeout=60)[0]
    assert process.returncode == 1, "the second has not begun"
    assert [line.split()[1] for line in said.splitlines() if line.startswith(f"{base}/seed")] == ["stopped", "new"]
    whole = tmp_path / "whole"
    steps = str(status(first)["step"])
    more = ("--train.steps", steps, "--optim.schedule", "constant", "--seed", "1")
    assert called(trainer.main, PRESET, *flags(tiny_data, whole, *more)).returncode == 0
    assert curve(first) == curve(whole)


@pytest.mark.slow
def test_debug_trains_in_this_very_process(tiny_data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    done = submitted([PRESET, "--cluster", "debug", "--gpus-per-node", "1", "--", *flags(tiny_data, run_dir)])
    assert done.returncode == 0, done.stderr
    assert status(run_dir)["state"] == "done" and not (run_dir / "code").exists()
    assert json.loads((run_dir / "provenance.json").read_text())["code"] == str(ROOT)
