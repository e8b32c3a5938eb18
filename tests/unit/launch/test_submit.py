"""launch/submit.py without Slurm and without a process: its refusals, its plan, and the states of run directories."""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro

from common.errors import InputError
from launch import runs, submit
from launch.grid import Point, expand_grid, split_at_dashes
from launch.local import split_gpus
from launch.options import Options, SubmitOptions, parse_minutes
from launch.runs import find_runs, inspect_runs
from launch.slurm_jobs import parse_sbatch_flags, refusal_message, slurm_executor
from tests.helpers.names import ODD_FOR_SUBMIT
from tests.helpers.runs import ROOT, called, tiny_flags
from train.command_line import parse
from train.presets import PRESETS

PRESET = "shakespeare-char-cpu"
SHOWN = [
    line.strip()
    for name in ("README.md", "docs/cluster.md", "launch/submit.py")
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines()
    if re.match(r"    \S*python launch/submit.py", line)
]


@pytest.fixture
def no_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A PATH with git and nothing of Slurm."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "git").symlink_to(shutil.which("git") or "")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


def test_command_lines_that_are_shown_parse() -> None:
    assert len(SHOWN) >= 13
    for line in SHOWN:
        words, flags = split_at_dashes(shlex.split(line, comments=True)[2:])
        if words[0] in submit.COMMANDS:
            assert len(words) == 2
            continue
        options = tyro.cli(SubmitOptions, args=words[1:])
        for point in expand_grid(words[0], options.grid, flags):
            parse(point.args, PRESETS)


def test_times_are_read_as_sbatch_reads_them() -> None:
    times = {"90": 90, "90:30": 91, "12:00:00": 720, "0:00:01": 1, "2-0": 2880, "1-2:30": 1590, "1-0:0:30": 1441}
    assert {text: parse_minutes(text) for text in times} == times
    for text in ("", "12h", "1:2:3:4", "-5", "1-"):
        with pytest.raises(InputError, match="write minutes, HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS"):
            parse_minutes(text)


def test_slurms_message_becomes_one_line_with_advice() -> None:
    output = "sbatch: error: invalid partition specified: p\nsbatch: error: Batch job submission failed: x"
    line = "Slurm refuses: invalid partition specified: p (see --partition; `sinfo -s` lists them)"
    assert refusal_message(output) == line
    timed_out = "sbatch: error: Batch job submission failed: Socket timed out"
    assert refusal_message(timed_out) == "Slurm refuses: Batch job submission failed: Socket timed out"
    assert refusal_message("") == "Slurm refuses: no reason given"


@pytest.mark.usefixtures("no_slurm")
def test_wrong_input_is_one_line_and_nothing_is_written(tiny_data: Path, tmp_path: Path) -> None:
    good = ["--", *tiny_flags(tiny_data, tmp_path / "run")[1:]]
    local = (PRESET, "--cluster", "local", "--gpus-per-node", "2")
    cases: list[tuple[tuple[str, ...], str]] = [
        ((PRESET, *good), "no Slurm here: no sbatch on PATH; --cluster local trains on this machine"),
        ((*local, "--nodes", "2", *good), "--nodes 2 with --cluster local: this machine is one node; use --nodes 1"),
        ((*local, "--prep", *good), "--prep with --cluster local: run python data_prep/fineweb.py"),
        ((PRESET, "--cluster", "debug", *good), "--gpus-per-node 8 with --cluster debug: it is one"),
        ((*local, "--gpus-per-node", "0", *good), "--gpus-per-node 0 must be at least 1"),
        ((*local, "--grid", "seed=1,2", "--max-parallel", "0", *good), "--max-parallel 0 must be at least 1"),
        ((*local, "--only-failed", *good), "--only-failed and --max-parallel are for a --grid"),
        ((*local, "--time", "soon", *good), "--time soon: write minutes"),
        ((*local, "--gpus-per-node", "5", *good), "--train.batch-tokens 384"),
        ((*local, *good, "--optim.lr-peek", "1"), "unknown '--optim.lr-peek' (did you mean"),
        (("gpt2", *local[1:], *good), "no preset 'gpt2'"),
        ((*local, *good, "--data.dir", str(tmp_path / "gone")), f"{tmp_path}/gone: no manifest.json"),
        ((*local, "--grid", "seed", *good), "--grid seed: write FLAG=VALUE,VALUE"),
        (("status",), "status: which run? give run directories, or a sweep's folder"),
        (("stop", str(tmp_path)), f"{tmp_path}: no run here, and no folder with runs"),
    ]
    for words, line in cases:
        done = called(submit.main, *words)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
        assert done.stderr.startswith(f"submit: {line}")
    assert not (tmp_path / "run").exists()


