"""Saves that fail while the disk is full or one rank cannot write: the run goes on, bit for bit, and loses no row."""

import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import InputError
from model.checkpoint import fault_of, list_checkpoints, step_of
from tests.distributed.test_disk import Disk
from tests.helpers.groups import run_on_ranks, run_with_own_mounts
from tests.helpers.runs import (
    assert_same_tensors,
    curve,
    final_tensors,
    rows,
    status,
    tensors_of,
    tiny_config,
    tiny_flags,
    torchrun,
    validations,
    with_save,
)
from tests.helpers.steps import before_each_step
from train import loop
from train.config import Config
from train.main import run
from train.metrics.line_file import LineFile
from train.processes.group import ProcessGroup

STEPS = 50
UNLIMITED = resource.RLIM_INFINITY


@pytest.fixture(scope="module")
def whole(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on a good disk."""
    run_dir = tmp_path_factory.mktemp("good") / "run"
    run(tiny_config(tiny_data, run_dir, steps=STEPS), ProcessGroup(0, 1, torch.device("cpu")))
    return run_dir


def limit_files(num_bytes: int) -> None:
    """Let no file of this process grow beyond so many bytes, as if the disk were full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, UNLIMITED))


def train_with_a_full_disk(
    group: ProcessGroup, config: Config, rank: int, full_at: int, free_at: int | None
) -> tuple[str, list[dict[str, Any]]]:
    """Train; `rank` cannot write from the step after `full_at` up to `free_at`. Return the error and all statuses."""
    seen = []

    def change(this: loop.Run) -> None:
        step = this.state.progress.step
        if step == full_at and group.rank == rank:
            limit_files(1500)
        if step == free_at:
            limit_files(UNLIMITED)
        time.sleep(0.02)  # so that an asynchronous save ends before the next change
        seen.append(status(config.directory))

    try:
        with before_each_step(change):
            run(config, group)
    except InputError as error:
        return str(error), seen
    finally:
        limit_files(UNLIMITED)
    return "", seen


def assert_same_run(run_dir: Path, whole: Path) -> None:
    """Compare all that does not depend on the clock; each row must be there once, in order."""
    assert curve(run_dir) == curve(whole) and validations(run_dir) == validations(whole)
    assert [row["step"] for row in rows(run_dir)] == [row["step"] for row in rows(whole)]
    assert_same_tensors(final_tensors(run_dir), final_tensors(whole))
    assert all(fault_of(checkpoint) is None for checkpoint in list_checkpoints(run_dir))
    assert not list((run_dir / "checkpoints").glob(".*"))


@pytest.mark.parametrize(("world", "rank", "mode"), [(1, 0, "async"), (2, 0, "sync"), (2, 1, "async"), (2, 1, "sync")])
def test_a_run_goes_on_after_saves_that_failed(
    tiny_data: Path, whole: Path, tmp_path: Path, world: int, rank: int, mode: str
) -> None:
    config = with_save(tiny_config(tiny_data, tmp_path / "run", steps=STEPS), mode=mode)
    outcomes = run_on_ranks(world, train_with_a_full_disk, config, rank, 15, 35)
    assert [error for error, _ in outcomes] == [""] * world
    saved = [step_of(path) for path in list_checkpoints(tmp_path / "run")]
    assert saved == [10, 40, 50], "those of steps 20 and 30 failed"
    assert_same_run(tmp_path / "run", whole)
    for checkpoint in list_checkpoints(tmp_path / "run"):
        assert_same_tensors(tensors_of(checkpoint), tensors_of(whole / "checkpoints" / checkpoint.name))
    assert status(tmp_path / "run") == {"state": "done", "step": STEPS, "reason": None, "attempt": 1}

    log = (tmp_path / "run" / "log.txt").read_text()
    warnings = [line for line in log.splitlines() if "training goes on" in line]
    assert len(warnings) == 2 and all("(failure 1 of 10)" in line for line in warnings), "counted once a minute"
    during = outcomes[0][1][34]
    assert (during["state"], during["step"]) == ("running", 10)
    if rank == 1:
        assert "step_00000030: not saved; rank 1: " in during["reason"]
        assert during["reason"].endswith("; trying again")
        assert "step_00000020: not saved; rank 1: " in warnings[0]
    assert outcomes[0][1][-1]["reason"] is None, "the save of step 40 succeeded"


