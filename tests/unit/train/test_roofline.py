"""The roofline: kernels whose bytes are known, FLOPs against two other counts, and the command's table."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.scheduler import BaseSchedulerNode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.config import ModelConfig
from model.cost import CARDS, count_backward_flops, count_forward_flops, model_cost
from model.costs import roofline
from model.costs.gpu_peaks import BANDWIDTHS
from model.costs.roofline import ROWS, Kernel, Rates, StepTrace, rows_of
from model.gpt import build_model
from tests.helpers.runs import called
from tests.unit.model.test_switches import MODERN, named
from train.data import zero_batch
from train.losses import LossModel
from train.roofline import main, traced_step

TINY = ModelConfig(num_layers=3, num_heads=2, width=64, vocab_size=100, context_len=32)
B, T, D, F, V, L = 4, 32, 64, 256, 128, 3
N = B * T
FP32, BF16, INT64 = 4, 2, 8
H100 = Rates(989.4e12, 989.4e12, 3.35e12)


def recorded(
    function: Callable[..., Any], *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> list[Kernel]:
    """Return the kernels of a compiled function of tensors of these shapes; a last 1-D one holds indices."""
    trace = StepTrace()
    with FakeTensorMode():
        tensors = [torch.empty(shape, dtype=dtype if len(shape) > 1 else torch.int64) for shape in shapes]
        compiled = torch.compile(function, dynamic=False)
        with trace.recording():
            compiled(*tensors)
    return trace.kernels


def with_flops(kernels: list[Kernel]) -> dict[str, int]:
    return {name: row.flops for name, row in rows_of(kernels, H100).items() if row.flops}


# --- Bytes that a person can count ------------------------------------------------------------------------------------


def test_a_fused_kernel_reads_once_and_writes_once() -> None:
    def chain(x_ND: Tensor) -> Tensor:
        return (x_ND.exp() * 2 + x_ND.sin()).relu()

    (kernel,) = recorded(chain, (64, 32))
    assert (kernel.row, kernel.flops, kernel.num_bytes) == ("elementwise", 0, 2 * 64 * 32 * FP32)
    (kernel,) = recorded(lambda x_ND: (x_ND * 2).float().sum(dim=1), (64, 32), dtype=torch.bfloat16)
    assert kernel.num_bytes == 64 * 32 * BF16 + 64 * FP32
    (kernel,) = recorded(lambda x_ND: x_ND.softmax(dim=1), (64, 32))  # three passes, one kernel
    assert kernel.num_bytes == 2 * 64 * 32 * FP32


def test_a_tensor_of_more_than_a_thousand_million_elements_is_counted_whole() -> None:
    (kernel,) = recorded(lambda x: x.float().logsumexp(dim=1), (65536, 50304), dtype=torch.bfloat16)
    assert kernel.num_bytes == 65536 * 50304 * BF16 + 65536 * FP32


def test_a_gather_reads_as_many_elements_as_it_has_indices() -> None:
    (kernel,) = recorded(lambda x_NV, index_N: x_NV.gather(1, index_N[:, None]), (64, 1000), (64,))
    assert kernel.num_bytes == 64 * (INT64 + FP32 + FP32)


def test_a_scatter_touches_as_many_elements_as_it_has_indices() -> None:
    """It adds in place to a copy, as on a GPU."""

    def scatter(x_NV: Tensor, index_N: Tensor) -> Tensor:
        return x_NV.scatter_add(1, index_N[:, None], torch.ones(64, 1))

    copy, scattered = recorded(scatter, (64, 1000), (64,))
    assert copy.num_bytes == 2 * 64 * 1000 * FP32 and scattered.num_bytes == 64 * (INT64 + FP32)


def test_a_product_ends_a_fused_kernel() -> None:
    before, product, after = recorded(lambda x, w: (x.relu() @ w).tanh(), (64, 32), (32, 48))
    assert before.num_bytes == 2 * 64 * 32 * FP32 and after.num_bytes == 2 * 64 * 48 * FP32
    assert product == Kernel(
        "product",
        flops=2 * 64 * 32 * 48,
        work=2 * 64 * 32 * 48,
        num_bytes=(64 * 32 + 32 * 48 + 64 * 48) * FP32,
        row="blocks' products",
    )


def test_a_backward_pass_recomputes_what_is_cheap() -> None:
    """The product's operand is computed again from x, so that only x is read, and the gradient has one more kernel."""
    trace = StepTrace()
    with FakeTensorMode():
        x_ND, weight_DD = torch.empty(64, 32, requires_grad=True), torch.empty(32, 32, requires_grad=True)
        compiled = torch.compile(lambda x, w: x.sigmoid() @ w, dynamic=False)
        with trace.recording():
            y_ND = compiled(x_ND, weight_DD)
            forward = len(trace.kernels)
            torch.autograd.grad(y_ND, (x_ND, weight_DD), torch.empty_like(y_ND))
    backward = [kernel for kernel in trace.kernels[forward:] if kernel.kind == "other"]
    assert [kernel.num_bytes for kernel in backward] == [3 * 64 * 32 * FP32]  # sigmoid and its gradient, to one result
    assert sum(kernel.flops for kernel in trace.kernels) == 3 * 2 * 64 * 32 * 32


