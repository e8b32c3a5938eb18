"""The choice of a parallel plan, what is refused, and every training option in every parallel mode."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.steps import opened_run
from common.errors import InputError
from model.checkpoint import list_checkpoints, load_model
from model.config import NAMED_SHAPES
from tests.helpers.groups import run_on_ranks
from tests.helpers.runs import (
    assert_same_tensors,
    called,
    curve,
    final_tensors,
    losses,
    rows,
    tensors_of,
    tiny_config,
    tiny_flags,
    validations,
    with_save,
)
from train.config import ParallelConfig, with_vocabulary
from train.config_checks import settings_without_effect
from train.main import main, run
from train.parallel.apply import local
from train.parallel.plan import ParallelPlan, choose_parallel_plan, local_world_of
from train.presets import PRESETS
from train.processes.group import ProcessGroup
from train.run.checkpoints import checkpoint_tensors
from train.run.shares import divide, share_of

pytestmark = pytest.mark.timeout(600)  # one group of processes runs all its cases before the first test
XL = replace(PRESETS["gpt2-xl"], model=NAMED_SHAPES["gpt2-xl"])  # 25 GB of weights, gradients and moments


def chosen(world: int, local_world: int, gigabytes: float, **parallel: Any) -> ParallelPlan:
    config = replace(XL, parallel=ParallelConfig(**parallel))
    return choose_parallel_plan(config, world=world, local_world=local_world, memory_bytes=int(gigabytes * 1e9))


@pytest.mark.parametrize(
    ("world", "local_world", "gigabytes", "expected"),
    [
        (1, 1, 80, ("none", 1, 1)),
        (1, 1, 8, ("none", 1, 1)),
        (8, 8, 80, ("ddp", 1, 8)),
        (16, 8, 80, ("ddp", 1, 16)),
        (8, 8, 40, ("fsdp", 8, 1)),
        (16, 8, 40, ("hsdp", 8, 2)),
        (16, 8, 6, ("fsdp", 16, 1)),
        (6, 1, 40, ("fsdp", 6, 1)),
    ],
)
def test_auto(world: int, local_world: int, gigabytes: float, expected: tuple[str, int, int]) -> None:
    parallel_plan = chosen(world, local_world, gigabytes)
    assert (parallel_plan.mode, parallel_plan.shards, parallel_plan.replicas) == expected
    assert world == 1 or f"{gigabytes:.1f} GB" in parallel_plan.reason


def test_auto_takes_a_shard_size_that_stays_within_hosts() -> None:
    assert chosen(16, 8, 40, shard_size=4).shards == 4
    assert chosen(12, 6, 40, shard_size=4).mode == "fsdp"
    assert "across hosts" in chosen(12, 6, 40, mode="hsdp", shard_size=4).reason


@pytest.mark.parametrize(
    ("hosts", "expected"), [("aaaa", 4), ("aabb", 2), ("aaaabb", 2), ("abc", 1), ("aaaaaaaabbbb", 4), ("abab", 1)]
)
def test_ranks_that_share_a_host(hosts: str, expected: int) -> None:
    assert local_world_of(list(hosts)) == expected


@pytest.mark.parametrize(("gigabytes", "whole"), [(40, True), (14, False)])
def test_gradients_are_added_up_whole_where_they_fit(gigabytes: float, whole: bool) -> None:
    assert chosen(8, 8, gigabytes, mode="fsdp").whole_gradients is whole
    assert chosen(8, 8, gigabytes, mode="fsdp", reduce_gradients="step").whole_gradients
    assert not chosen(8, 8, gigabytes, mode="fsdp", reduce_gradients="micro_batch").whole_gradients


@pytest.mark.parametrize(
    ("world", "parallel", "text"),
    [
        (2, {"mode": "none"}, "--parallel.mode none with 2 processes would train 2 models; use auto or ddp"),
        (1, {"mode": "ddp"}, "--parallel.mode ddp needs several processes: torchrun --nproc_per_node=2 train/main.py"),
        (8, {"mode": "hsdp"}, "8 processes one of 8 shards; --parallel.shard-size may be 2 or 4"),
        (
            12,
            {"mode": "hsdp", "shard_size": 5},
            "12 processes one of 5 shards; --parallel.shard-size may be 2 or 3 or 4 or 6",
        ),
        (2, {"mode": "hsdp"}, "one of 2 shards; use fsdp"),
    ],
)
def test_impossible_plans_are_refused(world: int, parallel: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError) as caught:
        chosen(world, world, 80, **parallel)
    assert str(caught.value).endswith(text)


def test_settings_without_effect_are_named() -> None:
    config = replace(XL, parallel=ParallelConfig(shard_size=4, reshard_after_forward=False, reduce_gradients="step"))
    warnings = settings_without_effect(config, "cuda", 8, "ddp")
    assert [line.split(" has no effect with --parallel.mode ddp")[0] for line in warnings] == [
        "--parallel.shard-size 4",
        "--parallel.no-reshard-after-forward",
        "--parallel.reduce-gradients step",
    ]
    assert len(settings_without_effect(config, "cuda", 8, "fsdp")) == 1
    assert settings_without_effect(config, "cuda", 8, "hsdp") == []


OPTIONS: dict[str, dict[str, Any]] = {
    "bf16": {"dtype": "bf16", "micro_batch": 3},
    "fp16": {"dtype": "fp16", "micro_batch": 3},
    "fp32": {"micro_batch": 3, "activation_checkpointing": True},
    "everything": {
        "dtype": "bf16",
        "micro_batch": 3,
        "compile": True,
        "activation_checkpointing": True,
        "loss": "chunked",
    },
}
MODES: dict[str, dict[str, Any]] = {
    "ddp": {"mode": "ddp"},
    "fsdp": {"mode": "fsdp"},
    "kept": {"mode": "fsdp", "reshard_after_forward": False},
    "sharded": {"mode": "fsdp", "reduce_gradients": "micro_batch"},
}
STEPS = 12


def train_with_options(group: ProcessGroup, data: Path, folder: Path, options: str, modes: tuple[str, ...]) -> None:
    for mode in modes:
        torch._dynamo.reset()
        config = tiny_config(data, folder / mode, steps=STEPS, **OPTIONS[options])
        sample = replace(config.sample, every=6, prompts=("a", "be"), tokens=8)
        run(replace(config, sample=sample, parallel=replace(config.parallel, **MODES[mode])), group)


COMPILES = pytest.mark.long(reason="two processes that compile each kernel twice, with DDP and with FSDP2")


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ("fp32", "kept"),
        ("bf16", "sharded"),
        ("fp16", "fsdp"),
        pytest.param("everything", "fsdp", marks=COMPILES),
    ],
)
def test_ddp_and_fsdp_train_the_same_run_with_every_option(
    tiny_data: Path, tmp_path: Path, options: str, mode: str
) -> None:
    run_on_ranks(2, train_with_options, tiny_data, tmp_path, options, ("ddp", mode))
    check_same_run(tmp_path / "ddp", tmp_path / mode, is_fp32=options == "fp32")


def check_same_run(copied: Path, sharded: Path, *, is_fp32: bool) -> None:
    """Bitwise in fp32. FSDP2 rounds norms' weights in bf16 and fp16: there as close as bf16 is to fp32."""
    one, other = load_model(sharded), load_model(copied)  # without a process group, as model/generate.py does
    assert one.step == other.step == STEPS
    assert [row["step"] for row in rows(sharded, "samples.jsonl")] == [6, 12]
    if not is_fp32:
        difference = (losses(sharded) - losses(copied)).abs()
        assert difference[0] <= 2e-6 and difference[1] <= 5e-4 and difference.max() <= 2e-2
        return
    assert curve(sharded) == curve(copied)
    assert_same_tensors(final_tensors(sharded), final_tensors(copied))
    assert torch.equal(one.model.lm_head.weight, other.model.lm_head.weight)
    assert (sharded / "samples.jsonl").read_text() == (copied / "samples.jsonl").read_text()
    assert validations(sharded) == validations(copied)


