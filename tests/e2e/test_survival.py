"""A run that is finished or refused, and one whose console goes away."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.test_exact import train_all
from tests.helpers.groups import run_on_ranks
from tests.helpers.runs import ROOT, called, status, tiny_flags
from train.command_line import parse
from train.main import main
from train.presets import PRESETS

STEPS = 20


def flags(data: Path, run_dir: Path) -> list[str]:
    return [*tiny_flags(data, run_dir), "--train.steps", str(STEPS)]


def test_a_finished_run_stays_finished(tiny_data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_on_ranks(2, train_all, [parse(flags(tiny_data, run_dir), PRESETS)])
    assert status(run_dir) == {"state": "done", "step": STEPS, "reason": None, "attempt": 1}
    before = {path: path.read_bytes() for path in (run_dir / "checkpoints").rglob("*") if path.is_file()}
    done = called(main, *flags(tiny_data, run_dir))
    assert done.returncode == 0, done.stderr
    assert f"done at step {STEPS}" in done.stdout
    assert {path: path.read_bytes() for path in (run_dir / "checkpoints").rglob("*") if path.is_file()} == before


def test_restarts_in_place_that_would_hang_are_refused_with_the_line_to_export(tiny_data: Path, tmp_path: Path) -> None:
    env = {"TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    done = called(main, *flags(tiny_data, tmp_path / "run"), **env)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in done.stderr


@pytest.mark.long(reason="an interpreter of its own")
def test_a_console_that_goes_away_does_not_end_the_run(tiny_data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "train/main.py", *flags(tiny_data, tmp_path / "run")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert status(tmp_path / "run")["state"] == "done"
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "the console is gone" in log and f"done at step {STEPS}" in log
