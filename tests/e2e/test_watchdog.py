"""Ranks that stop, block or are put to sleep: the others leave, say who it was, and the run goes on later."""

import dataclasses
import faulthandler
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.e2e.test_survival import children_of, finish, kill_everything, wait_for
from tests.helpers.groups import run_on_ranks, start_on_ranks
from tests.helpers.runs import (
    assert_same_tensors,
    curve,
    final_tensors,
    rows,
    status,
    tiny_config,
    tiny_flags,
    torchrun,
)
from train import loop
from train.config import Config, ParallelConfig, parse
from train.data import BatchPlan, TrainingSequences
from train.guards import watchdog
from train.guards.watchdog import Watchdog, verdict
from train.main import run
from train.presets import PRESETS
from train.processes import group
from train.processes.group import ProcessGroup
from train.run.directory import RunDirectory

WORLD = 3
STEPS = 24  # the hangs are at steps 13 to 16, after a save at 10
LIMIT_SECONDS = 4.0
HOST = socket.gethostname()
ALONE = ProcessGroup(0, 1, torch.device("cpu"))


def flags(data: Path, run_dir: Path) -> list[str]:
    return [*tiny_flags(data, run_dir), "--train.steps", str(STEPS), "--parallel.timeout-seconds", str(LIMIT_SECONDS)]


def configured(data: Path, run_dir: Path) -> Config:
    return parse(flags(data, run_dir), PRESETS)


def sleep_then_lose_rank_0(group: ProcessGroup, config: Config, folder: Path) -> None:
    """All wait in step 13 for the file `go`, for the test to put them to sleep; rank 0 never comes to step 16."""
    watchdog.GRACE_SECONDS = 2.0
    take_step = loop.take_step

    def stopping(run: loop.Run) -> loop.StepResult:
        if run.state.progress.step == 12 and group.rank == 0:
            (folder / "reached").touch()
            while not (folder / "go").exists():
                time.sleep(0.01)
        if run.state.progress.step == 15 and group.rank == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        return take_step(run)

    loop.take_step = stopping
    run(config, group)


def block_in_a_read_of_rank_2(group: ProcessGroup, config: Config) -> None:
    micro_batches = TrainingSequences.micro_batches

    def a_read_that_blocks(self: TrainingSequences, position: int, plan: BatchPlan, rank: int) -> Any:
        if rank == 2 and position // plan.sequences == 12:
            threading.Event().wait()
        return micro_batches(self, position, plan, rank)

    TrainingSequences.micro_batches = a_read_that_blocks  # type: ignore[method-assign]
    run(config, group)


@dataclasses.dataclass
class Hung:
    """Run directories that hung, how the processes of two of them ended, and what torchrun printed of the third."""

    stopped: Path
    silent: Path
    blocked: Path
    output: str
    silent_codes: list[int | None]
    blocked_codes: list[int | None]


HANGS = pytest.mark.long(
    reason="eight processes that hang for seconds, some under torchrun; verdicts are in `make test`"
)


@pytest.fixture(scope="module")
def hung(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hung]:
    """Three runs at once, since what they do is wait."""
    folder = tmp_path_factory.mktemp("hung")
    stopped, silent, blocked = (folder / name for name in ("stopped", "silent", "blocked"))
    for name in ("meet_silent", "meet_blocked"):
        (folder / name).mkdir()
    agent = torchrun(WORLD, *flags(tiny_data, stopped), script="tests/helpers/stopping_train.py")
    first = start_on_ranks(
        WORLD, str(folder / "meet_silent"), sleep_then_lose_rank_0, configured(tiny_data, silent), folder
    )
    second = start_on_ranks(
        WORLD, str(folder / "meet_blocked"), block_in_a_read_of_rank_2, configured(tiny_data, blocked)
    )
    try:
        suspend_all(first, folder)
        output = finish_without_rank_1(agent, stopped)
        codes = exit_codes(first, range(1, WORLD)), exit_codes(second, range(WORLD))
        assert (silent / "lock.json").exists(), "rank 0's, which lives"
        first.processes[0].kill()
        first.processes[0].join()
        yield Hung(stopped, silent, blocked, output, *codes)
    finally:
        kill_everything(agent)
        for process in [*first.processes, *second.processes]:
            process.kill()
            process.join()


def suspend_all(processes: mp.ProcessContext, folder: Path) -> None:
    """In the middle of a step, for longer than the limit."""
    while not (folder / "reached").exists():
        assert all(process.is_alive() for process in processes.processes)
        time.sleep(0.01)
    for pid in processes.pids():
        os.kill(pid, signal.SIGSTOP)
    time.sleep(LIMIT_SECONDS + 1.5)
    for pid in processes.pids():
        os.kill(pid, signal.SIGCONT)
    (folder / "go").touch()


