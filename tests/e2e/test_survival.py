"""Real torchrun around a run that goes on: what is finished, held by another, or refused. test_soak.py strikes it."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.test_exact import train_all
from tests.helpers.groups import run_on_ranks, start_on_ranks
from tests.helpers.runs import called, status, tiny_flags, torchrun
from tests.helpers.soak import num_rows
from train.config import parse
from train.main import main
from train.presets import PRESETS

STEPS = 20


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


def kill_everything(process: "subprocess.Popen[str]") -> None:
    for pid in [process.pid, *children_of(process.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()  # also closes the pipe


def test_a_finished_run_stays_finished(tiny_data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_on_ranks(2, train_all, [parse(flags(tiny_data, run_dir), PRESETS)])
    assert status(run_dir) == {"state": "done", "step": STEPS, "reason": None, "attempt": 1}
    before = {path: path.read_bytes() for path in (run_dir / "checkpoints").rglob("*") if path.is_file()}
    done = called(main, *flags(tiny_data, run_dir))
    assert done.returncode == 0, done.stderr
    assert f"done at step {STEPS}" in done.stdout
    assert {path: path.read_bytes() for path in (run_dir / "checkpoints").rglob("*") if path.is_file()} == before


def test_two_runs_in_one_directory_are_refused(tiny_data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    endless = [*flags(tiny_data, run_dir), "--train.steps", "100000"]
    (tmp_path / "meet").mkdir()
    first = start_on_ranks(1, str(tmp_path / "meet"), train_all, [parse(endless, PRESETS)])
    (process,) = first.processes
    try:
        while num_rows(run_dir) <= 5:
            assert process.is_alive()
            time.sleep(0.01)
        second = called(main, *endless)
        assert process.is_alive()
    finally:
        process.kill()
        process.join()
    assert second.returncode == 2
    assert "another process is training here (pid" in second.stderr


@pytest.mark.long(reason="a start of torchrun; test_mesh.py has faults of ranks in `make test`")
def test_bad_input_under_torchrun_is_said_once_and_every_worker_ends_with_2(tiny_data: Path, tmp_path: Path) -> None:
    process = torchrun(2, *flags(tmp_path / "nowhere", tmp_path / "run"))
    output = finish(process)
    assert output.count(f"train: {tmp_path}/nowhere: no such data directory") == 1
    assert "exitcode: 2" in output and "exitcode: -" not in output, output


def test_in_place_restarts_that_would_hang_are_refused_with_the_line_to_export(tiny_data: Path, tmp_path: Path) -> None:
    env = {"TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    done = called(main, *flags(tiny_data, tmp_path / "run"), **env)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in done.stderr
