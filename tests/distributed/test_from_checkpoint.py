"""A new run from the weights of another run."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.errors import InputError
from data_prep.textfiles import Options, prepare
from model.checkpoint import load_model
from tests.distributed.test_exact import cut_back
from tests.helpers.corpus import make_text
from tests.helpers.runs import curve, forget_checkpoints, rows, tiny_config, validations
from train.config import Config
from train.main import run
from train.processes.group import ProcessGroup

ALONE = ProcessGroup(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def old(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 10 and 20, validated at both."""
    folder = tmp_path_factory.mktemp("old") / "run"
    config = tiny_config(tiny_data, folder, steps=20)
    run(replace(config, validate=replace(config.validate, every=10)), ALONE)
    return folder


def continued(data: Path, run_dir: Path, name: str, **train: int) -> Config:
    return replace(tiny_config(data, run_dir, **{"steps": 10} | train), from_checkpoint=name)


@pytest.mark.parametrize(("suffix", "step"), [("", 20), ("@10", 10), ("/checkpoints/step_00000010", 10)])
def test_a_run_begins_with_the_weights_but_its_own_steps_and_warm_up(
    old: Path, tiny_data: Path, tmp_path: Path, suffix: str, step: int
) -> None:
    run(continued(tiny_data, tmp_path / "new", f"{old}{suffix}"), ALONE)
    first = validations(tmp_path / "new")[0]
    assert first[0] == 0
    assert first[1:] == next(validation[1:] for validation in validations(old) if validation[0] == step)
    assert curve(tmp_path / "new")[0][3] == pytest.approx(1e-2 / 5)
    assert f"weights from {old}/checkpoints/step_{step:08d}" in (tmp_path / "new" / "log.txt").read_text()


def test_weights_may_be_trained_on_with_another_dropout(old: Path, tiny_data: Path, tmp_path: Path) -> None:
    config = continued(tiny_data, tmp_path / "new", str(old))
    run(replace(config, model=replace(config.model, dropout=0.2)), ALONE)
    assert validations(tmp_path / "new")[0][1:] == validations(old)[-1][1:], "the same weights, scored without dropout"
    assert "--model.dropout 0.2" in (tmp_path / "new" / "log.txt").read_text()


def test_the_same_command_continues_the_new_run(old: Path, tiny_data: Path, tmp_path: Path) -> None:
    config = continued(tiny_data, tmp_path / "new", str(old))
    run(config, ALONE)
    before = rows(tmp_path / "new")
    for name in (str(old), f"{old}/../{old.name}/", f"{old}@20"):  # the same weights
        run(continued(tiny_data, tmp_path / "new", name), ALONE)
    assert rows(tmp_path / "new") == before
    assert "continuing from" in (tmp_path / "new" / "log.txt").read_text()
    assert json.loads((tmp_path / "new" / "config.json").read_text())["config"]["from_checkpoint"] == f"{old}@20"
    with pytest.raises(InputError, match=r"is another run: --from-checkpoint .*@10 \(was "):
        run(continued(tiny_data, tmp_path / "new", f"{old}@10"), ALONE)


def test_the_newest_checkpoint_of_a_run_that_goes_on_is_chosen_once(old: Path, tiny_data: Path, tmp_path: Path) -> None:
    """A start is killed before its first checkpoint; at the next one the old run has got further."""
    cut_back(old, tmp_path / "old", step=10)
    config = continued(tiny_data, tmp_path / "new", str(tmp_path / "old"))
    run(config, ALONE)
    forget_checkpoints(tmp_path / "new")
    shutil.copytree(old / "checkpoints" / "step_00000020", tmp_path / "old" / "checkpoints" / "step_00000020")
    run(config, ALONE)
    assert (tmp_path / "new" / "log.txt").read_text().count("weights from") == 2
    assert "step_00000020" not in (tmp_path / "new" / "log.txt").read_text()


def test_weights_that_do_not_fit_or_are_missing_are_refused(old: Path, tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(make_text(20_000).replace("c", "k"))
    prepare(Options(input=(str(tmp_path / "text.txt"),), out=tmp_path / "data", tokenizer="char"))
    errors = {
        r"does not fit this run: context_len 32 \(this run: 16\)": (tiny_data, str(old), 16),
        "another tokenizer": (tmp_path / "data", str(old), 32),
        "no checkpoint of step 11; there are 10, 20": (tiny_data, f"{old}@11", 32),
        "no such run directory or checkpoint": (tiny_data, "nowhere", 32),
    }
    for error, (data, name, seq_len) in errors.items():
        with pytest.raises(InputError, match=error):
            run(continued(data, tmp_path / "new", name, seq_len=seq_len), ALONE)
    assert load_model(f"{old}@10").step == 10, "a model may be read by the same name"
