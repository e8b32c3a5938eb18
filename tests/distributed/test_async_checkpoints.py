"""Checkpoints written during training, on one and on two processes: the same bits, complete or absent."""

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter

from common.errors import InputError
from model.checkpoint import fault_of, list_checkpoints, step_of
from tests.distributed.test_exact import train_all
from tests.helpers.groups import run_on_ranks
from tests.helpers.runs import assert_same_tensors, curve, rows, status, tensors_of, tiny_config, with_save
from tests.helpers.steps import before_each_step
from train import loop
from train.config import Config
from train.main import run
from train.processes.group import ProcessGroup
from train.processes.stop_requests import StopRequests
from train.run import checkpoints

STEPS = 30


def train_both_ways(group: ProcessGroup, sync: Config, asynchronous: Config) -> dict[int, int]:
    """Train with synchronous, then with slow asynchronous saves; return the step reached during each of the latter."""
    run(sync, group)
    reached, seal = {}, checkpoints.seal

    def seal_slowly(temporary: Path, parts: list[Any], state: dict[str, Any], **more: Any) -> None:
        step = state["progress"]["step"]
        end = time.monotonic() + 20
        while (now := curve(asynchronous.directory)[-1][0]) < min(step + 2, STEPS) and time.monotonic() < end:
            time.sleep(0.02)
        reached[step] = now
        seal(temporary, parts, state, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "seal", seal_slowly)
        run(asynchronous, group)
    return reached


@pytest.mark.parametrize("world", [1, 2])
def test_training_goes_on_and_the_checkpoint_is_of_the_step_at_which_it_began(
    tiny_data: Path, tmp_path: Path, world: int
) -> None:
    sync = with_save(tiny_config(tiny_data, tmp_path / "sync", steps=STEPS), every=14)
    other = with_save(tiny_config(tiny_data, tmp_path / "async", steps=STEPS), every=14, mode="async")
    reached = run_on_ranks(world, train_both_ways, sync, other)[0]
    assert list(reached) == [14, 28, 30]
    assert all(now >= min(step + 2, STEPS) for step, now in reached.items())
    assert curve(other.directory) == curve(sync.directory)
    assert status(other.directory)["state"] == "done"
    both = list_checkpoints(sync.directory), list_checkpoints(other.directory)
    assert [step_of(path) for path in both[0]] == [step_of(path) for path in both[1]] == list(reached)
    for left, right in zip(*both, strict=True):
        assert fault_of(right) is None
        assert_same_tensors(tensors_of(left), tensors_of(right))


def fail_to_save_on_one_rank(group: ProcessGroup, config: Config, fault: Exception) -> str:
    """Train with a second save that fails on the last rank; return the error that this rank raises."""
    write_data, calls = FileSystemWriter.write_data, iter(range(100))

    def failing(self: Any, *args: Any) -> Any:
        if next(calls) == 1 and group.rank == group.world - 1:
            raise fault
        return write_data(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileSystemWriter, "write_data", failing)
        try:
            run(config, group)
        except InputError as error:
            return str(error)
    return "no error"


@pytest.mark.parametrize(("world", "fault"), [(1, KeyError("odd")), (2, OSError(28, "No space left on device"))])
def test_a_save_that_fails_on_one_rank_ends_all_and_leaves_no_checkpoint(
    tiny_data: Path, tmp_path: Path, world: int, fault: Exception
) -> None:
    config = tiny_config(tiny_data, tmp_path / "run", steps=STEPS)
    config = with_save(config, every=10, mode="async", on_failure="stop")
    errors = run_on_ranks(world, fail_to_save_on_one_rank, config, fault)
    assert len(set(errors)) == 1
    assert f"step_00000020: not saved; rank {world - 1}: " in errors[0] and str(fault) in errors[0]
    assert "\n" not in errors[0]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000010"]
    assert status(tmp_path / "run")["state"] == "failed" and "not saved" in status(tmp_path / "run")["reason"]
    assert 20 <= curve(tmp_path / "run")[-1][0] < STEPS
    run_on_ranks(world, train_all, [config])
    assert status(tmp_path / "run")["state"] == "done"


def stop_while_saving(group: ProcessGroup, config: Config) -> None:
    """Train; rank 0 is asked to stop while the checkpoint of step 50 is being written."""
    seal, wanted = checkpoints.seal, StopRequests.wanted
    is_sealing: list[bool] = []

    def seal_slowly(*args: Any, **more: Any) -> None:
        is_sealing.append(True)
        time.sleep(0.2)
        seal(*args, **more)

    def wanted_while_sealing(self: StopRequests) -> bool:
        self.reason = self.reason or ("test" if is_sealing else None)
        return wanted(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "seal", seal_slowly)
        patch.setattr(StopRequests, "wanted", wanted_while_sealing)
        run(config, group)


def test_a_stop_finishes_the_pending_save_and_makes_its_own(tiny_data: Path, tmp_path: Path) -> None:
    config = with_save(tiny_config(tiny_data, tmp_path / "run", steps=1000), every=50, mode="async")
    run_on_ranks(2, stop_while_saving, config)
    ended = status(tmp_path / "run")
    assert (ended["state"], ended["reason"]) == ("stopped", "test")
    assert [step_of(path) for path in list_checkpoints(tmp_path / "run")] == [50, ended["step"]]
    assert all(fault_of(path) is None for path in list_checkpoints(tmp_path / "run"))


def save_by_the_clock(group: ProcessGroup, config: Config) -> None:
    """Train with a clock that advances by a second a step on rank 0, and that is always far ahead on the others."""
    steps: list[loop.Run] = []
    clock = SimpleNamespace(monotonic=lambda: len(steps) * (1.0 if group.is_main else 1e6))
    with pytest.MonkeyPatch.context() as patch, before_each_step(steps.append):
        patch.setattr(checkpoints, "time", clock)
        run(config, group)


def test_saves_follow_the_clock_of_rank_0(tiny_data: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_data, tmp_path / "run", steps=40)
    config = replace(config, validate=replace(config.validate, every=None))
    run_on_ranks(2, save_by_the_clock, with_save(config, every=1000, every_seconds=10))
    # A save is due in step 10; the host reads that after step 11 and saves after step 12, and so on.
    assert [step_of(path) for path in list_checkpoints(tmp_path / "run")] == [12, 24, 36, 40]
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, 41))


def test_a_run_that_fails_releases_its_directory_only_after_its_thread_is_done(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the next start of the run would meet another writer."""
    write_part, was_locked = checkpoints.write_part, []

    def fail(this: loop.Run) -> None:
        if this.state.progress.step == 7:
            raise RuntimeError("out of luck")

    def write_slowly(*args: Any) -> Any:
        time.sleep(0.3)
        part = write_part(*args)
        was_locked.append((tmp_path / "run" / "lock.json").exists())
        return part

    monkeypatch.setattr(checkpoints, "write_part", write_slowly)
    config = with_save(tiny_config(tiny_data, tmp_path / "run", steps=10), every=5, mode="async")
    with pytest.raises(RuntimeError, match="out of luck"), before_each_step(fail):
        run(config, ProcessGroup(0, 1, torch.device("cpu")))
    assert was_locked == [True]
    assert not (tmp_path / "run" / "lock.json").exists()
