"""The hidden directory beside --out in which it grows: kept across kills, its name given only when it is whole."""

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path

from data_prep.atomic import fsync_directory
from data_prep.errors import InputError

PARTS = "parts"
LOCK = "lock"


@contextlib.contextmanager
def unfinished_directory(out: Path) -> Iterator[Path]:
    """`.NAME.partial`, with its folder of parts, for one process at a time.

    After a failure the finished parts stay, which the error says; where there is none, nothing stays.
    """
    partial = out.with_name(f".{out.name}.partial")
    (partial / PARTS).mkdir(parents=True, exist_ok=True)
    with (partial / PARTS / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"--out {out}: another process is making it right now") from error
        _free_all_but_parts(partial)  # of an earlier attempt
        try:
            yield partial
        except (InputError, OSError) as error:
            raise InputError(f"{error}{_leave(partial)}") from error
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted{_leave(partial)}") from None


def _free_all_but_parts(partial: Path) -> None:
    for path in partial.iterdir():
        if path.is_dir() and path.name != PARTS:
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()


def _leave(partial: Path) -> str:
    """Give back the disk that a failed run filled, except for finished parts; what to say of those."""
    _free_all_but_parts(partial)
    finished = [path.with_suffix(".part") for path in (partial / PARTS).glob("*.json")]
    if not finished:
        shutil.rmtree(partial)
        return ""
    for path in (partial / PARTS).glob("*.tmp"):
        path.unlink()
    megabytes = sum(path.stat().st_size for path in finished) / 1e6
    return (
        f"; {len(finished)} finished parts ({megabytes:,.1f} MB) stay in {partial}: the same command goes on from "
        "them, or remove it"
    )


def put_in_place(partial: Path, out: Path) -> None:
    """Give the finished directory its name; what stood there, and the parts, go only once the new one is complete."""
    replaced = out.with_name(f".{out.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    replaced.mkdir()
    (partial / PARTS).rename(replaced / PARTS)
    if out.exists():
        out.rename(replaced / out.name)
    partial.rename(out)
    fsync_directory(out.parent)
    shutil.rmtree(replaced, ignore_errors=True)
