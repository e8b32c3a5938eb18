"""Disks that are full, read-only or refuse a deletion: real ones, which a forked process mounts for itself.

If the system does not allow mounts, a limit on file sizes and missing permissions take their place.
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
from tests.helpers.steps import before_each_step
from train import loop
from train.command_line import parse
from train.config import Config
from train.main import main, run
from train.presets import PRESETS
from train.processes.group import ProcessGroup

SMALL = "24m"  # room for a checkpoint of the tiny run and the spare bytes that a save requires


def flags(data: Path, run_dir: Path, *more: str) -> list[str]:
    return [*tiny_flags(data, run_dir), "--train.steps", "30", *more]


@pytest.fixture(scope="module")
def whole(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 30 steps with checkpoints at 10, 20 and 30 on a good disk."""
    run_dir = tmp_path_factory.mktemp("disk") / "run"
    run(parse(flags(tiny_data, run_dir), PRESETS), ProcessGroup(0, 1, torch.device("cpu")))
    return run_dir


@dataclass(frozen=True)
class Disk:
    """A small file system at `folder`; without mounts, a limit on the size of every file."""

    folder: Path
    can_mount: bool

    def __post_init__(self) -> None:
        self.folder.mkdir()
        if self.can_mount:
            mount("-t", "tmpfs", "-o", f"size={SMALL}", "small", str(self.folder))

    def fill(self, leaving: int) -> None:
        """Fill the disk up to `leaving` bytes, as another program's files would."""
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
    # Permissions hold for root too, once it has given up its capabilities (capset(2), version 3).
    ctypes.CDLL(None).capset(struct.pack("Ii", 0x20080522, 0), bytes(24))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_run(run_dir: Path, whole: Path) -> None:
    assert curve(run_dir) == curve(whole)
    assert validations(run_dir) == validations(whole)
    assert_same_tensors(final_tensors(run_dir), final_tensors(whole))


def train_on_a_disk_that_fills_up(can_mount: bool, data: Path, whole: Path, folder: Path) -> None:
    """Fill the disk during a save, then between saves, and start on a full disk; free it and train to the end."""
    disk, run_dir, usage = Disk(folder, can_mount), folder / "run", shutil.disk_usage
    cut_back(whole, run_dir, step=10)

    def fill_after_the_check(path: Any) -> Any:
        free = usage(path)
        disk.fill(leaving=60_000)
        return free

    def fill_before_step_13(run: loop.Run) -> None:
        if run.state.progress.step == 12:
            disk.fill(leaving=0)

    shutil.disk_usage = fill_after_the_check
    refused = called(main, *flags(data, run_dir, "--save.on-failure", "stop"))
    shutil.disk_usage = usage
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused.stderr
    assert f"train: {run_dir}/checkpoints/step_00000020: not saved" in refused.stderr
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_00000010"]
    assert status(run_dir)["state"] == "failed" and "not saved" in status(run_dir)["reason"]
    assert len(rows(run_dir)) == 21 and not (run_dir / "lock.json").exists()

    disk.free()
    with before_each_step(fill_before_step_13):
        refused = called(main, *flags(data, run_dir, "--save.every", "100", "--save.on-failure", "stop"))
    warning, error = refused.stderr.splitlines()
    assert refused.returncode == 2 and warning == f"warning: {run_dir}/status.json still says running"
    assert error.startswith(f"train: {run_dir}: cannot be written ([Errno ")
    assert error.endswith("; make room there, then give the same command again")
    assert status(run_dir)["step"] == 10 and status(run_dir)["attempt"] == 3
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert 12 <= len(lines) < 30, "it must stop at once, not at the next save"
    assert not (run_dir / "lock.json").exists() and fault_of(list_checkpoints(run_dir)[-1]) is None

    before = contents(run_dir)
    refused = called(main, *flags(data, run_dir))
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert f"train: {run_dir}: cannot be written" in refused.stderr and "make room" in refused.stderr
    assert contents(run_dir) == before
    disk.free()
    assert called(main, *flags(data, run_dir)).returncode == 0
    assert_same_run(run_dir, whole)
    assert status(run_dir) == {"state": "done", "step": 30, "reason": None, "attempt": 4}


