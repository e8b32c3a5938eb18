"""Checkpoints written while training goes on, by one and by two processes: the same bits, all or nothing."""

import dataclasses
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.errors import InputError
from model.checkpoint import fault_of, list_checkpoints, step_of
from tests.helpers.groups import run_on_ranks
from tests.helpers.runs import assert_same_tensors, curve, rows, status, tensors_of, tiny_config, with_save
from train import loop
from train.config import Config
from train.main import run
from train.processes.group import ProcessGroup
from train.processes.stop_requests import StopRequests
from train.run import checkpoints

STEPS = 30


def train_both_ways(group: ProcessGroup, sync: Config, asynchronous: Config) -> dict[int, int]:
    """Train synchronously, then asynchronously with slow writes: by step of a save, the step reached meanwhile."""
    run(sync, group)
    reached, seal = {}, checkpoints._seal

    def seal_slowly(temporary: Path, state: dict[str, Any]) -> None:
        step = state["progress"]["step"]
        end = time.monotonic() + 20
        while (now := curve(asynchronous.directory)[-1][0]) < min(step + 2, STEPS) and time.monotonic() < end:
            time.sleep(0.02)
        reached[step] = now
        seal(temporary, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "_seal", seal_slowly)
        run(asynchronous, group)
    return reached


@pytest.mark.parametrize("world", [1, 2])
def test_training_goes_on_meanwhile_and_what_is_written_is_the_step_it_began_at(
    tiny_data: Path, tmp_path: Path, world: int
) -> None:
    sync = with_save(tiny_config(tiny_data, tmp_path / "sync", steps=STEPS), every=7)
    other = with_save(tiny_config(tiny_data, tmp_path / "async", steps=STEPS), every=7, mode="async")
    reached = run_on_ranks(world, train_both_ways, sync, other)[0]
    assert list(reached) == [7, 14, 21, 28, 30]
    assert all(now >= min(step + 2, STEPS) for step, now in reached.items())
    assert curve(other.directory) == curve(sync.directory)
    assert status(other.directory)["state"] == "done"
    both = list_checkpoints(sync.directory), list_checkpoints(other.directory)
    assert [step_of(path) for path in both[0]] == [step_of(path) for path in both[1]] == list(reached)
    for left, right in zip(*both, strict=True):
        assert fault_of(right) is None
        assert_same_tensors(tensors_of(left), tensors_of(right))


def train_with_a_save_that_fails_on_one_rank(group: ProcessGroup, config: Config, fault: Exception) -> str:
    sound, calls = checkpoints.dcp.FileSystemWriter.write_data, iter(range(100))

    def write_data(self: Any, *args: Any) -> Any:
        if next(calls) == 1 and group.rank == group.world - 1:
            raise fault
        return sound(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints.dcp.FileSystemWriter, "write_data", write_data)
        try:
            run(config, group)
        except InputError as error:
            return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("world", "fault"), [(1, KeyError("odd")), (2, OSError(28, "No space left on device"))], ids=["one", "two"]
)
def test_what_one_rank_cannot_write_ends_all_and_is_no_checkpoint(
    tiny_data: Path, tmp_path: Path, world: int, fault: Exception
) -> None:
    config = with_save(tiny_config(tiny_data, tmp_path / "run", steps=STEPS), every=10, mode="async")
    outcomes = run_on_ranks(world, train_with_a_save_that_fails_on_one_rank, config, fault)
    assert len(set(outcomes)) == 1
    assert "step_00000020: not saved; rank 0: " in outcomes[0] and str(fault) in outcomes[0]
    assert "\n" not in outcomes[0]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000010"]
    assert status(tmp_path / "run")["state"] == "failed"
    assert 20 <= curve(tmp_path / "run")[-1][0] < STEPS
    run_on_ranks(world, run_again, config)
    assert status(tmp_path / "run")["state"] == "done"


def run_again(group: ProcessGroup, config: Config) -> None:
    run(config, group)


