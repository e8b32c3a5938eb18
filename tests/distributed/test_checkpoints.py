"""Checkpoints: whole or absent, damage found before loading, nothing in them runs, nothing good is deleted."""

import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from common.errors import InputError
from common.files import sha256_of_file
from model.checkpoint import SUMS_FILE, fault_of, list_checkpoints, load_model, newest_sound
from tests.helpers.groups import run_on_ranks
from tests.helpers.runs import (
    ROOT,
    assert_same_tensors,
    called,
    final_tensors,
    rows,
    status,
    tiny_config,
    tiny_flags,
    with_save,
)
from train.main import main, run
from train.processes.group import ProcessGroup

ALONE = ProcessGroup(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def finished(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 30 steps with checkpoints at 10, 20 and 30."""
    run_dir = tmp_path_factory.mktemp("saves") / "run"
    run(tiny_config(tiny_data, run_dir, steps=30), ALONE)
    return run_dir


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[random.Random(0).randrange(len(data))] ^= 4
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, empty, Path.unlink])
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "state.json", SUMS_FILE])
def test_damage_is_found_and_the_one_before_is_taken(run_dir: Path, name: str, damage: Callable[[Path], None]) -> None:
    newest = list_checkpoints(run_dir)[-1]
    damage(newest / name)
    fault = fault_of(newest)
    assert fault is not None and "\n" not in fault
    checkpoint, faults = newest_sound(run_dir)
    assert checkpoint is not None and checkpoint.name == "step_00000020"
    assert faults == [fault]


def test_what_cannot_be_read_is_passed_over(run_dir: Path) -> None:
    newest = list_checkpoints(run_dir)[-1]
    (newest / "state.json").unlink()
    (newest / "state.json").mkdir()
    checkpoint, faults = newest_sound(run_dir)
    assert checkpoint is not None and checkpoint.name == "step_00000020"
    assert "unreadable" in faults[0]


def test_a_foreign_file_is_found(run_dir: Path) -> None:
    newest = list_checkpoints(run_dir)[-1]
    (newest / "extra.distcp").write_bytes(b"x")
    assert "extra.distcp" in str(fault_of(newest))


def test_the_hashes_are_those_of_sha256sum(finished: Path) -> None:
    checkpoint = list_checkpoints(finished)[-1]
    done = subprocess.run(["sha256sum", "-c", SUMS_FILE], cwd=checkpoint, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.count("OK") == 3


def test_a_run_continues_past_a_broken_checkpoint_and_says_so(run_dir: Path, finished: Path, tiny_data: Path) -> None:
    flip_a_bit(list_checkpoints(run_dir)[-1] / "__0_0.distcp")
    run(tiny_config(tiny_data, run_dir, steps=30), ALONE)
    log = (run_dir / "log.txt").read_text()
    assert "warning: passed over" in log and "continuing from" in log and "step_00000020" in log
    assert_same_tensors(final_tensors(run_dir), final_tensors(finished))
    assert fault_of(list_checkpoints(run_dir)[-1]) is None


def test_a_run_without_a_sound_checkpoint_is_refused_not_started_over(run_dir: Path, tiny_data: Path) -> None:
    before = rows(run_dir)
    for checkpoint in list_checkpoints(run_dir):
        truncate(checkpoint / "__0_0.distcp")
    with pytest.raises(InputError, match="has no sound checkpoint"):
        run(tiny_config(tiny_data, run_dir, steps=30), ALONE)
    assert rows(run_dir) == before
    assert len(list_checkpoints(run_dir)) == 3
    assert status(run_dir)["state"] == "failed"


class Planted:
    """A pickle that touches a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def sign_again(checkpoint: Path) -> None:
    """As an attacker would: hashes that fit the altered files."""
    names = sorted(path.name for path in checkpoint.iterdir() if path.name != SUMS_FILE)
    (checkpoint / SUMS_FILE).write_text("".join(f"{sha256_of_file(checkpoint / n)}  {n}\n" for n in names))


def test_a_planted_pickle_does_not_run(run_dir: Path, tmp_path: Path) -> None:
    newest, mark = list_checkpoints(run_dir)[-1], tmp_path / "ran"
    (newest / ".metadata").write_bytes(pickle.dumps(Planted(mark)))
    sign_again(newest)
    assert fault_of(newest) is None, "the hashes alone must not save it"
    with pytest.raises(InputError, match=r"refused: .*system has no place"):
        load_model(newest)
    assert not mark.exists()
    pickle.loads((newest / ".metadata").read_bytes())
    assert mark.exists(), "the plant works where it is loaded plainly"


def test_a_planted_object_in_place_of_a_tensor_does_not_run(run_dir: Path, tmp_path: Path) -> None:
    """DCP loads entries that are no tensors by torch.load with weights_only=False."""
    newest, mark = list_checkpoints(run_dir)[-1], tmp_path / "ran"
    metadata = pickle.loads((newest / ".metadata").read_bytes())
    name = "model.transformer.wpe.weight"
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    index = next(key for key in metadata.storage_data if key.fqn == name)
    planted = io.BytesIO()
    torch.save(Planted(mark), planted)
    path = newest / metadata.storage_data[index].relative_path
    metadata.storage_data[index].offset = path.stat().st_size
    metadata.storage_data[index].length = len(planted.getvalue())
    path.write_bytes(path.read_bytes() + planted.getvalue())
    (newest / ".metadata").write_bytes(pickle.dumps(metadata))
    sign_again(newest)
    with pytest.raises(InputError, match="refused"):
        load_model(newest)
    assert not mark.exists()


@pytest.mark.parametrize("seed", range(20))
def test_fuzzed_metadata_is_refused_or_read(run_dir: Path, seed: int) -> None:
    newest, rng = list_checkpoints(run_dir)[-1], random.Random(seed)
    data = bytearray((newest / ".metadata").read_bytes())
    for _ in range(5):
        data[rng.randrange(len(data))] = rng.randrange(256)
    (newest / ".metadata").write_bytes(data)
    sign_again(newest)
    try:
        load_model(newest)
    except InputError as error:
        assert str(newest) in str(error)


def test_old_checkpoints_go_and_the_kept_stay(tiny_data: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_data, tmp_path / "run", steps=35)
    run(with_save(config, every=5, keep=2, keep_every=15), ALONE)
    assert [p.name for p in list_checkpoints(tmp_path / "run")] == [f"step_{n:08d}" for n in (15, 30, 35)]
    left = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert left == {"step_00000015", "step_00000030", "step_00000035"}


def test_leftovers_of_a_killed_save_do_not_disturb(run_dir: Path, finished: Path, tiny_data: Path) -> None:
    shutil.rmtree(list_checkpoints(run_dir)[-1])
    for name in (".step_00000030.writing_1", ".step_00000017.writing_2", ".step_00000005.deleting"):
        (run_dir / "checkpoints" / name).mkdir()
        (run_dir / "checkpoints" / name / "__0_0.distcp").write_bytes(b"half")
    run(tiny_config(tiny_data, run_dir, steps=30), ALONE)
    assert_same_tensors(final_tensors(run_dir), final_tensors(finished))
    assert not list((run_dir / "checkpoints").glob(".*"))


def limit_file_size() -> None:
    """As a full disk: no file may grow beyond 120 KB, and the write fails with EFBIG."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, resource.RLIM_INFINITY))


@pytest.mark.parametrize("world", [1, 2])
def test_a_save_that_cannot_be_written_ends_in_one_line_and_spoils_nothing(
    tiny_data: Path, tmp_path: Path, world: int
) -> None:
    run_dir = tmp_path / "run"
    config = with_save(tiny_config(tiny_data, run_dir, steps=20), every=10)
    outcomes = run_on_ranks(world, run_then_fail, config, tiny_config(tiny_data, run_dir, steps=20))
    assert all("step_00000020: not saved; rank 0: " in outcome for outcome in outcomes)
    assert all("\n" not in outcome for outcome in outcomes)
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_00000010"]
    assert fault_of(run_dir / "checkpoints" / "step_00000010") is None
    assert status(run_dir)["state"] == "failed" and "not saved" in status(run_dir)["reason"]


def run_then_fail(group: ProcessGroup, config: Any, again: Any) -> str:
    run(config, group)
    if group.is_main:
        shutil.rmtree(config.directory / "checkpoints" / "step_00000020")
    group.barrier()
    limit_file_size()
    try:
        run(again, group)
    except InputError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return "saved after all"


def test_no_room_is_said_before_anything_is_written(run_dir: Path, tiny_data: Path, monkeypatch: Any) -> None:
    shutil.rmtree(list_checkpoints(run_dir)[-1])
    usage = shutil.disk_usage(run_dir)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(InputError, match=r"0.00 GB free, but a checkpoint needs 0.02 GB"):
        run(tiny_config(tiny_data, run_dir, steps=30), ALONE)
    assert [p.name for p in list_checkpoints(run_dir)] == ["step_00000010", "step_00000020"]


def test_another_run_in_the_same_directory_is_refused_field_by_field(run_dir: Path, tiny_data: Path) -> None:
    config = tiny_config(tiny_data, run_dir, steps=40, batch_tokens=768)
    before = (run_dir / "config.json").read_bytes()
    with pytest.raises(InputError) as caught:
        run(config, ALONE)
    assert "--train.steps 40 (was 30)" in str(caught.value)
    assert "--train.batch-tokens 768 (was 384)" in str(caught.value)
    assert (run_dir / "config.json").read_bytes() == before
    assert status(run_dir)["state"] == "done"


def test_a_run_that_never_saved_may_start_over_with_other_settings(run_dir: Path, tiny_data: Path) -> None:
    shutil.rmtree(run_dir / "checkpoints")
    run(tiny_config(tiny_data, run_dir, steps=12), ALONE)
    assert [row["step"] for row in rows(run_dir) if "loss" in row] == list(range(1, 13))


def test_other_data_is_refused(run_dir: Path, tmp_path: Path) -> None:
    text = tmp_path / "other.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 300)
    other = tmp_path / "other"
    script = [sys.executable, "data_prep/textfiles.py", "--input", str(text), "--out", str(other)]
    subprocess.run([*script, "--tokenizer", "char"], cwd=ROOT, check=True, capture_output=True)
    with pytest.raises(InputError, match="holds other tokens"):
        run(tiny_config(other, run_dir, steps=30), ALONE)


def test_no_resume_refuses_a_directory_with_checkpoints(run_dir: Path, tiny_data: Path) -> None:
    line = [*tiny_flags(tiny_data, run_dir), "--train.steps", "30", "--no-resume"]
    done = called(main, *line)
    assert done.returncode == 2 and "is another run" in done.stderr
    line = [*line, "--optim.beta2", "0.95", "--optim.lr-final", "0", "--validate.every", "25"]
    done = called(main, *line)
    assert done.returncode == 2 and "drop --no-resume to continue" in done.stderr
    assert len(list_checkpoints(run_dir)) == 3


def test_a_model_of_another_shape_is_refused_in_one_line(run_dir: Path) -> None:
    newest = list_checkpoints(run_dir)[-1]
    state = json.loads((newest / "state.json").read_text())
    state["config"]["model"]["width"] = 64
    (newest / "state.json").write_text(json.dumps(state))
    sign_again(newest)
    with pytest.raises(InputError, match="do not fit this model") as caught:
        load_model(newest)
    assert "\n" not in str(caught.value)
