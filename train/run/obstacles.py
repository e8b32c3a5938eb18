"""Moves aside whatever stands where a run writes its files: FIFOs, devices, links and directories of such a name."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from common.files import move_aside
from common.reading import is_there
from data_prep.tokenizer import FOLDER as TOKENIZER
from model.checkpoint import CHECKPOINTS, STEP_NAME, list_checkpoints
from train.metrics.rows import KEPT_FILES

ASIDE = ".aside_"
FILES = {*("config.json", "provenance.json", "status.json", "log.txt", "nonfinite.jsonl", "STOP"), *KEPT_FILES}
FOLDERS = {CHECKPOINTS, TOKENIZER, "evaluations", "wandb", "traces", "verified"}


def clear_the_way(run_dir: Path) -> list[str]:
    """Move aside what would block or stop the run; return a line for each. Raise OSError if that fails.

    Links to directories may stand for a run's folders, since large checkpoints often lie on another disk. All other
    links, and what is neither a file nor a directory, never come from a run.
    """
    lines = []
    for path, fault in list(_obstacles(run_dir)):
        lines.append(f"{path}: {fault}; moved aside to {move_aside(path).name}")
    for leftover in (run_dir / CHECKPOINTS).glob(".step_*"):  # a directory is one that a save has left (resume.py)
        if leftover.is_symlink() or not leftover.is_dir():
            leftover.unlink()
    return lines


def set_aside(run_dir: Path) -> list[str]:
    """Move the checkpoints and rows of an earlier run aside, none of which is sound; return a line for each."""
    rows = [path for name in KEPT_FILES if is_there(path := run_dir / name) and path.stat().st_size > 0]
    return [f"{path}: kept as {move_aside(path).name}" for path in [*list_checkpoints(run_dir), *rows]]


def _obstacles(folder: Path, depth: int = 0) -> Iterator[tuple[Path, str]]:
    """Yield (path, what is wrong with it) of everything below a run directory that stands in the way."""
    for entry in os.scandir(folder):
        path = Path(entry.path)
        if ASIDE in entry.name:
            continue
        is_folder, is_link = entry.is_dir(), entry.is_symlink()
        if depth == 1 and folder.name == CHECKPOINTS and STEP_NAME.fullmatch(entry.name):
            if is_link or not is_folder:
                yield path, "not a checkpoint"
            continue
        try:
            mode = entry.stat().st_mode
        except OSError:  # a link to nowhere, or to itself
            if depth == 0 and entry.name in FILES | FOLDERS:
                yield path, "a link to nothing"
            continue
        is_file_expected = entry.name in FILES if depth == 0 else depth == 1 and folder.name == TOKENIZER
        if not (is_folder or stat.S_ISREG(mode)):
            yield path, "neither a file nor a directory"
        elif depth == 0 and entry.name in FOLDERS and not is_folder:
            yield path, "not a directory"
        elif is_file_expected and (is_folder or is_link):
            yield path, "not a file"
        elif is_folder and (not is_link or (depth == 0 and entry.name in FOLDERS)):
            yield from _obstacles(path, depth + 1)
