"""How a run is spread over its processes: what is copied, what is sharded, and why."""

import itertools
import math
import os
import socket
from dataclasses import dataclass
from typing import Literal

import torch

from common.errors import InputError
from model.cost import model_cost
from model.costs.activations import FP32_BYTES
from model.costs.optimizer import count_slice, matrices_and_others
from train.config import Config
from train.data import divisors, plan_batches
from train.processes.group import ProcessGroup

Mode = Literal["none", "ddp", "fsdp", "hsdp"]

# Part of a process's memory that weights, gradients and optimizer state may take before they are sharded. The rest is
# for activations: a larger micro-batch makes a step faster. A choice, not a measurement.
COMFORTABLE = 0.5


@dataclass(frozen=True)
class ParallelPlan:
    """`replicas` copies of weights, gradients and optimizer state, each spread over `shards` consecutive ranks.

    `reshard_after_forward`: gathered weights are freed after each block's forward pass and gathered again for its
    backward pass. `whole_gradients`: micro-batches add up whole gradients, which are reduced once a step; otherwise
    they are reduced after each micro-batch, and only the own shard is kept. `reason`: why this plan. `memory_bytes`:
    what each rank may use. `reduce_dtype`: in which gradients are sent. `hosts`: on how many the ranks are.
    """

    mode: Mode
    shards: int
    replicas: int
    reshard_after_forward: bool
    whole_gradients: bool
    reason: str
    memory_bytes: int
    reduce_dtype: torch.dtype = torch.float32
    hosts: int = 1

    @property
    def is_sharded(self) -> bool:
        return self.mode in ("fsdp", "hsdp")


def choose_parallel_plan(config: Config, *, world: int, local_world: int, memory_bytes: int) -> ParallelPlan:
    """Return the plan that --parallel.mode names, or with auto the one that suits `world` ranks.

    auto is DDP while a whole copy of the training state fits comfortably into `memory_bytes`, since DDP communicates
    least. Otherwise it is FSDP2 on one host. Over several hosts of `local_world` ranks it is HSDP while a copy fits
    comfortably into one host's ranks, since weights are then gathered within hosts only; else FSDP2 over all ranks.

    Raise InputError if the mode does not fit the number of processes.
    """
    mode, reason = _mode_of(config, world, local_world, memory_bytes)
    shards = {"none": 1, "ddp": 1, "fsdp": world, "hsdp": config.parallel.shard_size or local_world}[mode]
    if mode == "hsdp" and (not 1 < shards < world or world % shards):
        fitting = [n for n in divisors(world) if 1 < n < world]
        advice = f"; --parallel.shard-size may be {' or '.join(map(str, fitting))}" if fitting else "; use fsdp"
        raise InputError(f"--parallel.mode hsdp cannot give each of {world} processes one of {shards} shards{advice}")
    if config.train.cuda_graphs and mode != "none":
        raise InputError(
            f"--train.cuda-graphs needs one process and --parallel.mode none, not {mode} with {world}: a captured pass "
            "would not communicate"
        )
    is_sharded = mode in ("fsdp", "hsdp")
    if is_sharded and config.model.kind != "gpt":
        raise InputError(
            f"--parallel.mode {mode} shards blocks, which --model.kind {config.model.kind} does not have; use ddp"
        )
    plan = ParallelPlan(
        mode=mode,
        shards=shards,
        replicas=world // shards,
        reshard_after_forward=is_sharded and config.parallel.reshard_after_forward,
        whole_gradients=not is_sharded or _adds_up_whole(config, shards, memory_bytes),
        reason=reason,
        memory_bytes=memory_bytes,
        reduce_dtype=torch.bfloat16 if config.parallel.reduce_dtype == "bf16" else torch.float32,
        hosts=world // local_world,
    )
    _check_reduction(config, plan, world)
    return plan


def agree_on_parallel_plan(config: Config, group: ProcessGroup) -> ParallelPlan:
    """Return the same plan on every rank: for the least memory of any, and for which ranks share a host. Collective."""
    local_ranks = local_world_of(group.gather(socket.gethostname()))
    memory_bytes = min(group.gather(memory_of(group.device, local_ranks)))
    return choose_parallel_plan(config, world=group.world, local_world=local_ranks, memory_bytes=memory_bytes)


