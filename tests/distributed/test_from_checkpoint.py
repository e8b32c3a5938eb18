"""A new run from an old one's weights."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from common.errors import InputError
from data_prep.textfiles import Options, prepare
from model.checkpoint import find_checkpoint, load_model
from tests.distributed.test_exact import cut_back
from tests.helpers.corpus import make_text
from tests.helpers.runs import curve, rows, tiny_config, validations
from train.config import Config
from train.main import run
from train.processes.group import ProcessGroup

ALONE = ProcessGroup(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def old(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 10 and 20, validated at both."""
    folder = tmp_path_factory.mktemp("old") / "run"
    config = tiny_config(tiny_data, folder, steps=20)
    run(dataclasses.replace(config, validate=dataclasses.replace(config.validate, every=10)), ALONE)
    return folder


def continued(data: Path, run_dir: Path, name: str, **train: int) -> Config:
    return dataclasses.replace(tiny_config(data, run_dir, **{"steps": 10} | train), from_checkpoint=name)


@pytest.mark.parametrize(("at", "step"), [("", 20), ("@10", 10), ("@20", 20), ("/checkpoints/step_00000010", 10)])
def test_it_begins_where_the_weights_stood(old: Path, tiny_data: Path, tmp_path: Path, at: str, step: int) -> None:
    run(continued(tiny_data, tmp_path / "new", f"{old}{at}"), ALONE)
    begun = validations(tmp_path / "new")[0]
    assert begun[0] == 0  # a new run, of its own steps
    assert begun[1:] == next(found[1:] for found in validations(old) if found[0] == step)
    assert curve(tmp_path / "new")[0][3] == pytest.approx(1e-2 / 5)  # and its own warm-up
    assert f"weights from {old}/checkpoints/step_{step:08d}" in (tmp_path / "new" / "log.txt").read_text()


def test_the_same_command_continues_the_new_run(old: Path, tiny_data: Path, tmp_path: Path) -> None:
    config = continued(tiny_data, tmp_path / "new", str(old))
    run(config, ALONE)
    before = rows(tmp_path / "new")
    run(config, ALONE)
    assert rows(tmp_path / "new") == before
    assert "continuing from" in (tmp_path / "new" / "log.txt").read_text()
    assert json.loads((tmp_path / "new" / "config.json").read_text())["config"]["from_checkpoint"] == f"{old}@20"
    run(continued(tiny_data, tmp_path / "new", f"{old}/../{old.name}/"), ALONE)  # the same, spelled otherwise
    run(continued(tiny_data, tmp_path / "new", f"{old}@20"), ALONE)
    with pytest.raises(InputError, match=r"is another run: --from-checkpoint .*@10 \(was "):
        run(continued(tiny_data, tmp_path / "new", f"{old}@10"), ALONE)


def test_the_newest_of_a_run_that_goes_on_is_chosen_once(old: Path, tiny_data: Path, tmp_path: Path) -> None:
    """A start that was killed before its first checkpoint, and the old run has got further meanwhile."""
    cut_back(old, tmp_path / "old", step=10)
    config = continued(tiny_data, tmp_path / "new", str(tmp_path / "old"))
    run(config, ALONE)
    shutil.rmtree(tmp_path / "new" / "checkpoints")
    shutil.copytree(old / "checkpoints" / "step_00000020", tmp_path / "old" / "checkpoints" / "step_00000020")
    run(config, ALONE)
    assert (tmp_path / "new" / "log.txt").read_text().count("weights from") == 2
    assert "step_00000020" not in (tmp_path / "new" / "log.txt").read_text()


def test_what_does_not_fit_is_named(old: Path, tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"does not fit this run: context_len 32 \(this run: 16\)"):
        run(continued(tiny_data, tmp_path / "short", str(old), seq_len=16), ALONE)
    (tmp_path / "text.txt").write_text(make_text(20_000).replace("c", "k"))
    prepare(Options(input=(str(tmp_path / "text.txt"),), out=tmp_path / "data", tokenizer="char"))
    with pytest.raises(InputError, match="another tokenizer"):
        run(continued(tmp_path / "data", tmp_path / "other", str(old)), ALONE)


@pytest.mark.parametrize(
    ("name", "said"),
    [("{old}@11", "no checkpoint of step 11; there are 10, 20"), ("nowhere", "no such run directory or checkpoint")],
)
def test_what_is_not_there_is_refused(old: Path, tiny_data: Path, tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        run(continued(tiny_data, tmp_path / "new", name.format(old=old)), ALONE)
    with pytest.raises(InputError, match=said):
        find_checkpoint(name.format(old=old))


def test_a_step_can_be_named_where_a_trained_model_is_read(old: Path) -> None:
    assert load_model(f"{old}@10").step == 10
