"""Where a compiled run keeps its code: with its user on this host, and never in the run directory."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from model import generate
from tests.helpers.runs import ROOT, called, tiny_flags
from train import main, validate

ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("TORCHINDUCTOR_")}


def test_nothing_is_compiled_where_others_can_write_what_would_be_executed(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    cache = tmp_path / f"gpt-ladder-compiled-{os.getuid()}"
    cache.symlink_to("elsewhere")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    run_dir = tmp_path / "run"
    done = called(main.main, *tiny_flags(tiny_data, run_dir), "--train.no-compile", "--train.steps", "1")
    assert done.returncode == 0, done.stderr
    new_run = (*tiny_flags(tiny_data, tmp_path / "new"), "--train.compile")
    for command, args in (
        (main, new_run),
        (validate, (str(run_dir), "--compile")),
        (generate, (str(run_dir), "--compile")),
    ):
        done = called(command.main, *args)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done
        assert (
            f": {cache}: another user can write it or has made it, and torch runs the code in it; set " in done.stderr
        )
    assert not (tmp_path / "new").exists() and not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.slow
def test_the_next_start_finds_what_was_compiled_and_the_run_directory_has_none_of_it(
    tiny_data: Path, tmp_path: Path
) -> None:
    """Inductor compiles C++ for half a minute to one and a half."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    compiled: list[set[Path]] = []
    for run_dir in (tmp_path / "run", tmp_path / "again"):
        command = [sys.executable, "train/main.py", *tiny_flags(tiny_data, run_dir), "--train.compile"]
        done = subprocess.run(
            [*command, "--train.steps", "2", "--sample.every", "None"],
            cwd=ROOT,
            env=ENVIRONMENT | {"TMPDIR": str(temporary)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert not [path for path in run_dir.rglob("*") if path.suffix in (".so", ".py", ".cpp")]
        compiled.append(set(temporary.rglob("*.so")))
    (cache,) = temporary.glob("gpt-ladder-compiled-*")
    assert compiled[0] and all(path.is_relative_to(cache) for path in compiled[0])
    assert compiled[1] == compiled[0]
