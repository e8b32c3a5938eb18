"""Everything that is applied to the plain model before it trains, in one ordered function."""

import types
import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from model.base import LanguageModel, init_weights
from model.gpt import Block, Shared
from model.ladder import make_model
from train.config import Config
from train.losses import LossModel
from train.parallel import fp8
from train.parallel.plan import ParallelPlan
from train.parallel.precision import compute_dtype
from train.processes.group import ProcessGroup


def build_loss_model(
    config: Config, parallel_plan: ParallelPlan, group: ProcessGroup, *, draws_weights: bool = True
) -> LossModel:
    """Return the model with its loss and initial weights, ready for this process. Parameter names stay as they are.

    Without `draws_weights` every parameter holds whatever its memory held, so the caller must fill them all.

    1. Build on the meta device, so that no rank ever holds more than its part and one whole parameter.
    2. Apply FP8, and activation checkpointing block by block. The compiler must see it to plan what is recomputed.
    3. Compile in place and block by block: one graph serves all blocks that are alike. The switches that connect blocks
       make up to five kinds. A block's forward is compiled, not its call, so that FSDP2's hooks, which run around it,
       break no graph. Shapes are static: training, validation and sampling use one shape, HellaSwag a few. Dynamo's own
       splitting at DDP's buckets is off: blocks are small enough to overlap with communication, and every world size
       then compiles the same graph.
    4. Apply FSDP2, so that it gathers and frees a block with all that was done to it.
    5. Allocate memory and set initial values, each drawn whole and cut: the same numbers however the model is spread.
    6. Apply DDP, in `wrap`, so that it sees the final parameters. The optimizer is made after sharding, of shards.
    """
    train = config.train
    with torch.device("meta"):
        model = make_model(config.model, compute_dtype=compute_dtype(train))
        loss_model = LossModel(
            model,
            chunk_tokens=train.loss_chunk_tokens if train.loss == "chunked" else None,
            is_fp8=train.fp8 in ("head", "all"),
            compiled=train.compile,
            mode=train.compile_mode,
        )
    if train.fp8 in ("blocks", "all"):
        fp8.use_in_blocks(model)
    if train.activation_checkpointing:
        for block in model.blocks:
            block.forward = types.MethodType(recomputed, block)
    if train.compile:
        compile_parts(model, train.compile_mode)
    if parallel_plan.is_sharded:
        shard(loss_model, parallel_plan, group)
        group.set_timeout(config.parallel.init_timeout_seconds)  # for the groups that sharding made, too
    loss_model.to_empty(device=group.device)
    model.tie_weights()
    if draws_weights:
        init_weights(model, config.seed, put=put)
    holders = [p for _, p in model.named_parameters(remove_duplicate=False) if p is model.lm_head.weight]
    assert (len(holders) == 2) == model.is_tied
    return loss_model


def compile_parts(model: LanguageModel, mode: str = "default") -> None:
    """Compile the model's parts in place (step 3).

    torch keeps 8 graphs of a function and runs later ones uncompiled: too few for the shapes of training, validation
    and HellaSwag together, of which each kind of block needs each.
    """
    torch._dynamo.config.optimize_ddp = False
    torch._dynamo.config.recompile_limit = 96
    for part in model.compiled_parts:
        part.forward = torch.compile(part.forward, dynamic=False, mode=mode)


def recomputed(block: Block, x_BTD: Tensor, shared: Shared) -> tuple[Tensor, Tensor | None]:
    """Run a block that keeps only its inputs. Nothing in it draws from a generator, so no state has to be kept.

    A function of ours around `checkpoint`, since Dynamo skips frames of torch.utils.checkpoint that it meets first.
    """
    outputs: tuple[Tensor, Tensor | None] = checkpoint(
        Block.forward, block, x_BTD, shared, use_reentrant=False, preserve_rng_state=False
    )
    return outputs