def test_a_full_disk_ends_the_run_with_its_checkpoints_intact(tiny_data: Path, whole: Path, tmp_path: Path) -> None:
    run_with_own_mounts(train_on_a_disk_that_fills_up, tiny_data, whole, tmp_path / "small")


def train_with_read_only_folders(can_mount: bool, data: Path, run_dir: Path, blocked: Path) -> None:
    """Train on read-only data, beside a checkpoint that cannot be deleted, and in a read-only run directory."""
    for folder in (blocked, data, run_dir / "checkpoints" / "step_00000010"):
        make_read_only(folder, can_mount)
    before = contents(blocked)
    refused = called(main, *flags(data, blocked))
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused.stderr
    assert f"train: {blocked}: cannot be written" in refused.stderr
    assert contents(blocked) == before
    assert called(verify.main, str(data)).returncode == 0

    first, again = (called(main, *flags(data, run_dir, "--save.keep", "1")) for _ in range(2))
    assert first.returncode == 0 and "step_00000010 could not be deleted: [Errno " in first.stderr, first.stderr
    assert first.stderr.count("\n") == 1
    assert (again.returncode, again.stderr) == (0, "") and "done at step 30" in again.stdout
    kept = [run_dir / "checkpoints" / name for name in ("step_00000020", "step_00000030")]
    assert list_checkpoints(run_dir)[-2:] == kept and [fault_of(path) for path in kept] == [None, None]


def test_only_the_run_directory_must_be_writable(tiny_data: Path, whole: Path, tmp_path: Path) -> None:
    data = shutil.copytree(tiny_data, tmp_path / "data")
    for name in ("blocked", "run"):
        cut_back(whole, tmp_path / name, step=20)
    run_with_own_mounts(train_with_read_only_folders, data, tmp_path / "run", tmp_path / "blocked")
    assert_same_run(tmp_path / "run", whole)


def lose_the_disk_on_rank_0(group: ProcessGroup, config: Config) -> str:
    """Train; from step 12 on no file of rank 0 may grow beyond the size that metrics.jsonl has then."""
    metrics = config.directory / "metrics.jsonl"

    def limit(run: loop.Run) -> None:
        if run.state.progress.step == 12 and group.is_main:
            resource.setrlimit(resource.RLIMIT_FSIZE, (metrics.stat().st_size, resource.RLIM_INFINITY))

    try:
        with before_each_step(limit):
            run(config, group)
    except InputError as error:
        return str(error)
    return "trained on"


def test_rows_that_rank_0_cannot_write_end_every_rank(tiny_data: Path, whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    cut_back(whole, run_dir, step=10)
    config = parse(flags(tiny_data, run_dir, "--save.every", "100", "--save.on-failure", "stop"), PRESETS)
    first, second = run_on_ranks(2, lose_the_disk_on_rank_0, config)
    assert first == second and first.startswith(f"{run_dir}: cannot be written ([Errno ")
    ended = status(run_dir)
    assert (ended["state"], ended["step"]) == ("failed", 10) and "cannot be written" in ended["reason"]
    assert [row["step"] for row in rows(run_dir) if "loss" in row] in ([*range(1, 12)], [*range(1, 13)])
    assert [path.name for path in list_checkpoints(run_dir)] == ["step_00000010"]


def test_a_truncated_shard_is_named_before_the_first_step(tiny_data: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        data = shutil.copytree(tiny_data, tmp_path / split)
        shard = data / f"{split}_000000.bin"
        os.truncate(shard, shard.stat().st_size - 2)
        done = called(main, *flags(data, tmp_path / "run"))
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith(f"train: {shard}: truncated or altered: ") and done.stderr.count("\n") == 1
        assert not (tmp_path / "run" / "checkpoints").exists()
