"""The rungs below GPT trained by train/main.py: resumed, in two processes, with the chunked loss, and refused."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.manifest import read_manifest
from model import generate, ladder
from model.checkpoint import load_model
from model.cost import main as cost_command
from tests.distributed.test_exact import cut_back
from tests.helpers.groups import run_on_ranks
from tests.helpers.runs import (
    assert_same_tensors,
    called,
    curve,
    final_tensors,
    losses,
    status,
    tiny_config,
    tiny_flags,
    validations,
)
from tests.unit.model.test_ladder import BELOW
from train import main as trainer
from train.config import Config, with_vocabulary
from train.main import run
from train.processes.group import ProcessGroup

ALONE = ProcessGroup(0, 1, torch.device("cpu"))


def configured(data: Path, run_dir: Path, name: Any, **train: Any) -> Config:
    config = with_vocabulary(tiny_config(data, run_dir, steps=30, **train), read_manifest(data).vocab_size)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, kind=name))


def train_here(group: ProcessGroup, config: Config) -> None:
    run(config, group)


@pytest.mark.parametrize("name", BELOW)
def test_a_rung_learns_and_a_resumed_run_is_bitwise_the_same(tiny_data: Path, tmp_path: Path, name: str) -> None:
    run(configured(tiny_data, tmp_path / "whole", name), ALONE)
    first, *_, last = (loss for _, loss, _ in validations(tmp_path / "whole"))
    assert last < first - 0.1
    cut_back(tmp_path / "whole", tmp_path / "parts", 20)
    run(configured(tiny_data, tmp_path / "parts", name), ALONE)
    assert curve(tmp_path / "whole") == curve(tmp_path / "parts")
    assert_same_tensors(final_tensors(tmp_path / "whole"), final_tensors(tmp_path / "parts"))
    assert type(load_model(tmp_path / "parts").model) is ladder.MODELS[name]
    generated = called(generate.main, str(tmp_path / "parts"), "--max-tokens", "20", "--device", "cpu")
    assert generated.returncode == 0 and len(generated.stdout) >= 20


def test_two_processes_and_the_chunked_loss_train_the_same_block(tiny_data: Path, tmp_path: Path) -> None:
    run(configured(tiny_data, tmp_path / "one", "block"), ALONE)
    run(configured(tiny_data, tmp_path / "chunked", "block", loss="chunked"), ALONE)
    run_on_ranks(2, train_here, configured(tiny_data, tmp_path / "two", "block"))
    for name in ("two", "chunked"):
        torch.testing.assert_close(losses(tmp_path / name), losses(tmp_path / "one"), rtol=0, atol=1e-5)


def test_flags_that_a_rung_has_no_use_for_are_refused_by_name(tiny_data: Path, tmp_path: Path) -> None:
    flags = [*tiny_flags(tiny_data, tmp_path / "run"), "--model.kind", "head"]
    for words, message in (
        ("--model.mlp swiglu --model.no-bias", "--model.mlp, --model.bias: only for --model.kind gpt"),
        ("--parallel.mode fsdp", "--parallel.mode fsdp shards blocks, which --model.kind head does not have; use ddp"),
        ("--model.kind heads --model.num-heads 5", "--model.width 32 is not divisible by --model.num-heads 5"),
        ("--model.kind table", "--model.kind"),
    ):
        refused = called(trainer.main, *flags, *words.split(), "--dry-run")
        assert refused.returncode == 2 and message in refused.stderr, refused.stderr
    dry_run = called(trainer.main, *flags, "--train.activation-checkpointing", "--dry-run")
    assert "32 wide, context 32: " in dry_run.stdout and "memory" not in dry_run.stdout
    assert "--train.activation-checkpointing has no effect with --model.kind head" in dry_run.stdout
    assert not (tmp_path / "run").exists()
    cost = called(cost_command, "gpt2-small", "--model.kind", "head")
    assert cost.returncode == 2 and "--model.kind head: this command counts gpt only" in cost.stderr


def test_one_kinds_weights_and_run_directory_are_refused_for_another(tiny_data: Path, tmp_path: Path) -> None:
    run(configured(tiny_data, tmp_path / "head", "head"), ALONE)
    flags = [*tiny_flags(tiny_data, tmp_path / "heads"), "--model.kind", "heads"]
    refused = called(trainer.main, *flags, "--from-checkpoint", str(tmp_path / "head"))
    message = "its model does not fit this run: kind head (this run: heads)"
    assert refused.returncode == 2 and message in refused.stderr
    refused = called(trainer.main, *tiny_flags(tiny_data, tmp_path / "head"), "--model.kind", "heads")
    assert refused.returncode == 2 and "--model.kind heads (was head)" in refused.stderr
    assert status(tmp_path / "head")["state"] == "done"
