"""Everything that is done to the plain model before it trains, in one visible order."""

import types

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from data_prep.errors import InputError
from model.gpt import GPT, Block
from train.config import Config
from train.losses import Objective
from train.mesh import Mesh


def build_objective(model: GPT, config: Config) -> Objective:
    """The model with its loss, made ready for one process. Parameter names stay as they are.

    1. Activation checkpointing, block by block: the compiler must see it to plan what is computed again.
    2. compile, in place and block by block: one graph serves all blocks, and what wraps the model does not break it.
       Shapes are static: training, validation and sampling call the model in one and the same.
       Dynamo's own cutting at DDP's buckets is switched off: blocks are pieces enough to overlap communication with,
       and every world size then compiles the same graph.
    """
    train = config.train
    if train.activation_checkpointing:
        for block in model.blocks:
            block.forward = types.MethodType(recomputed, block)
    if train.compile:
        torch._dynamo.config.optimize_ddp = False
        for part in (*model.blocks, model.transformer["ln_f"]):
            part.compile(dynamic=False)
    return Objective(model, chunked=train.loss == "chunked", compiled=train.compile)


def recomputed(block: Block, x_BTD: Tensor) -> Tensor:
    """A block that keeps its input alone. Nothing random happens in it, so no generator has to be put back.

    A function of ours around `checkpoint`, since Dynamo skips the frames of torch.utils.checkpoint that it meets first.
    """
    found: Tensor = checkpoint(Block.forward, block, x_BTD, use_reentrant=False, preserve_rng_state=False)
    return found


def wrap(objective: Objective, mesh: Mesh) -> nn.Module:
    """3. DDP last, so that it sees the final parameters. gradient_as_bucket_view saves one copy of the gradients.

    The module to call in training; the model itself stays the one to save, validate and sample from.
    """
    if mesh.world > 1:
        return DistributedDataParallel(objective, gradient_as_bucket_view=True)
    return objective


def check_mode(config: Config, world: int) -> None:
    """InputError if --parallel.mode does not fit the number of processes."""
    if config.parallel.mode == "none" and world > 1:
        raise InputError(f"--parallel.mode none with {world} processes would train {world} models; use ddp")
    if config.parallel.mode == "ddp" and world == 1:
        raise InputError("--parallel.mode ddp needs several processes: torchrun --nproc_per_node=2 train/main.py")


def zero_gradients(module: nn.Module) -> None:
    """Forget the gradients; DDP's are zeroed in place, since they lie in its buckets: without them there, micro-batches
    that are not reduced would hold a second copy of all gradients."""
    module.zero_grad(set_to_none=not isinstance(module, DistributedDataParallel))


def set_gradient_sync(module: nn.Module, is_last: bool) -> None:
    """Reduce gradients in the backward pass of the last micro-batch only. Call before its *forward*."""
    if isinstance(module, DistributedDataParallel):
        module.require_backward_grad_sync = is_last
