"""What model/costs/memory.py counts, against what autograd keeps and what the allocator hands out.

torch.profiler records every allocation and release of the process, to the byte. Products are taken without oneDNN: its
bf16 kernels (chosen on CPUs with avx512_bf16) allocate scratch inside a product, 153 kB in one of these models, which
the account leaves out with the other memory of libraries. Without it the account is the same on every CPU.
"""

import contextlib
import dataclasses
import gc
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from model import linear
from model.config import ModelConfig
from model.cost import model_cost
from model.costs.activations import (
    StepShape,
    block_shapes,
    count_between_blocks,
    count_bias_bytes,
    count_block_activations,
    count_kept_by_norm,
    count_mask_bytes,
)
from model.costs.memory import memory, reduction_bytes
from model.gpt import build_model
from tests.helpers.groups import run_on_ranks
from tests.unit.model.test_switches import MODERN, ONE_BY_ONE, RECIPE, named
from train import optim
from train.config import Config, OptimConfig, ParallelConfig, TrainConfig, resolve
from train.data import plan_batches, zero_batch
from train.parallel import apply
from train.parallel.plan import choose_parallel_plan
from train.processes.group import ProcessGroup
from train.run.card import run_card, step_memory

WIDE = {"width": 128, "vocab_size": 100, "sequences": 1, "seq_len": 16}  # blocks' weights are most of it
LONG = {"width": 64, "vocab_size": 1000, "sequences": 8, "seq_len": 64}  # logits and activations are
DEEP = {"width": 64, "vocab_size": 100, "sequences": 8, "seq_len": 64, "num_layers": 6}  # activations are


def configured(
    *,
    width: int,
    vocab_size: int,
    sequences: int,
    seq_len: int,
    num_layers: int = 3,
    accumulation: int = 1,
    **options: Any,
) -> Config:
    """Return a configuration; `options` are fields of ModelConfig, ParallelConfig or TrainConfig."""
    names = {
        section: {field.name for field in dataclasses.fields(section)} for section in (ModelConfig, ParallelConfig)
    }
    model, parallel = (
        {name: value for name, value in options.items() if name in names[section]}
        for section in (ModelConfig, ParallelConfig)
    )
    optimizer = OptimConfig(name=options.pop("optimizer", "adamw"))
    train: dict[str, Any] = {"dtype": "fp32", "compile": False, "micro_batch": sequences}
    train |= {name: value for name, value in options.items() if name not in model | parallel}
    config = Config(
        model=ModelConfig(num_layers=num_layers, num_heads=2, width=width, vocab_size=vocab_size, **model),
        train=TrainConfig(seq_len=seq_len, batch_tokens=sequences * accumulation * seq_len, **train),
        parallel=ParallelConfig(**parallel),
        optim=optimizer,
    )
    return resolve(config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "switches", [{}, *ONE_BY_ONE, {"attention": "naive"} | MODERN, {"attention": "naive"} | RECIPE], ids=named
)
def test_what_autograd_keeps(switches: dict[str, Any], dtype: torch.dtype) -> None:
    B, T = 2, 8
    config = ModelConfig(num_layers=3, num_heads=2, width=32, vocab_size=100, context_len=16, **switches)
    model = build_model(config, seed=1, compute_dtype=dtype)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        seeds_B = torch.arange(B) if config.dropout else None
        features_BTD = model.training_states(torch.zeros(B, T, dtype=torch.int64), seeds_B)
    assert features_BTD.requires_grad
    N, c, is_low = B * T, dtype.itemsize, dtype != torch.float32
    shape = StepShape(micro_batch=B, seq_len=T, compute_bytes=c, on_cpu=True)
    blocks = sum(sum(count_block_activations(config, shape, index).values()) for index in range(3))
    blocks += count_between_blocks(config, shape, 3)
    last_norm = count_kept_by_norm(config, shape) if config.has_last_norm else 0
    ids = 8 * (N + T * (config.position_embedding == "learned"))
    matrices = 3 * sum(rows * columns[0] for rows, *columns in block_shapes(config) if columns)
    # A copy of each matrix and of each learned number.
    copies = is_low * c * (matrices + sum(parameter.numel() == 1 for parameter in model.parameters()))
    rotation = 2 * 4 * T * config.head_size * (config.position_embedding == "rope")
    masks = 3 * T * T * (config.attention == "naive")
    once = count_mask_bytes(config, shape, 1) + count_bias_bytes(config, shape)
    expected = blocks + last_norm + ids + copies + rotation + masks + once
    assert sum(size for address, size in kept.items() if address not in own) == expected