def test_uncompiled_operations_read_operands_and_write_results() -> None:
    trace = StepTrace()
    with FakeTensorMode():
        table_VD, ids_N = torch.empty(1000, 32), torch.empty(8, dtype=torch.int64)
        a_NN, b_NN = torch.empty(16, 16), torch.empty(16, 16)
        with trace.recording():
            torch.nn.functional.embedding(ids_N, table_VD)
            a_NN.add_(b_NN)
            torch.mm(a_NN, b_NN, out=torch.empty(16, 16))
            a_NN.copy_(b_NN)
            a_NN.view(4, 64).t()
            torch.zeros(16, 16)
            b_NN.expand(5, 16, 16).sum()
    square = 16 * 16 * FP32
    assert [kernel.num_bytes for kernel in trace.kernels] == [
        8 * INT64 + 2 * 8 * 32 * FP32,
        3 * square,
        3 * square,
        2 * square,
        square,
        square + FP32,
    ]
    assert {kernel.row for kernel in trace.kernels} == {"rest", "blocks' products"}


# --- The step against other counts ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2_tiny() -> tuple[list[Kernel], Counter[str]]:
    """Return the kernels of a tiny GPT-2's step in bf16, and two counts of its fused kernels' bytes."""
    counts, fused_bytes = Counter[str](), roofline.fused_bytes

    def counted(node: BaseSchedulerNode) -> int:
        counts["ours"] += fused_bytes(node)
        counts["Inductor's"] += node.get_read_write_buffers_sizes()
        return fused_bytes(node)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roofline, "fused_bytes", counted)
        config = dataclasses.replace(TINY, vocab_size=V)  # without padding columns, which are not read
        kernels = traced_step(config, batch=B, seq_len=T, compute_dtype=torch.bfloat16)
    return kernels, counts


def test_the_bytes_of_products_are_those_of_their_matrices(gpt2_tiny: tuple[list[Kernel], Counter[str]]) -> None:
    rows = rows_of(gpt2_tiny[0], H100)
    blocks = 0
    for inputs, outputs in ((D, 3 * D), (D, D), (D, F), (F, D)):  # each multiplies forward and gives two gradients
        blocks += 3 * (N * inputs + inputs * outputs + N * outputs) + outputs  # the bias is added forward
    assert rows["blocks' products"].num_bytes == L * blocks * BF16
    assert rows["head"].num_bytes == 3 * (N * D + D * V + N * V) * BF16
    # Forward: q, k, v to output and log-sums; backward: these and the output's gradient to three gradients.
    assert rows["attention"].num_bytes == L * ((4 + 8) * N * D * BF16 + 2 * 2 * N * FP32)


def test_the_bytes_of_fused_kernels_equal_inductors_own_count(gpt2_tiny: tuple[list[Kernel], Counter[str]]) -> None:
    """Inductor counts a gather of N logits as a read of all, and a pair of gradients where one of them is read."""
    _, counts = gpt2_tiny
    assert counts["ours"] == counts["Inductor's"] - (N * V - N) * BF16 - FP32


def test_the_optimizer_reads_and_writes_every_parameters_four_tensors(
    gpt2_tiny: tuple[list[Kernel], Counter[str]],
) -> None:
    """The kernel also writes the gradients, which it clips. The norm reads them once more."""
    held = model_cost(TINY).gradient_bytes
    assert held * 9 < rows_of(gpt2_tiny[0], H100)["optimizer"].num_bytes < held * 9 + 10_000


