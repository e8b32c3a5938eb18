"""Copy the checkout into a run directory. A job runs this copy, also after every requeue.

    python3 launch/snapshot.py take RUN_DIR --job 4711      # copies this checkout and prints RUN_DIR/code/HASH
    python3 launch/snapshot.py check RUN_DIR/code/job_4711  # prints RUN_DIR/code/HASH, unless a file has changed

The copy holds the files that git tracks, as they are now, and new files that git does not ignore: a second, one or two
MB. Left out, with a line for each, are files that look like secrets (common/redaction.py), links that lead out of the
checkout, and repositories inside it. The folder's name is the hash of names and contents, so the same code is kept
once. provenance.json takes its commit and changes from the copy (train/run/provenance.py). This needs git, Python 3.9
and no packages.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.errors import InputError, one_line_errors, reading_from, warn, writing_to
from common.reading import Form, read_own_json, read_regular, require_regular
from common.redaction import DIFF, redacted_diff, why_secret

ROOT = Path(__file__).resolve().parents[1]
RECORD = "SNAPSHOT.json"
RECORD_FORM: Form = {"files": dict, "commit": (str, None), "changes": (str, None)}
LIMIT_BYTES = 64 << 20  # a larger copy holds data that git should ignore


def take(root: Path, run_dir: Path) -> Path:
    """Copy `root` into the run directory, whole or not at all, and return the copy's folder.

    Raises InputError if git does not know `root`, or if the copy would be too large.
    """
    root, run_dir = root.resolve(), run_dir.resolve()
    files = files_of(root, run_dir)
    commit, changes = None, None
    if has_commit(root):
        commit, changes = ask_git(root, "rev-parse", "HEAD").strip(), redacted_diff(ask_git(root, *DIFF)).strip()
    with writing_to(run_dir / "code"):
        new = run_dir / "code" / f".{uuid.uuid4().hex}"
        for name in files:
            copy_file(root, root / name, new / name)
        hashes = {name: hash_file(new / name) for name in files}  # of the copies: an original may change meanwhile
        code = new.with_name(hash_names(hashes))
        record = {
            "root": str(root),
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "commit": commit,
            "changes": changes,
            "files": hashes,
        }
        (new / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        try:
            new.rename(code)
        except OSError:  # the same code was copied before
            shutil.rmtree(new)
            if not code.is_dir():
                raise
    return check(code)


def copy_file(root: Path, old: Path, new: Path) -> None:
    """Copy a file's content and executable bit, or a link. The copy is read-only, and for whom the umask says."""
    new.parent.mkdir(parents=True, exist_ok=True)
    if old.is_symlink():
        new.symlink_to(old.readlink())
        return
    mode = 0o555 if old.stat().st_mode & stat.S_IXUSR else 0o444
    content = read_regular(old, inside=root)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)


def check(code: Path) -> Path:
    """Return the same folder if every file is as it was copied; else raise InputError."""
    record = read_own_json(code / RECORD, RECORD_FORM, remedy=f"remove {code} and submit again")
    if record is None:
        raise InputError(f"{code}: no snapshot, or a part of one: no {RECORD}; submit again")
    hashes: dict[str, Any] = record["files"]
    changed = [name for name, expected in hashes.items() if hash_file(inside(code, name)) != expected]
    present = (path.relative_to(code) for path in code.rglob("*") if path.is_symlink() or not path.is_dir())
    changed += [str(name) for name in present if "__pycache__" not in name.parts and str(name) not in {*hashes, RECORD}]
    if changed or hash_names(hashes) != code.name:
        raise InputError(
            f"{code}: {', '.join(changed[:3]) or RECORD} is not what was submitted; remove it, submit again"
        )
    return code


def inside(folder: Path, name: str) -> Path:
    """Return folder / name. Raise InputError for a name that leaves the folder; any other may be a file of git's."""
    if {"", ".", ".."} & set(name.split("/")) or "\0" in name:
        raise InputError(f"{folder}: {RECORD} names {name!r}, which is not a name inside this folder")
    return folder / name