@contextlib.contextmanager
def without_onednn() -> Iterator[None]:
    """torch.backends.mkldnn.flags would set oneDNN's TF32 too, which warns on a CPU."""
    was_enabled, *_ = torch.backends.mkldnn.set_flags(_enabled=False)
    try:
        with mock.patch.object(linear, "HAS_ONEDNN", False):
            yield
    finally:
        torch.backends.mkldnn.set_flags(_enabled=was_enabled)


class Unhurried(TorchDispatchMode):
    """Wait a moment after every collective: gloo's thread releases its copies only some time after it has sent them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            time.sleep(0.005)
        return result


def allocated_peak(group: ProcessGroup, config: Config, accumulation: int) -> int:
    """Return the bytes at the peak of the third step, by the allocator's account."""
    parallel_plan = choose_parallel_plan(config, world=group.world, local_world=group.world, memory_bytes=10**12)
    loss_model = apply.build_loss_model(config, parallel_plan, group)
    parameters = list(loss_model.model.parameters())
    optimizer = optim.build_optimizer(loss_model.model, config.optim, parallel_plan, group)
    module, scale = apply.wrap(loss_model, parallel_plan), torch.ones(())
    shape = (plan_batches(config, 1).micro_batch, config.train.seq_len)
    inputs_BT, targets_BT, *seeds = zero_batch(shape, has_dropout=config.model.dropout > 0)

    def step() -> None:
        for index in range(accumulation):
            apply.set_gradient_sync(module, parallel_plan, index == accumulation - 1)
            module(inputs_BT, targets_BT, scale, *seeds)[0].backward()
        norm = optim.sum_of_squares(parameters).sqrt().float()
        optim.update(optimizer, 0, 1e-4, norm, torch.ones((), dtype=torch.bool))
        apply.zero_gradients(module)

    with without_onednn():
        for _ in range(2):  # DDP lays out its buckets after the first step
            step()
        gc.collect()
        lasting = [apply.local(p) for p in parameters]
        lasting += [apply.local(value) for state in optimizer.state.values() for value in state.values()]
        lasting += [p.grad for p in parameters if p.grad is not None]
        now = peak = sum(tensor.nbytes for tensor in lasting)
        with Unhurried(), profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
            step()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def counted_peak(config: Config, world: int, accumulation: int) -> int:
    parallel_plan = choose_parallel_plan(config, world=world, local_world=world, memory_bytes=10**12)
    plan = dataclasses.replace(plan_batches(config, 1), accumulation=accumulation)
    return step_memory(config, plan, parallel_plan, on_cpu=True).peak_bytes


def check_peak_of_one_process(options: dict[str, Any], accumulation: int, tolerance: float) -> None:
    config = configured(**options, accumulation=accumulation)
    measured = allocated_peak(ProcessGroup(0, 1, torch.device("cpu")), config, accumulation)
    assert counted_peak(config, 1, accumulation) == pytest.approx(measured, rel=tolerance)


BF16 = {"dtype": "bf16"}
CHUNKED = {"loss": "chunked", "loss_chunk_tokens": 1024}
ONE_PROCESS: list[dict[str, Any]] = [
    WIDE,
    LONG,
    DEEP,
    WIDE | BF16,
    LONG | BF16,
    DEEP | {"activation_checkpointing": True},
    DEEP | {"activation_checkpointing": True} | BF16,
    LONG | CHUNKED,
    LONG | CHUNKED | BF16,
    LONG | {"sequences": 1} | CHUNKED | BF16,
    LONG | {"sequences": 40} | CHUNKED,  # three chunks
    LONG | {"sequences": 40} | CHUNKED | BF16,
    LONG | {"sequences": 40, "loss": "chunked"},  # one chunk
]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("options", ONE_PROCESS, ids=named)
def test_the_peak_of_one_process(options: dict[str, Any], accumulation: int) -> None:
    check_peak_of_one_process(options, accumulation, tolerance=0.02)


NAIVE = DEEP | {"attention": "naive", "seq_len": 256, "sequences": 2}
SWITCHED: list[dict[str, Any]] = [
    *(shape | MODERN for shape in (WIDE, LONG, DEEP)),
    LONG | MODERN | BF16,
    DEEP | MODERN | {"activation_checkpointing": True},
    LONG | MODERN | {"loss": "chunked"},
    LONG | {"tie": False},
    LONG | {"logit_softcap": 5.0},
    *(shape | {"dropout": 0.1, "vocab_size": 100} | more for shape in (LONG, DEEP) for more in ({}, BF16)),
    *(shape | {"window": 16, "seq_len": 128} for shape in (LONG, DEEP)),
    DEEP | {"window": 16, "seq_len": 128, "sequences": 1} | BF16,
    DEEP | {"dropout": 0.1, "activation_checkpointing": True},
    DEEP | {"dropout": 0.1, "activation_checkpointing": True} | BF16,
    *(DEEP | switches for switches in ONE_BY_ONE if switches not in (MODERN, {"tie": False})),
    NAIVE,
    NAIVE | BF16,
    NAIVE | {"activation_checkpointing": True},
    *(shape | RECIPE for shape in (WIDE, LONG)),
    LONG | RECIPE | BF16,
    DEEP | RECIPE | {"activation_checkpointing": True, "value_embeddings": 3},
    LONG | RECIPE | {"loss": "chunked"},
    # The peak is in the middle, where the most gradients of skipped outputs wait.
    DEEP | {"skips": True, "sequences": 12, "num_layers": 16, "activation_checkpointing": True},
]


