"""Export of a sharded run and fine-tuning from the folder, on gloo ranks."""

import dataclasses
from pathlib import Path

import pytest

from model.checkpoint import load_model
from model.hf_bridge import write_folder
from tests.helpers.groups import run_on_ranks
from tests.helpers.runs import assert_same_tensors, tiny_config, validations
from train.config import Config, ParallelConfig
from train.main import run
from train.processes.group import ProcessGroup

pytest.importorskip("safetensors")


def train_sharded(group: ProcessGroup, config: Config) -> None:
    validate = dataclasses.replace(config.validate, every=4)
    run(dataclasses.replace(config, validate=validate, parallel=ParallelConfig(mode="fsdp")), group)


def test_a_sharded_run_is_exported_by_one_process_and_finetuned_by_two(tiny_data: Path, tmp_path: Path) -> None:
    """Two FSDP2 ranks train, one process exports, two FSDP2 ranks begin with the weights of the folder."""
    run_on_ranks(2, train_sharded, tiny_config(tiny_data, tmp_path / "run", steps=4))
    write_folder(load_model(tmp_path / "run"), tmp_path / "out")
    trained, exported = (load_model(tmp_path / name).model for name in ("run", "out"))
    assert_same_tensors(trained.state_dict(), exported.state_dict())
    config = tiny_config(tiny_data, tmp_path / "new", steps=1)
    run_on_ranks(2, train_sharded, dataclasses.replace(config, from_checkpoint=str(tmp_path / "out")))
    assert validations(tmp_path / "new")[0] == (0, *validations(tmp_path / "run")[-1][1:])
