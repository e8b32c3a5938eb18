"""A rank that stops: the others exit and name it, and the same command continues the run."""

import faulthandler
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.helpers.groups import run_on_ranks, start_on_ranks
from tests.helpers.runs import assert_same_tensors, curve, final_tensors, rows, status, tiny_config, tiny_flags
from tests.helpers.steps import before_each_step
from train import loop
from train.command_line import parse
from train.config import Config, ParallelConfig
from train.guards import watchdog
from train.guards.watchdog import Watchdog, verdict
from train.main import run
from train.presets import PRESETS
from train.processes.group import LATER_SECONDS, ProcessGroup
from train.run.directory import RunDirectory

WORLD = 3
STEPS = 24  # The run hangs in step 16, after a save at 10.
LIMIT_SECONDS = 4.0
HOST = socket.gethostname()
ALONE = ProcessGroup(0, 1, torch.device("cpu"))


def configured(data: Path, run_dir: Path) -> Config:
    limit = ["--parallel.timeout-seconds", str(LIMIT_SECONDS)]
    return parse([*tiny_flags(data, run_dir), "--train.steps", str(STEPS), *limit], PRESETS)


def lose_rank_1_after_a_suspension(group: ProcessGroup, config: Config, folder: Path) -> None:
    """Train; wait in step 13 for the file `go`, so that the test can suspend all; rank 1 stops before step 16."""
    watchdog.GRACE_SECONDS = 2.0

    def stop(run: loop.Run) -> None:
        if run.state.progress.step == 12 and group.is_main:
            (folder / "reached").touch()
            while not (folder / "go").exists():
                time.sleep(0.01)
        if run.state.progress.step == 15 and group.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)

    with before_each_step(stop):
        run(config, group)


def hang(config: Config, folder: Path) -> None:
    """Train on three ranks; suspend all for longer than the limit; wait until the ranks but rank 1 have exited."""
    (folder / "meet").mkdir()
    context = start_on_ranks(WORLD, str(folder / "meet"), lose_rank_1_after_a_suspension, config, folder)
    try:
        while not (folder / "reached").exists():
            assert all(process.is_alive() for process in context.processes)
            time.sleep(0.01)
        for number, seconds in ((signal.SIGSTOP, LIMIT_SECONDS + 1.5), (signal.SIGCONT, 0)):
            for pid in context.pids():
                os.kill(pid, number)
            time.sleep(seconds)
        (folder / "go").touch()
        for rank in (0, 2):
            context.processes[rank].join(60)
            assert context.processes[rank].exitcode == 1
    finally:
        for process in context.processes:
            process.kill()
            process.join()


def report_of(run_dir: Path, rank: int) -> tuple[dict[str, Any], str]:
    header, _, stacks = (run_dir / "hang" / "attempt_1" / f"rank_{rank:05}.txt").read_text().partition("\n")
    return json.loads(header), stacks


def train_and_read_timeouts(group: ProcessGroup, configs: list[Config]) -> list[float]:
    """Train all runs to their end; return each process group's time-out in seconds afterwards."""
    groups = (dist.group.WORLD, dist.new_group(backend="gloo"))
    for config in configs:
        run(config, group)
    return [each._get_backend(torch.device("cpu")).options._timeout.total_seconds() for each in groups]  # type: ignore[union-attr]


@pytest.mark.long(reason="processes that hang for seconds; verdicts are in `make test`")
def test_a_stopped_rank_is_named_with_stacks_and_the_same_command_continues_bitwise(
    tiny_data: Path, tmp_path: Path
) -> None:
    hung, whole = configured(tiny_data, tmp_path / "hung"), configured(tiny_data, tmp_path / "whole")
    hang(hung, tmp_path)
    ended, folder = status(hung.directory), hung.directory / "hang" / "attempt_1"
    assert ended["state"] == "failed" and ended["step"] == 10
    silent = f"hang: rank 1 on {HOST} gave no sign, stopped or gone"
    assert ended["reason"].startswith(f'{silent}, while rank 0 waited at "step 16')
    assert ended["reason"].endswith(f"every rank's stacks are in {folder}")
    assert ended["reason"] in (hung.directory / "log.txt").read_text()
    assert not (hung.directory / "lock.json").exists(), "rank 0 released it"
    for rank in (0, 2):
        report, stacks = report_of(hung.directory, rank)
        assert (report["rank"], report["host"]) == (rank, HOST) and report["silent_seconds"] > 0
        assert "in accumulate_gradients" in stacks and "watchdog.py" in stacks, "the stacks of every thread"
        recorded = json.loads((folder / f"rank_{rank:05}.gloo.json").read_text())
        assert "gloo:all_reduce" in {entry["profiling_name"] for entry in recorded["entries"]}
        assert report["collectives"] == 1 + recorded["entries"][-1]["record_id"]
    assert not (folder / "rank_00001.txt").exists()

    timeouts = run_on_ranks(WORLD, train_and_read_timeouts, [whole, hung])
    assert timeouts == [[LIMIT_SECONDS + LATER_SECONDS] * 2] * WORLD
    assert "continuing from" in (hung.directory / "log.txt").read_text()
    assert status(hung.directory) == {"state": "done", "step": STEPS, "reason": None, "attempt": 2}
    assert curve(hung.directory) == curve(whole.directory)
    assert_same_tensors(final_tensors(hung.directory), final_tensors(whole.directory))


