"""Parts of a step on a GPU against plainer ones: FSDP2 and HSDP on one rank, FlexAttention, generation."""

import dataclasses

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.generation.decoding import CachedPasses, Row, WholePasses, generate_rows, make_ready
from model.generation.sampling import Sampling
from model.gpt import build_model
from tests.helpers.groups import leaving_no_group
from train.config import Config, TrainConfig
from train.parallel import apply
from train.parallel.plan import Mode, ParallelPlan
from train.processes.group import ProcessGroup

pytestmark = pytest.mark.gpu
MODEL = ModelConfig(num_layers=3, num_heads=2, width=64, vocab_size=100, context_len=32)


def plan_of(mode: Mode, *, reshard: bool = True) -> ParallelPlan:
    return ParallelPlan(
        mode=mode,
        shards=1,
        replicas=1,
        reshard_after_forward=reshard,
        whole_gradients=reshard,
        reason="test",
        memory_bytes=10**12,
    )


def gradients(plan: ParallelPlan, group: ProcessGroup, dtype: str) -> dict[str, Tensor]:
    """Return the gradients of two micro-batches under a plan."""
    train = TrainConfig(seq_len=32, batch_tokens=256, micro_batch=4, dtype=dtype, compile=False)  # type: ignore[arg-type]
    loss_model = apply.build_loss_model(Config(model=MODEL, train=train), plan, group)
    module, scale = apply.wrap(loss_model, plan), torch.ones((), device=group.device)
    tokens_NBT = torch.randint(100, (2, 4, 32), generator=torch.Generator().manual_seed(1)).to(group.device)
    for index, tokens_BT in enumerate(tokens_NBT):
        apply.set_gradient_sync(module, plan, index == 1)
        module(tokens_BT, tokens_BT.roll(-1, 1), scale)[0].backward()
    return {name: apply.local(p.grad).clone() for name, p in loss_model.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("mode", ["fsdp", "hsdp"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_sharding_over_one_rank_changes_no_gradient(alone: ProcessGroup, mode: Mode, reshard: bool, dtype: str) -> None:
    """The whole of FSDP2's machinery runs, its 2-D mesh for HSDP too; there is only nobody to send to."""
    expected = gradients(plan_of("none"), alone, dtype)
    with leaving_no_group(alone):
        sharded = gradients(plan_of(mode, reshard=reshard), alone, dtype)
    assert sharded.keys() == expected.keys()
    for name, value in expected.items():
        tolerance = 1e-5 if dtype == "fp32" else 2e-2  # in bf16 the norms' gains are gathered in bf16
        assert (sharded[name] - value).norm() <= tolerance * value.norm(), name


def test_flex_attention_equals_sdpa(gpu: torch.device) -> None:
    """Compiled, with documents that are one each: logits and gradients of bf16 models."""
    outputs = []
    tokens_BT = torch.randint(100, (4, 128), generator=torch.Generator().manual_seed(1)).to(gpu)
    for attention in ("sdpa", "flex"):
        torch.compiler.reset()
        config = dataclasses.replace(MODEL, context_len=128, attention=attention, eot_id=None)
        model = build_model(config, seed=1, device=gpu, compute_dtype=torch.bfloat16)
        for part in model.compiled_parts:
            part.forward = torch.compile(part.forward, dynamic=False)
        logits_BTV = model(tokens_BT)
        logits_BTV.float().square().mean().backward()
        flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        outputs.append((logits_BTV.detach().float(), flat))
    for expected, value in zip(*outputs, strict=True):
        assert (expected - value).norm() <= 2e-2 * expected.norm()


@pytest.mark.parametrize("backend", [None, "inductor", "cudagraphs"])
def test_generation_is_the_same_compiled_and_by_cuda_graphs(device: torch.device, backend: str | None) -> None:
    if backend is not None and device.type != "cuda":
        pytest.skip("no CUDA graphs, and compiling C++ takes a minute")
    torch.compiler.reset()
    model = build_model(MODEL, seed=1, device=device)
    with torch.no_grad():
        for block in model.blocks:  # so that other windows get other tokens
            for parameter in block.parameters():
                parameter.mul_(4)
    prompts = [[1, 2, 3], [4], list(range(5, 20))]
    whole = tokens_of(WholePasses(model, keep=16), prompts)
    make_ready(model)
    assert tokens_of(CachedPasses(model, num_rows=4, keep=16, compile_backend=backend), prompts) == whole


def tokens_of(passes: CachedPasses | WholePasses, prompts: list[list[int]]) -> list[list[int]]:
    rows = [Row(list(prompt), torch.Generator().manual_seed(1)) for prompt in prompts]
    rounds = generate_rows(passes, rows, sampling=Sampling(0.0, None))
    for _ in range(40):
        next(rounds)
    return [row.tokens for row in rows]
