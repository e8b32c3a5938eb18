"""A fault on one rank is every rank's fault, in one line, and nobody waits for the one that has gone."""

import dataclasses
import os
import socket
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
from train import loop
from train.config import Config, OptimConfig, SaveConfig
from train.main import run
from train.optim import build_optimizer
from train.processes.group import ProcessGroup
from train.run import directory
from train.run.checkpoints import CheckpointWriter, Progress


def outcome_of(function: Any, *args: Any) -> str:
    try:
        function(*args)
    except InputError as error:
        return str(error)
    return "no error"


def train_where_one_rank_lacks_the_data(group: ProcessGroup, data: Path, folder: Path) -> list[str]:
    elsewhere = folder / "not_here" if group.rank == 1 else data
    missing = outcome_of(run, tiny_config(elsewhere, folder / "run"), group)
    blocked = outcome_of(run, tiny_config(data, folder / "blocked"), group)
    return [missing, blocked, str(group.gather(group.rank)), str(group.on_main(lambda: group.rank))]


def train_with_other_settings(group: ProcessGroup, data: Path, folder: Path) -> str:
    config = tiny_config(data, folder / "run")
    left_out = dataclasses.replace(config.data, skip_sequences=(7,) if group.rank == 2 else ())
    config = dataclasses.replace(config, seed=1337 + group.rank // 2, data=left_out)
    return outcome_of(run, config, group)


def test_ranks_that_were_started_differently_do_not_train(tiny_data: Path, tmp_path: Path) -> None:
    outcomes = run_on_ranks(3, train_with_other_settings, tiny_data, tmp_path)
    said = "rank 2 was started differently: --seed 1338 (rank 0: 1337); --data.skip-sequences (7,) (rank 0: ())"
    assert set(outcomes) == {said}
    assert not (tmp_path / "run").exists()


def train_on_local_disks(group: ProcessGroup, data: Path, folder: Path) -> str:
    directory.SECONDS_TO_SEE = 0.5
    (folder / f"host_{group.rank}").mkdir()
    os.chdir(folder / f"host_{group.rank}")
    return outcome_of(run, tiny_config(data, Path("run")), group)


def test_a_run_directory_that_is_not_shared_is_refused_at_the_start(tiny_data: Path, tmp_path: Path) -> None:
    outcomes = run_on_ranks(2, train_on_local_disks, tiny_data, tmp_path)
    assert outcomes[0] == outcomes[1] and "does not see what rank 0 writes; share --run-dir" in outcomes[0]
    assert status(tmp_path / "host_0" / "run")["state"] == "failed"
    assert not (tmp_path / "host_0" / "run" / "lock.json").exists()


def save_on_local_disks(group: ProcessGroup, folder: Path) -> str:
    directory.SECONDS_TO_SEE = 0.5
    here = folder / f"disk_{group.rank}"
    (here / "checkpoints" / ".step_00000000.writing_1").mkdir(parents=True)
    model = build_model(ModelConfig(2, 2, 32, vocab_size=50, context_len=8), seed=1)
    return outcome_of(
        lambda: save(
            CheckpointWriter(
                here,
                attempt=1,
                model=model,
                optimizer=build_optimizer(model, OptimConfig()),
                config=SaveConfig(),
                state={},
                loaded=None,
                group=group,
            )
        )
    )


def save(checkpoint_writer: CheckpointWriter) -> None:
    checkpoint_writer.begin(Progress())
    checkpoint_writer.finish()


def test_a_checkpoint_without_the_other_ranks_files_is_never_committed(tmp_path: Path) -> None:
    outcomes = run_on_ranks(2, save_on_local_disks, tmp_path)
    assert all("__1_0.distcp of other ranks cannot be seen from rank 0" in outcome for outcome in outcomes)
    assert list((tmp_path / "disk_0" / "checkpoints").iterdir()) == []


def test_faults_of_one_rank_are_shared(tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "blocked").write_text("a file where the run directory should be")
    outcomes = run_on_ranks(3, train_where_one_rank_lacks_the_data, tiny_data, tmp_path)
    assert outcomes[0] == outcomes[1] == outcomes[2]
    missing, blocked, ranks, main = outcomes[0]
    assert missing.startswith(f"rank 1: {tmp_path}/not_here: no such data directory")
    assert "File exists" in blocked and "\n" not in blocked
    assert (ranks, main) == ("[0, 1, 2]", "0")
    assert not (tmp_path / "run").exists()


def run_out_of_memory_on_rank_1(group: ProcessGroup, config: Config) -> None:
    take_step = loop.take_step

    def failing(this: loop.Run) -> loop.StepResult:
        if group.rank == 1 and this.state.progress.step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return take_step(this)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "take_step", failing)
        run(config, group)


def test_the_rank_that_fails_says_so_not_the_one_that_misses_it(tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(mp.ProcessRaisedException, match=r"set --train.micro-batch 3 or "):
        run_on_ranks(2, run_out_of_memory_on_rank_1, tiny_config(tiny_data, tmp_path / "run"))
    found = status(tmp_path / "run")
    assert found["state"] == "failed"
    assert found["reason"] == f"rank 1 on {socket.gethostname()}: OutOfMemoryError: CUDA out of memory"