def finish_without_rank_1(agent: "subprocess.Popen[str]", run_dir: Path) -> str:
    wait_for((run_dir / "hang" / "attempt_1" / "verdict.txt").exists, agent)
    for pid in filter(is_stopped, children_of(agent.pid)):
        os.kill(pid, signal.SIGKILL)  # as torchrun does half a minute after the others have left
    return finish(agent)


def is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except (FileNotFoundError, ProcessLookupError):
        return False


def exit_codes(processes: mp.ProcessContext, ranks: range) -> list[int | None]:
    for rank in ranks:
        processes.processes[rank].join(60)
    return [processes.processes[rank].exitcode for rank in ranks]


def report_of(run_dir: Path, rank: int) -> tuple[dict[str, Any], str]:
    header, _, stacks = (run_dir / "hang" / "attempt_1" / f"rank_{rank:05}.txt").read_text().partition("\n")
    return json.loads(header), stacks


@HANGS
def test_a_stopped_rank_is_named_with_its_host_and_torchrun_ends(hung: Hung) -> None:
    reason = status(hung.stopped)["reason"]
    assert reason.startswith(f"hang: rank 1 on {HOST} gave no sign, stopped or gone, while rank 0 waited at ")
    assert f"train: {reason}\n" in hung.output and hung.output.count("gave no sign") == 1
    assert reason in (hung.stopped / "log.txt").read_text()
    assert f"{hung.stopped}/hang/attempt_1" in reason
    assert "exitcode: 1)" in hung.output or "exitcode  : 1 " in hung.output
    assert not (hung.stopped / "lock.json").exists(), "rank 0 gave it up"


@HANGS
def test_the_living_leave_their_stacks_and_their_last_collectives(hung: Hung) -> None:
    for rank in (0, 2):
        report, stacks = report_of(hung.stopped, rank)
        assert (report["rank"], report["host"]) == (rank, HOST)
        assert report["silent_seconds"] > 0
        assert re.search(r'loop.py", line \d+ in (take_step|record|save_now|validate_now)', stacks)
        assert "watchdog.py" in stacks, "every thread's"
        recorded = json.loads((hung.stopped / "hang" / "attempt_1" / f"rank_{rank:05}.gloo.json").read_text())
        assert "gloo:all_reduce" in {entry["profiling_name"] for entry in recorded["entries"]}
        assert report["collectives"] == 1 + recorded["entries"][-1]["record_id"]
    assert not (hung.stopped / "hang" / "attempt_1" / "rank_00001.txt").exists()


@HANGS
def test_rank_0_itself_silent_is_named_by_the_next_and_sleep_longer_than_the_limit_is_no_hang(hung: Hung) -> None:
    assert hung.silent_codes == [1, 1]
    found = status(hung.silent)
    assert found["state"] == "failed" and found["step"] == 10
    assert found["reason"].startswith(
        f'hang: rank 0 on {HOST} gave no sign, stopped or gone, while rank 1 waited at "step'
    )
    report, stacks = report_of(hung.silent, 1)
    assert "step 16" in report["where"] and "in accumulate_gradients" in stacks


@HANGS
def test_a_rank_that_waits_for_its_data_is_furthest_behind(hung: Hung) -> None:
    assert hung.blocked_codes == [1, 1, 1]
    reason = status(hung.blocked)["reason"]
    assert reason.startswith(f'hang: rank 2 on {HOST} is furthest behind, at "step 13, waiting for its data"')
    assert 'rank 0 is at "step 13"' in reason
    _, stacks = report_of(hung.blocked, 2)
    assert "in a_read_that_blocks" in stacks and "in take" in stacks


def finish_them(mesh_: ProcessGroup, configs: list[Config]) -> list[float]:
    """All runs to their end; how long a collective of each group may last by then."""
    later = dist.new_group(backend="gloo")
    for config in configs:
        run(config, mesh_)
    groups = (dist.group.WORLD, later)
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]  # type: ignore[union-attr]


@HANGS
def test_the_same_command_then_goes_on_to_the_bits_of_the_run_that_never_hung(
    hung: Hung, tiny_data: Path, tmp_path: Path
) -> None:
    whole, *others = runs = [tmp_path / "whole", hung.stopped, hung.silent, hung.blocked]
    found = run_on_ranks(WORLD, finish_them, [configured(tiny_data, run_dir) for run_dir in runs])
    for run_dir in others:
        assert "continuing from" in (run_dir / "log.txt").read_text()
        assert status(run_dir) == {"state": "done", "step": STEPS, "reason": None, "attempt": 2}
        assert curve(run_dir) == curve(whole)
        assert_same_tensors(final_tensors(run_dir), final_tensors(whole))
    assert found == [[LIMIT_SECONDS + group.LATER_SECONDS] * 2] * WORLD, "every group's"


