"""The job scripts as far as they go without Slurm; tests/cluster has one."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.helpers.names import ODD
from tests.helpers.runs import ROOT
from train.command_line import parse
from train.presets import PRESETS

JOBS = sorted(path for path in (ROOT / "slurm").glob("*.sh") if path.name not in ("body.sh", "site.sh"))


def bash(*args: str, cwd: Path = ROOT) -> "subprocess.CompletedProcess[str]":
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return subprocess.run(["bash", *args], cwd=cwd, env=env, capture_output=True, text=True, check=False)


def test_without_slurm_each_script_says_what_to_do(tmp_path: Path) -> None:
    for path in JOBS:
        done = bash(str(path))
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert done.stderr.startswith("slurm: this is no Slurm job: give the script to sbatch, or use torchrun")
        elsewhere = bash(str(path), cwd=tmp_path)
        assert elsewhere.returncode == 2
        assert elsewhere.stderr == "slurm: ./slurm/body.sh is not there: submit from the root of the checkout\n"


def test_the_shell_and_the_trainer_agree_on_the_run_directory() -> None:
    body = (ROOT / "slurm" / "body.sh").read_text()
    function = re.search(r"^run_dir_of\(\) \{.*?^\}", body, re.MULTILINE | re.DOTALL)
    assert function is not None
    for flags in (
        [],
        ["--run-dir", "runs/hot"],
        ["--seed", "7", "--run-dir=/scratch/a b", "--optim.lr-peak", "1e-3"],
        ["--run_dir", "elsewhere"],
        ["--run_dir=elsewhere", "--run-dir", "last"],
        [f"--run-dir={ODD}"],
        ["--run-dir=-x"],
    ):
        done = bash("-c", f'{function[0]}\nrun_dir_of "$@"', "-", "gpt2-small", *flags)
        assert Path(done.stdout.removesuffix("\n")) == parse(["gpt2-small", *flags], PRESETS).directory
        assert not done.stdout.startswith("-")


def test_a_wrong_number_of_requeues_is_one_line() -> None:
    script = '. slurm/body.sh; export SLURM_JOB_ID=1 SLURM_SUBMIT_DIR=$PWD MAX_REQUEUES="$1"; prepare'
    for text in ("x", "-1", "1e3", "1 2"):
        done = bash("-c", script, "-", text)
        assert (done.returncode, done.stderr) == (2, f"slurm: MAX_REQUEUES='{text}': give a whole number\n")


def test_prepare_asks_the_controller_again_and_drops_an_outer_jobs_variables(tmp_path: Path) -> None:
    """Functions stand in for scontrol and sleep; tests/cluster has the real ones."""
    record = "JobId=12 ArrayJobId=9 ArrayTaskId=3 JobName=x JobState=RUNNING Restarts=2 Priority=1"
    cases = ((record, "9_3", "3"), (record.replace("ArrayJobId=9 ArrayTaskId=3 ", ""), "12", "none"))
    for number, (answer, job, task) in enumerate(cases):
        asked = tmp_path / f"asked_{number}"
        script = f"""
          scontrol() {{ [ -e {asked} ] && echo "JobId=11 x Restarts=7 y" && echo "{answer}" && return
            touch {asked}; return 1; }}
          sleep() {{ :; }}
          export SLURM_SUBMIT_DIR={tmp_path} SLURM_JOB_ID=12 SLURM_ARRAY_JOB_ID=9 SLURM_ARRAY_TASK_ID=3
          export SLURM_NTASKS=8 RANK=1
          . slurm/body.sh; prepare
          echo "$job $SLURM_RESTART_COUNT ${{SLURM_ARRAY_TASK_ID:-none}} ${{SLURM_NTASKS:-none}} ${{RANK:-none}}" """
        done = bash("-c", script)
        assert done.stdout == f"{job} 2 {task} none none\n", done.stderr


TWICE = "slurm: the job asks for 8 and for 4 GPUs of each node: give sbatch --gres=gpu:N, which replaces"
UNLIKE = "slurm: Slurm gives unlike numbers of the 8 GPUs to the 2 nodes, 7 to "
NONE = "slurm: the job has no GPUs: ask for them by sbatch --gres=gpu:N, or by --gres=none --gpus-per-node=N"


@pytest.mark.parametrize(
    ("fields", "on_node", "expected"),
    [
        ("TresPerNode=gres:gpu:8", "8", "8"),  # as Slurm 22.05 writes it
        ("TresPerNode=gres/gpu:h100:8", "8", "8"),  # as newer ones do
        ("TresPerNode=gpu:8", "8", "8"),
        ("TresPerNode=gres:gpu", "1", "1"),
        ("TresPerNode=gres:nic:2,gres:gpu:4", "8", "4"),  # an --exclusive job
        ("TresPerNode=gres:gpu:8,gres:gpu:8", "8", "8"),
        ("TresPerNode=gres:gpu:8,gres:gpu:4", "4", TWICE),
        ("TresPerJob=gres:gpu:16", "8", "8"),
        ("TresPerJob=gres/gpu:h100:16", "8", "8"),
        ("TresPerJob=gres:gpu:8", "7", UNLIKE),
        ("TresPerTask=gres:gpu:1", "4", "4"),
        ("TresPerTask=cpu=4,gres/gpu=1", "4", "4"),
        ("TresPerNode=gres:nic:2", "8", NONE),
        ("TresPerNode=gres:gpu:0", "8", NONE),
        ("Comment=x", "8", NONE),  # the 8 are of the job from which this one was submitted
        ("TresPerTask=gres:gpu:1", "", NONE),
    ],
)
def test_gpus_are_counted_however_a_site_asks_for_them(fields: str, on_node: str, expected: str) -> None:
    record = f"JobId=12 JobName=x Restarts=0 TRES=cpu=8,node=2,gres/gpu=3 Power= {fields} "
    script = (
        '. slurm/body.sh; record=$1 SLURM_GPUS_ON_NODE=$2 hosts=(n1 n2); gpus=$(gpus_per_node) || exit; echo "$gpus"'
    )
    done = bash("-c", script, "-", record, on_node)
    if expected.isdigit():
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{expected}\n", "")
    else:
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert done.stderr.startswith(expected)
