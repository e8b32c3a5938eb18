"""Disks that are full, read-only or hold on to files: real ones, which this process mounts for itself.

Where the system lets nobody mount, a limit on the size of files and missing permissions stand in for them.
"""

import ctypes
import os
import resource
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import InputError
from data_prep import verify
from model.checkpoint import fault_of, list_checkpoints
from tests.distributed.test_exact import cut_back
from tests.helpers.groups import run_on_ranks, run_with_own_mounts
from tests.helpers.runs import assert_same_tensors, called, curve, final_tensors, rows, status, tiny_flags, validations
from train import loop
from train.config import Config, parse
from train.main import main, run
from train.presets import PRESETS
from train.processes.group import ProcessGroup

SMALL = "24m"  # a checkpoint of the tiny run, and what a save wants to be free beside it


def flags(data: Path, run_dir: Path, *more: str) -> list[str]:
    return [*tiny_flags(data, run_dir), "--train.steps", "30", *more]


@pytest.fixture(scope="module")
def whole(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 steps with checkpoints at 10, 20 and 30, and nothing in the way."""
    run_dir = tmp_path_factory.mktemp("disk") / "run"
    run(parse(flags(tiny_data, run_dir), PRESETS), ProcessGroup(0, 1, torch.device("cpu")))
    return run_dir


@dataclass(frozen=True)
class Disk:
    """A small file system at `folder`, or, where nobody may mount one, a limit on the size of every file."""

    folder: Path
    can_mount: bool

    def __post_init__(self) -> None:
        self.folder.mkdir()
        if self.can_mount:
            mount("-t", "tmpfs", "-o", f"size={SMALL}", "small", str(self.folder))

    def fill(self, leaving: int) -> None:
        """As another program's files would, up to so many bytes."""
        if not self.can_mount:
            resource.setrlimit(resource.RLIMIT_FSIZE, (leaving, resource.RLIM_INFINITY))
            return
        filler = self.folder / "filler"
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                os.truncate(filler, filler.stat().st_size - leaving)

    def free(self) -> None:
        if self.can_mount:
            (self.folder / "filler").unlink()
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def mount(*args: str) -> None:
    subprocess.run(["mount", *args], check=True)


def make_read_only(folder: Path, can_mount: bool) -> None:
    if can_mount:
        mount("--bind", str(folder), str(folder))
        mount("-o", "remount,bind,ro", str(folder))
        return
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555)
    # Permissions hold root back too, once it has given up its capabilities (capset(2), version 3).
    ctypes.CDLL(None).capset(struct.pack("Ii", 0x20080522, 0), bytes(24))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_run(run_dir: Path, whole: Path) -> None:
    assert curve(run_dir) == curve(whole)
    assert validations(run_dir) == validations(whole)
    assert_same_tensors(final_tensors(run_dir), final_tensors(whole))


def fills_up_during_a_save(can_mount: bool, data: Path, whole: Path, folder: Path) -> None:
    disk, run_dir, usage = Disk(folder, can_mount), folder / "run", shutil.disk_usage
    cut_back(whole, run_dir, step=10)

    def free_for_the_last_time(path: Any) -> Any:
        found = usage(path)
        disk.fill(leaving=60_000)
        return found

    shutil.disk_usage = free_for_the_last_time
    refused = called(main, *flags(data, run_dir))
    shutil.disk_usage = usage
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused.stderr
    assert f"train: {run_dir}/checkpoints/step_00000020: not saved" in refused.stderr
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_00000010"]
    assert status(run_dir)["state"] == "failed" and "not saved" in status(run_dir)["reason"]
    assert len(rows(run_dir)) == 21 and not (run_dir / "lock.json").exists()
    disk.free()
    assert called(main, *flags(data, run_dir)).returncode == 0
    assert_same_run(run_dir, whole)


def test_a_disk_that_fills_up_during_a_save_ends_the_run_in_one_line(
    tiny_data: Path, whole: Path, tmp_path: Path
) -> None:
    run_with_own_mounts(fills_up_during_a_save, tiny_data, whole, tmp_path / "small")


def fills_up_between_saves(can_mount: bool, data: Path, whole: Path, folder: Path) -> None:
    disk, run_dir, take_step = Disk(folder, can_mount), folder / "run", loop.take_step
    cut_back(whole, run_dir, step=10)
    line = flags(data, run_dir, "--save.every", "100")

    def filling(run: loop.Run) -> loop.StepResult:
        if run.state.progress.step == 12:
            disk.fill(leaving=0)
        return take_step(run)

    loop.take_step = filling
    refused = called(main, *line)
    loop.take_step = take_step
    said = refused.stderr.splitlines()
    assert refused.returncode == 2 and len(said) == 2, refused.stderr
    assert said[0] == f"warning: {run_dir}/status.json still says running"
    assert said[1].startswith(f"train: {run_dir}: cannot be written ([Errno ")
    assert said[1].endswith("; make room there, then give the same command again")
    assert status(run_dir)["step"] == 10 and status(run_dir)["attempt"] == 2
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert 12 <= len(lines) < 30, "it stopped at once, not at the next save"
    assert not (run_dir / "lock.json").exists() and fault_of(list_checkpoints(run_dir)[-1]) is None

    before = contents(run_dir)
    refused = called(main, *line)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert f"train: {run_dir}: cannot be written" in refused.stderr and "make room" in refused.stderr
    assert contents(run_dir) == before
    disk.free()
    assert called(main, *line).returncode == 0
    assert_same_run(run_dir, whole)
    assert status(run_dir) == {"state": "done", "step": 30, "reason": None, "attempt": 3}


