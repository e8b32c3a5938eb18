"""What stands in a run's way is moved aside, its checkpoints tell what run it is, and progress is never dropped."""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import InputError
from tests.helpers.runs import assert_same_tensors, curve, final_tensors, forget_checkpoints, rows, status, tiny_config
from train.config import Config
from train.main import run
from train.processes.group import ProcessGroup

ALONE = ProcessGroup(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run of 20 steps with the checkpoints of steps 10 and 20."""
    config = tiny_config(tiny_data, tmp_path_factory.mktemp("trained") / "run", steps=20)
    run(config, ALONE)
    return config


def copy_of(trained: Config, tmp_path: Path, **changes: Any) -> Config:
    shutil.copytree(trained.directory, tmp_path / "run")
    return dataclasses.replace(trained, run_dir=tmp_path / "run", **changes)


def damage_checkpoints(run_dir: Path) -> None:
    for state in run_dir.glob("checkpoints/step_*/state.json"):
        state.write_text("{")


def log_of(config: Config) -> str:
    return (config.directory / "log.txt").read_text()


@pytest.mark.parametrize(
    "stand_in_the_way",
    [
        lambda path: path.write_text("junk"),
        lambda path: path.symlink_to(path.with_name("step_00000010")),
        lambda path: path.symlink_to("nothing"),
        os.mkfifo,
        Path.mkdir,
    ],
    ids=["file", "link", "link to nothing", "FIFO", "directory"],
)
def test_what_has_a_checkpoints_name_and_is_none_is_moved_aside(
    stand_in_the_way: Callable[[Path], None], trained: Config, tmp_path: Path
) -> None:
    config = copy_of(trained, tmp_path)
    shutil.rmtree(config.directory / "checkpoints" / "step_00000020")
    stand_in_the_way(config.directory / "checkpoints" / "step_00000020")
    run(config, ALONE)
    assert curve(config.directory) == curve(trained.directory)
    assert_same_tensors(final_tensors(config.directory), final_tensors(trained.directory))
    assert re.search(r"warning: .*step_00000020", log_of(config))


@pytest.mark.parametrize("place", ["checkpoints", "log.txt", "nonfinite.jsonl", "wandb", "tokenizer", "sub/any"])
def test_nothing_in_a_run_directory_blocks_a_start(place: str, trained: Config, tmp_path: Path) -> None:
    config = dataclasses.replace(trained, run_dir=tmp_path / "run")
    (config.directory / place).parent.mkdir(parents=True)
    os.mkfifo(config.directory / place)
    run(config, ALONE)
    assert curve(config.directory) == curve(trained.directory)
    assert f"{place}: neither a file nor a directory; moved aside" in log_of(config)


def test_the_checkpoint_tells_what_run_it_is(trained: Config, tmp_path: Path) -> None:
    config = copy_of(trained, tmp_path)
    path = config.directory / "config.json"
    edited = json.loads(path.read_text())
    edited["config"]["seed"] = 7
    for content, remark in ((None, "missing"), ("{", "damaged"), ("[]", "damaged"), (json.dumps(edited), "differs")):
        if content is None:
            path.unlink()
        else:
            path.write_text(content)
        with pytest.raises(InputError, match=r"is another run: --seed 7 \(was 1337\)"):
            run(dataclasses.replace(config, seed=7), ALONE)
        run(config, ALONE)
        assert json.loads(path.read_text())["config"]["seed"] == 1337
        assert f"config.json: {remark}" in log_of(config)


def test_without_any_record_of_the_run_a_start_is_refused(trained: Config, tmp_path: Path) -> None:
    config = copy_of(trained, tmp_path)
    damage_checkpoints(config.directory)
    (config.directory / "config.json").write_text('{"config": {}, "data": null}')
    with pytest.raises(InputError, match=r"no checkpoint in .* tells what run this is"):
        run(config, ALONE)
    run(dataclasses.replace(config, resume=False), ALONE)
    assert curve(config.directory) == curve(trained.directory)


def remove_nothing(run_dir: Path) -> None:
    return


def damage_status(run_dir: Path) -> None:
    (run_dir / "status.json").write_text("{}")


def leave_rows(run_dir: Path) -> None:
    (run_dir / "status.json").unlink()


def leave_a_lock(run_dir: Path) -> None:
    for name in ("status.json", "metrics.jsonl"):
        (run_dir / name).unlink()
    holder = {"host": os.uname().nodename, "pid": 1, "started": "another process", "job": None}
    (run_dir / "lock.json").write_text(json.dumps(holder))


@pytest.mark.parametrize("remove", [remove_nothing, damage_status, leave_rows, leave_a_lock])
def test_progress_without_checkpoints_is_not_dropped(
    remove: Callable[[Path], None], trained: Config, tmp_path: Path
) -> None:
    config = copy_of(trained, tmp_path)
    shutil.rmtree(config.directory / "checkpoints")
    remove(config.directory)
    before = rows(config.directory)
    with pytest.raises(InputError, match=r"there is no checkpoint; .*--no-resume"):
        run(config, ALONE)
    assert rows(config.directory) == before
    run(dataclasses.replace(config, resume=False), ALONE)
    assert curve(config.directory) == curve(trained.directory)
    assert not before or rows(config.directory, "metrics.jsonl.aside_1") == before


def test_a_run_that_never_saved_begins_again(trained: Config, tmp_path: Path) -> None:
    config = copy_of(trained, tmp_path)
    forget_checkpoints(config.directory)
    run(config, ALONE)
    assert curve(config.directory) == curve(trained.directory)


def test_unsound_checkpoints_alone_are_given_up_when_asked_or_when_little_is_lost(
    trained: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = copy_of(trained, tmp_path)
    damage_checkpoints(config.directory)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for restarts in ("0", "1"):
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        with pytest.raises(InputError, match=r"no sound checkpoint .*--no-resume .* trains its 20 steps again"):
            run(config, ALONE)
    shutil.rmtree(config.directory / "checkpoints" / "step_00000020")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    with pytest.raises(InputError, match="no sound checkpoint"):
        run(config, ALONE)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    run(config, ALONE)
    assert curve(config.directory) == curve(trained.directory)
    assert status(config.directory)["state"] == "done"
    assert (config.directory / "checkpoints" / "step_00000010.aside_1" / "state.json").exists()


def test_no_resume_refuses_while_a_sound_checkpoint_is_there(trained: Config, tmp_path: Path) -> None:
    config = copy_of(trained, tmp_path, resume=False)
    (config.directory / "checkpoints" / "step_00000020" / "state.json").write_text("{")
    with pytest.raises(InputError, match="holds checkpoints; drop --no-resume"):
        run(config, ALONE)


def test_what_was_given_up_is_not_missed_at_the_next_start(
    trained: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start that gave up its progress may be killed before it saves again."""
    config = copy_of(trained, tmp_path)
    damage_checkpoints(config.directory)
    monkeypatch.setattr("train.main.set_up", kill)
    for resume in (False, True):
        with pytest.raises(KilledError):
            run(dataclasses.replace(config, resume=resume), ALONE)
        assert status(config.directory)["step"] == 0
    monkeypatch.undo()
    run(config, ALONE)
    assert curve(config.directory) == curve(trained.directory)


class KilledError(Exception):
    pass


def kill(*args: object, **kwargs: object) -> None:
    raise KilledError


def test_a_job_that_began_again_goes_on_when_slurm_restarts_it(
    trained: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = copy_of(trained, tmp_path, resume=False)
    shutil.rmtree(config.directory / "checkpoints" / "step_00000020")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    run(config, ALONE)
    assert f"continuing from {config.directory}/checkpoints/step_00000010" in log_of(config)
    assert_same_tensors(final_tensors(config.directory), final_tensors(trained.directory))
    assert not list(config.directory.glob("*.aside_*"))


def test_a_folder_called_stop_stops_nothing(trained: Config, tmp_path: Path) -> None:
    config = copy_of(trained, tmp_path)
    (config.directory / "STOP" / "sub").mkdir(parents=True)
    shutil.rmtree(config.directory / "checkpoints" / "step_00000020")
    run(config, ALONE)
    assert status(config.directory)["state"] == "done"
