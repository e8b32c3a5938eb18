"""Models start and train on ranks that cannot hold them whole: the kernel refuses each rank more than a limit.

RLIMIT_DATA counts the private writable memory of a process, touched or not. The quick test is the slow one at a small
size, with blocks that are as small a part of the model as in GPT-2 XL.
"""

import ctypes
import dataclasses
import gc
import math
import resource
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

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
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def configured(model: ModelConfig) -> Config:
    train = TrainConfig(seq_len=SEQ_LEN, batch_tokens=WORLD * SEQ_LEN, micro_batch=1, dtype="fp32", compile=False)
    return resolve(Config(model=model, train=train, optim=OptimConfig(), parallel=ParallelConfig(mode="fsdp")))


def plan_of(config: Config) -> ParallelPlan:
    return choose_parallel_plan(config, world=WORLD, local_world=WORLD, memory_bytes=10**12)


def limit_memory(num_bytes: int) -> None:
    """Allow this process `num_bytes` beside what it has, and make glibc return freed memory at once."""
    torch.ones((), requires_grad=True).backward()  # starts autograd's threads, whose stacks of 8 MB would count
    for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
        ctypes.CDLL(None).mallopt(parameter, 2**16)
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    data_bytes = next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmData:"))
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (data_bytes + num_bytes, hard))


def refusal_of_ddp(config: Config, group: ProcessGroup) -> str:
    """Return torch's error where rank 0 is to hold the whole model. If all ranks tried, they might fill the RAM."""
    ddp = dataclasses.replace(config, parallel=ParallelConfig(mode="ddp"))
    message = "no error"
    if group.is_main:
        try:
            loss_model = apply.build_loss_model(ddp, plan_of(ddp), group)
            optim.build_optimizer(loss_model.model, config.optim)
        except RuntimeError as error:
            message = str(error)
        gc.collect()  # the model is full of reference cycles
    return group.gather(message)[0]


def start(group: ProcessGroup, config: Config, num_bytes: int) -> tuple[str, int, float]:
    """Return DDP's error under a limit; with FSDP2, the parameters whose rows are the seed's, and the mean loss."""
    limit_memory(num_bytes)
    refusal = refusal_of_ddp(config, group)
    loss_model = apply.build_loss_model(config, plan_of(config), group)
    num_right = 0

    def compare(parameter: Tensor, value: Tensor) -> None:
        nonlocal num_right
        assert isinstance(parameter, DTensor)
        rows = math.ceil(len(value) / group.world)
        num_right += torch.equal(parameter.to_local(), value[rows * group.rank : rows * (group.rank + 1)])

    init_weights(loss_model.model, config.seed, put=compare)
    tokens_BT = torch.arange(SEQ_LEN)[None]
    return refusal, num_right, loss_model.token_losses(tokens_BT, tokens_BT.roll(-1, dims=1)).mean().item()


def step(group: ProcessGroup, config: Config, num_bytes: int) -> tuple[str, float, float]:
    """Return DDP's error under a limit; with FSDP2, the mean loss of a sequence before and after a step on it."""
    limit_memory(num_bytes)
    refusal = refusal_of_ddp(config, group)
    parallel_plan = plan_of(config)
    loss_model = apply.build_loss_model(config, parallel_plan, group)
    optimizer = optim.build_optimizer(loss_model.model, config.optim)
    tokens_BT = torch.arange(SEQ_LEN)[None]
    targets_BT = tokens_BT.roll(-1, dims=1)
    apply.set_gradient_sync(loss_model, parallel_plan, is_last=True)
    scaled, before = loss_model(tokens_BT, targets_BT, torch.full((), 1 / SEQ_LEN))
    scaled.backward()
    norm = group.sum_(optim.sum_of_squares(loss_model.model.parameters())).sqrt().float()
    optim.update(optimizer, 0, 1e-3, norm, torch.ones((), dtype=torch.bool))
    apply.zero_gradients(loss_model)
    after = loss_model.token_losses(tokens_BT, targets_BT).sum()
    return refusal, before.item() / SEQ_LEN, after.item() / SEQ_LEN


SLOW = (pytest.mark.slow, pytest.mark.timeout(1800))


@pytest.mark.parametrize(
    ("model", "num_bytes"),
    [
        pytest.param(SMALL, 32 * 10**6, id="39 MB of weights"),
        pytest.param(NAMED_SHAPES["gpt2-xl"], 3 * 10**9, id="6.2 GB of weights", marks=SLOW),
    ],
)
def test_a_model_starts_on_ranks_that_cannot_hold_it(model: ModelConfig, num_bytes: int) -> None:
    assert num_bytes < model_cost(model).gradient_bytes
    for refusal, num_right, loss in run_on_ranks(WORLD, start, configured(model), num_bytes):
        assert "can't allocate memory" in refusal
        assert num_right == 4 + 12 * model.num_layers
        assert loss == pytest.approx(math.log(model.vocab_size), rel=0.05)


@pytest.mark.parametrize(
    ("model", "num_bytes"),
    [
        pytest.param(SMALL, 90 * 10**6, id="155 MB of weights, gradients and moments"),
        pytest.param(NAMED_SHAPES["gpt2-large"], 6 * 10**9, id="12.4 GB of them", marks=SLOW),
    ],
)
def test_a_model_trains_on_ranks_that_cannot_hold_its_state(model: ModelConfig, num_bytes: int) -> None:
    config = configured(model)
    counted = step_memory(config, plan_batches(config, WORLD), plan_of(config), on_cpu=True).peak_bytes
    assert counted < num_bytes < model_cost(model).state_bytes
    for refusal, before, after in run_on_ranks(WORLD, step, config, num_bytes):
        assert "can't allocate memory" in refusal
        assert after < before - 0.1
