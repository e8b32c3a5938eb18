"""Commands in processes of their own, from another directory and with a bare environment."""

import gzip
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep import textfiles
from tests.helpers.data_dirs import decoded
from tests.helpers.runs import ROOT, called
from tests.unit.test_house import SCRIPTS, relative
from tests.unit.train.test_curves import train_row, write_run


@pytest.mark.parametrize(
    "scripts",
    [
        pytest.param([ROOT / "train" / "main.py"], id="one"),
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
        assert process.returncode == 0 and "usage:" in printed, f"{name}: {printed}"
    assert list(tmp_path.iterdir()) == []


def test_curves_draws_two_runs_from_another_directory(tmp_path: Path) -> None:
    first, second = (write_run(tmp_path / name, [train_row(1, 4.0), train_row(2, 3.0)]) for name in ("a", "_$1 b$"))
    command = [sys.executable, str(ROOT / "train" / "curves.py"), str(first), str(second), "--x", "flops"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (tmp_path / "curves.md").read_text() + "\ncurves.png\n"
    assert (tmp_path / "curves.png").is_file() and not (first / "curves.png").exists()
    code = "import sys, train.curves; sys.exit('torch' in sys.modules)"  # importing torch takes seconds
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_bad_input_ends_training_with_one_line_and_status_2() -> None:
    command = [sys.executable, "train/main.py", "--data.dir", "nowhere"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "nowhere: no such data directory" in done.stderr


@pytest.mark.parametrize(("name", "mark"), [("it's \U0001f600.txt", b"\xff\xfe"), ("b.txt.gz", b"\xfe\xff")])
def test_the_command_that_a_refusal_of_utf_16_names_converts_the_file(name: str, mark: bytes, tmp_path: Path) -> None:
    if shutil.which("iconv") is None:
        pytest.skip("no iconv")
    text = "caf\u00e9 \U0001f600\r\n" * 100
    content = mark + text.encode("utf-16-le" if mark == b"\xff\xfe" else "utf-16-be")
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    flags = ["--tokenizer", "byte", "--out", str(tmp_path / "data"), "--input"]
    refused = called(textfiles.main, *flags, str(tmp_path / name))
    assert refused.returncode == 2
    subprocess.run(refused.stderr.partition("(--input): ")[2], shell=True, check=True)
    assert called(textfiles.main, *flags, str(tmp_path / f"utf8_{name}")).returncode == 0
    assert decoded(tmp_path / "data").decode() == text
