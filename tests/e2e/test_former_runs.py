"""A run of the version before the renames continues bitwise, and its flags are refused by their new names."""

import json
import shutil
from pathlib import Path

import torch

from model.checkpoint import list_checkpoints
from model.config import FORMER_NAMES
from tests.distributed.test_checkpoints import sign_again
from tests.helpers.runs import assert_same_tensors, called, curve, final_tensors, tiny_config, tiny_flags
from train.curves import count_parameters_of
from train.main import main, run
from train.processes.group import ProcessGroup

ALONE = ProcessGroup(0, 1, torch.device("cpu"))


def as_before(recorded: Path) -> None:
    """Give the configuration in a JSON file the field names of the version before."""
    content = json.loads(recorded.read_text())
    former = {new: old for old, new in FORMER_NAMES.items()}
    config = content["config"]
    config["model"] = {former.get(name, name): value for name, value in config["model"].items()}
    config["data"]["leave_out"] = config["data"].pop("skip_sequences")
    config["parallel"]["accumulate"] = config["parallel"].pop("reduce_gradients")
    recorded.write_text(json.dumps(content))


def test_a_run_with_the_former_names_continues_bitwise(tiny_data: Path, tmp_path: Path) -> None:
    run(tiny_config(tiny_data, tmp_path / "whole", steps=20), ALONE)
    shutil.copytree(tmp_path / "whole", tmp_path / "former")
    shutil.rmtree(list_checkpoints(tmp_path / "former")[-1])
    as_before(tmp_path / "former" / "config.json")
    (checkpoint,) = list_checkpoints(tmp_path / "former")
    as_before(checkpoint / "state.json")
    sign_again(checkpoint)
    assert count_parameters_of(tmp_path / "former") == count_parameters_of(tmp_path / "whole") is not None

    run(tiny_config(tiny_data, tmp_path / "former", steps=20), ALONE)
    assert curve(tmp_path / "former") == curve(tmp_path / "whole")
    assert_same_tensors(final_tensors(tmp_path / "former"), final_tensors(tmp_path / "whole"))


def test_former_flags_are_refused_with_their_new_names(tiny_data: Path, tmp_path: Path) -> None:
    for flags, line in (
        (["--model.rung", "head"], "--model.rung is now called --model.kind"),
        (["--model.hidden_size=8"], "--model.hidden-size is now called --model.mlp-width"),
        (["--model.positions", "rope"], "--model.positions is now called --model.position-embedding"),
        (["--data.leave-out", "7"], "--data.leave-out is now called --data.skip-sequences"),
        (["--parallel.accumulate", "whole"], "--parallel.accumulate is now called --parallel.reduce-gradients step"),
    ):
        done = called(main, *tiny_flags(tiny_data, tmp_path / "run"), *flags)
        assert done.returncode == 2 and done.stderr.startswith(f"train: {line}") and done.stderr.count("\n") == 1