def test_a_disk_that_is_full_between_saves_ends_the_run_and_a_start_on_it_changes_nothing(
    tiny_data: Path, whole: Path, tmp_path: Path
) -> None:
    run_with_own_mounts(fills_up_between_saves, tiny_data, whole, tmp_path / "small")


def is_read_only(can_mount: bool, data: Path, run_dir: Path, blocked: Path) -> None:
    make_read_only(blocked, can_mount)
    make_read_only(data, can_mount)
    before = contents(blocked)
    refused = called(main, *flags(data, blocked))
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused.stderr
    assert f"train: {blocked}: cannot be written" in refused.stderr
    assert contents(blocked) == before
    assert called(main, *flags(data, run_dir)).returncode == 0
    assert called(verify.main, str(data)).returncode == 0


def test_a_read_only_run_directory_is_refused_and_read_only_data_trained_on(
    tiny_data: Path, whole: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(tiny_data, tmp_path / "data")
    cut_back(whole, tmp_path / "blocked", step=20)
    cut_back(whole, tmp_path / "run", step=20)
    run_with_own_mounts(is_read_only, data, tmp_path / "run", tmp_path / "blocked")
    assert_same_run(tmp_path / "run", whole)


def holds_on_to_a_checkpoint(can_mount: bool, data: Path, run_dir: Path) -> None:
    """One that is to be deleted is read-only and, being a mount point, cannot be renamed either."""
    make_read_only(run_dir / "checkpoints" / "step_00000010", can_mount)
    line = flags(data, run_dir, "--save.keep", "1")
    first, again = called(main, *line), called(main, *line)
    assert first.returncode == 0 and "step_00000010 could not be deleted: [Errno " in first.stderr, first.stderr
    assert first.stderr.count("\n") == 1
    assert (again.returncode, again.stderr) == (0, "") and "done at step 30" in again.stdout
    kept = [run_dir / "checkpoints" / name for name in ("step_00000020", "step_00000030")]
    assert list_checkpoints(run_dir)[-2:] == kept and [fault_of(path) for path in kept] == [None, None]


def test_a_checkpoint_that_cannot_be_deleted_disturbs_nothing(tiny_data: Path, whole: Path, tmp_path: Path) -> None:
    cut_back(whole, tmp_path / "run", step=20)
    run_with_own_mounts(holds_on_to_a_checkpoint, tiny_data, tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


def cannot_write_on_rank_0(group: ProcessGroup, config: Config) -> str:
    """From step 12 on no file of rank 0 may grow beyond what metrics.jsonl has then; rank 1 notices nothing of it."""
    take_step, metrics = loop.take_step, config.directory / "metrics.jsonl"

    def limiting(run: loop.Run) -> loop.StepResult:
        if run.state.progress.step == 12 and group.is_main:
            resource.setrlimit(resource.RLIMIT_FSIZE, (metrics.stat().st_size, resource.RLIM_INFINITY))
        return take_step(run)

    loop.take_step = limiting
    try:
        run(config, group)
    except InputError as error:
        return str(error)
    return "trained on"


def test_reports_that_rank_0_alone_cannot_write_end_every_rank(tiny_data: Path, whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    cut_back(whole, run_dir, step=10)
    config = parse(flags(tiny_data, run_dir, "--save.every", "100"), PRESETS)
    first, second = run_on_ranks(2, cannot_write_on_rank_0, config)
    assert first == second and first.startswith(f"{run_dir}: cannot be written ([Errno ")
    found = status(run_dir)
    assert (found["state"], found["step"]) == ("failed", 10) and "cannot be written" in found["reason"]
    assert [row["step"] for row in rows(run_dir) if "loss" in row] in ([*range(1, 12)], [*range(1, 13)])
    assert [path.name for path in list_checkpoints(run_dir)] == ["step_00000010"]


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_shard_cut_short_is_named_before_the_first_step(tiny_data: Path, tmp_path: Path, split: str) -> None:
    shutil.copytree(tiny_data, tmp_path / "data")
    shard = tmp_path / "data" / f"{split}_000000.bin"
    os.truncate(shard, shard.stat().st_size - 2)
    done = called(main, *flags(tmp_path / "data", tmp_path / "run"))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"train: {shard}: truncated or altered: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "run" / "checkpoints").exists()
