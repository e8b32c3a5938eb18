"""Checkpoints are complete or absent; damage is found before loading; loading never executes code from them."""

import copy
import functools
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from common.errors import InputError
from common.files import sha256_of_file
from data_prep.textfiles import Options, prepare
from model import generate, hf_bridge, lens
from model.checkpoint import SUMS_FILE, fault_of, list_checkpoints, load_model, newest_sound
from tests.helpers.runs import (
    assert_same_tensors,
    called,
    final_tensors,
    forget_checkpoints,
    rows,
    status,
    tiny_config,
    tiny_flags,
    with_save,
)
from train import validate
from train.main import main, run
from train.processes.group import ProcessGroup

ALONE = ProcessGroup(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def finished(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 30 steps with checkpoints at 10, 20 and 30."""
    run_dir = tmp_path_factory.mktemp("checkpoints") / "run"
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


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def add_another_file(path: Path) -> None:
    path.with_name("extra.distcp").write_bytes(b"x")


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, empty, Path.unlink, replace_by_folder, add_another_file])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    run_dir: Path, damage: Callable[[Path], None]
) -> None:
    newest = list_checkpoints(run_dir)[-1]
    intact = shutil.copytree(newest, run_dir / "intact")
    for name in ("__0_0.distcp", ".metadata", "state.json", SUMS_FILE):
        damage(newest / name)
        fault = fault_of(newest)
        assert fault is not None and "\n" not in fault, name
        checkpoint, faults = newest_sound(run_dir)
        assert checkpoint is not None and checkpoint.name == "step_00000020" and faults == [fault], name
        shutil.rmtree(newest)
        shutil.copytree(intact, newest)
    assert fault_of(newest) is None
    done = subprocess.run(["sha256sum", "-c", SUMS_FILE], cwd=newest, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.count("OK") == 3


def test_a_run_continues_past_a_damaged_checkpoint_and_leftovers_of_a_kill(
    run_dir: Path, finished: Path, tiny_data: Path
) -> None:
    newest = list_checkpoints(run_dir)[-1]
    shutil.copytree(newest, newest.with_name(".step_00000030.writing_1"))  # complete, and killed before the rename
    for name in (".step_00000017.writing_2", ".step_00000005.deleting"):
        (run_dir / "checkpoints" / name).mkdir()
        (run_dir / "checkpoints" / name / "__0_0.distcp").write_bytes(b"half")
    flip_a_bit(newest / "__0_0.distcp")
    run(tiny_config(tiny_data, run_dir, steps=30), ALONE)
    log = (run_dir / "log.txt").read_text()
    assert "warning: passed over" in log and "continuing from" in log and "step_00000020" in log
    assert_same_tensors(final_tensors(run_dir), final_tensors(finished))
    assert fault_of(list_checkpoints(run_dir)[-1]) is None
    assert not list((run_dir / "checkpoints").glob(".*"))


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
    """An object whose pickle touches a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def sign_again(checkpoint: Path) -> None:
    """Write hashes that fit the altered files, as an attacker would."""
    names = sorted(path.name for path in checkpoint.iterdir() if path.name != SUMS_FILE)
    (checkpoint / SUMS_FILE).write_text("".join(f"{sha256_of_file(checkpoint / n)}  {n}\n" for n in names))


def test_planted_objects_are_not_executed(run_dir: Path, tmp_path: Path) -> None:
    """One takes the place of the metadata, the other of a tensor, in two ways; the hashes are those of the plants."""
    newest, mark = list_checkpoints(run_dir)[-1], tmp_path / "executed"
    metadata = pickle.loads((newest / ".metadata").read_bytes())
    (newest / ".metadata").write_bytes(pickle.dumps(Planted(mark)))
    sign_again(newest)
    assert_passed_over(run_dir, r"refused: .*system' has no place")

    name, planted = "model.transformer.wpe.weight", io.BytesIO()
    torch.save(Planted(mark), planted)
    path, entry = newest / "__0_0.distcp", next(e for index, e in metadata.storage_data.items() if index.fqn == name)
    planted.write(bytes(entry.length))  # so that its length says nothing
    entry.offset, entry.length = path.stat().st_size, len(planted.getvalue())
    path.write_bytes(path.read_bytes() + planted.getvalue())
    (newest / ".metadata").write_bytes(pickle.dumps(metadata))
    sign_again(newest)
    assert fault_of(newest) is None, "only reading the tensors shows it"
    with pytest.raises(InputError, match=r"refused: model\.transformer\.wpe\.weight"):
        load_model(newest)

    metadata.state_dict_metadata[name] = BytesStorageMetadata()  # DCP would load it with weights_only=False
    (newest / ".metadata").write_bytes(pickle.dumps(metadata))
    sign_again(newest)
    assert_passed_over(run_dir, "refused")
    assert not mark.exists()
    pickle.loads(pickle.dumps(Planted(mark)))
    assert mark.exists(), "plain unpickling executes it"


def assert_passed_over(run_dir: Path, fault: str) -> None:
    """The newest checkpoint is named in one line, and the one before is taken."""
    newest, before = list_checkpoints(run_dir)[:-3:-1]
    checkpoint, faults = newest_sound(run_dir)
    assert checkpoint == before and len(faults) == 1, faults
    assert re.search(fault, faults[0]) and str(newest) in faults[0] and "\n" not in faults[0], faults


@pytest.mark.parametrize("name", ["../outside.distcp", "{tmp}/outside.distcp", "sub/outside.distcp", "..", ""])
def test_a_path_in_the_metadata_stays_in_the_checkpoint(run_dir: Path, tmp_path: Path, name: str) -> None:
    newest = list_checkpoints(run_dir)[-1]
    metadata = pickle.loads((newest / ".metadata").read_bytes())
    for folder in (newest.parent, tmp_path):
        shutil.copy(newest / "__0_0.distcp", folder / "outside.distcp")
    for entry in metadata.storage_data.values():
        entry.relative_path = name.format(tmp=tmp_path)
    (newest / ".metadata").write_bytes(pickle.dumps(metadata))
    sign_again(newest)
    assert_passed_over(run_dir, "is not a name inside this folder")
    with pytest.raises(InputError, match="is not a name inside this folder"):
        load_model(newest)


STAND_INS: dict[str, Callable[[Path], object]] = {
    "fifo": os.mkfifo,
    "socket": lambda path: os.mknod(path, stat.S_IFSOCK | 0o600),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "link out": lambda path: path.symlink_to(path.parents[3] / "moved"),
    "link to nowhere": lambda path: path.symlink_to("nowhere"),
    "link to itself": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("kind", STAND_INS)
def test_only_plain_files_of_the_checkpoint_are_opened(run_dir: Path, kind: str) -> None:
    newest = list_checkpoints(run_dir)[-1]
    for name in ("__0_0.distcp", ".metadata", "state.json", SUMS_FILE):
        (newest / name).rename(run_dir.parent / "moved")
        STAND_INS[kind](newest / name)
        assert_passed_over(run_dir, ".")
        (newest / name).unlink()
        (run_dir.parent / "moved").rename(newest / name)
    assert fault_of(newest) is None
    newest.rename(run_dir.parent / "moved")
    STAND_INS[kind](newest)
    assert fault_of(newest) is not None
    done = called(generate.main, str(run_dir), "--max-tokens", "2")
    assert done.returncode == 0 and done.stderr == f"warning: passed over {newest}: not a checkpoint\n"


def test_a_name_in_the_hashes_stays_in_the_checkpoint(run_dir: Path) -> None:
    sums = list_checkpoints(run_dir)[-1] / SUMS_FILE
    intact = sums.read_text()
    for text in (
        intact.replace("state.json", "../../config.json"),
        intact + "0" * 64 + "  /etc/passwd\n",
        "\n",
        "\xe9\n",
    ):
        sums.write_bytes(text.encode("latin-1"))
        assert_passed_over(run_dir, ".")


OTHER_JSON: tuple[Any, ...] = (None, True, -1, 5, 1.5, 10**400, "", "text", [], [1], {}, {"a": 1})
MAY_BE: dict[tuple[str, ...], Callable[[Any], bool]] = {
    ("wandb_id",): lambda value: value is None or isinstance(value, str),
    ("data",): lambda value: isinstance(value, str),
    ("versions",): lambda value: isinstance(value, dict),
    ("found",): lambda value: isinstance(value, dict),
    ("rows",): lambda value: value == {},
    ("config", "model"): lambda value: isinstance(value, dict),  # `load_model` looks into it, as far as it must
    ("progress", "position"): lambda value: type(value) is int and 0 <= value < 2**63,
    ("progress", "tokens"): lambda value: type(value) is int and 0 <= value < 2**63,
    ("progress", "seconds"): lambda value: type(value) in (int, float),
}


def test_a_state_of_another_form_is_passed_over_though_its_hash_is_right(run_dir: Path) -> None:
    """Every key that is read, absent and with every type of JSON value; and what is no JSON object at all."""
    newest = list_checkpoints(run_dir)[-1]
    path = newest / "state.json"
    intact = json.loads(path.read_text())
    keys = [(), *((key,) for key in intact), ("config", "model"), ("random", "cpu")]
    keys += [("progress", key) for key in intact["progress"]]

    def assert_damaged(text: str, note: object) -> None:
        path.write_text(text)
        sign_again(newest)
        fault = fault_of(newest)
        assert fault is not None and str(path) in fault and "\n" not in fault, note

    for key in keys:
        for value in OTHER_JSON:
            if key in MAY_BE and MAY_BE[key](value):
                continue
            state: Any = {"": copy.deepcopy(intact)}
            holder = functools.reduce(dict.__getitem__, ("", *key[:-1]), state) if key else state
            holder[key[-1] if key else ""] = value
            assert_damaged(json.dumps(state[""]), (key, value))
        if key and key not in (("found",), ("rows",)):  # older checkpoints have none
            del holder[key[-1]]
            assert_damaged(json.dumps(state[""]), key)
    for seals in (5, None, [1], {"metrics.jsonl": 5}, {"metrics.jsonl": {"bytes": -1, "sha256": ""}}):
        assert_damaged(json.dumps(intact | {"rows": seals}), seals)
    for text in ("", "{", "[" * 100_000, "9" * 5_000, '{"progress": ' + "9" * 5_000 + "}", "NaN"):
        assert_damaged(text, text[:20])
    assert_passed_over(run_dir, "state.json: damaged")
    shutil.copytree(newest.with_name("step_00000020"), newest, dirs_exist_ok=True)
    assert_passed_over(run_dir, "it is of step 20")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"width": 2**30}, "do not fit this model"),
        ({"num_layers": 2**30}, "do not fit this model"),
        ({"width": 10**400}, "no model of this code"),
        ({"width": "32"}, "no model of this code"),
        ({"num_heads": 0}, "no model of this code"),
        ({"context_len": 0}, "no model of this code"),
        ({"mlp": "softmax"}, "no model of this code"),
        ({"depth": 3}, "no model of this code: it has no depth"),
        ({"position_embedding": "rope", "context_len": 2**30}, "do not fit this model"),
    ],
)
def test_a_model_that_the_tensors_do_not_bear_out_is_not_made(
    run_dir: Path, changes: dict[str, Any], line: str
) -> None:
    newest = list_checkpoints(run_dir)[-1]
    state = json.loads((newest / "state.json").read_text())
    state["config"]["model"] |= changes
    (newest / "state.json").write_text(json.dumps(state))
    sign_again(newest)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=line) as caught:
        load_model(newest)
    assert "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_every_command_says_which_checkpoint_it_passed_over(run_dir: Path, tiny_data: Path, tmp_path: Path) -> None:
    newest = list_checkpoints(run_dir)[-1]
    flip_a_bit(newest / "__0_0.distcp")
    line = f"warning: passed over {newest}: __0_0.distcp is damaged (its sha256 is not the one in {SUMS_FILE})"
    run_name = str(run_dir)
    for command, args in (
        (generate.main, (run_name, "--max-tokens", "2")),
        (validate.main, (run_name, "--tokens", "64")),
        (hf_bridge.main, ("export", run_name, "--out", str(tmp_path / "out"))),
        (lens.main, ("attention", run_name, "--prompt", "the cat")),
    ):
        done = called(command, *args)
        assert done.returncode == 0, done.stderr
        assert done.stderr.splitlines() == [line], command
        assert called(command, *args, RANK="1").stderr.count("passed over") == 0
    flags = tiny_flags(tiny_data, tmp_path / "new")
    done = called(main, *flags, "--train.steps", "2", "--from-checkpoint", run_name, "--track.wandb", "disabled")
    assert done.returncode == 0 and done.stderr.splitlines().count(line) == 1, done.stderr
    run(tiny_config(tiny_data, run_dir, steps=30), ALONE)
    assert line in (run_dir / "log.txt").read_text()


