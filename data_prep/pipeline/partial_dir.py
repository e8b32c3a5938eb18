"""The hidden directory beside --out in which the output grows. It survives kills, and is renamed when complete."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common.errors import InputError, reading_from, writing_to
from common.files import fsync_directory
from common.reading import require_place
from data_prep.manifest import FILE_NAME, Manifest, open_split, read_manifest
from data_prep.tokenizer import Tokenizer

PARTS = "parts"
PLAN_FILES = ("plan.json", "listing.json")  # they lie with the parts, and outlive them


def named_directory(out: Path) -> Path:
    """Return the directory to make or replace for --out: behind a link, its target. Raise InputError if none can be."""
    with reading_from(out):
        out = out.resolve() if out.is_symlink() else out
    if not out.name:
        raise InputError(f"--out {out}: give the directory a name of its own")
    require_place(out.parent)
    return out


def is_free(out: Path) -> bool:
    """Return whether nothing is at --out, or an empty directory."""
    return not out.exists() or (out.is_dir() and not any(out.iterdir()))


@contextlib.contextmanager
def unfinished_directory(out: Path, *, shared: bool = False) -> Iterator[Path]:
    """Hold `.NAME.partial`, with a folder for parts, for one process at a time.

    shared: for all processes that make nothing but parts. After a failure the finished parts stay, and the error says
    so. If there are none, and the directory is not shared, it is removed.
    """
    partial = _beside(out, "partial")
    with writing_to(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
    with writing_to(out.parent), _locked(out, shared=shared):
        _finish_swap(out)
        (partial / PARTS).mkdir(parents=True, exist_ok=True)
        if not shared:
            _free_all_but_parts(partial)  # of an earlier attempt
        try:
            yield partial
        except (InputError, OSError) as error:
            raise InputError(f"{error}{_clean_up(partial, shared=shared)}") from error
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted{_clean_up(partial, shared=shared)}") from None


@contextlib.contextmanager
def _locked(out: Path, *, shared: bool) -> Iterator[None]:
    """Hold `.NAME.lock`. Only an exclusive holder removes the file, because others may share it."""
    path = _beside(out, "lock")
    while True:
        with path.open("a+") as lock:  # NFS locks only files that are open for reading and writing
            try:
                fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(f"--out {out}: another process is making it right now") from error
            except OSError as error:
                raise InputError(f"{path}: this file system has no locks ({error}); choose another --out") from error
            if not path.exists() or path.stat().st_ino != os.fstat(lock.fileno()).st_ino:
                continue  # The last holder removed this file, and another process may hold a new one.
            try:
                yield
            finally:
                if not shared:
                    path.unlink()
            return


def _free_all_but_parts(partial: Path) -> None:
    for path in partial.iterdir():
        if path.is_dir() and path.name != PARTS:
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()


def free_other_parts(partial: Path, stems: set[Path]) -> None:
    """Remove parts of another input or of other options. stems: the parts to keep, without suffix."""
    for path in (partial / PARTS).iterdir():
        is_part = path.suffix in (".part", ".json", ".tmp") and path.name not in PLAN_FILES
        if is_part and path.with_suffix("") not in stems:
            path.unlink()


def _clean_up(partial: Path, *, shared: bool) -> str:
    """Remove what a failed run wrote, except for finished parts; return a message about those."""
    finished = [path for path in (partial / PARTS).glob("*.part") if path.with_suffix(".json").exists()]
    if not shared:
        _free_all_but_parts(partial)
        for path in (partial / PARTS).glob("*.tmp"):
            path.unlink()
        if not finished:
            shutil.rmtree(partial)
    if not finished:
        return ""
    parts = f"{len(finished)} finished parts ({sum(path.stat().st_size for path in finished) / 1e6:,.1f} MB)"
    return f"; {parts} stay in {partial}: the same command continues from them, or remove it"


def existing_data(
    out: Path,
    is_same_source: Callable[[dict[str, Any]], bool],
    options: dict[str, Any],
    tokenizer: Tokenizer,
    *,
    overwrite: bool,
) -> Manifest | None:
    """Return the manifest if --out already holds exactly this data; None if it is free or to be replaced.

    Raise InputError if it holds anything else.
    """
    with writing_to(out.parent):
        leftovers = (out / PARTS, _beside(out, "replaced"), _beside(out, "removing"))  # after a kill in put_in_place
        if any(path.exists() for path in leftovers):
            with _locked(out, shared=False):
                _finish_swap(out)
        if is_free(out):
            return None
        is_data = (out / FILE_NAME).is_file()
    if not is_data:
        raise InputError(f"--out {out}: exists and is no data directory; choose another or remove it")
    if overwrite:
        return None
    manifest = read_manifest(out)
    mismatches = [] if is_same_source(manifest.source) else ["other input"]
    mismatches += [] if manifest.tokenizer == tokenizer.describe() else ["another tokenizer"]
    mismatches += differences(manifest.options, options)
    if not mismatches:
        for split in manifest.splits:
            open_split(out, split)  # which raises if a shard is missing or short
        return manifest
    raise InputError(
        f"--out {out}: already holds finished data, of {', '.join(mismatches)}; "
        "choose another --out, or replace it with --overwrite"
    )


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return each option that differs, as a flag with both values."""
    return [
        f"--{name.replace('_', '-')} {now.get(name)} (was {before.get(name)})"
        for name in {**before, **now}
        if now.get(name) != before.get(name)
    ]


def put_in_place(partial: Path, out: Path) -> None:
    """Give the finished directory its name. After a kill at any moment, the next start's `_finish_swap` repairs it."""
    if out.exists():
        out.rename(_beside(out, "replaced"))
    partial.rename(out)
    fsync_directory(out.parent)
    _finish_swap(out)


def _finish_swap(out: Path) -> None:
    """Finish `put_in_place`: restore the old directory if the new one is not there, else remove it and the parts."""
    old, doomed = _beside(out, "replaced"), _beside(out, "removing")
    shutil.rmtree(doomed, ignore_errors=True)
    if not out.exists() and any(old.glob("*.json")):  # Every finished directory has one.
        old.rename(out)
    for leftover in (out / PARTS, old):
        if leftover.exists():
            leftover.rename(doomed)  # so that a half-removed directory is never taken for a whole one
            shutil.rmtree(doomed)


def _beside(out: Path, suffix: str) -> Path:
    return out.with_name(f".{out.name}.{suffix}")
