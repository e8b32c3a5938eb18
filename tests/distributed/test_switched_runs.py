"""A model with every switch set trains the same run however it is spread; and what its switches refuse."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import InputError
from data_prep.manifest import read_manifest
from model.checkpoint import load_model
from model.gpt import build_model
from tests.distributed.test_exact import cut_back
from tests.helpers.groups import leaving_no_group, run_on_ranks
from tests.helpers.runs import assert_same_tensors, curve, final_tensors, losses, tiny_config, with_save
from tests.unit.model.test_switches import MODERN
from train.config import Config, ParallelConfig, with_vocabulary
from train.config_checks import settings_without_effect
from train.main import run
from train.optim import build_optimizer
from train.parallel.auto_micro_batch import check_device
from train.processes.group import ProcessGroup

STEPS = 12
WAYS: dict[str, dict[str, Any]] = {
    "none": {},
    "ddp": {},
    "fsdp": {},
    "fsdp, checkpointing": {"activation_checkpointing": True},
    "fsdp, chunked": {"loss": "chunked"},
}
QUICK = ["ddp", "fsdp", "fsdp, chunked"]


def configured(data: Path, folder: Path, name: str, **train: Any) -> Config:
    config = with_save(tiny_config(data, folder / name, steps=STEPS, **(WAYS.get(name, {}) | train)), every=5)
    config = with_vocabulary(config, read_manifest(data).vocab_size)
    mode: Any = name.split(",")[0]
    return replace(config, model=replace(config.model, **MODERN, num_layers=3), parallel=ParallelConfig(mode=mode))


def train_ways(group: ProcessGroup, data: Path, folder: Path, names: list[str]) -> None:
    for name in names:
        with leaving_no_group(group):
            run(configured(data, folder, name), group)
    if "fsdp" in names:  # lose all after step 5, and go on
        again = replace(configured(data, folder, "fsdp"), run_dir=folder / "again")
        group.on_main(partial(cut_back, folder / "fsdp", again.directory, step=5))
        run(again, group)


RUNS_ARE_LONG = pytest.mark.long(reason="runs with many switches; test_switches.py has each, test_modes.py the layouts")


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("switched")
    run_on_ranks(1, train_ways, tiny_data, folder, ["none"])
    run_on_ranks(2, train_ways, tiny_data, folder, QUICK)
    return folder


@RUNS_ARE_LONG
@pytest.mark.parametrize("name", QUICK)
def test_two_processes_train_the_run_of_one(trained: Path, name: str) -> None:
    check_same_run(trained, name)


@pytest.mark.long(reason="test_parallel.py has the option with fewer switches")
def test_two_processes_train_it_with_checkpointing(trained: Path, tiny_data: Path) -> None:
    run_on_ranks(2, train_ways, tiny_data, trained, ["fsdp, checkpointing"])
    check_same_run(trained, "fsdp, checkpointing")


def check_same_run(trained: Path, name: str) -> None:
    one = losses(trained / "none")
    difference = (losses(trained / name) - one).abs()
    assert len(difference) == STEPS and one[-1] < one[0] - 0.3
    assert difference[0] <= 2e-6 and difference.max() <= 4e-6


@RUNS_ARE_LONG
def test_it_resumes_bit_for_bit(trained: Path) -> None:
    assert curve(trained / "again") == curve(trained / "fsdp")
    assert_same_tensors(final_tensors(trained / "again"), final_tensors(trained / "fsdp"))


@RUNS_ARE_LONG
def test_a_checkpoint_holds_the_untied_head_and_reads_back(trained: Path) -> None:
    tensors = final_tensors(trained / "fsdp")
    names = {name for name in tensors if name.startswith("model.")}
    assert {"model.lm_head.weight", "model.transformer.h.2.attn.value_mix"} <= names
    model = load_model(trained / "fsdp").model
    assert {f"model.{name}" for name in model.state_dict()} == names
    assert all(torch.equal(tensor, tensors[f"model.{name}"]) for name, tensor in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_and_sharded_and_recomputed_it_is_the_same_run(tiny_data: Path, trained: Path) -> None:
    """Minutes of C++ compilation."""
    run_on_ranks(2, train_compiled, tiny_data, trained)
    assert (losses(trained / "compiled") - losses(trained / "none")).abs().max() <= 1e-5


def train_compiled(group: ProcessGroup, data: Path, folder: Path) -> None:
    config = configured(data, folder, "fsdp, checkpointing", compile=True)
    run(replace(config, run_dir=folder / "compiled"), group)


@RUNS_ARE_LONG
def test_scalars_and_norms_do_not_decay(trained: Path, tiny_data: Path) -> None:
    config = configured(tiny_data, trained, "none")
    model = build_model(config.model, seed=1)
    decayed, others = build_optimizer(model, config.optim).param_groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert decayed["weight_decay"] > 0 and others["weight_decay"] == 0
    kinds = {name.rsplit(".", 2)[-2] if name.endswith("weight") else name.rsplit(".", 1)[-1] for name in names.values()}
    plain = {"ln_1", "ln_2", "ln_f", "q_norm", "k_norm", "value_mix"}
    assert plain < kinds
    found = [name.removesuffix(".weight").rsplit(".", 1)[-1] for name in (names[p] for p in others["params"])]
    assert set(found) == plain
    assert len(found) + len(decayed["params"]) == len(names)


def test_flex_is_refused_where_it_cannot_train(tiny_data: Path, tmp_path: Path) -> None:
    config = configured(tiny_data, tmp_path, "none")
    flex = replace(config, model=replace(config.model, attention="flex"))
    with pytest.raises(InputError, match="has no backward pass on a CPU; train with --model"):
        run(flex, ProcessGroup(0, 1, torch.device("cpu")))
    assert not flex.directory.exists()
    check_device(flex, torch.device("cuda"))


def test_switches_without_effect_are_named(tiny_data: Path, tmp_path: Path) -> None:
    config = configured(tiny_data, tmp_path, "none")
    assert not [line for line in settings_without_effect(config, "cpu", 1, "none") if "--model" in line]
    alone = replace(config, model=replace(config.model, num_layers=1, attention="flex"))
    found = [line for line in settings_without_effect(alone, "cuda", 1, "none") if "--model" in line]
    assert found == [
        "--model.value-residual has no effect with --model.num-layers 1: there are no later blocks",
        "--model.attention flex finds no documents: the data's tokenizer has no end-of-text token",
        "--model.attention flex with --train.no-compile holds all scores, as naive does",
    ]