def stop_while_saving(group: ProcessGroup, config: Config) -> None:
    """Rank 0 hears a stop while the checkpoint of step 50 is being written."""
    seal, sound = checkpoints._seal, StopRequests.wanted
    is_sealing: list[bool] = []

    def seal_slowly(*args: Any) -> None:
        is_sealing.append(True)
        time.sleep(0.2)
        seal(*args)

    def wanted(self: StopRequests) -> bool:
        self.reason = self.reason or ("test" if is_sealing else None)
        return sound(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "_seal", seal_slowly)
        patch.setattr(StopRequests, "wanted", wanted)
        run(config, group)


@pytest.mark.parametrize("world", [1, 2])
def test_a_stop_finishes_the_save_under_way_and_makes_its_own(tiny_data: Path, tmp_path: Path, world: int) -> None:
    config = with_save(tiny_config(tiny_data, tmp_path / "run", steps=1000), every=50, mode="async")
    run_on_ranks(world, stop_while_saving, config)
    found = status(tmp_path / "run")
    assert (found["state"], found["reason"]) == ("stopped", "test")
    assert [step_of(path) for path in list_checkpoints(tmp_path / "run")] == [50, found["step"]]
    assert all(fault_of(path) is None for path in list_checkpoints(tmp_path / "run"))


def save_by_the_clock(group: ProcessGroup, config: Config) -> None:
    """With a clock that strikes once a step on rank 0, and that always says it is late on the others."""
    take_step, ticks = loop.take_step, [0]

    def ticking(this: loop.Run) -> loop.StepResult:
        ticks[0] += 1
        return take_step(this)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "take_step", ticking)
        clock = SimpleNamespace(monotonic=lambda: ticks[0] * (1.0 if group.is_main else 1e6))
        patch.setattr(checkpoints, "time", clock)
        run(config, group)


@pytest.mark.parametrize("world", [1, 2])
def test_saves_by_the_clock_of_rank_0(tiny_data: Path, tmp_path: Path, world: int) -> None:
    config = tiny_config(tiny_data, tmp_path / "run", steps=40)
    config = dataclasses.replace(config, validate=dataclasses.replace(config.validate, every=None))
    run_on_ranks(world, save_by_the_clock, with_save(config, every=1000, every_seconds=10))
    # Step 10 says that it is time; the host knows that after step 11 and saves after step 12, and so on.
    assert [step_of(path) for path in list_checkpoints(tmp_path / "run")] == [12, 24, 36, 40]
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, 41))


def test_a_stage_left_unwritten_by_a_kill_is_cleared_away(tiny_data: Path, tmp_path: Path) -> None:
    config = with_save(tiny_config(tiny_data, tmp_path / "run", steps=10), every=5, mode="async")
    run(config, ProcessGroup(0, 1, torch.device("cpu")))
    newest = list_checkpoints(tmp_path / "run")[-1]
    shutil.move(newest, newest.with_name(f".{newest.name}.writing"))  # sealed, and killed before the rename
    run(config, ProcessGroup(0, 1, torch.device("cpu")))
    assert fault_of(list_checkpoints(tmp_path / "run")[-1]) is None
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2


def test_a_run_that_fails_gives_its_directory_up_only_when_its_thread_is_done(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever starts the same run next must meet no writer."""
    take_step, seal, done = loop.take_step, checkpoints._seal, []

    def failing(this: loop.Run) -> loop.StepResult:
        if this.state.progress.step == 7:
            raise RuntimeError("out of luck")
        return take_step(this)

    def seal_slowly(*args: Any) -> None:
        time.sleep(0.3)
        seal(*args)
        done.append((tmp_path / "run" / "lock.json").exists())

    monkeypatch.setattr(loop, "take_step", failing)
    monkeypatch.setattr(checkpoints, "_seal", seal_slowly)
    config = with_save(tiny_config(tiny_data, tmp_path / "run", steps=10), every=5, mode="async")
    with pytest.raises(RuntimeError, match="out of luck"):
        run(config, ProcessGroup(0, 1, torch.device("cpu")))
    assert done == [True]
    assert not (tmp_path / "run" / "lock.json").exists()
