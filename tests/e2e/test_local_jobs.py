"""launch/submit.py --cluster local and debug, and its command stop, with real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import submit
from launch.runs import inspect_runs
from model.checkpoint import list_checkpoints, step_of
from tests.helpers.runs import ROOT, assert_same_tensors, called, curve, final_tensors, status, tiny_flags
from train import main as trainer

PRESET = "shakespeare-char-cpu"


def flags(data: Path, run_dir: Path, *more: str) -> list[str]:
    """Return the flags of a tiny run, which follow the preset."""
    quiet = ("--track.wandb", "disabled", "--sample.every", "None")
    return [*tiny_flags(data, run_dir)[1:], "--train.steps", "12", *quiet, *more]


ENDLESS = ("--train.steps", "1000000", "--optim.schedule", "constant")


@pytest.mark.long(reason="a living run of its own; test_stops.py has STOP files in `make test`")
def test_stop_asks_a_living_run_and_waits_for_its_checkpoint(tiny_data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = [sys.executable, "train/main.py", PRESET, *flags(tiny_data, run_dir, *ENDLESS)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        while not ((run_dir / "metrics.jsonl").exists() and '"loss"' in (run_dir / "metrics.jsonl").read_text()):
            assert process.poll() is None
            time.sleep(0.05)
        assert inspect_runs([run_dir])[0].state == "running"
        done = called(submit.main, "stop", str(run_dir))
        assert process.wait(timeout=60) == 0
    ended = status(run_dir)
    assert (ended["state"], ended["reason"]) == ("stopped", "STOP file") and ended["step"] > 0
    first, *_, last = done.stdout.splitlines()
    assert first == f"{run_dir}: asked to save and stop (pid {process.pid} on {os.uname().nodename})"
    assert last.split()[:3] == [str(run_dir), "stopped", str(ended["step"])]
    assert called(submit.main, "stop", str(run_dir)).returncode == 0, "a run that has ended is not asked again"
    assert not (run_dir / "STOP").exists()


def submitted(words: list[str]) -> "subprocess.CompletedProcess[str]":
    """Run launch/submit.py in a process of its own, since submitit leaves files open."""
    command = [sys.executable, "launch/submit.py", *words]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_local_trains_a_grid_two_runs_at_a_time(tiny_data: Path, tmp_path: Path) -> None:
    base = tmp_path / "grid"
    words = [PRESET, "--cluster", "local", "--gpus-per-node", "2", "--grid", "seed=1,2,3", "--max-parallel", "2", "--"]
    done = submitted([*words, *flags(tiny_data, base)])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" done ") == 3
    for seed in (1, 2, 3):
        run_dir, plain = base / f"seed={seed}", tmp_path / str(seed)
        assert called(trainer.main, PRESET, *flags(tiny_data, plain, "--seed", str(seed))).returncode == 0
        assert curve(run_dir) == curve(plain)
        assert_same_tensors(final_tensors(run_dir), final_tensors(plain))
        provenance = json.loads((run_dir / "provenance.json").read_text())
        assert f"train/main.py {PRESET} --track.group grid --data.dir" in provenance["command"]
        assert provenance["world"] == 2 and provenance["code"].startswith(f"{base}/code/")
    assert len(list((base / "submitit").glob("*_result.pkl"))) == 6, "of each rank of each run"


@pytest.mark.slow
def test_ctrl_c_saves_the_local_runs_and_begins_no_more(tiny_data: Path, tmp_path: Path) -> None:
    """SIGINT goes to the whole group, as from a terminal. Then the run restarts at its time limit and is stopped."""
    base = tmp_path / "grid"
    words = [PRESET, "--cluster", "local", "--gpus-per-node", "2", "--grid", "seed=1,2", "--time", "1", "--"]
    words += flags(tiny_data, base, *ENDLESS)
    first, second = base / "seed=1", base / "seed=2"

    def started() -> "subprocess.Popen[str]":
        command = [sys.executable, "launch/submit.py", *words]
        return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, start_new_session=True)

    def wait_for(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert process.poll() is None and time.monotonic() < deadline
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
        wait_for(lambda: inspect_runs([first])[0].holder is not None)
        assert called(submit.main, "stop", str(first)).returncode == 0
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 1, "the second has not begun"
    assert [line.split()[1] for line in output.splitlines() if line.startswith(f"{base}/seed")] == ["stopped", "new"]
    whole = tmp_path / "whole"
    more = ("--train.steps", str(status(first)["step"]), "--optim.schedule", "constant", "--seed", "1")
    assert called(trainer.main, PRESET, *flags(tiny_data, whole, *more)).returncode == 0
    assert curve(first) == curve(whole)


@pytest.mark.slow
def test_debug_trains_in_the_submitting_process(tiny_data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    done = submitted([PRESET, "--cluster", "debug", "--gpus-per-node", "1", "--", *flags(tiny_data, run_dir)])
    assert done.returncode == 0, done.stderr
    assert status(run_dir)["state"] == "done" and not (run_dir / "code").exists()
    assert json.loads((run_dir / "provenance.json").read_text())["code"] == str(ROOT)
