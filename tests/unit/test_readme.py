"""The commands and files that README.md and docs/ name: the commands parse, the files exist."""

import functools
import importlib
import re
import shlex
from pathlib import Path

import pytest

from tests.helpers.runs import ROOT, called
from train.command_line import parse
from train.presets import PRESETS

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PACKAGES = "common|train|model|data_prep|launch|slurm|docs|benchmarks|tests"


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def commands_of(page: Path) -> list[list[str]]:
    """Return the Python commands of a page's code blocks: the script and its arguments."""
    lines = re.findall(r"^    (\.venv/bin/(?:python|torchrun) .*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    words = [shlex.split(line, comments=True) for line in lines]
    return [command[next(i for i, word in enumerate(command) if word.endswith(".py")) :] for command in words]


@functools.cache
def help_of(script: str, *subcommand: str) -> str:
    """Return a script's --help, without starting a process that imports torch again."""
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    done = called(module.main, *subcommand, "--help")
    assert done.returncode == 0
    return done.stdout


def unknown_flags(script: str, words: list[str], *subcommand: str) -> list[str]:
    """Return the flags that a script's help does not have."""
    flags = [word.split("=")[0] for word in words if word.startswith("--")]
    return [flag for flag in flags if flag not in help_of(script, *subcommand)]


def test_there_are_commands_to_check() -> None:
    assert {"README.md", "docs/data.md", "docs/training.md"} <= {name_of(page) for page in PAGES if commands_of(page)}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_name_scripts_and_flags_that_exist(page: Path) -> None:
    for script, *words in commands_of(page):
        if script == "train/main.py":
            parse(words, PRESETS)
        elif script == "launch/sweep.py":  # a kind of sweep, its own flags, and those of training
            training = [word for word in unknown_flags(script, words) if word not in help_of("train/main.py")]
            assert words[0] in help_of(script) and training == [], words
        elif script in ("model/lens.py", "model/hf_bridge.py"):
            assert unknown_flags(script, words, words[0]) == [], words
        else:
            assert unknown_flags(script, words) == [], script


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_and_make_targets_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(rf"(?<![\w/.])(?:{PACKAGES})/[\w/]+\.(?:py|sh|md)", text))
    linked = re.findall(r"\]\(([^)#:]+)(?:#[\w-]*)?\)", text)
    named -= {"slurm/site.sh"}  # written by the user
    assert [name for name in named if not (ROOT / name).exists()] == []
    assert [link for link in linked if not (page.parent / link).exists()] == []
    for target in re.findall(r"(?:^    |`)make ([a-z. /-]+?)(?=`|\s{2}|$)", text, re.MULTILINE):
        for word in target.split():
            assert re.search(rf"^{re.escape(word)}:", MAKEFILE, re.MULTILINE), target


def test_the_readme_is_short_and_names_the_targets() -> None:
    readme = PAGES[0].read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 150
    assert {"make quickstart", "make test", "make bench"} <= set(re.findall(r"make [a-z]+", readme))


def test_benchmarks_of_the_makefile_have_the_flags_it_gives_them() -> None:
    (small,) = re.findall(r"^SMALL := (.*)$", MAKEFILE, re.MULTILINE)
    commands = re.findall(r"(benchmarks/\w+\.py)(.*)", MAKEFILE)
    assert len(commands) == 11
    for script, words in commands:
        assert unknown_flags(script, words.replace("$(SMALL)", small).split()) == [], script
