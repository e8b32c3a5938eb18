"""The headers of the job scripts, and the command lines that are shown; tests/e2e runs the scripts without Slurm."""

import re
import shlex

import tyro

from data_prep import fineweb_plan
from launch.grid import expand_grid, split_at_dashes
from tests.helpers.runs import ROOT
from train.command_line import parse
from train.presets import PRESETS

JOBS = sorted(path for path in (ROOT / "slurm").glob("*.sh") if path.name not in ("body.sh", "site.sh"))
SHOWN = [
    line.strip("# ").split("  ")[0]
    for path in [*JOBS, ROOT / "docs" / "cluster.md"]
    for line in path.read_text().splitlines()
    if re.match(r"(#  |   ) *sbatch .*slurm/\w+\.sh", line)
]


def test_headers_ask_for_what_the_body_needs() -> None:
    for path in JOBS:
        text = path.read_text()
        words = " ".join(re.findall(r"^#SBATCH (.*)$", text, re.MULTILINE)).split()
        names = {word.partition("=")[0] for word in words}
        assert {"--requeue", "--open-mode", "--nodes", "--cpus-per-task", "--time"} <= names, path
        assert "--open-mode=append" in words and not {"--account", "--partition"} & names, path
        for preset in re.findall(r"^train (\S+)", text, re.MULTILINE):
            assert preset in PRESETS
            assert {"--signal=B:USR1@300", "--ntasks-per-node=1", "--gres=gpu:8"} <= set(words)
            assert f"--job-name={preset}" in words


def test_command_lines_that_are_shown_have_flags_that_exist() -> None:
    assert len(SHOWN) >= 9
    for line in SHOWN:
        before, script, arguments = re.fullmatch(r"sbatch (.*?)slurm/(\w+)\.sh(.*)", line).groups()  # type: ignore[union-attr]
        assert ROOT / "slurm" / f"{script}.sh" in JOBS
        assert {flag.split("=")[0] for flag in shlex.split(before) if flag.startswith("--")} <= {
            *("--account", "--partition", "--nodes", "--cpus-per-task", "--array"),
            *("--gres", "--gpus", "--gpus-per-node", "--gpus-per-task", "--ntasks-per-node"),
        }, line
        if script == "sweep":
            words, flags = split_at_dashes(shlex.split(arguments))
            assert words[1] == "--grid"
            for point in expand_grid(words[0], words[2:], flags):
                parse(point.args, PRESETS)
        elif script.startswith("gpt2_"):
            parse([script.replace("_", "-"), *shlex.split(arguments)], PRESETS)
        else:
            tyro.cli(fineweb_plan.Options, args=shlex.split(arguments))
