"""Writes the files of a checkpoint, which model/checkpoint.py describes. Nothing here communicates.

Each rank writes its part by itself. Rank 0 then seals the whole with what the ranks report of their parts.
"""

import hashlib
import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from common.errors import InputError
from common.files import write_atomically, write_json_atomically
from model.checkpoint import STATE_FILE, SUMS_FILE
from model.dcp_reader import read_description
from train.run import directory as run_dirs


@dataclass(frozen=True)
class Part:
    """Tell rank 0 of a rank's part: its tensors, their places in its files, and the sha256 of these files.

    It grows with the number of tensors, not with their sizes.
    """

    plan: SavePlan
    places: list[WriteResult]
    sums: dict[str, str]


class HashedFile(io.BufferedWriter):
    """A new file, hashed from memory while it is written: what the disk then holds otherwise is damage."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "wb"))
        self.digest = hashlib.sha256()

    def write(self, block: Any, /) -> int:
        self.digest.update(block)
        return super().write(block)

    def fileno(self) -> int:
        self.flush()  # DCP asks for the number to fsync the file, before it has flushed .metadata
        return super().fileno()


class HashedFiles(FileSystem):
    """DCP's access to files. `sums` has the hex sha256 of each file that was written, by name."""

    def __init__(self) -> None:
        self.sums: dict[str, str] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[io.IOBase]:
        assert mode == "wb"
        with HashedFile(path) as file:
            yield file
        self.sums[Path(path).name] = file.digest.hexdigest()

    def rename(self, path: Any, new_path: Any) -> None:
        super().rename(path, new_path)
        self.sums[Path(new_path).name] = self.sums.pop(Path(path).name)


class HashingWriter(dcp.FileSystemWriter):
    """DCP's writer, whose files are hashed while they are written."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.fs = self.files = HashedFiles()


def write_part(folder: Path, tensors: dict[str, Tensor], rank: int) -> Part:
    """Write and fsync a rank's tensors, plain or its own shards, into a file of its own."""
    planner, writer = dcp.DefaultSavePlanner(), HashingWriter(folder)
    planner.set_up_planner(tensors, is_coordinator=True)
    # A file is named after the place of its rank in this list.
    plan = writer.prepare_global_plan([planner.create_local_plan()] * (rank + 1))[rank]
    places = writer.write_data(planner.finish_plan(plan), planner).value()
    return Part(plan, places, writer.files.sums)


def seal(folder: Path, parts: list[Part], state: dict[str, Any], *, is_first: bool) -> None:
    """Add .metadata, state.json and the hashes of all files.

    Raise InputError if a file of another rank is not visible here, or if .metadata could not be loaded. The latter is
    tried with the first checkpoint alone, since the others' differ in nothing else than places.
    """
    sums = {name: sha256 for part in parts for name, sha256 in part.sums.items()}
    end = time.monotonic() + run_dirs.SECONDS_TO_SEE
    while missing := sums.keys() - {path.name for path in folder.iterdir()}:
        if time.monotonic() < end:
            time.sleep(0.1)
            continue
        raise InputError(
            f"{', '.join(sorted(missing))} of other ranks cannot be seen from rank 0: "
            "--run-dir must lie on storage that all hosts share"
        )
    writer = HashingWriter(folder)
    _, metadata = dcp.DefaultSavePlanner().create_global_plan([part.plan for part in parts])
    writer.finish(metadata, [part.places for part in parts])
    if is_first:
        read_description(folder)
    sums |= writer.files.sums
    sums[STATE_FILE] = write_json_atomically(folder / STATE_FILE, state)
    write_atomically(folder / SUMS_FILE, "".join(f"{sha256}  {name}\n" for name, sha256 in sorted(sums.items())))