def test_random_bytes_in_the_metadata_are_refused_or_read(run_dir: Path) -> None:
    newest = list_checkpoints(run_dir)[-1]
    intact = (newest / ".metadata").read_bytes()
    for seed in range(20):
        data, rng = bytearray(intact), random.Random(seed)
        for _ in range(5):
            data[rng.randrange(len(data))] = rng.randrange(256)
        (newest / ".metadata").write_bytes(data)
        sign_again(newest)
        try:
            load_model(newest)
        except InputError as error:
            assert str(newest) in str(error), seed


def test_a_model_of_another_shape_is_refused_in_one_line(run_dir: Path) -> None:
    newest = list_checkpoints(run_dir)[-1]
    state = json.loads((newest / "state.json").read_text())
    state["config"]["model"]["width"] = 64
    (newest / "state.json").write_text(json.dumps(state))
    sign_again(newest)
    with pytest.raises(InputError, match="do not fit this model") as caught:
        load_model(newest)
    assert "\n" not in str(caught.value)


def test_the_last_and_every_nth_checkpoint_are_kept(tiny_data: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_data, tmp_path / "run", steps=35)
    run(with_save(config, every=5, keep=2, keep_every=15), ALONE)
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step_00000015", "step_00000030", "step_00000035"]


def test_too_little_room_is_reported_before_anything_is_written(
    run_dir: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(list_checkpoints(run_dir)[-1])
    usage = shutil.disk_usage(run_dir)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(InputError, match=r"0.00 GB free, but a checkpoint needs 0.02 GB"):
        run(with_save(tiny_config(tiny_data, run_dir, steps=30), retry_seconds=0.1), ALONE)
    assert [path.name for path in list_checkpoints(run_dir)] == ["step_00000010", "step_00000020"]


def test_another_run_in_the_same_directory_is_refused_with_each_difference(
    run_dir: Path, tiny_data: Path, tmp_path: Path
) -> None:
    before = (run_dir / "config.json").read_bytes()
    (tmp_path / "other.txt").write_text("the quick brown fox jumps over the lazy dog. " * 300)
    prepare(Options(input=(str(tmp_path / "other.txt"),), out=tmp_path / "other", tokenizer="char"))
    with pytest.raises(InputError, match="holds other tokens"):
        run(tiny_config(tmp_path / "other", run_dir, steps=30), ALONE)
    with pytest.raises(InputError) as caught:
        run(tiny_config(tiny_data, run_dir, steps=40, batch_tokens=768), ALONE)
    assert "--train.steps 40 (was 30)" in str(caught.value)
    assert "--train.batch-tokens 768 (was 384)" in str(caught.value)
    flags = [*tiny_flags(tiny_data, run_dir), "--train.steps", "30", "--no-resume"]
    done = called(main, *flags, "--optim.beta2", "0.95", "--optim.lr-final", "0", "--validate.every", "25")
    assert done.returncode == 2 and "drop --no-resume to continue" in done.stderr
    assert (run_dir / "config.json").read_bytes() == before
    assert status(run_dir)["state"] == "done" and len(list_checkpoints(run_dir)) == 3


def test_a_run_that_never_saved_may_start_over_with_other_settings(run_dir: Path, tiny_data: Path) -> None:
    forget_checkpoints(run_dir)
    run(tiny_config(tiny_data, run_dir, steps=12), ALONE)
    assert [row["step"] for row in rows(run_dir) if "loss" in row] == list(range(1, 13))