@pytest.mark.parametrize(
    ("options", "accumulation"),
    [*((options, 1) for options in SWITCHED), (SWITCHED[0], 2), (SWITCHED[5], 2), (LONG | RECIPE, 2)],
)
def test_the_peak_with_switches(options: dict[str, Any], accumulation: int) -> None:
    check_peak_of_one_process(options, accumulation, tolerance=0.05)


MUON = {"optimizer": "muon"}


@pytest.mark.parametrize("options", [WIDE | MUON, DEEP | MUON, WIDE | MODERN | MUON, WIDE | BF16 | MUON], ids=named)
def test_the_peak_with_muon(options: dict[str, Any]) -> None:
    check_peak_of_one_process(options, 1, tolerance=0.05)


SPREAD: list[tuple[dict[str, Any], int]] = [
    (WIDE | {"mode": "ddp"}, 2),
    (WIDE | {"mode": "fsdp"}, 1),
    (WIDE | {"mode": "fsdp", "reduce_gradients": "step"}, 2),
    (WIDE | {"mode": "fsdp", "reduce_gradients": "micro_batch"}, 3),
    (LONG | MODERN | {"mode": "ddp"}, 2),
    (WIDE | MODERN | {"mode": "fsdp"}, 1),
    (WIDE | RECIPE | {"mode": "fsdp"}, 1),
]
ALSO_SPREAD: list[tuple[dict[str, Any], int]] = [
    (WIDE | {"mode": "fsdp", "reduce_gradients": "step", "reshard_after_forward": False}, 2),
    (LONG | {"mode": "fsdp", "reduce_gradients": "micro_batch", "dtype": "bf16"}, 2),
    (DEEP | MODERN | {"mode": "fsdp", "reduce_gradients": "micro_batch"}, 2),
    (LONG | MODERN | {"mode": "fsdp", "dtype": "bf16", "activation_checkpointing": True}, 2),
    (LONG | RECIPE | {"mode": "fsdp", "dtype": "bf16", "reduce_gradients": "step"}, 3),
]


def allocated_peaks(group: ProcessGroup, spread: list[tuple[dict[str, Any], int]]) -> list[int]:
    return [allocated_peak(group, configured(**options), accumulation) for options, accumulation in spread]


@pytest.mark.parametrize(
    "spread",
    [
        pytest.param(SPREAD, id="each mode"),
        pytest.param(ALSO_SPREAD, id="with more", marks=pytest.mark.long(reason="the costlier combinations")),
    ],
)
def test_the_peak_of_two_processes(spread: list[tuple[dict[str, Any], int]]) -> None:
    measured = run_on_ranks(2, allocated_peaks, spread)
    for (options, accumulation), *peaks in zip(spread, *measured, strict=True):
        config = configured(**options)
        counted = counted_peak(config, 2, accumulation)
        late = 0
        if options["mode"] == "fsdp":  # gloo's thread releases its copies some time after it has sent them
            late = 2 * reduction_bytes(
                block_shapes(config.model), StepShape(micro_batch=1, seq_len=1, mode="fsdp", shards=2)
            )
        for peak in peaks:
            assert 0.98 * counted <= peak <= 1.02 * counted + late, (options, accumulation, counted, peaks)


def test_the_peak_of_two_processes_with_muon() -> None:
    """gloo's thread keeps copies of several messages at once, longer or shorter."""
    spread: list[tuple[dict[str, Any], int]] = [(WIDE | MUON | {"mode": mode}, 1) for mode in ("ddp", "fsdp")]
    measured = run_on_ranks(2, allocated_peaks, spread)
    for (options, accumulation), *peaks in zip(spread, *measured, strict=True):
        counted = counted_peak(configured(**options), 2, accumulation)
        assert all(0.98 * counted <= peak <= 1.15 * counted for peak in peaks), (options, counted, peaks)


def held_by_a_rank(group: ProcessGroup, config: Config) -> int:
    parallel_plan = choose_parallel_plan(config, world=group.world, local_world=group.world, memory_bytes=10**12)
    model = apply.build_loss_model(config, parallel_plan, group).model
    return sum(apply.local(p).untyped_storage().nbytes() for p in model.parameters())