def test_the_long_limit_holds_until_the_first_step_is_done(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a validation before that step. No thread and no folder stay behind."""
    calls: list[list[bool]] = []
    monkeypatch.setattr(
        Watchdog, "expect_steps", lambda self: calls.append(["loss" in row for row in rows(tmp_path / "run")])
    )
    run(tiny_config(tiny_data, tmp_path / "run", steps=3), ALONE)
    assert calls == [[False, True]]
    assert "watchdog" not in {thread.name for thread in threading.enumerate()}
    assert not (tmp_path / "run" / "hang").exists()


@pytest.fixture
def directory(tiny_data: Path, tmp_path: Path) -> Iterator[RunDirectory]:
    with RunDirectory(tiny_config(tiny_data, tmp_path / "run"), "fingerprint", ALONE) as directory:
        yield directory


def test_a_single_process_is_watched_too(directory: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    exit_statuses: list[int] = []

    def leave(status: int) -> None:
        faulthandler.cancel_dump_traceback_later()
        exit_statuses.append(status)
        watched._stop.set()

    monkeypatch.setattr(os, "_exit", leave)
    with Watchdog(ParallelConfig(init_timeout_seconds=4.0, timeout_seconds=0.1), ALONE, directory) as watched:
        watched.heartbeat("compiling")
        time.sleep(1.0)
        assert exit_statuses == [], "the short limit does not hold yet"
        watched.expect_steps()
        watched.heartbeat("step 2")
        watched._thread.join(60)
    assert exit_statuses == [1]
    assert status(directory.path)["state"] == "failed"
    assert status(directory.path)["reason"].startswith(f'hang: rank 0 on {HOST} is at "step 2" for 0 s')
    assert "test_a_single_process_is_watched_too" in report_of(directory.path, 0)[1]


def test_a_run_directory_taken_over_by_another_process_is_not_written_to(directory: RunDirectory) -> None:
    before = status(directory.path)
    (directory.path / "lock.json").write_text("another's")
    directory.report(7)
    directory.fail("hang")
    directory.record({"micro_batch": 1})
    assert status(directory.path) == before
    assert json.loads((directory.path / "config.json").read_text())["found"] == {}
    assert (directory.path / "lock.json").read_text() == "another's"


def test_a_rank_that_wakes_up_after_the_verdict_exits_and_leaves_it(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    exit_statuses: list[int] = []
    monkeypatch.setattr(os, "_exit", exit_statuses.append)
    with pytest.raises(RuntimeError), Watchdog(ParallelConfig(), ALONE, directory):
        folder = directory.path / "hang" / "attempt_1"
        folder.mkdir(parents=True)
        (folder / "verdict.txt").touch()
        raise RuntimeError("connection closed by peer")
    assert exit_statuses == [1]


def report(rank: int, beats: int, where: str, collectives: int | None) -> dict[str, Any]:
    return {"rank": rank, "beats": beats, "where": where, "silent_seconds": 600.0, "collectives": collectives}


RANK_0 = '"step 4" for 600 s (collectives called: 20)'


@pytest.mark.parametrize(
    ("reports", "expected"),
    [
        (
            [report(rank, 9, "step 4", 20) for rank in (0, 3)],
            f"rank 1 on b, rank 2 on b gave no sign, stopped or gone, while rank 0 waited at {RANK_0}",
        ),
        (
            [report(rank, 9 - (rank > 1), "data" if rank > 1 else "step 4", 20 - (rank > 1)) for rank in range(4)],
            'rank 2 on b, rank 3 on c are furthest behind, at "data" for 600 s (collectives called: 19); '
            f"rank 0 is at {RANK_0}",
        ),
        (
            [report(rank, 9, "step 4", 20 - (rank == 1)) for rank in range(4)],
            f'rank 1 on b is furthest behind, at "step 4" for 600 s (collectives called: 19); rank 0 is at {RANK_0}',
        ),
        ([report(rank, 9, "step 4", 20) for rank in range(4)], f"all ranks are at the same place, {RANK_0}"),
        (
            [report(rank, 9 - (rank == 3), "step 4", None if rank else 20) for rank in range(4)],
            'rank 3 on c is furthest behind, at "step 4" for 600 s (collectives called: unknown); '
            f"rank 0 is at {RANK_0}",
        ),
    ],
)
def test_the_verdict(reports: list[dict[str, Any]], expected: str) -> None:
    assert verdict({each["rank"]: each for each in reports}, ["a", "b", "b", "c"]) == expected