def local_world_of(hosts: list[str]) -> int:
    """Return the largest group size such that consecutive ranks of each group always share a host."""
    sizes = [len(list(ranks)) for _, ranks in itertools.groupby(hosts)]
    return math.gcd(*sizes)


def _mode_of(config: Config, world: int, local_world: int, memory_bytes: int) -> tuple[Mode, str]:
    mode = config.parallel.mode
    if mode == "none" and world > 1:
        raise InputError(f"--parallel.mode none with {world} processes would train {world} models; use auto or ddp")
    if mode == "ddp" and world == 1:
        raise InputError("--parallel.mode ddp needs several processes: torchrun --nproc_per_node=2 train/main.py")
    if mode != "auto":
        shard_size = config.parallel.shard_size or local_world
        is_across = mode == "hsdp" and local_world % shard_size != 0
        return mode, "set by flag" + ("; weights are gathered across hosts" if is_across else "")
    if world == 1:
        return "none", "one process"
    state_bytes = saved_bytes(config) + model_cost(config.model).gradient_bytes
    limit_bytes = COMFORTABLE * memory_bytes
    state = f"the training state of {state_bytes / 1e9:.2f} GB"
    limit = f"half of {memory_bytes / 1e9:.1f} GB"
    if state_bytes <= limit_bytes:
        return "ddp", f"{state} is within {limit}"
    shards = config.parallel.shard_size or local_world
    if 1 < shards < world and local_world % shards == 0 and state_bytes <= shards * limit_bytes:
        return "hsdp", f"{state} is more than {limit}, but a shard of {shards} is not"
    return "fsdp", f"{state} is more than {limit}"


def _adds_up_whole(config: Config, shards: int, memory_bytes: int) -> bool:
    """Return whether whole gradients are kept; auto: while they fit comfortably beside the shards."""
    if config.parallel.reduce_gradients != "auto":
        return config.parallel.reduce_gradients == "step"
    whole_gradients = model_cost(config.model).gradient_bytes
    return saved_bytes(config) // shards + whole_gradients <= COMFORTABLE * memory_bytes


def saved_bytes(config: Config) -> int:
    """Return the bytes of weights, optimizer state and mean of the weights: all of a checkpoint but some numbers."""
    cost = model_cost(config.model)
    matrices, _ = matrices_and_others(config.model) if config.optim.name == "muon" else ([], [])
    mean = 0 if config.optim.average_fraction is None else cost.gradient_bytes
    return cost.checkpoint_bytes - FP32_BYTES * count_slice(matrices, 1, 1) + mean  # Muon has one moment, AdamW two


def _check_reduction(config: Config, plan: ParallelPlan, world: int) -> None:
    """Raise InputError where --parallel.reduce-dtype bf16 would do more than round what is sent.

    FSDP2 adds up whole gradients in the dtype in which it reduces them. In HSDP, before torch 2.13, the next block's
    gradients could be written to memory of which an all-reduce in another dtype than the weights' was still reading.
    """
    if plan.reduce_dtype == torch.float32:
        return
    flag = "--parallel.reduce-dtype bf16"
    if plan.mode == "hsdp":
        raise InputError(f"{flag} is for ddp and fsdp, not for --parallel.mode hsdp; leave it fp32")
    if plan.mode != "fsdp" or not plan.whole_gradients:
        return
    if config.train.micro_batch == "auto" or plan_batches(config, world).largest_accumulation > 1:
        raise InputError(
            f"{flag} with --parallel.mode fsdp would add up micro-batches in bf16; give a --train.micro-batch of all "
            "sequences of a process, or --parallel.reduce-gradients micro_batch, or leave it fp32"
        )


def memory_of(device: torch.device, local_ranks: int) -> int:
    """Return the bytes that one rank may use: its GPU's, or its share of the host's physical memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // local_ranks
