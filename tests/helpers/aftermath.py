"""What must be true of a run directory after any fault: nothing is lost, and status.json tells the truth."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import InputError
from model.checkpoint import fault_of, list_checkpoints, step_of
from tests.helpers.attempts import Attempt, is_running
from tests.helpers.faults import (
    FREEZE,
    FULL,
    HARMLESS,
    KILLS,
    STOPS,
    Episode,
    Struck,
    at,
    killed_rank_0,
    stood_beside_the_loop,
)
from train.metrics.rows import KEPT_FILES, METRICS_FILE, SAMPLES_FILE, read_lines
from train.run.status import read_status

STEPS = 150
KEEP = 3


@dataclass(frozen=True)
class Snapshot:
    """The state of a run directory while nobody writes to it."""

    status: dict[str, Any] | None  # None: there is none, or it is damaged
    checkpoints: tuple[int, ...]  # the sound ones
    unsound: frozenset[int] = frozenset()

    @property
    def newest(self) -> int:
        return self.checkpoints[-1] if self.checkpoints else 0

    @property
    def attempt(self) -> int:
        return self.status["attempt"] if self.status is not None else 0


def snapshot_of(run_dir: Path) -> Snapshot:
    sound = {step_of(path): fault_of(path) is None for path in list_checkpoints(run_dir)}
    unsound = frozenset(step for step in sound if not sound[step])
    try:
        status = read_status(run_dir)
    except InputError:
        status = None
    return Snapshot(status, tuple(step for step in sound if sound[step]), unsound)


def check(attempt: Attempt, episode: Episode, struck: Struck, before: Snapshot, after: Snapshot) -> None:
    """Raise AssertionError for anything in the run directory that the fault does not explain."""
    check_checkpoints(attempt.run_dir, episode, before, after)
    check_attempts(attempt, struck, before, after)
    check_tracebacks(attempt, struck)
    if after.status is None:
        return
    left_hard = any(killed_rank_0(strike) or strike.kind == FREEZE for strike in struck.strikes) or not struck.all_heard
    lock = attempt.run_dir / "lock.json"
    if lock.exists() and list(attempt.control.glob("claimed_*")):
        assert not is_running(json.loads(lock.read_text())["pid"]), "the lock of a living process"
        assert left_hard, "the lock was not given up"
    if after.attempt == before.attempt and before.status is not None:
        assert after.status == before.status, f"status.json was {before.status}"
        assert not struck.all_heard or at(struck, "start", "process group", "claim"), "the attempt was not counted"
        return
    check_state(attempt, episode, struck, before, after)


def check_checkpoints(run_dir: Path, episode: Episode, before: Snapshot, after: Snapshot) -> None:
    """Check that no checkpoint became unsound and none is lost."""
    for step in after.unsound - before.unsound:
        raise AssertionError(fault_of(run_dir / "checkpoints" / f"step_{step:08d}"))
    ever = sorted({*before.checkpoints, *before.unsound, *after.checkpoints})  # --save.keep counts names
    for step in {*before.checkpoints} - {*after.checkpoints}:
        assert step not in ever[-KEEP:], f"the checkpoint of step {step} was lost"
        assert episode.in_place or step != before.newest, f"step {step} was deleted, which this attempt had loaded"


def check_tracebacks(attempt: Attempt, struck: Struck) -> None:
    """Check that no traceback of ours was printed, unless a rank lost another one: it says where it stood then.

    A rank that has no handlers yet is lost to any signal.
    """
    if struck.all_heard and not {strike.kind for strike in struck.strikes} & {*KILLS, FREEZE}:
        output = attempt.output.read_text(errors="replace")
        assert 'faulty_train.py", line' not in output, "a traceback was printed"


def check_attempts(attempt: Attempt, struck: Struck, before: Snapshot, after: Snapshot) -> None:
    """Check that every start that claimed the directory was counted, and no other."""
    claimed = len(list(attempt.control.glob("claimed_*")))
    counted = after.attempt - before.attempt
    num_struck_before_the_mark = sum(not fault.stays for fault in struck.faults)
    assert claimed <= counted <= claimed + num_struck_before_the_mark, f"{claimed} starts, {counted} counted"


def is_something_left(run_dir: Path) -> bool:
    """Return whether the last step's validation or samples are still to be done."""
    done = {name: [row for row in read_lines(run_dir / name).rows if row["step"] == STEPS] for name in KEPT_FILES}
    return not done[SAMPLES_FILE] or not any("val_loss" in row for row in done[METRICS_FILE])


def check_state(attempt: Attempt, episode: Episode, struck: Struck, before: Snapshot, after: Snapshot) -> None:
    """Check that status.json names the newest checkpoint and an end that the strikes explain."""
    assert after.status is not None
    state, step, reason = after.status["state"], after.status["step"], after.status["reason"]
    kinds = {strike.kind for strike in struck.strikes}
    aimed = all(fault.stays for fault in struck.faults) and not stood_beside_the_loop(episode, struck)
    is_stop = kinds <= {*STOPS, *HARMLESS} and bool(kinds - HARMLESS)
    code = attempt.process.returncode
    summary = f"status.json says {after.status}, and the newest checkpoint is of step {after.newest}"
    is_begun = "while the data was read" not in attempt.output.read_text(errors="replace")
    if before.checkpoints and state in ("done", "stopped") and is_begun:
        line = f"continuing from {attempt.run_dir}/checkpoints/step_{before.newest:08d}"
        assert line in (attempt.run_dir / "log.txt").read_text(errors="replace"), f"not in the log: {line}"
    if state == "done":
        assert after.newest == step == STEPS and reason is None, summary
        if kinds <= HARMLESS or episode.in_place:
            assert code == 0, f"torchrun ended with {code} though the run was done"
        if is_stop and struck.all_heard and aimed:
            assert struck.rows >= STEPS - 1, f"asked to stop at row {struck.rows}, it went on to the end"
        return
    assert struck.strikes, f"nothing was done to it: {summary}"
    if state == "stopped":
        assert after.newest == step, summary
        assert step < STEPS or is_something_left(attempt.run_dir), f"nothing was left to do: {summary}"
        assert reason in {STOPS.get(kind) for kind in kinds} - {None}, summary
        assert not (attempt.run_dir / "STOP").exists() or kinds - {"STOP file"}, "the STOP file is still there"
        if aimed:
            assert step <= max(struck.rows, before.newest) + 5, f"asked at row {struck.rows}: {summary}"
        if is_stop and struck.all_heard and kinds <= {"STOP file", "SIGTERM rank", "SIGUSR1 rank", *HARMLESS}:
            assert code == 0, f"torchrun ended with {code} though the run was stopped in order"
        return
    assert step <= after.newest, summary
    assert kinds & {*KILLS, FREEZE, FULL} or not struck.all_heard, f"a stop was not honoured: {summary}"
    if state == "running":
        is_explained = FULL in kinds or any(killed_rank_0(strike) for strike in struck.strikes)
        assert is_explained or not struck.all_heard, summary
    else:
        assert state == "failed" and reason, summary