def shard(loss_model: LossModel, parallel_plan: ParallelPlan, group: ProcessGroup) -> None:
    """Apply FSDP2 (step 4): every rank keeps its rows of each parameter and gathers a block when it is needed.

    A block's weights are gathered in the dtype that it computes with, as the plain model uses them, except that the
    norms' gain and bias are rounded too. Gradients are reduced in the plan's dtype. The root group holds the rest: the
    embedding (with the head), positions and last norm. It is gathered in fp32, since the embedding's gradient is a sum
    over tokens and would lose in bf16 what the plain model keeps. The last block and the root stay gathered between
    forward and backward pass, which begins with them.
    """
    device_mesh = make_device_mesh(parallel_plan, group)
    dtype = loss_model.model.compute_dtype
    in_compute_dtype = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=parallel_plan.reduce_dtype,
        cast_forward_inputs=False,
    )
    *blocks, last = loss_model.model.blocks
    for block in blocks:
        fully_shard(
            block,
            mesh=device_mesh,
            mp_policy=in_compute_dtype,
            reshard_after_forward=parallel_plan.reshard_after_forward,
        )
    fully_shard(last, mesh=device_mesh, mp_policy=in_compute_dtype, reshard_after_forward=False)
    fully_shard(
        loss_model,
        mesh=device_mesh,
        mp_policy=MixedPrecisionPolicy(reduce_dtype=parallel_plan.reduce_dtype, cast_forward_inputs=False),
        reshard_after_forward=False,
    )
    if loss_model.config.value_residual:  # the first block returns its values, a view, to which no operation writes
        warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(FSDPBlock\) returned a view tensor")
    for method in ("token_losses", "logits_at"):  # they gather as `forward` does
        register_fsdp_forward_method(loss_model, method)


def make_device_mesh(parallel_plan: ParallelPlan, group: ProcessGroup) -> DeviceMesh:
    """Return the ranks as a row of shards, or as a table with a row for each replica. Collective."""
    group.need_group()
    if parallel_plan.mode == "hsdp":
        shape, names = (parallel_plan.replicas, parallel_plan.shards), ("replicate", "shard")
        return init_device_mesh(group.device.type, shape, mesh_dim_names=names)
    return init_device_mesh(group.device.type, (parallel_plan.shards,), mesh_dim_names=("shard",))


@torch.no_grad()
def put(parameter: Tensor, value: Tensor) -> None:
    """Write `value` into a parameter that may be sharded: then this rank's rows of it, without communication."""
    if isinstance(parameter, DTensor):
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(value)


def wrap(loss_model: LossModel, parallel_plan: ParallelPlan) -> nn.Module:
    """Return the module to call in training: DDP around the loss model, or the loss model itself (step 6).

    gradient_as_bucket_view saves one copy of the gradients. Validation and sampling call the loss model itself.
    """
    if parallel_plan.mode == "ddp":
        module = DistributedDataParallel(loss_model, gradient_as_bucket_view=True)
        if parallel_plan.reduce_dtype == torch.bfloat16:
            module.register_comm_hook(dist.get_world_size(), mean_in_bf16)
        return module
    return loss_model


def mean_in_bf16(world: int, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Send a bucket in bf16: the mean over the ranks, as DDP takes it. torch's own hook refuses gloo."""
    buffer = bucket.buffer()
    sent = torch.empty_like(buffer, dtype=torch.bfloat16)
    torch.div(buffer, world, out=sent)  # rounded once
    future: torch.futures.Future[list[Tensor]] = dist.all_reduce(sent, async_op=True).get_future()
    return future.then(lambda done: buffer.copy_(done.value()[0]))


def zero_gradients(module: nn.Module) -> None:
    """Clear the gradients. DDP's are zeroed in place, since they are views of its buckets.

    Without them there, micro-batches that are not reduced would hold a second copy of all gradients.
    """
    module.zero_grad(set_to_none=not isinstance(module, DistributedDataParallel))


def set_gradient_sync(module: nn.Module, parallel_plan: ParallelPlan, is_last: bool) -> None:
    """Say whether the next micro-batch is the last of its step. Call this before its *forward*.

    The root's weights stay gathered until the last: every pass uses them first and last, so freeing them lowers no
    peak. With whole gradients nothing is reduced before the last micro-batch, and weights that stay gathered from
    forward to backward stay so until then. Otherwise every micro-batch's gradients are scattered over a replica's
    shards, and the last one's sums are added up over the replicas.
    """
    if isinstance(module, DistributedDataParallel):
        module.require_backward_grad_sync = is_last
    if isinstance(module, FSDPModule):
        module.set_is_last_backward(is_last)
        keeps_all = parallel_plan.whole_gradients and not parallel_plan.reshard_after_forward
        module.set_reshard_after_backward(is_last, recurse=keeps_all)
        if parallel_plan.whole_gradients:
            module.set_requires_gradient_sync(is_last)
        elif parallel_plan.replicas > 1:
            module.set_requires_all_reduce(is_last)


def free_gathered(module: nn.Module) -> None:
    """Free what FSDP2 keeps gathered after forward passes that no backward pass followed."""
    if isinstance(module, FSDPModule):
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor that may be sharded, as a view."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
