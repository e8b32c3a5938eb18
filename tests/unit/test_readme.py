"""What the README promises: its commands parse, its files exist."""

import functools
import importlib
import re
import shlex

import pytest

from tests.helpers.runs import ROOT, called
from train.config import parse
from train.presets import PRESETS

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.split("#")[0].strip() for line in README.splitlines() if line.startswith("    .venv/bin/")]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.mark.parametrize("line", [line for line in COMMANDS if "train/main.py" in line])
def test_training_commands_parse(line: str) -> None:
    args = shlex.split(line)
    parse(args[args.index("train/main.py") + 1 :], PRESETS)


@pytest.mark.parametrize(
    "line",
    # tests/unit/launch/test_submit.py has those of launch/
    [line for line in COMMANDS if not re.search(r"train/main.py|launch/|pre-commit", line)],
)
def test_other_commands_name_flags_that_exist(line: str) -> None:
    args = shlex.split(line)
    flags = [arg for arg in args if arg.startswith("--")]
    assert all(flag in help_of(args[1]) for flag in flags)


@functools.cache
def help_of(script: str) -> str:
    """tests/unit/test_house.py starts each of them once; here in this process, which has torch already."""
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    done = called(module.main, "--help")
    assert done.returncode == 0
    return done.stdout


def test_the_files_it_sends_a_reader_to_exist() -> None:
    named = set(re.findall(r"(?:train|model|data_prep|launch|slurm|docs|benchmarks|tests)/\w+\.(?:py|sh|md)", README))
    assert {"data_prep/fineweb.py", "train/main.py", "slurm/gpt2_small.sh", "launch/submit.py"} <= named
    missing = {name for name in named if not (ROOT / name).exists()}
    assert missing == set()


def test_benchmarks_of_the_makefile_have_the_flags_it_gives_them() -> None:
    given = re.findall(r"(benchmarks/\w+\.py)(.*)", MAKEFILE)
    small = re.findall(r"^SMALL := (.*)$", MAKEFILE, re.MULTILINE)
    assert len(small) == 1 and len(given) == 10
    for script, words in given:
        flags = [word for word in words.replace("$(SMALL)", small[0]).split() if word.startswith("--")]
        assert [flag for flag in flags if flag not in help_of(script)] == [], script


def test_make_targets_exist() -> None:
    named = re.findall(r"(?:^    |`)make ([a-z-]+)", README, re.MULTILINE)
    assert {"quickstart", "test", "test-long", "test-cluster", "test-slow", "lint", "bench", "bench-gpu"} <= set(named)
    for target in named:
        assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), target
