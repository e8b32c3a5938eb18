"""Everything that is done to the plain model before it trains, in one visible order."""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from data_prep.errors import InputError
from model.gpt import GPT
from train.config import Config
from train.mesh import Mesh


def parallelize(model: GPT, config: Config, mesh: Mesh) -> nn.Module:
    """The module to call in training; `model` itself stays the one to save, validate and sample from.

    1. compile, in place and block by block: one graph serves all blocks, parameter names stay clean, and the
       graph is not broken by what wraps it. Dynamo's own cutting at DDP's buckets is switched off: blocks are
       pieces enough to overlap communication with, and every world size then compiles the same graph.
    2. DDP last, so that it sees the final parameters. gradient_as_bucket_view saves one copy of the gradients.
    """
    if config.train.compile:
        torch._dynamo.config.optimize_ddp = False
        for block in model.blocks:
            block.compile()
    if mesh.world > 1:
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    return model


def check_mode(config: Config, world: int) -> None:
    """InputError if --parallel.mode does not fit the number of processes."""
    if config.parallel.mode == "none" and world > 1:
        raise InputError(f"--parallel.mode none with {world} processes would train {world} models; use ddp")
    if config.parallel.mode == "ddp" and world == 1:
        raise InputError("--parallel.mode ddp needs several processes: torchrun --nproc_per_node=2 train/main.py")


def set_gradient_sync(module: nn.Module, is_last: bool) -> None:
    """Reduce gradients in the backward pass of the last micro-batch only. Call before its *forward*."""
    if isinstance(module, DistributedDataParallel):
        module.require_backward_grad_sync = is_last


def compute_dtype(config: Config) -> torch.dtype:
    return torch.bfloat16 if config.train.dtype == "bf16" else torch.float32