def test_the_long_limit_holds_until_the_first_step_is_done(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a validation before it; and no thread stays behind."""
    done: list[list[bool]] = []
    monkeypatch.setattr(
        Watchdog, "expect_steps", lambda self: done.append(["loss" in row for row in rows(tmp_path / "run")])
    )
    config = tiny_config(tiny_data, tmp_path / "run", steps=3)
    run(config, ALONE)
    assert done == [[False, True]]
    assert "watchdog" not in {thread.name for thread in threading.enumerate()}
    assert not (tmp_path / "run" / "hang").exists()


@pytest.fixture
def directory(tiny_data: Path, tmp_path: Path) -> Iterator[RunDirectory]:
    with RunDirectory(tiny_config(tiny_data, tmp_path / "run"), "fingerprint", ALONE) as directory:
        yield directory


def test_a_world_of_one_is_watched_too(directory: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []

    def leave(code: int) -> None:
        faulthandler.cancel_dump_traceback_later()
        left.append(code)
        watched._stop.set()

    monkeypatch.setattr(os, "_exit", leave)
    with Watchdog(ParallelConfig(init_timeout_seconds=4.0, timeout_seconds=0.1), ALONE, directory) as watched:
        watched.heartbeat("compiling")
        time.sleep(1.0)
        assert left == [], "the short limit does not hold yet"
        watched.expect_steps()
        watched.heartbeat("step 2")
        watched._thread.join(60)
    assert left == [1]
    assert status(directory.path)["state"] == "failed"
    assert status(directory.path)["reason"].startswith(f'hang: rank 0 on {HOST} is at "step 2" for 0 s')
    assert "test_a_world_of_one_is_watched_too" in report_of(directory.path, 0)[1]


def test_a_run_that_was_taken_over_is_not_written_to(directory: RunDirectory) -> None:
    before = status(directory.path)
    (directory.path / "lock.json").write_text("another's")
    directory.report(7)
    directory.fail("hang")
    directory.record({"micro_batch": 1})
    assert status(directory.path) == before
    assert json.loads((directory.path / "config.json").read_text())["found"] == {}
    assert (directory.path / "lock.json").read_text() == "another's"


def test_a_rank_that_wakes_up_after_the_verdict_leaves_it_as_it_is(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    with pytest.raises(RuntimeError), Watchdog(ParallelConfig(), ALONE, directory):
        folder = directory.path / "hang" / "attempt_1"
        folder.mkdir(parents=True)
        (folder / "verdict.txt").touch()
        raise RuntimeError("connection closed by peer")
    assert left == [1]


def report(rank: int, beats: int, where: str, collectives: int | None) -> dict[str, Any]:
    return {"rank": rank, "beats": beats, "where": where, "silent_seconds": 600.0, "collectives": collectives}


@pytest.mark.parametrize(
    ("reports", "said"),
    [
        (
            [report(0, 9, "step 4", 20), report(3, 9, "step 4", 20)],
            'rank 1 on b, rank 2 on b gave no sign, stopped or gone, while rank 0 waited at "step 4" for 600 s '
            "(collectives called: 20)",
        ),
        (
            [
                report(0, 9, "step 4", 20),
                report(1, 9, "step 4", 20),
                report(2, 8, "data", 19),
                report(3, 8, "data", 19),
            ],
            'rank 2 on b, rank 3 on c are furthest behind, at "data" for 600 s (collectives called: 19); '
            'rank 0 is at "step 4" for 600 s (collectives called: 20)',
        ),
        (
            [report(r, 9, "step 4", 20 - (r == 1)) for r in range(4)],
            'rank 1 on b is furthest behind, at "step 4" for 600 s (collectives called: 19); '
            'rank 0 is at "step 4" for 600 s (collectives called: 20)',
        ),
        (
            [report(r, 9, "step 4", 20) for r in range(4)],
            'all ranks are at the same place, "step 4" for 600 s (collectives called: 20)',
        ),
        (
            [report(r, 9 - (r == 3), "step 4", None if r else 20) for r in range(4)],
            'rank 3 on c is furthest behind, at "step 4" for 600 s (collectives called: unknown); '
            'rank 0 is at "step 4" for 600 s (collectives called: 20)',
        ),
    ],
)
def test_the_verdict(reports: list[dict[str, Any]], said: str) -> None:
    assert verdict({each["rank"]: each for each in reports}, ["a", "b", "b", "c"]) == said
