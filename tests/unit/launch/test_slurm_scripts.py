"""The job scripts as far as they go without Slurm; tests/cluster has one."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import tyro

from data_prep import fineweb_plan
from launch.grid import points_of, split
from tests.helpers.runs import ROOT
from train.config import parse
from train.presets import PRESETS

JOBS = sorted(path for path in (ROOT / "slurm").glob("*.sh") if path.name not in ("body.sh", "site.sh"))


def bash(*args: str, cwd: Path = ROOT) -> "subprocess.CompletedProcess[str]":
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return subprocess.run(["bash", *args], cwd=cwd, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_without_slurm_each_says_what_to_do(path: Path, tmp_path: Path) -> None:
    done = bash(str(path))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("slurm: this is no Slurm job: give the script to sbatch, or use torchrun")
    elsewhere = bash(str(path), cwd=tmp_path)
    assert (elsewhere.returncode, elsewhere.stderr.count("\n")) == (2, 1)
    assert elsewhere.stderr == "slurm: ./slurm/body.sh is not there: submit from the root of the checkout\n"


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_headers_ask_for_what_the_body_needs(path: Path) -> None:
    text = path.read_text()
    asked = " ".join(re.findall(r"^#SBATCH (.*)$", text, re.MULTILINE))
    assert {"--requeue", "--open-mode=append", "--nodes=", "--cpus-per-task=", "--time="} <= set(
        re.findall(r"--[a-z-]+=?(?:append)?", asked)
    )
    assert "--account" not in asked and "--partition" not in asked
    for preset in re.findall(r"^train (\S+)", text, re.MULTILINE):
        assert preset in PRESETS
        assert {"--signal=B:USR1@300", "--ntasks-per-node=1", "--gpus-per-node=8"} <= set(asked.split())
        assert f"--job-name={preset}" in asked.split()


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--run-dir", "runs/hot"],
        ["--seed", "7", "--run-dir=/scratch/a b", "--optim.lr-peak", "1e-3"],
        ["--run_dir", "elsewhere"],
        ["--run_dir=elsewhere", "--run-dir", "last"],
    ],
    ids=" ".join,
)
def test_the_shell_and_the_trainer_agree_on_the_run_directory(flags: list[str]) -> None:
    function = re.search(
        r"^run_dir_of\(\) \{.*?^\}", (ROOT / "slurm" / "body.sh").read_text(), re.MULTILINE | re.DOTALL
    )
    assert function is not None
    done = bash("-c", f'{function[0]}\nrun_dir_of "$@"', "-", "gpt2-small", *flags)
    assert done.stdout == f"{parse(['gpt2-small', *flags], PRESETS).directory}\n"


RECORD = "JobId=12 ArrayJobId=9 ArrayTaskId=3 JobName=x JobState=RUNNING Restarts=2 Priority=1"


@pytest.mark.parametrize(
    ("record", "job"), [(RECORD, "9_3"), (RECORD.replace("ArrayJobId=9 ArrayTaskId=3 ", ""), "12")]
)
def test_a_controller_that_stumbles_is_asked_again_and_an_outer_jobs_array_is_not_ours(
    tmp_path: Path, record: str, job: str
) -> None:
    """Slurm's two commands and sleep are stood in for; tests/cluster has the real ones."""
    stubs = f"""
      scontrol() {{ [ -e {tmp_path}/asked ] && echo "JobId=11 x Restarts=7 y" && echo "{record}" && return
        touch {tmp_path}/asked; return 1; }}
      sleep() {{ :; }}"""
    leftovers = "SLURM_JOB_ID=12 SLURM_ARRAY_JOB_ID=9 SLURM_ARRAY_TASK_ID=3 SLURM_NTASKS=8 RANK=1"
    script = f"""{stubs}
      export SLURM_SUBMIT_DIR={tmp_path} {leftovers}
      . slurm/body.sh; prepare
      echo "$job $SLURM_RESTART_COUNT ${{SLURM_ARRAY_TASK_ID:-none}} ${{SLURM_NTASKS:-none}} ${{RANK:-none}}" """
    done = bash("-c", script)
    assert done.stdout == f"{job} 2 {3 if job == '9_3' else 'none'} none none\n", done.stderr


SHOWN = [
    line.strip("# ").split("  ")[0]
    for path in [*JOBS, ROOT / "docs" / "cluster.md"]
    for line in path.read_text().splitlines()
    if re.match(r"(#  |   ) *sbatch .*slurm/\w+\.sh", line)
]


@pytest.mark.parametrize("line", SHOWN)
def test_the_command_lines_that_are_shown_have_flags_that_exist(line: str) -> None:
    before, script, arguments = re.fullmatch(r"sbatch (.*?)slurm/(\w+)\.sh(.*)", line).groups()  # type: ignore[union-attr]
    assert ROOT / "slurm" / f"{script}.sh" in JOBS
    assert {flag.split("=")[0] for flag in shlex.split(before) if flag.startswith("--")} <= {
        *("--account", "--partition", "--nodes", "--gpus-per-node", "--cpus-per-task", "--array"),
    }
    if script == "sweep":
        words, flags = split(shlex.split(arguments))
        assert words[1] == "--grid"
        for point in points_of(words[0], words[2:], flags):
            parse(point.args, PRESETS)
    elif script.startswith("gpt2_"):
        parse([script.replace("_", "-"), *shlex.split(arguments)], PRESETS)
    else:
        tyro.cli(fineweb_plan.Options, args=shlex.split(arguments))


def test_command_lines_are_shown() -> None:
    assert len(SHOWN) >= 9
