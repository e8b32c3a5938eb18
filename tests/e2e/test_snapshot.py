"""A job's copy of the code: which files it holds, that it runs itself, and that a changed copy does not run."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import InputError
from launch import snapshot
from launch.snapshot import check, take
from tests.helpers.runs import ROOT, called
from train.run.provenance import SNAPSHOT_FILE


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A small clone with a changed, a new, a removed and an ignored file."""
    root = tmp_path / "checkout"
    for name in ("train/main.py", "train/__init__.py", "launch/gone.py", "slurm/job.sh"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"# {name}\n")
    (root / "slurm" / "job.sh").chmod(0o755)
    (root / ".gitignore").write_text("runs/\n")
    git(root, "init", "--quiet")
    git(root, "add", "--all")
    git(root, "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "--quiet", "-m", "first")
    (root / "train" / "main.py").write_text("# changed\n")
    (root / "train" / "new one.py").write_text("# new\n")
    (root / "launch" / "gone.py").unlink()
    (root / "runs").mkdir()
    (root / "runs" / "old.py").write_text("# ignored\n")
    return root


def git(root: Path, *args: str) -> str:
    return subprocess.run(["git", "-C", str(root), *args], check=True, capture_output=True, text=True).stdout


def test_tracked_changed_and_new_files_are_copied_and_nothing_else(checkout: Path, tmp_path: Path) -> None:
    code = take(checkout, tmp_path / "run")
    tracked = [".gitignore", "slurm/job.sh", "train/__init__.py", "train/main.py", "train/new one.py"]
    copied = sorted(str(path.relative_to(code)) for path in code.rglob("*") if path.is_file())
    assert copied == sorted([snapshot.RECORD, *tracked])
    assert (code / "train" / "main.py").read_text() == "# changed\n"
    assert (code / "slurm" / "job.sh").stat().st_mode & 0o777 == 0o555
    record = json.loads((code / snapshot.RECORD).read_text())
    assert record["commit"] == git(checkout, "rev-parse", "HEAD").strip()
    assert "+# changed" in record["changes"] and "deleted file" in record["changes"]


def test_the_same_code_is_kept_once_and_other_code_beside_it(checkout: Path, tmp_path: Path) -> None:
    first = take(checkout, tmp_path / "run")
    assert take(checkout, tmp_path / "run") == first
    (checkout / "train" / "new one.py").chmod(0o755)
    second = take(checkout, tmp_path / "run")
    assert second != first and check(first) == first
    assert {path.name for path in (tmp_path / "run" / "code").iterdir()} == {first.name, second.name}
    inside = checkout / "not_ignored"  # a run directory is not copied into itself
    assert take(checkout, inside) == take(checkout, inside)


@pytest.mark.parametrize("damage", ["edited", "removed", "added", "record", "no record", "another name"])
def test_code_that_is_not_what_was_submitted_does_not_run(checkout: Path, tmp_path: Path, damage: str) -> None:
    code = take(checkout, tmp_path / "run")
    changed_file, record = code / "train" / "main.py", code / snapshot.RECORD
    line = "train/main.py is not what was submitted; remove it, submit again"
    if damage == "edited":
        changed_file.chmod(0o644)
        changed_file.write_text("# changes\n")
    elif damage == "removed":
        changed_file.unlink()
    elif damage == "added":
        (code / "torch.py").touch()
        (code / "train" / "__pycache__").mkdir()
        (code / "train" / "__pycache__" / "main.pyc").touch()
        line = f"{code}: torch.py is not what was submitted"
    elif damage == "record":
        record.write_text("{")
        line = f"{record}: damaged"
    elif damage == "no record":
        record.unlink()
        line = f"{code}: no snapshot, or a part of one: no {snapshot.RECORD}; submit again"
    else:
        code = code.rename(code.with_name("0123456789abcdef"))
        line = f"{snapshot.RECORD} is not what was submitted"
    with pytest.raises(InputError) as caught:
        check(code)
    assert line in str(caught.value)


def test_a_folder_that_is_no_clone_or_holds_data_is_refused(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    (tmp_path / "plain").mkdir()
    with pytest.raises(InputError, match=r"plain: fatal: not a git repository"):
        take(tmp_path / "plain", tmp_path / "run")
    with (checkout / "tokens.bin").open("wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(
        InputError, match=r"65 MB to copy for the job, most of it tokens.bin; above 64 MB it is not code"
    ):
        take(checkout, tmp_path / "run")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match=r"no git on \S+, which lists the files to copy for a job; install it"):
        take(checkout, tmp_path / "run")
    assert not list((tmp_path / "run").rglob("*.*"))
    shell = called(snapshot.main, "take", str(tmp_path / "run"), "--job", "7")
    assert shell.stderr.startswith("slurm: no git on ") and shell.stderr.endswith(
        "runs the checkout as it is at every start\n"
    )


def test_only_plain_files_and_links_inside_the_checkout_are_copied(
    checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "weights.py").write_text("outside")
    links = {"inside": "train/main.py", "up": "../outside/weights.py", "absolute": str(checkout / "train/main.py")}
    for name, target in links.items():
        (checkout / name).symlink_to(target)
    (checkout / "slurm" / "job.sh").unlink()
    (checkout / "slurm").rmdir()
    (checkout / "slurm").symlink_to(tmp_path / "outside")  # a tracked folder is now somewhere else
    (tmp_path / "outside" / "job.sh").write_text("outside")
    (checkout / "nested").mkdir()
    git(checkout / "nested", "init", "--quiet")
    (checkout / "nested" / "a.py").write_text("# a\n")
    code = take(checkout, tmp_path / "run")
    assert {str(path.relative_to(code)) for path in code.rglob("*") if path.is_symlink()} == {"inside"}
    assert not any("outside" in path.read_text() for path in code.rglob("*.py")) and not (code / "slurm").exists()
    warnings = capsys.readouterr().err
    for name in ("up: a link out", "absolute: a link out", "slurm/job.sh: ", "nested/: a repository of its own"):
        assert f"snapshot: warning: left out {name}" in warnings
    assert check(code) == code
    (checkout / "train" / "__init__.py").unlink()
    os.mkfifo(checkout / "train" / "__init__.py")
    with pytest.raises(InputError, match=r"train/__init__\.py: unsupported file type"):  # git's own words
        take(checkout, tmp_path / "run")


@pytest.mark.parametrize("name", ["../../../outside.py", "/etc/passwd", "train/../../x", "", "train//main.py"])
def test_a_record_names_files_of_the_copy_only(checkout: Path, tmp_path: Path, name: str) -> None:
    code = take(checkout, tmp_path / "run")
    record = json.loads((code / snapshot.RECORD).read_text())
    record["files"][name] = "0"
    (code / snapshot.RECORD).write_text(json.dumps(record))
    with pytest.raises(InputError, match="is not a name inside this folder"):
        check(code)


def test_a_record_or_copy_of_another_kind_is_one_line(checkout: Path, tmp_path: Path) -> None:
    code = take(checkout, tmp_path / "run")
    for content in (b"", b"[]", b"{}", b"\xff", b"[" * 100_000, b"9" * 5_000, b'{"files": [], "commit": null}'):
        (code / snapshot.RECORD).write_bytes(content)
        with pytest.raises(InputError, match=f"{snapshot.RECORD}: damaged"):
            check(code)
    (code / snapshot.RECORD).unlink()
    os.mkfifo(code / snapshot.RECORD)
    with pytest.raises(InputError, match="a FIFO"):
        check(code)
    shutil.rmtree(code)
    code = take(checkout, tmp_path / "run")
    (code / "train" / "main.py").unlink()
    os.mkfifo(code / "train" / "main.py")
    os.mkfifo(code / "torch.py")
    with pytest.raises(InputError, match=r"train/main\.py, torch\.py is not what was submitted"):
        check(code)


@pytest.mark.long(reason="an interpreter that imports torch from a whole copy")
def test_a_copy_of_the_whole_checkout_runs_its_own_files_and_says_so(tmp_path: Path) -> None:
    """Started through the link that is named after the job, in another folder."""
    done = called(snapshot.main, "take", str(tmp_path / "run"), "--job", "7")
    link = tmp_path / "run" / "code" / "job_7"
    assert done.stdout == f"{link.resolve()}\n" and link.is_symlink(), done.stderr
    assert called(snapshot.main, "check", str(link)).stdout == done.stdout
    script = f"import sys; sys.argv = ['{link}/train/main.py']; import runpy; m = runpy.run_path(sys.argv[0]); "
    script += "import json, train.run.provenance as r; print(json.dumps([r.__file__, r.code()]))"
    ran = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    path, code = json.loads(ran.stdout)
    assert path == f"{link.resolve()}/train/run/provenance.py"
    assert code["code"] == str(link.resolve())
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    assert code["commit"] == (head.stdout.strip() or None)
    assert snapshot.RECORD == SNAPSHOT_FILE
