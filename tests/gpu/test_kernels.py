"""The kernels that flags choose, on a GPU: attention's libraries, the head's gradient, products in FP8."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.nn.attention import _cur_sdpa_kernel_backends, _sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from common.errors import InputError
from model.config import ModelConfig
from model.dropout import dropped, place_keys
from model.gpt import build_model, naive_attention
from train.config import Config, OptimConfig, TrainConfig
from train.data import plan_batches
from train.losses import LossModel, add_product
from train.optim import build_optimizer, sum_of_squares, update
from train.parallel import fp8
from train.parallel.apply import compile_parts
from train.parallel.attention import BACKENDS, settle_attention_backend
from train.processes.group import ProcessGroup

pytestmark = pytest.mark.gpu
MODEL = ModelConfig(num_layers=2, num_heads=2, width=128, vocab_size=1000, context_len=128)
OPERATIONS = {"flash": "flash", "fa3": "flash", "cudnn": "cudnn", "efficient": "efficient"}


@pytest.fixture(autouse=True)
def _torchs_own_choice() -> Iterator[None]:
    before, tag = _cur_sdpa_kernel_backends(with_priority=True), torch.compiler.config.cache_key_tag
    yield
    torch.nn.attention.restore_flash_attention_impl(_raise_warn=False)
    _sdpa_kernel(before, set_priority=True)
    torch.compiler.config.cache_key_tag = tag
    torch.compiler.reset()


def configured(backend: Any, **train: Any) -> Config:
    options = {"seq_len": 128, "batch_tokens": 1024, "micro_batch": 4} | train
    return Config(model=MODEL, train=TrainConfig(attention_backend=backend, **options))


class Operations(TorchDispatchMode):
    """Records the names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_named_library_computes_attention_eager_and_compiled(
    backend: str, gpu: torch.device, alone: ProcessGroup
) -> None:
    try:
        settle_attention_backend(configured(backend), plan_batches(configured(backend), 1), {}, alone)
    except InputError as refusal:
        assert f"--train.attention-backend {backend} cannot compute" in str(refusal) and "\n" not in str(refusal)
        pytest.skip(str(refusal))
    qkv = torch.randn(3, 4, 2, 128, 64, device=gpu, dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn(4, 2, 128, 64, device=gpu, dtype=torch.bfloat16)
    with Operations() as operations:
        eager = attention(*qkv.unbind())
    name = f"_scaled_dot_product_{OPERATIONS[backend]}_attention"
    assert any(name in operation for operation in operations.names), operations.names
    compiled, code = run_and_get_code(torch.compile(attention, dynamic=False), *qkv.unbind())
    assert name in "".join(code)
    exact = naive_attention(*qkv.float().unbind())
    (expected,) = torch.autograd.grad(exact, qkv, gradient.float())
    for output in (eager, compiled):
        assert (output - exact).norm() <= 0.01 * exact.norm()
        (value,) = torch.autograd.grad(output, qkv, gradient)
        assert (value - expected).norm() <= 0.01 * expected.norm()


def test_auto_is_measured_once_and_kept(gpu: torch.device, alone: ProcessGroup) -> None:
    config = configured("auto")
    chosen, record, remark = settle_attention_backend(config, plan_batches(config, 1), {}, alone)
    backend = chosen.train.attention_backend
    assert backend in BACKENDS and record["attention"]["backend"] == backend
    assert remark is not None and remark.startswith(f"attention by {backend}: {backend} ") and " ms" in remark
    assert _cur_sdpa_kernel_backends(with_priority=True)[0] == BACKENDS[backend]
    assert settle_attention_backend(config, plan_batches(config, 1), record, alone) == (chosen, record, None)


def test_fp32_has_a_kernel_too(gpu: torch.device, alone: ProcessGroup) -> None:
    config = configured("auto", dtype="fp32")
    chosen, _, _ = settle_attention_backend(config, plan_batches(config, 1), {}, alone)
    assert chosen.train.attention_backend == "efficient"  # the others take 16 bits only


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_heads_gradient_is_added_by_the_product(device: torch.device, dtype: torch.dtype) -> None:
    generator = torch.Generator(device).manual_seed(1)
    total_VD = torch.randn(1008, 64, device=device, generator=generator)
    gradient_nV = torch.randn(96, 1008, device=device, generator=generator).to(dtype)
    x_nD = torch.randn(96, 64, device=device, generator=generator).to(dtype)
    expected = total_VD.double() + gradient_nV.double().T @ x_nD.double()
    if device.type == "cuda":
        add_product(total_VD.clone(), gradient_nV, x_nD)  # cuBLAS allocates its workspace
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    add_product(total_VD, gradient_nV, x_nD)
    tolerance = 1e-6 if device.type == "cuda" or dtype == torch.float32 else 2**-8  # a CPU's product is rounded first
    assert (total_VD - expected).norm() <= tolerance * expected.norm()
    if device.type == "cuda":
        assert torch.cuda.max_memory_allocated() - before < total_VD.numel() * 2  # no product beside the total


def step_of(
    device: torch.device, part: str | None, *, chunk_tokens: int | None = None, compiled: bool = False
) -> Tensor:
    """Return the loss of a micro-batch and the whole gradient, in one vector."""
    model = build_model(MODEL, seed=1, device=device, compute_dtype=torch.bfloat16)
    if part in ("blocks", "all"):
        fp8.use_in_blocks(model)
    loss_model = LossModel(model, chunk_tokens=chunk_tokens, is_fp8=part in ("head", "all"), compiled=compiled)
    if compiled:
        compile_parts(model)
    tokens_BT = torch.randint(1000, (4, 129), generator=torch.Generator().manual_seed(1)).to(device)
    scale = torch.full((), 1 / 512, device=device)
    loss_pair = loss_model(tokens_BT[:, :-1], tokens_BT[:, 1:], scale)
    loss_pair[0].backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat([loss_pair[:1].detach(), *gradients])


def assert_close_steps(value: Tensor, expected: Tensor, *, loss: float, gradient: float) -> None:
    assert abs(value[0] - expected[0]) <= loss * expected[0]
    assert (value[1:] - expected[1:]).norm() <= gradient * expected[1:].norm()


@pytest.mark.parametrize("chunk_tokens", [512, 200])
def test_the_chunked_loss_is_the_plain_one(device: torch.device, chunk_tokens: int) -> None:
    expected = step_of(device, None)
    assert_close_steps(step_of(device, None, chunk_tokens=chunk_tokens), expected, loss=1e-5, gradient=0.01)


def has_fp8(device: torch.device) -> None:
    try:
        fp8.check_device(TrainConfig(fp8="all"), device)
    except InputError as refusal:
        if device.type == "cuda":
            pytest.skip(str(refusal))


@pytest.mark.parametrize("is_forward", [True, False])
@pytest.mark.parametrize(("M", "K", "N"), [(512, 128, 384), (200, 1008, 128)])
def test_a_product_in_fp8_is_that_of_its_operands(
    device: torch.device, is_forward: bool, M: int, K: int, N: int
) -> None:
    has_fp8(device)
    generator = torch.Generator(device).manual_seed(1)
    sizes = torch.logspace(-6, 3, M, device=device)[:, None]
    x_MK = (torch.randn(M, K, device=device, generator=generator) * sizes).bfloat16()
    weight_NK = torch.randn(N, K, device=device, generator=generator).bfloat16()
    a, b = fp8.scaled(x_MK), fp8.scaled(weight_NK)
    exact = (a.values.double() * a.scale) @ (b.values.double() * b.scale).t()
    result = fp8.product(a, b, torch.bfloat16, is_forward=is_forward)
    errors_M = (result - exact).norm(dim=1) / exact.norm(dim=1)
    assert errors_M.max() <= 0.01  # rounded to bf16 twice; fast accumulation keeps 14 bits of a sum


@pytest.mark.parametrize("chunk_tokens", [None, 200])
@pytest.mark.parametrize("part", ["head", "blocks", "all"])
def test_a_step_in_fp8_is_that_of_bf16_within_a_tolerance(
    device: torch.device, part: str, chunk_tokens: int | None
) -> None:
    has_fp8(device)
    expected = step_of(device, None)
    assert_close_steps(step_of(device, part, chunk_tokens=chunk_tokens), expected, loss=1e-3, gradient=0.1)


@pytest.mark.parametrize("chunk_tokens", [None, 256])
def test_a_compiled_step_in_fp8_is_the_eager_one(gpu: torch.device, chunk_tokens: int | None) -> None:
    """A kernel that stored 8-bit floats in the wrong places would give a gradient without any likeness."""
    has_fp8(gpu)
    eager = step_of(gpu, "all", chunk_tokens=chunk_tokens)
    assert_close_steps(step_of(gpu, "all", chunk_tokens=chunk_tokens, compiled=True), eager, loss=1e-3, gradient=0.1)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_dropouts_masks_are_those_of_a_cpu(gpu: torch.device, is_compiled: bool) -> None:
    seeds_B = torch.randint(-(2**63), 2**63 - 1, (5,), generator=torch.Generator().manual_seed(3))
    ones_BTD, place = torch.ones(5, 100, 131), 2
    function = torch.compile(dropped, dynamic=False) if is_compiled else dropped
    found_BTD = function(ones_BTD.to(gpu), place_keys(seeds_B.to(gpu), 3)[place], 0.2)
    assert torch.equal(found_BTD.cpu(), dropped(ones_BTD, place_keys(seeds_B, 3)[place], 0.2))


def test_muons_update_is_nearly_that_of_a_cpu(device: torch.device) -> None:
    """On a GPU matrices are orthogonalised in bf16, in batches: singular values keep two digits. AdamW is exact."""
    config = OptimConfig(name="muon", lr_peak=0.02, embedding_lr=1e-2, vector_lr=1e-2)
    models = [build_model(MODEL, seed=1, device=each) for each in (device, "cpu")]
    for model in models:
        optimizer = build_optimizer(model, config)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            norm = sum_of_squares(model.parameters()).sqrt().float()
            update(optimizer, step, 0.02, norm, norm.isfinite())
    before = build_model(MODEL, seed=1)
    for name, first in before.named_parameters():
        moved, expected = (model.get_parameter(name).detach().cpu() - first.detach() for model in models)
        assert (moved - expected).norm() <= 0.05 * expected.norm(), name