@pytest.mark.parametrize("switches", [{}, {"attention": "naive"}, {"dropout": 0.1, "window": 5}, MODERN], ids=named)
def test_flops_equal_the_cost_account_and_torchs_counter(switches: dict[str, Any]) -> None:
    """A fused attention's backward pass also computes the scores once more; with a window nothing is left out."""
    config = dataclasses.replace(TINY, **switches)
    kernels = traced_step(
        config, batch=B, seq_len=T, compute_dtype=torch.float32, chunk_tokens=N // 2 if switches == MODERN else None
    )
    forward = count_forward_flops(config, batch=B, seq_len=T)
    step = sum(forward.values()) + sum(count_backward_flops(config, batch=B, seq_len=T).values())
    recomputed = 0 if config.attention == "naive" else forward["attention scores"]
    assert sum(kernel.flops for kernel in kernels) == step + recomputed
    attention = 3 * (forward["attention scores"] + forward["attention values"]) + recomputed
    blocks = 3 * (forward["attention projections"] + forward["mlp"])
    assert with_flops(kernels) == {"blocks' products": blocks, "head": 3 * forward["head"], "attention": attention}
    work = sum(kernel.work for kernel in kernels)
    has_all_scores = config.attention == "naive" or config.window is not None
    assert work == step + recomputed - (0 if has_all_scores else attention // 2)

    inputs_BT, targets_BT, *seeds = zero_batch((B, T), has_dropout=config.dropout > 0)
    loss_model = LossModel(build_model(config, seed=1), chunk_tokens=None)  # torch does not count addmm_
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss_model(inputs_BT, targets_BT, torch.ones(()), *seeds)[0].backward()
    assert counter.get_total_flops() == step


# --- The command ------------------------------------------------------------------------------------------------------


def test_gpt2_small_on_an_h100() -> None:
    """Within a quarter of another count by the same method: 48, 22, 15, 25, 9 and 3 ms, so 46 % MFU.

    That count took attention's time from measurements, and more passes over the logits.
    """
    done = called(main, "gpt2-small", "--card", "h100", "--batch", "64")
    assert done.returncode == 0, done.stderr
    words = {line.split("  ")[1]: line.split() for line in done.stdout.splitlines() if line.startswith("  ")}
    attained = {name: float(words[name][-1]) for name in ROWS}
    expected = {"blocks' products": 48, "head": 22, "attention": 15, "elementwise": 25, "loss": 9}
    assert {name: attained[name] for name in expected} == pytest.approx(expected, rel=0.26)
    assert attained["rest"] + attained["optimizer"] == pytest.approx(3, rel=0.26)
    assert float(words["total"][-1]) == pytest.approx(sum(attained.values()), abs=0.05)
    assert 105 < float(words["total"][-1]) < 135 and 42 < float(words["at attained rates"][-3]) < 52
    # The first row: 2 x 3 x 65,536 tokens x 12 blocks x 12 x 768^2 FLOPs.
    assert "33.4 TFLOP" in done.stdout and "33.76   40.7 %  FLOP/s" in done.stdout
    assert "at the peaks                 790," in done.stdout and "68.3 % MFU" in done.stdout


def test_rows_add_up_and_a_faster_memory_helps_what_it_binds() -> None:
    kernels = [
        Kernel("product", 3 * 10**12, 3 * 10**12, 10**6, "head"),
        Kernel("product", 10**9, 10**9, 10**9, "head"),
        Kernel("attention", 10**12, 5 * 10**11, 10**6, "attention"),
        Kernel("other", 0, 0, 10**10, "loss"),
    ]
    rates = Rates(products=10.0**15, attention=10.0**14, bandwidth=10.0**12)
    rows = rows_of(kernels, rates)
    assert list(rows) == ["head", "attention", "loss"]
    assert [row.bound for row in rows.values()] == ["FLOP/s", "FLOP/s", "bandwidth"]
    assert [row.seconds for row in rows.values()] == pytest.approx([0.003 + 0.001, 0.005, 0.01])
    assert rows["head"].flops == 3 * 10**12 + 10**9 and rows["head"].num_bytes == 10**6 + 10**9
    faster = rows_of(kernels, dataclasses.replace(rates, bandwidth=10.0**13))
    assert [row.seconds for row in faster.values()] == pytest.approx([0.003 + 0.0001, 0.005, 0.001])


def test_every_card_has_a_bandwidth() -> None:
    assert {name for _, name in CARDS.values()} == set(BANDWIDTHS)


def test_bad_input_is_one_line() -> None:
    for flags, message in (
        ("gpt3", "no shape 'gpt3'; there are gpt2-small, "),
        ("--card 80", "--card 80: its peaks are not listed; give --peak-tflops and --bandwidth-tb-per-s, or --card "),
        ("--card 80 --peak-tflops 100", "--card 80: its peaks are not listed; give --peak-tflops and "),
        ("--bandwidth-tb-per-s -1", "--bandwidth-tb-per-s -1.0 must be a finite number above 0"),
        ("--bandwidth-tb-per-s inf", "--bandwidth-tb-per-s inf must be a finite number above 0"),
        ("--batch 1000000000000", "--batch 1000000000000 x --seq-len 1024: a step of this model needs "),
        ("--model.width 12000000000", "--batch 1 x --seq-len 1024: a step of this model needs "),
        ("--model.attention flex", "--model.attention flex: its work depends on the documents; give sdpa or naive"),
        ("--attained 70 0.3 0.9", "--attained 70.0 0.3 0.9: give three fractions above 0 and at most 1"),
    ):
        done = called(main, *flags.split())
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith(f"roofline: {message}") and done.stderr.count("\n") == 1
