"""A real job's path, from the snapshot to the exported model: no planted secret is kept, and the umask holds."""

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.corpus import make_text
from tests.helpers.runs import ROOT, tiny_flags
from tests.helpers.secrets_planted import SECRETS, TEXTS

pytest.importorskip("wandb")
pytest.importorskip("safetensors")
BY_NAME = {name: f"by {name}" for name in (".env", ".netrc", "sub/id_rsa", "server.pem")}


def git(root: Path, *args: str) -> str:
    command = ["git", "-C", str(root), "-c", "user.name=t", "-c", "user.email=t@localhost", *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone of this repository with a secret of every kind: in new files, in changed ones, and in removed lines."""
    root = tmp_path_factory.mktemp("secrets") / "checkout"
    for name in git(ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0"):
        path = ROOT / name
        if path.is_file() and not name.startswith("tests/") and path.suffix in (".py", ".toml", ".sh"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, root / name)
    (root / "removed.txt").write_text("\n".join(TEXTS.values()))
    (root / "server.pem").write_text("old " + BY_NAME["server.pem"])
    git(root, "init", "--quiet")
    git(root, "add", "--all", "--force")
    git(root, "commit", "--quiet", "-m", "first")
    git(root, "config", "diff.noprefix", "true")
    git(root, "config", "color.ui", "always")
    (root / "removed.txt").unlink()
    for name, secret in BY_NAME.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(secret)
    for kind, text in TEXTS.items():
        (root / f"{kind.replace(' ', '_')}.txt").write_text(f"a\n{text}\n")
    (root / "launch" / "grid.py").write_text((root / "launch" / "grid.py").read_text() + f"# {TEXTS['github']}\n")
    (root / "plain.py").write_text("tokens = [1, 2]\n")
    (root / "plain.py").chmod(0o666)
    return root


def run(umask: int, *args: str | Path, cwd: Path, home: Path) -> "subprocess.CompletedProcess[str]":
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    done = subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=cwd,
        env=kept | {"HOME": str(home), "OMP_NUM_THREADS": "1"},
        umask=umask,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(
    scope="module",
    params=[0o077, pytest.param(0o027, marks=pytest.mark.long(reason="another umask"))],
    ids=["077", "027"],
)
def work(request: pytest.FixtureRequest, checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Data, a run's snapshot, the run with W&B, its evaluation and its export, all made by commands under a umask."""
    folder, umask = tmp_path_factory.mktemp("work"), request.param
    folder.chmod(0o700)
    (folder / "text.txt").write_text(make_text(20_000))
    (folder / "text.txt").chmod(0o600)
    run_dir, home = folder / "run", folder / "home"
    home.mkdir(mode=0o700)

    def command(*args: str | Path) -> "subprocess.CompletedProcess[str]":
        return run(umask, *args, cwd=folder, home=home)

    command(
        ROOT / "data_prep/textfiles.py", "--input", folder / "text.txt", "--out", folder / "data", "--tokenizer", "char"
    )
    taken = command(checkout / "launch/snapshot.py", "take", run_dir, "--job", "7")
    code = Path(taken.stdout.strip())
    for name in (*BY_NAME, "rsa_key.txt", "launch/grid.py"):
        assert f"snapshot: warning: left out {name}: " in taken.stderr, name
    flags = [
        *tiny_flags(folder / "data", run_dir),
        "--train.steps",
        "20",
        "--sample.every",
        "10",
        "--sample.tokens",
        "4",
    ]
    tags = [SECRETS[kind] for kind in ("hub", "github", "aws key", "wandb new", "openai", "jwt")]
    flags += ["--track.wandb", "offline", "--track.group", TEXTS["wandb"], "--track.tags", *tags]
    command(code / "train/main.py", *flags)
    command(ROOT / "train/validate.py", run_dir, "--tokens", "64")
    command(ROOT / "model/hf_bridge.py", "export", run_dir, "--out", run_dir / "exported")
    (folder / "umask").write_text(str(umask))
    yield folder


def test_no_secret_is_kept_anywhere(work: Path) -> None:
    run_dir = work / "run"
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    assert {"provenance.json", "config.json", "state.json", "SNAPSHOT.json", "plain.py", "README.md"} <= {
        path.name for path in files
    }
    assert any(path.suffix == ".wandb" for path in files)
    for path in files:
        content = path.read_bytes()
        found = [secret for secret in (*SECRETS.values(), *BY_NAME.values()) if secret.encode() in content]
        assert not found, path
    provenance = (run_dir / "provenance.json").read_text()
    assert "diff --git a/removed.txt" in provenance and "[redacted]" in provenance


def test_nothing_has_wider_permissions_than_the_umask(work: Path) -> None:
    umask = int((work / "umask").read_text())
    made = [work / "data", work / "run", *(work / "data").rglob("*"), *(work / "run").rglob("*")]
    assert len(made) > 60
    wide = [
        f"{path} {mode:o}"
        for path in made
        if not path.is_symlink() and (mode := stat.S_IMODE(path.stat().st_mode)) & umask
    ]
    assert wide == []
