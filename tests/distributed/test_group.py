"""An error on one rank ends every rank in one line, and nobody waits for a rank that has gone."""

import os
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from common.errors import InputError
from model.config import ModelConfig
from model.gpt import build_model
from tests.helpers.groups import run_on_ranks
from tests.helpers.runs import status, tiny_config
from tests.helpers.steps import before_each_step
from train import loop
from train.config import Config, OptimConfig, SaveConfig
from train.main import run
from train.optim import build_optimizer
from train.processes.group import ProcessGroup
from train.run import directory
from train.run.checkpoints import CheckpointWriter, Progress


def error_of(function: Callable[[], object]) -> str:
    try:
        function()
    except InputError as error:
        return str(error)
    return "no error"


def start_unlike_others(group: ProcessGroup, data: Path, folder: Path) -> list[str]:
    """Return the errors if rank 1 lacks the data, if the run directory is a file, and if rank 2 has other settings."""
    missing = tiny_config(folder / "not_here" if group.rank == 1 else data, folder / "run")
    config = tiny_config(data, folder / "run")
    skipped = replace(config.data, skip_sequences=(7,) if group.rank == 2 else ())
    other = replace(config, seed=1337 + group.rank // 2, data=skipped)
    configs = [missing, tiny_config(data, folder / "blocked"), other]
    assert group.gather(group.rank) == [0, 1, 2] and group.on_main(lambda: group.rank) == 0
    return [error_of(lambda config=config: run(config, group)) for config in configs]  # type: ignore[misc]


def test_an_error_on_one_rank_is_raised_on_all(tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "blocked").write_text("a file instead of the run directory")
    errors = run_on_ranks(3, start_unlike_others, tiny_data, tmp_path)
    assert errors[0] == errors[1] == errors[2]
    missing, blocked, differing = errors[0]
    assert missing.startswith(f"rank 1: {tmp_path}/not_here: no such data directory")
    assert "File exists" in blocked and "\n" not in blocked
    settings = "--seed 1338 (rank 0: 1337); --data.skip-sequences [7] (rank 0: [])"
    assert differing == f"rank 2: was started differently: {settings}"
    assert not (tmp_path / "run").exists()


def leave_by_an_error(group: ProcessGroup, folder: Path, error: BaseException) -> None:
    sys.stderr = (folder / f"stderr_{group.rank}").open("w")
    with group:
        raise error


@pytest.mark.parametrize(
    ("error", "exit_code", "line"),
    [
        (InputError("no such data directory"), 2, "train: no such data directory\n"),
        (KeyboardInterrupt(), 130, "train: interrupted\n"),
        (RuntimeError("a bug"), 1, None),
    ],
)
def test_bad_input_and_ctrl_c_are_one_line_and_a_bug_has_its_traceback(
    tmp_path: Path, error: BaseException, exit_code: int, line: str | None
) -> None:
    with pytest.raises(mp.ProcessExitedException) as caught:
        run_on_ranks(2, leave_by_an_error, tmp_path, error)
    assert caught.value.exit_code == exit_code
    printed = (tmp_path / f"stderr_{caught.value.error_index}").read_text()
    if line is None:
        assert printed.startswith("Traceback") and printed.endswith("RuntimeError: a bug\n")
    else:
        assert printed == (line if caught.value.error_index == 0 else "")


def use_local_disks(group: ProcessGroup, data: Path, folder: Path) -> list[str]:
    """Return the errors of a run and of a checkpoint on ranks that do not share a file system."""
    directory.SECONDS_TO_SEE = 0.5
    disk = folder / f"disk_{group.rank}"
    (disk / "checkpoints" / ".step_00000000.writing_1").mkdir(parents=True)
    os.chdir(disk)
    model = build_model(ModelConfig(2, 2, 32, vocab_size=50, context_len=8), seed=1)
    parts: dict[str, Any] = {"model": model, "optimizer": build_optimizer(model, OptimConfig()), "group": group}
    writer = CheckpointWriter(disk, attempt=1, config=SaveConfig(), state={}, loaded=None, **parts)
    writer.begin(Progress())
    return [error_of(lambda: run(tiny_config(data, Path("run")), group)), error_of(writer.finish)]


def test_without_shared_storage_no_run_starts_and_no_checkpoint_is_completed(tiny_data: Path, tmp_path: Path) -> None:
    errors = run_on_ranks(2, use_local_disks, tiny_data, tmp_path)
    assert errors[0][0] == errors[1][0] and "does not see what rank 0 writes; share --run-dir" in errors[0][0]
    assert all("__1_0.distcp of other ranks cannot be seen from rank 0" in error for _, error in errors)
    assert status(tmp_path / "disk_0" / "run")["state"] == "failed"
    assert not (tmp_path / "disk_0" / "run" / "lock.json").exists()
    assert list((tmp_path / "disk_0" / "checkpoints").iterdir()) == []


def run_out_of_memory_on_rank_1(group: ProcessGroup, config: Config) -> None:
    def fail(this: loop.Run) -> None:
        if group.rank == 1 and this.state.progress.step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with before_each_step(fail):
        run(config, group)


def test_status_has_the_error_of_the_rank_that_failed_first(tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(mp.ProcessRaisedException, match=r"set --train.micro-batch 3 or "):
        run_on_ranks(2, run_out_of_memory_on_rank_1, tiny_config(tiny_data, tmp_path / "run"))
    ended = status(tmp_path / "run")
    assert ended["state"] == "failed"
    assert ended["reason"] == f"rank 1 on {socket.gethostname()}: OutOfMemoryError: CUDA out of memory"