def files_of(root: Path, run_dir: Path) -> list[str]:
    """Return the sorted names of the files to copy: those that git tracks, and new ones that it does not ignore.

    Files in the run directory are left out, and with a warning each what `why_left_out` names.
    """
    listed = set(ask_git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")) - {""}
    listed = {name for name in listed if os.path.lexists(root / name) and run_dir not in (root / name).parents}
    if not (root / "train/main.py").is_file() or "train/main.py" not in listed:
        raise InputError(f"{root}: git knows no train/main.py here; run this in a clone, or after git init and git add")
    sizes = {name: (root / name).lstat().st_size for name in listed}
    if sum(sizes.values()) > LIMIT_BYTES:
        largest = max(sizes, key=lambda name: sizes[name])
        raise InputError(
            f"{root}: {sum(sizes.values()) >> 20} MB to copy for the job, most of it {largest}; above "
            f"{LIMIT_BYTES >> 20} MB it is not code: move data away, or name it in .gitignore"
        )
    reasons = {name: why_left_out(root, name) for name in sorted(listed)}
    for name, reason in reasons.items():
        if reason is not None:
            warn("snapshot", f"left out {ascii(name)[1:-1]}: {reason}")
    return [name for name, reason in reasons.items() if reason is None]


def why_left_out(root: Path, name: str) -> str | None:
    """Return why a file of the checkout is not copied; None if it is."""
    path = root / name
    if path.is_symlink():
        target = path.readlink()
        real = os.path.realpath(path)
        is_inside = not target.is_absolute() and os.path.commonpath([real, root]) == str(root)
        return None if is_inside else f"a link out of the checkout, to {target}"
    if path.is_dir():
        return "a repository of its own; copy its files into this one if the job needs them"
    try:
        require_regular(path, inside=root)
        return why_secret(name, read_regular(path, inside=root))
    except InputError as error:
        return str(error)


def hash_file(path: Path) -> str | None:
    """Return the sha256 of a file's content and executable bit, None if there is no such file.

    The content of a symbolic link is its target.
    """
    if path.is_symlink():
        content = bytes(path.readlink())
    elif path.is_file():
        content = read_regular(path)
    else:
        return None
    return hashlib.sha256(content + (b"x" if path.lstat().st_mode & stat.S_IXUSR else b"-")).hexdigest()


def hash_names(hashes: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()[:16]


def has_commit(root: Path) -> bool:
    command = ["git", "-C", str(root), "rev-parse", "-q", "--verify", "HEAD"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def ask_git(root: Path, *args: str) -> str:
    command = ["git", "-C", str(root), *args]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="surrogateescape", check=False)
    except FileNotFoundError as error:
        fault = f"no git on {os.uname().nodename}, which lists the files to copy for a job; install it"
        raise InputError(fault) from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise InputError(f"{root}: {lines[0] if lines else f'git {args[0]} failed'}")
    return done.stdout


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("take", "check"))
    parser.add_argument("path", type=Path, help="take: the run directory; check: the copy inside it")
    parser.add_argument(
        "--job", help="take: the job that will run the copy; RUN_DIR/code/job_JOB becomes a link to the copy"
    )
    options = parser.parse_args(args)
    with one_line_errors("slurm"):
        path = options.path.resolve()
        if options.action == "check":
            with reading_from(path):
                print(check(path))
            return
        try:
            code = take(ROOT, path)
        except InputError as error:
            raise InputError(f"{error}; SNAPSHOT=off sbatch ... runs the checkout as it is at every start") from error
        if options.job:
            link = code.with_name(f"job_{options.job}")
            with writing_to(link):
                link.unlink(missing_ok=True)  # job ids repeat when a cluster is set up again
                link.symlink_to(code.name)
        print(code)


if __name__ == "__main__":
    main()