HSDP = ParallelConfig(mode="hsdp", shard_size=2)


def save_both_ways(group: ProcessGroup, data: Path, folder: Path) -> int:
    """Train with synchronous and with asynchronous saves, and return the number of elements that this rank writes."""
    for mode in ("sync", "async"):
        config = with_save(tiny_config(data, folder / mode, steps=STEPS), every=5, mode=mode)
        run(replace(config, parallel=HSDP), group)
    config = replace(tiny_config(data, folder / "shares"), parallel=HSDP)
    with opened_run(with_vocabulary(config, 33), group) as (opened, _):
        tensors = checkpoint_tensors(opened.state.model, opened.state.optimizer)
        share = share_of(tensors, divide(tensors, group), group.rank)
        return sum(local(tensor).numel() for tensor in share.values())


@pytest.mark.long(reason="four processes; test_async_checkpoints.py has two in `make test`")
def test_each_element_is_written_once_and_saves_may_be_asynchronous(tiny_data: Path, tmp_path: Path) -> None:
    """Each rank writes its shards, and one of several replicas writes what all of them hold."""
    shares = run_on_ranks(4, save_both_ways, tiny_data, tmp_path)
    left, right = (list_checkpoints(tmp_path / mode) for mode in ("sync", "async"))
    assert [path.name for path in left] == [f"step_{step:08d}" for step in (5, 10, STEPS)]
    for one, other in zip(left, right, strict=True):
        assert_same_tensors(tensors_of(one), tensors_of(other))
    whole = sum(tensor.numel() for tensor in final_tensors(tmp_path / "sync").values())
    assert sum(shares) == whole
    assert max(shares) < 0.3 * whole


def test_the_run_card_tells_the_parallel_plan(tiny_data: Path, tmp_path: Path) -> None:
    flags = [*tiny_flags(tiny_data, tmp_path / "run"), "--dry-run"]
    flags += ["--parallel.mode", "hsdp", "--parallel.shard-size", "2"]
    done = called(main, *flags, WORLD_SIZE="4")
    assert done.returncode == 0, done.stderr
    assert "parallel  hsdp, 2 shards, 2 copies (set by flag)" in done.stdout
    assert "network   each rank, each step: " in done.stdout and "memory    about 0.0" in done.stdout
    done = called(main, *flags, WORLD_SIZE="3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        "train: --parallel.mode hsdp cannot give each of 3 processes one of 2 shards; use fsdp"
    )
    assert not (tmp_path / "run").exists()
