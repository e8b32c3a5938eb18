"""--train.fp8: matrix products of 8-bit floats, in forward passes and in the gradients of their inputs.

Each row of an operand is divided by a scale of its own, so that its largest element is the largest of the format. That
is e4m3 (Micikevicius et al. 2022, "FP8 Formats for Deep Learning"). With scaled rows it is the more exact format for
gradients too, those of 50,000 logits included: e5m2 loses more to its two bits than it gains by its range.
Gradients of weights are products in the compute dtype: they are sums over tokens, and the least exact in 8 bits.
Biases, norms, attention, weights and the optimizer stay as they are, and evaluations compute without FP8.
"""

import types
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.errors import InputError
from model.base import LanguageModel
from model.gpt import Block
from model.layers import Linear
from train.config import TrainConfig

E4M3 = torch.float8_e4m3fn
SMALLEST = 1e-30  # of a row's largest element: smaller rows become zeros, as a scale of 0 would divide by 0
CAPABILITY = (8, 9)  # the first GPUs with FP8 units: Ada


class Scaled(NamedTuple):
    """Rows of 8-bit floats [M, K] with the fp32 scale of each row, [M, 1]: values x scale is what they stand for."""

    values: Tensor
    scale: Tensor


def scaled(x_MK: Tensor) -> Scaled:
    """Return x in 8-bit floats, row by row in memory. An element that is not finite gives its row one that is NaN."""
    largest_M1 = x_MK.float().abs().amax(dim=1, keepdim=True)
    scale_M1 = torch.where(largest_M1 > SMALLEST, largest_M1 / torch.finfo(E4M3).max, 1.0)
    return Scaled((x_MK.float() / scale_M1).to(E4M3).contiguous(), scale_M1)


def product(a: Scaled, b: Scaled, dtype: torch.dtype, *, is_forward: bool) -> Tensor:
    """Return a @ b^T in `dtype`: [M, K] x [N, K] -> [M, N].

    Scales are applied afterwards, which the compiler fuses with what follows; torch's kernel for scaled rows is slow
    where it accumulates exactly. Forward products accumulate fast, as their sums are short.
    """
    one = torch.ones((), device=a.values.device)
    sums_MN = torch._scaled_mm(
        a.values, b.values.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=is_forward
    )
    return (sums_MN.float() * a.scale * b.scale.t()).to(dtype)


class ScaledLinear(torch.autograd.Function):
    """x_MK, weight_NK, both in the compute dtype -> x @ weight^T."""

    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, weight_NK: Tensor) -> Tensor:
        ctx.save_for_backward(x_MK, weight_NK)
        return product(scaled(x_MK), scaled(weight_NK), x_MK.dtype, is_forward=True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x_MK, weight_NK = ctx.saved_tensors
        (gradient_MN,) = gradients
        columns = scaled(weight_NK.t().contiguous())
        x_gradient = product(scaled(gradient_MN), columns, x_MK.dtype, is_forward=False)
        return x_gradient, gradient_MN.t() @ x_MK


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return F.linear(x, weight) with its products in FP8, differentiable."""
    y: Tensor = ScaledLinear.apply(x.flatten(0, -2), weight)
    return y.view(*x.shape[:-1], len(weight))


def forward_in_fp8(self: Linear, x: Tensor) -> Tensor:
    """Compute a Linear of the model in FP8 in training, and as it is in evaluations."""
    if not torch.is_grad_enabled():
        return Linear.forward(self, x)
    y = linear(x, self.weight.to(x.dtype))
    return y if self.bias is None else y + self.bias.to(x.dtype)


def use_in_blocks(model: LanguageModel) -> None:
    """Let the matrices of all blocks compute in FP8. Call this before the blocks are compiled."""
    for block in model.blocks:
        assert isinstance(block, Block)
        for module in block.modules():
            if isinstance(module, Linear):
                module.forward = types.MethodType(forward_in_fp8, module)  # type: ignore[method-assign]


def check_device(config: TrainConfig, device: torch.device) -> None:
    """Raise InputError for --train.fp8 on a device without FP8 units, or with those of another format (AMD's)."""
    if config.fp8 is None:
        return
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    if not is_nvidia or torch.cuda.get_device_capability(device) < CAPABILITY:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
        raise InputError(
            f"--train.fp8 {config.fp8} needs an NVIDIA GPU of compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or "
            f"later (Ada, Hopper, Blackwell), and this is {name}; leave the flag out"
        )
