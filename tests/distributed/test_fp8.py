"""--train.fp8 with DDP and FSDP2, also with what else changes a block: the gradients are those of one process."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig
from tests.helpers.groups import run_on_ranks
from train.config import Config, ParallelConfig, TrainConfig, resolve
from train.parallel import apply
from train.parallel.plan import choose_parallel_plan
from train.processes.group import ProcessGroup

MODEL = ModelConfig(num_layers=2, num_heads=2, width=32, vocab_size=150)
CONFIG = resolve(Config(model=MODEL, train=TrainConfig(seq_len=16, batch_tokens=64, micro_batch=2, compile=False)))
LAYOUTS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {},
    "fsdp, everything": {"activation_checkpointing": True, "loss": "chunked", "loss_chunk_tokens": 20},
}


def gradient(group: ProcessGroup, fp8: Any, layout: str) -> Tensor:
    """Return the whole gradient of one micro-batch for each rank, in one vector."""
    train = replace(CONFIG.train, fp8=fp8, **LAYOUTS.get(layout, {}))
    mode: Any = layout.partition(",")[0]
    config = replace(CONFIG, train=train, parallel=ParallelConfig(mode=mode))
    parallel_plan = choose_parallel_plan(config, world=group.world, local_world=group.world, memory_bytes=10**12)
    loss_model = apply.build_loss_model(config, parallel_plan, group)
    module = apply.wrap(loss_model, parallel_plan)
    tokens_BT = torch.randint(150, (4, 17), generator=torch.Generator().manual_seed(1))
    tokens_BT = tokens_BT[group.rank * 4 // group.world :][: 4 // group.world]
    apply.set_gradient_sync(module, parallel_plan, is_last=True)
    module(tokens_BT[:, :-1], tokens_BT[:, 1:], torch.tensor(group.world / 64))[0].backward()
    gradients = [parameter.grad for parameter in loss_model.parameters()]
    whole = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients if g is not None]
    return torch.cat([g.flatten().float() for g in whole])


def gradients_on_two(group: ProcessGroup) -> list[Tensor]:
    return [gradient(group, "all", layout) for layout in LAYOUTS]


def test_two_processes_have_the_gradient_of_one() -> None:
    """A row's scale knows nothing of other rows, so how they are spread changes no product."""
    one = run_on_ranks(1, gradient, "all", "none")[0]
    in_bf16 = run_on_ranks(1, gradient, None, "none")[0]
    assert (one - in_bf16).norm() > 0.01 * in_bf16.norm()
    for gradients in run_on_ranks(2, gradients_on_two):
        for layout, vector in zip(LAYOUTS, gradients, strict=True):
            assert (vector - one).norm() <= 0.01 * one.norm(), layout
