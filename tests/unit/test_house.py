"""Rules that keep scripts runnable from anywhere and the packages in one order."""

import ast
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOWER_PACKAGES = {
    "common": set[str](),
    "data_prep": {"common"},
    "model": {"common", "data_prep"},
    "train": {"common", "data_prep", "model"},
    "launch": {"common", "data_prep", "model", "train"},
    "benchmarks": {"common", "data_prep", "model", "train", "launch"},
}
OURS = {*LOWER_PACKAGES, "tests"}
SOURCES = sorted(path for package in LOWER_PACKAGES for path in (ROOT / package).rglob("*.py"))
TOO_WIDE = {"Exception", "BaseException"}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_bytes(), filename=str(path))


def is_script(path: Path) -> bool:
    return any(
        isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'" for node in parse(path).body
    )


SCRIPTS = [path for path in SOURCES if is_script(path)]


def listed_by_git() -> list[Path]:
    """Every Python file that is, or would be, in the repository."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [ROOT / name for name in listed if (ROOT / name).exists()]


def imported_roots(tree: ast.AST) -> set[str]:
    """The first part of every name imported absolutely, anywhere in the module."""
    roots = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            roots.add(node.module.split(".")[0])
    return roots


def swallows(node: ast.AST) -> bool:
    """Does this catch everything without raising it again?"""
    if isinstance(node, ast.ExceptHandler):
        caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        is_wide = any(kind is None or ast.unparse(kind) in TOO_WIDE for kind in caught)
        return is_wide and not isinstance(node.body[-1], ast.Raise)
    if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "suppress":
        return any(ast.unparse(kind) in TOO_WIDE for kind in node.args)
    return False


def test_the_packages_are_found() -> None:
    assert {relative(path).split("/")[0] for path in SOURCES} >= {"data_prep", "model", "train"}
    assert {relative(path) for path in SCRIPTS} >= {"data_prep/textfiles.py", "data_prep/verify.py", "train/main.py"}


def test_no_module_has_the_name_of_another_library() -> None:
    installed = set(importlib.metadata.packages_distributions()) - OURS
    assert {"numpy", "torch", "tiktoken"} <= installed
    taken = sys.stdlib_module_names | installed
    stems = {path.stem for path in SOURCES} - {"__init__"}
    assert stems & taken == set()
    assert OURS & sys.stdlib_module_names == set()


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_run_one_way(path: Path) -> None:
    package = relative(path).split("/")[0]
    assert imported_roots(parse(path)) & OURS <= LOWER_PACKAGES[package] | {package}


@pytest.mark.parametrize("path", SCRIPTS, ids=relative)
def test_a_script_replaces_its_own_folder_on_the_path_before_it_imports_ours(path: Path) -> None:
    body = parse(path).body
    replacing = [
        place
        for place, node in enumerate(body)
        if isinstance(node, ast.If)
        and ast.unparse(node.test) == "not __package__"
        and any(isinstance(inner, ast.Assign) and ast.unparse(inner.targets[0]) == "sys.path[0]" for inner in node.body)
    ]
    ours = [place for place, node in enumerate(body) if imported_roots(node) & OURS]
    assert len(replacing) == 1
    assert all(place > replacing[0] for place in ours)


# tests/unit/test_readme.py asks all for their help in its own process.
ONE = [script for script in SCRIPTS if script.name == "main.py"]


@pytest.mark.parametrize(
    "scripts",
    [
        pytest.param(ONE, id="one"),
        pytest.param(SCRIPTS, id="all", marks=pytest.mark.long(reason="two dozen interpreters that import torch")),
    ],
)
def test_every_script_shows_its_help_from_anywhere(tmp_path: Path, scripts: list[Path]) -> None:
    bare = {name: os.environ[name] for name in ("PATH", "HOME", "LD_LIBRARY_PATH") if name in os.environ}
    running = {
        relative(script): subprocess.Popen(
            [sys.executable, script, "--help"],
            cwd=tmp_path,
            env=bare,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for script in scripts
    }
    for name, process in running.items():
        printed, _ = process.communicate()
        assert process.returncode == 0, f"{name}: {printed}"
        assert "usage:" in printed, name
    assert list(tmp_path.iterdir()) == []


def test_every_file_is_ascii() -> None:
    listed = listed_by_git()
    assert set(SOURCES) <= set(listed)
    assert [relative(path) for path in listed if not path.read_bytes().isascii()] == []


def test_nothing_swallows_every_exception() -> None:
    """Only the helper process that talks to W&B may: what a third party's service raises ends there as one line."""
    found = [relative(path) for path in listed_by_git() for node in ast.walk(parse(path)) if swallows(node)]
    assert found == ["train/metrics/wandb_process.py"]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("try: f()\nexcept: pass", True),
        ("try: f()\nexcept Exception: log()", True),
        ("try: f()\nexcept (OSError, BaseException) as e: print(e)", True),
        ("with contextlib.suppress(Exception): f()", True),
        ("try: f()\nexcept BaseException:\n    undo()\n    raise", False),
        ("try: f()\nexcept (OSError, ValueError): pass", False),
        ("with suppress(OSError): f()", False),
    ],
)
def test_the_rule_sees_what_swallows(code: str, expected: bool) -> None:
    assert any(swallows(node) for node in ast.walk(ast.parse(code))) is expected
