"""A model with every switch set trains the same run in every parallel mode; and what its switches refuse."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import InputError
from data_prep.manifest import read_manifest
from model.checkpoint import load_model
from model.gpt import INITIAL_NUMBERS
from tests.distributed.test_exact import assert_close_losses, cut_back
from tests.helpers.groups import run_on_ranks
from tests.helpers.runs import assert_same_tensors, curve, final_tensors, losses, tiny_config, with_save
from tests.unit.model.test_switches import MODERN, RECIPE
from train.config import Config, ParallelConfig, with_vocabulary
from train.config_checks import settings_without_effect
from train.main import run
from train.parallel.auto_micro_batch import check_device
from train.processes.group import ProcessGroup

STEPS = 12
FSDP_OPTIONS: dict[str, Any] = {"activation_checkpointing": True, "loss": "chunked"}


SWITCHES = {"modern": MODERN, "recipe": RECIPE}
every_switch = pytest.mark.parametrize("name", SWITCHES)


def configured(data: Path, run_dir: Path, mode: Any, name: str = "modern", **train: Any) -> Config:
    config = with_save(tiny_config(data, run_dir, steps=STEPS, **train), every=5)
    config = with_vocabulary(config, read_manifest(data).vocab_size)
    model = replace(config.model, **SWITCHES[name], num_layers=3)
    return replace(config, model=model, parallel=ParallelConfig(mode=mode))


def train_on_two(group: ProcessGroup, data: Path, folder: Path, name: str) -> None:
    run(configured(data, folder / "ddp", "ddp", name), group)
    run(configured(data, folder / "fsdp", "fsdp", name, **FSDP_OPTIONS), group)
    group.on_main(lambda: cut_back(folder / "fsdp", folder / "resumed", step=5))
    run(configured(data, folder / "resumed", "fsdp", name, **FSDP_OPTIONS), group)


@every_switch
@pytest.mark.long(reason="runs with many switches; test_switches.py has each, test_modes.py the layouts")
def test_two_processes_train_and_resume_the_run_of_one(tiny_data: Path, tmp_path: Path, name: str) -> None:
    """FSDP2 with checkpointing and the chunked loss too; its checkpoint holds the untied head and the mixed values."""
    run_on_ranks(1, lambda group: run(configured(tiny_data, tmp_path / "none", "none", name), group))
    run_on_ranks(2, train_on_two, tiny_data, tmp_path, name)
    one = losses(tmp_path / "none")
    assert len(one) == STEPS and one[-1] < one[0] - 0.3
    for name in ("ddp", "fsdp"):
        assert_close_losses(tmp_path / name, tmp_path / "none")
    assert curve(tmp_path / "resumed") == curve(tmp_path / "fsdp")
    tensors = final_tensors(tmp_path / "fsdp")
    assert_same_tensors(final_tensors(tmp_path / "resumed"), tensors)
    names = {name for name in tensors if name.startswith("model.")}
    assert {"model.lm_head.weight", "model.transformer.h.2.attn.value_mix"} <= names
    state_dict = load_model(tmp_path / "fsdp").model.state_dict()
    assert_same_tensors(
        {f"model.{name}": tensor for name, tensor in state_dict.items()}, {n: tensors[n] for n in names}
    )


def with_muon(config: Config) -> Config:
    rates: dict[str, Any] = {"embedding_lr": 1e-2, "head_lr": 5e-3, "vector_lr": 1e-2}
    return replace(config, optim=replace(config.optim, name="muon", **rates))


def train_recipe(group: ProcessGroup, data: Path, folder: Path, modes: list[str]) -> None:
    for mode in modes:
        config = configured(data, folder / mode, mode, "recipe")
        run(config, group)
        run(with_muon(replace(config, run_dir=folder / f"muon_{mode}")), group)


def test_the_recipes_switches_train_bitwise_alike_in_ddp_and_fsdp2(tiny_data: Path, tmp_path: Path) -> None:
    run_on_ranks(1, train_recipe, tiny_data, tmp_path, ["none"])
    run_on_ranks(2, train_recipe, tiny_data, tmp_path, ["ddp", "fsdp"])
    for optimizer in ("", "muon_"):
        one = losses(tmp_path / f"{optimizer}none")
        assert len(one) == STEPS and one[-1] < one[0] - 0.3
        for mode in ("ddp", "fsdp"):
            assert curve(tmp_path / f"{optimizer}{mode}") == curve(tmp_path / f"{optimizer}none")
            tensors = final_tensors(tmp_path / f"{optimizer}{mode}")
            assert_same_tensors(tensors, final_tensors(tmp_path / f"{optimizer}none"))
            numbers = {name: tensor.item() for name, tensor in tensors.items() if name.endswith("_scale")}
            assert len(numbers) == 3 + 2 + 1
            assert all(name.startswith("model.") for name in numbers)
            assert not set(numbers.values()) & set(INITIAL_NUMBERS.values()), "every number has learned"


@pytest.mark.slow
@pytest.mark.timeout(900)
@every_switch
def test_compiled_sharded_and_recomputed_it_is_the_same_run(tiny_data: Path, tmp_path: Path, name: str) -> None:
    """Minutes of C++ compilation."""
    run_on_ranks(1, lambda group: run(configured(tiny_data, tmp_path / "none", "none", name), group))
    run_on_ranks(2, train_compiled, tiny_data, tmp_path / "compiled", name)
    assert (losses(tmp_path / "compiled") - losses(tmp_path / "none")).abs().max() <= 1e-5


def train_compiled(group: ProcessGroup, data: Path, run_dir: Path, name: str) -> None:
    run(configured(data, run_dir, "fsdp", name, compile=True, activation_checkpointing=True), group)


def test_flex_attention_does_not_train_on_a_cpu(tiny_data: Path, tmp_path: Path) -> None:
    config = configured(tiny_data, tmp_path / "run", "none")
    flex = replace(config, model=replace(config.model, attention="flex"))
    with pytest.raises(InputError, match="has no backward pass on a CPU; train with --model"):
        run(flex, ProcessGroup(0, 1, torch.device("cpu")))
    assert not flex.directory.exists()
    check_device(flex, torch.device("cuda"))


def test_switches_without_effect_are_named(tiny_data: Path, tmp_path: Path) -> None:
    config = configured(tiny_data, tmp_path / "run", "none")
    assert not [line for line in settings_without_effect(config, "cpu", 1, "none") if "--model" in line]
    uncapped: dict[str, Any] = {"logit_softcap": None, "softcap_form": "rsqrt"}
    switches: dict[str, Any] = {"num_layers": 1, "attention": "flex", "skips": True, "window": 32}
    one_block = replace(config, model=replace(config.model, **switches, **uncapped))
    assert [line for line in settings_without_effect(one_block, "cuda", 1, "none") if "--model" in line] == [
        "--model.window 32 has no effect with --train.seq-len 32",
        "--model.value-residual has no effect with --model.num-layers 1: there are no later blocks",
        "--model.skips has no effect with --model.num-layers 1: there are no later blocks",
        "--model.softcap-form rsqrt has no effect without --model.logit-softcap",
        "--model.attention flex finds no documents: the data's tokenizer has no end-of-text token",
        "--model.attention flex with --train.no-compile holds all scores, as naive does",
    ]