def test_a_rank_holds_what_is_counted_as_its_shard() -> None:
    """The ranks do not share the width evenly."""
    config = configured(width=33 * 2, vocab_size=100, sequences=1, seq_len=7, mode="fsdp")
    phases = memory(config.model, StepShape(micro_batch=1, seq_len=7, mode="fsdp", shards=3)).phases
    assert {phase["weights"] for phase in phases.values()} == set(run_on_ranks(3, held_by_a_rank, config))


def test_the_peak_is_the_largest_phase_and_its_parts_are_named() -> None:
    counted = memory(ModelConfig(), StepShape(micro_batch=16, seq_len=1024, compute_bytes=2))
    assert counted.peak_bytes == sum(counted.peak.values())
    assert counted.peak_bytes == max(sum(phase.values()) for phase in counted.phases.values())
    # The two largest parts of GPT-2 small. Loss: 3 fp32 tensors of logits. Activations: 12 blocks at 36 x 768 bytes a
    # token (8 for the fp32 inputs of two norms, 28 in bf16), log-sums and norms' deviations; the last norm's 6 x 768.
    assert counted.peak["loss"] == 3 * 16 * 1024 * 50257 * 4
    per_token = 12 * (36 * 768 + 12 * 4 + 16) + 6 * 768 + 8
    assert counted.peak["activations"] == 16 * 1024 * per_token


def card_lines(config: Config, world: int, memory_bytes: int, device: str = "CPU process") -> dict[str, str]:
    parallel_plan = choose_parallel_plan(config, world=world, local_world=world, memory_bytes=memory_bytes)
    card = run_card(config, None, plan_batches(config, world), parallel_plan, device)
    return {line[:10].strip(): line[10:] for line in card.splitlines()}


def test_the_card_tells_switches_parallel_plan_and_memory() -> None:
    line = card_lines(configured(**WIDE, mlp="swiglu", tie=False), 1, 10**9)["model"]
    assert line.endswith(" vocabulary padding), --model.mlp swiglu, --model.tie False")

    config = configured(**WIDE, accumulation=8)
    lines = card_lines(config, 1, 10**9)
    assert lines["parallel"] == "none (one process)"
    assert lines["memory"].startswith("about 0.01 of 1.0 GB per process, in the")
    assert "WARNING" not in lines["memory"]
    assert card_lines(config, 2, 15 * 10**6)["parallel"] == (
        "fsdp, 2 shards (the training state of 0.01 GB is more than half of 0.0 GB); "
        "whole gradients reduced once a step; weights gathered for each pass"
    )
    hsdp = ParallelConfig(mode="hsdp", shard_size=2, reshard_after_forward=False)
    lines = card_lines(dataclasses.replace(config, parallel=hsdp), 4, 10**6)
    assert lines["parallel"] == (
        "hsdp, 2 shards, 2 copies (set by flag); gradients reduced each time; weights gathered once for both passes"
    )
    assert lines["memory"].endswith("WARNING: more than there is")


def test_the_mean_of_the_weights_is_counted_in_memory_and_checkpoint() -> None:
    config = configured(**WIDE)
    averaging = dataclasses.replace(config, optim=dataclasses.replace(config.optim, average_fraction=0.25))
    plan, batches = choose_parallel_plan(config, world=1, local_world=1, memory_bytes=10**9), plan_batches(config, 1)
    own, more = (step_memory(each, batches, plan, on_cpu=True) for each in (config, averaging))
    weights = model_cost(config.model).gradient_bytes
    assert all(sum(more.phases[name].values()) == sum(phase.values()) + weights for name, phase in own.phases.items())
    lines = card_lines(averaging, 1, 10**9)
    assert lines["optimizer"].endswith("mean of the weights over the last 25%")
    assert lines["device"].endswith(f"checkpoint {4 * weights / 1e9:.2f} GB")
    memory_bytes = 2 * (model_cost(config.model).state_bytes + weights - 1)
    planned = [choose_parallel_plan(c, world=2, local_world=2, memory_bytes=memory_bytes) for c in (config, averaging)]
    assert [plan.mode for plan in planned] == ["ddp", "fsdp"]


def test_the_card_before_the_micro_batch_is_known_and_with_compilation() -> None:
    config = configured(**WIDE, micro_batch="auto", accumulation=8)
    assert "per process with a micro-batch of 1, in " in card_lines(config, 1, 10**9, "H100")["memory"]
    compiled = dataclasses.replace(config, train=dataclasses.replace(config.train, compile=True))
    assert card_lines(compiled, 1, 10**9, "H100")["memory"].startswith("at most 0.0")