@pytest.mark.parametrize("rank", [0, 1])
def test_so_many_failures_in_a_row_end_the_run(tiny_data: Path, tmp_path: Path, rank: int) -> None:
    config = with_save(tiny_config(tiny_data, tmp_path / "run", steps=STEPS), failures_in_a_row=3, retry_seconds=1e-6)
    (first, seen), (second, _) = run_on_ranks(2, train_with_a_full_disk, config, rank, 15, None)
    assert first == second and first.startswith("3 saves in a row have failed, the last: "), first
    assert len(seen) < 40 and [step_of(path) for path in list_checkpoints(tmp_path / "run")] == [10]
    assert status(tmp_path / "run")["state"] == "failed"
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def test_a_failed_save_is_tried_again_before_the_next_is_due(tiny_data: Path, tmp_path: Path) -> None:
    config = with_save(tiny_config(tiny_data, tmp_path / "run", steps=STEPS), every=20, retry_seconds=0.05)
    ((error, _),) = run_on_ranks(1, train_with_a_full_disk, config, 0, 15, 25)
    saved = [step_of(path) for path in list_checkpoints(tmp_path / "run")]
    assert error == "" and 25 <= saved[0] < 40 and saved[1:] == [40, 50]


def free_after(seconds: float) -> None:
    threading.Timer(seconds, limit_files, (UNLIMITED,)).start()


@pytest.mark.parametrize(("seconds", "fails"), [(0.8, False), (None, True)])
def test_the_end_of_a_run_waits_for_the_disk_only_so_long(
    tiny_data: Path, whole: Path, tmp_path: Path, seconds: float | None, fails: bool
) -> None:
    config = with_save(tiny_config(tiny_data, tmp_path / "run", steps=STEPS), retry_seconds=2 if fails else 20)

    def fill(this: loop.Run) -> None:
        if this.state.progress.step == 45:
            limit_files(1500)
            if seconds is not None:
                free_after(seconds)

    try:
        with before_each_step(fill):
            run(config, ProcessGroup(0, 1, torch.device("cpu")))
    except InputError as error:
        assert fails and "then give the same command again" in str(error)
    finally:
        limit_files(UNLIMITED)
    saved = [step_of(path) for path in list_checkpoints(tmp_path / "run")]
    assert saved == ([10, 20, 30, 40] if fails else [10, 20, 30, 40, 50])
    if not fails:
        assert_same_run(tmp_path / "run", whole)
        assert status(tmp_path / "run") == {"state": "done", "step": STEPS, "reason": None, "attempt": 1}


def wait_for(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def train_under_torchrun(can_mount: bool, data: Path, folder: Path) -> str:
    """Train on two processes on a disk of 24 MB that is full for a while; return the output."""
    disk, run_dir = Disk(folder, can_mount), folder / "run"
    if not can_mount:
        return ""
    flags = [*tiny_flags(data, run_dir), "--train.steps", "200", "--save.mode", "async", "--save.keep", "1"]
    process = torchrun(2, *flags)
    wait_for(lambda: len(rows(run_dir)) > 30)
    disk.fill(leaving=0)
    assert process.stdout is not None
    output = ""
    while "training goes on" not in output:  # status.json may not fit on the disk
        line = process.stdout.readline()
        assert line, output
        output += line
    log_bytes = (run_dir / "log.txt").stat().st_size
    time.sleep(0.3)
    disk.free()
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and log_bytes < (run_dir / "log.txt").stat().st_size, output + rest
    assert [row["step"] for row in rows(run_dir) if "loss" in row] == list(range(1, 201))
    return output + str(rest)


def test_a_real_disk_that_is_full_for_a_while(tiny_data: Path, tmp_path: Path) -> None:
    output = run_with_own_mounts(train_under_torchrun, tiny_data, tmp_path / "small")
    assert "training goes on" in output and "Traceback" not in output


def test_lines_that_could_not_be_written_follow_once_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    file = LineFile(path)
    file.add("first")
    file.flush()
    try:
        limit_files(9)
        for line in ("second", "third"):
            with pytest.raises(OSError):
                file.add(line)
        with pytest.raises(OSError):
            file.flush()
        assert path.read_text() == "first\nsec"
    finally:
        limit_files(UNLIMITED)
    file.add("fourth")
    assert path.read_text() == "first\nsecond\nthird\nfourth\n"
    file.close()


def test_lines_are_written_again_if_a_flush_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows"
    file = LineFile(path)
    file.add("first")
    file.flush()
    file.add("second")

    def fail(descriptor: int) -> None:
        path.write_text("first\n\0\0\0\0")  # the kernel dropped the pages
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fail)
        with pytest.raises(OSError, match="Input/output"):
            file.flush()
    file.add("third")
    file.flush()
    assert path.read_text() == "first\nsecond\nthird\n"
    file.close()
