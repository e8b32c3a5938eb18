"""Models start and train on ranks that may not hold them whole: the kernel refuses each rank more than a limit.

RLIMIT_DATA counts what a process may write and shares with nobody, touched or not. The quick tests are the slow ones
in small: blocks are as small a part of the model as in GPT-2 XL.
"""

import dataclasses
import gc
import math
import resource

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from benchmarks.bench_memory import give_memory_back_at_once, status_bytes
from model.config import NAMED_SHAPES, ModelConfig
from model.cost import model_cost
from model.gpt import init_weights
from tests.helpers.groups import run_on_ranks
from train import optim
from train.config import Config, OptimConfig, ParallelConfig, TrainConfig, resolve
from train.data import plan_batches
from train.parallel import apply
from train.parallel.plan import ParallelPlan, choose_parallel_plan
from train.processes.group import ProcessGroup
from train.run.card import step_memory

WORLD, SEQ_LEN = 4, 64
SMALL = ModelConfig(num_layers=12, num_heads=4, width=256, vocab_size=512)


def configured(model: ModelConfig) -> Config:
    train = TrainConfig(seq_len=SEQ_LEN, batch_tokens=WORLD * SEQ_LEN, micro_batch=1, dtype="fp32", compile=False)
    return resolve(Config(model=model, train=train, optim=OptimConfig(), parallel=ParallelConfig(mode="fsdp")))


def layout_of(config: Config) -> ParallelPlan:
    return choose_parallel_plan(config, world=WORLD, local_world=WORLD, memory_bytes=10**12)


def limit(num_bytes: int) -> None:
    """Of what this process may have from now on, beside what it has, and glibc is to keep nothing for later."""
    give_memory_back_at_once()
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (status_bytes("VmData") + num_bytes, hard))


def refused_with_ddp(config: Config, group: ProcessGroup) -> str:
    """What torch says under this limit where a rank is to hold the whole model. One tries: all might fill the RAM."""
    spread = dataclasses.replace(config, parallel=ParallelConfig(mode="ddp"))
    said = "nothing"
    if group.is_main:
        try:
            loss_model = apply.build_loss_model(spread, layout_of(spread), group)
            optim.build_optimizer(loss_model.model, config.optim)
        except RuntimeError as error:
            said = str(error)
        gc.collect()  # what was made of it is full of cycles
    said, *_ = group.gather(said)
    return said


def start(group: ProcessGroup, config: Config, num_bytes: int) -> tuple[str, int, float]:
    """Under a limit: what DDP says; then, with FSDP2, how many parameters have the seed's values in this rank's rows,
    and the mean loss of a sequence."""
    limit(num_bytes)
    refusal = refused_with_ddp(config, group)
    loss_model = apply.build_loss_model(config, layout_of(config), group)
    num_right = 0

    def compare(parameter: Tensor, value: Tensor) -> None:
        nonlocal num_right
        assert isinstance(parameter, DTensor)
        rows = math.ceil(len(value) / group.world)
        num_right += torch.equal(parameter.to_local(), value[rows * group.rank : rows * (group.rank + 1)])

    init_weights(loss_model.model, config.seed, put=compare)
    tokens_BT = torch.arange(SEQ_LEN)[None]
    losses_BT = loss_model.token_losses(tokens_BT, tokens_BT.roll(-1, dims=1))
    return refusal, num_right, losses_BT.mean().item()


def check_start(model: ModelConfig, num_bytes: int) -> None:
    config = configured(model)
    weights_bytes = model_cost(model).gradient_bytes
    assert num_bytes < weights_bytes
    num_parameters = 4 + 12 * model.num_layers
    for refusal, num_right, loss in run_on_ranks(WORLD, start, config, num_bytes):
        assert "can't allocate memory" in refusal
        assert num_right == num_parameters
        assert loss == pytest.approx(math.log(model.vocab_size), rel=0.05)


def step(group: ProcessGroup, config: Config, num_bytes: int) -> tuple[str, float, float]:
    """Under a limit: what DDP says; then, with FSDP2, the mean loss of a sequence before and after a step on it."""
    limit(num_bytes)
    refusal = refused_with_ddp(config, group)
    parallel_plan = layout_of(config)
    loss_model = apply.build_loss_model(config, parallel_plan, group)
    optimizer = optim.build_optimizer(loss_model.model, config.optim)
    tokens_BT = torch.arange(SEQ_LEN)[None]
    targets_BT = tokens_BT.roll(-1, dims=1)
    apply.set_gradient_sync(loss_model, parallel_plan, is_last=True)
    scaled, before = loss_model(tokens_BT, targets_BT, torch.full((), 1 / SEQ_LEN))
    scaled.backward()
    norm = group.sum_(optim.sum_of_squares(loss_model.model.parameters())).sqrt().float()
    optim.update(optimizer, 1e-3, norm, torch.ones((), dtype=torch.bool), 1.0)
    apply.zero_gradients(loss_model)
    after = loss_model.token_losses(tokens_BT, targets_BT).sum()
    return refusal, before.item() / SEQ_LEN, after.item() / SEQ_LEN


def check_step(model: ModelConfig, num_bytes: int) -> None:
    config = configured(model)
    counted = step_memory(config, plan_batches(config, WORLD), layout_of(config), on_cpu=True).peak_bytes
    assert counted < num_bytes < model_cost(model).state_bytes
    for refusal, before, after in run_on_ranks(WORLD, step, config, num_bytes):
        assert "can't allocate memory" in refusal
        assert after < before - 0.1


def test_a_model_starts_on_ranks_that_cannot_hold_it() -> None:
    check_start(SMALL, 32 * 10**6)  # its weights are 39 MB


def test_a_model_trains_on_ranks_that_cannot_hold_its_state() -> None:
    check_step(SMALL, 90 * 10**6)  # weights, gradients and optimizer are 155 MB


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_gpt2_xl_starts_on_ranks_that_cannot_hold_it() -> None:
    check_start(NAMED_SHAPES["gpt2-xl"], 3 * 10**9)  # its weights are 6.2 GB


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_gpt2_large_trains_on_ranks_that_cannot_hold_its_state() -> None:
    check_step(NAMED_SHAPES["gpt2-large"], 6 * 10**9)  # weights, gradients and optimizer are 12.4 GB