def test_sbatch_flags_that_submit_sets_itself_are_refused() -> None:
    flags = parse_sbatch_flags(("qos=high", "--exclude=n1,n2", "exclusive"))
    assert flags == {"qos": "high", "exclude": "n1,n2", "exclusive": True}
    refused = {"cpus-per-task=16": "--cpus-per-gpu", "cpus_per_task=16": "--cpus-per-gpu", "array=0-3": "--grid"}
    for flag, own in refused.items():
        with pytest.raises(InputError, match=f"--sbatch {flag}: use {own}"):
            parse_sbatch_flags((flag,))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), ["--gres=gpu:8"]),
        (("qos=high",), ["--gres=gpu:8"]),
        (("gres=gpu:h100:8",), ["--gres=gpu:h100:8"]),
        (("gpus-per-node=h100:8",), ["--gpus-per-node=h100:8"]),
        (("--gpus=16",), ["--gpus=16"]),
        (("gpus_per_task=1",), ["--gpus-per-task=1"]),
    ],
)
def test_gpus_are_asked_for_by_gres_or_as_the_site_wants(
    tmp_path: Path, words: tuple[str, ...], expected: list[str]
) -> None:
    executor = slurm_executor(Options(sbatch=words), tmp_path, tmp_path / "code", [Point((), tmp_path)])
    script = executor._make_submission_file_text("", "")
    asked = [line.removeprefix("#SBATCH ") for line in script.splitlines() if "--g" in line]
    assert asked == expected


