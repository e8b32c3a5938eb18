"""Real torchrun, real signals, real kills: the run that comes back is the run that was never interrupted."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from model.trained import list_checkpoints
from tests.groups import run_on_ranks
from tests.runs import assert_same_tensors, curve, final_tensors, status, tiny_flags, torchrun, validations
from tests.test_exact import continue_elsewhere
from train.config import parse
from train.presets import PRESETS

STEPS = 150


def flags(data: Path, run_dir: Path) -> list[str]:
    return [*tiny_flags(data, run_dir), "--train.steps", str(STEPS)]


def finish(process: "subprocess.Popen[str]") -> str:
    output, _ = process.communicate(timeout=120)
    return output


def children_of(pid: int) -> list[int]:
    """Process ids below `pid`, from /proc, at any depth."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents[int(stat.parent.name)] = int(fields[1])
    found = [pid]
    for parent in found:
        found += [child for child, its_parent in parents.items() if its_parent == parent]
    return found[1:]


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]", seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, finish(process)
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


def num_rows(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b'"loss"') if path.exists() else 0


def kill_everything(process: "subprocess.Popen[str]") -> None:
    for pid in [process.pid, *children_of(process.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()  # also closes the pipe


@pytest.fixture(scope="module")
def uninterrupted(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    process = torchrun(2, *flags(tiny_data, run_dir))
    output = finish(process)
    assert process.returncode == 0, output
    assert status(run_dir) == {"state": "done", "step": STEPS, "reason": None, "attempt": 1}
    return run_dir


def assert_same_run(run_dir: Path, whole: Path) -> None:
    assert curve(run_dir) == curve(whole)
    assert validations(run_dir) == validations(whole)
    assert_same_tensors(final_tensors(run_dir), final_tensors(whole))


def run_with_kills(data: Path, run_dir: Path, num_kills: int, seed: int) -> None:
    """kill -9 of launcher and workers at random moments, then the same command line to the end."""
    rng = random.Random(seed)
    for _ in range(num_kills):
        process = torchrun(2, *flags(data, run_dir))
        before = num_rows(run_dir)
        wait_for(lambda before=before: num_rows(run_dir) not in (0, before), process)  # type: ignore[misc]
        time.sleep(rng.uniform(0, 0.5))
        kill_everything(process)
    process = torchrun(2, *flags(data, run_dir))
    output = finish(process)
    assert process.returncode == 0, output


def test_killed_at_random_moments_and_resumed_is_bitwise_the_same(
    tiny_data: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    run_with_kills(tiny_data, tmp_path / "run", num_kills=2, seed=1)
    assert_same_run(tmp_path / "run", uninterrupted)
    assert status(tmp_path / "run")["attempt"] == 3


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(10))
def test_killed_many_times(tiny_data: Path, uninterrupted: Path, tmp_path: Path, seed: int) -> None:
    run_with_kills(tiny_data, tmp_path / "run", num_kills=3, seed=seed)
    assert_same_run(tmp_path / "run", uninterrupted)


REQUESTS = ("SIGTERM", "SIGUSR1", "STOP file", "launcher died")


@pytest.mark.parametrize("request_by", REQUESTS)
def test_a_stop_saves_and_says_why(tiny_data: Path, stopped: Path, request_by: str) -> None:
    run_dir = stopped / request_by
    process = torchrun(2, *flags(tiny_data, run_dir))
    wait_for(lambda: num_rows(run_dir) > 15, process)
    workers = children_of(process.pid)
    match request_by:
        case "STOP file":
            (run_dir / "STOP").touch()
        case "launcher died":
            process.kill()
        case "SIGTERM":
            process.terminate()  # torchrun hands it on to every worker
        case "SIGUSR1":
            os.kill(workers[-1], signal.SIGUSR1)  # one rank alone hears it
    output = finish(process)
    wait_for_end(workers)
    found = status(run_dir)
    assert (found["state"], found["reason"]) == ("stopped", request_by), output
    assert 15 < found["step"] < STEPS
    assert list_checkpoints(run_dir)[-1].name == f"step_{found['step']:08d}"
    assert not (run_dir / "STOP").exists()
    assert not (run_dir / "lock.json").exists()
    if request_by in ("STOP file", "SIGUSR1"):
        assert process.returncode == 0, output


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs lie that were stopped, each under what stopped it."""
    return tmp_path_factory.mktemp("stopped")


def test_stopped_runs_continue_to_the_uninterrupted_ones_bits(
    tiny_data: Path, uninterrupted: Path, stopped: Path
) -> None:
    """One group of processes continues them all, one after the other."""
    runs = [stopped / name for name in REQUESTS if (stopped / name).is_dir()]
    assert runs, "test_a_stop_saves_and_says_why makes them"
    run_on_ranks(2, continue_elsewhere, [parse(flags(tiny_data, run_dir), PRESETS) for run_dir in runs])
    for run_dir in runs:
        assert "continuing from" in (run_dir / "log.txt").read_text()
        assert_same_run(run_dir, uninterrupted)


def wait_for_end(pids: list[int]) -> None:
    end = time.monotonic() + 60
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < end, "a worker outlived its launcher"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_finished_run_stays_finished(tiny_data: Path, uninterrupted: Path) -> None:
    before = {path: path.read_bytes() for path in (uninterrupted / "checkpoints").rglob("*") if path.is_file()}
    process = torchrun(1, *flags(tiny_data, uninterrupted))
    output = finish(process)
    assert process.returncode == 0, output
    assert f"done at step {STEPS}" in output
    assert {path: path.read_bytes() for path in (uninterrupted / "checkpoints").rglob("*") if path.is_file()} == before


def test_two_runs_in_one_directory_are_refused(tiny_data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    first = torchrun(1, *flags(tiny_data, run_dir), "--train.steps", "100000")
    wait_for(lambda: num_rows(run_dir) > 5, first)
    second = torchrun(1, *flags(tiny_data, run_dir), "--train.steps", "100000")
    output = finish(second)
    kill_everything(first)
    assert second.returncode != 0
    assert "another process is training here (pid" in output


def test_bad_input_under_torchrun_is_said_once_and_every_worker_ends_with_2(tiny_data: Path, tmp_path: Path) -> None:
    process = torchrun(2, *flags(tmp_path / "nowhere", tmp_path / "run"))
    output = finish(process)
    assert output.count(f"train: {tmp_path}/nowhere: no such data directory") == 1
    assert "exitcode: 2" in output and "exitcode: -" not in output, output


def test_in_place_restarts_that_would_hang_are_refused_with_the_line_to_export(tiny_data: Path, tmp_path: Path) -> None:
    env = os.environ | {"TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    command = [sys.executable, "train/main.py", *flags(tiny_data, tmp_path / "run")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in done.stderr