def test_runs_that_train_at_the_same_time_share_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert split_gpus(2, 3) == [(), (), ()], "on a CPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert split_gpus(2, 2) == [(0, 1), (2, 3)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    assert split_gpus(1, 3) == [(4,), (5,), (7,)]
    with pytest.raises(InputError, match=r"2 runs at a time with --gpus-per-node 2 need 4 GPUs; there are 3; use a sm"):
        split_gpus(2, 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1234")
    with pytest.raises(InputError, match=r"CUDA_VISIBLE_DEVICES=GPU-1234: --cluster local needs GPUs by number"):
        split_gpus(1, 1)


@pytest.mark.usefixtures("no_slurm")
def test_a_dry_run_names_the_runs_and_writes_nothing(tiny_data: Path, tmp_path: Path) -> None:
    words = ("--cluster", "local", "--gpus-per-node", "2", "--dry-run", "--grid", "seed=1,2", "--")
    done = called(submit.main, PRESET, *words, *tiny_flags(tiny_data, tmp_path / "grid")[1:])
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == [f"would train {tmp_path}/grid/seed={seed}" for seed in (1, 2)]
    assert "2 processes" in done.stdout
    assert not (tmp_path / "grid").exists()


def test_any_name_stands_quoted_in_the_job_script(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script is the one of a dry run, which calls nothing of Slurm. It says that there is no copy of the code."""
    for name in ("sbatch", "srun", "squeue", "scancel"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 9\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / ODD_FOR_SUBMIT
    done = called(submit.main, PRESET, "--dry-run", "--gpus-per-node", "1", "--", *tiny_flags(tiny_data, run_dir)[1:])
    assert done.returncode == 0, done.stderr
    script = done.stdout[done.stdout.index("#!/bin/bash") :]
    ran = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    line = f"slurm: {run_dir}/code/.../slurm/body.sh is not there on {os.uname().nodename}: share the run directory\n"
    assert (ran.returncode, ran.stderr) == (2, line) and not (tmp_path / "pwned").exists()


def test_names_that_no_job_script_can_hold_are_one_line(tiny_data: Path, tmp_path: Path) -> None:
    local = (PRESET, "--cluster", "local", "--gpus-per-node", "1")
    cases: list[tuple[tuple[str, ...], str, str]]
    cases = [((), str(tmp_path / "100%a"), "Slurm replaces what follows a % in the names of logs; choose another")]
    cases += [((), str(tmp_path / "a\\b"), "Slurm removes the backslash; give a name without one")]
    for flag in ("--name", "--account", "--partition"):
        cases.append(((flag, "a\\b"), str(tmp_path / "run"), f"{flag} a\\b: Slurm removes the backslash"))
        cases.append(((flag, "a\nb"), str(tmp_path / "run"), f"{flag} 'a\\nb': it has characters that do not print"))
    cases.append((("--sbatch", "comment=a\nb"), str(tmp_path / "run"), "--sbatch 'comment=a\\nb': it has characters"))
    for words, run_dir, line in cases:
        done = called(submit.main, *local, *words, "--", *tiny_flags(tiny_data, Path(run_dir))[1:])
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1) and line in done.stderr, done
    assert list(tmp_path.iterdir()) == []


def write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps(content) + "\n")


def test_the_state_of_each_run_is_seen_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done, killed, submitted = (tmp_path / "sweep" / name for name in ("done", "killed", "submitted"))
    write(done / "status.json", {"state": "done", "step": 12, "reason": None, "attempt": 1})
    write(done / "config.json", {"config": {"train": {"steps": 12}}})
    (done / "metrics.jsonl").write_text('{"step": 12, "loss": 2.5}\n{"step": 12, "val_loss": 2.75}\n{"step": 13, "lo')
    write(killed / "status.json", {"state": "running", "step": 10, "reason": None, "attempt": 1})
    monkeypatch.setattr(runs, "ask_slurm", lambda *_: pytest.fail("no job was ever submitted"))
    assert [(run.state, run.step) for run in inspect_runs([done, killed])] == [("done", 12), ("killed", 10)]

    write(submitted / "submitted.json", {"job": "12_0", "args": []})
    monkeypatch.setattr(runs, "queued_jobs", lambda jobs: {"12_0": "PENDING"})
    assert [run.state for run in inspect_runs(find_runs(tmp_path / "sweep"))] == ["done", "killed", "queued"]
    lines = called(submit.main, "status", str(tmp_path / "sweep")).stdout.splitlines()
    assert lines[0].split() == ["run", "step", "of", "loss", "val", "loss", "job"]
    assert lines[1].split() == [str(done), "done", "12", "12", "2.5000", "2.7500", "-"]
    assert lines[3].split() == [str(submitted), "queued", "0", "-", "-", "-", "12_0"]
    for queue, state in (({"12_0": "RUNNING"}, "running"), ({}, "new")):
        monkeypatch.setattr(runs, "queued_jobs", lambda jobs, queue=queue: queue)
        assert inspect_runs([submitted])[0].state == state

    # A run may have been started in the shell of a job, which goes on when the run has ended.
    for run_dir in (done, killed):
        write(run_dir / "provenance.json", {"job": "77"})
    write(killed / "status.json", {"state": "failed", "step": 10, "reason": "x", "attempt": 1})
    monkeypatch.setattr(runs, "queued_jobs", lambda jobs: dict.fromkeys(jobs, "RUNNING"))
    assert [run.state for run in inspect_runs([done, killed])] == ["done", "failed"]
