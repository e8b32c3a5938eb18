"""The product of a linear layer: torch's own, and on a CPU in fp32 that of oneDNN.

torch takes MKL for fp32 products on a CPU. On processors that are not Intel's, MKL uses narrow instructions: on an AMD
EPYC with AVX-512 it reached 105 GFLOP/s a core, and oneDNN, which torch has for other dtypes, 245.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import mm_flop, register_flop_formula

HAS_ONEDNN = torch.backends.mkldnn.is_available()
FEWEST_ROWS = 32  # with fewer, as in cached generation, the start of oneDNN's kernel costs more than it saves


def linear(x: Tensor, weight_MK: Tensor, bias_M: Tensor | None = None) -> Tensor:
    """Return x [..., K] times the transposed weight, plus the bias: [..., M], all of one dtype."""
    if not _suits_onednn(x):
        return F.linear(x, weight_MK, bias_M)
    y_NM: Tensor = OneDNNProduct.apply(x.flatten(0, -2), weight_MK, bias_M)
    return y_NM.view(*x.shape[:-1], -1)


def product_without_gradient(x_NK: Tensor, weight_MK: Tensor) -> Tensor:
    """Return x times the transposed weight, [N, M]: what `linear` returns, sooner, where nothing asks for gradients."""
    y_NM: Tensor = product(x_NK, weight_MK, None) if _suits_onednn(x_NK) else x_NK @ weight_MK.T
    return y_NM


def _suits_onednn(x: Tensor) -> bool:
    is_fp32_on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
    return is_fp32_on_cpu and HAS_ONEDNN and x.numel() >= FEWEST_ROWS * x.shape[-1]


class OneDNNProduct(torch.autograd.Function):
    """The product and its gradients."""

    @staticmethod
    def forward(ctx: Any, x_NK: Tensor, weight_MK: Tensor, bias_M: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_NK, weight_MK)
        ctx.has_bias = bias_M is not None
        return product(x_NK, weight_MK, bias_M)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_NM,), (x_NK, weight_MK) = gradients, ctx.saved_tensors
        return (
            product(gradient_NM, weight_MK.t(), None) if ctx.needs_input_grad[0] else None,
            product(gradient_NM.t(), x_NK.t(), None) if ctx.needs_input_grad[1] else None,
            gradient_NM.sum(dim=0) if ctx.has_bias else None,
        )


# An operator of our own, since the compiler takes torch's for constant weights only. Registered this way it costs some
# microseconds a call; torch.library.custom_op, with its gradients, costs two hundred.
LIBRARY = torch.library.Library("gpt_ladder", "DEF")
LIBRARY.define("product(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
product = torch.ops.gpt_ladder.product.default


def _product(x_NK: Tensor, weight_MK: Tensor, bias_M: Tensor | None) -> Tensor:
    y_NM: Tensor = torch.ops.mkldnn._linear_pointwise(x_NK, weight_MK, bias_M, "none", [], "")
    return y_NM


LIBRARY.impl("product", _product, "CPU")


@torch.library.register_fake("gpt_ladder::product", lib=LIBRARY)
def _(x_NK: Tensor, weight_MK: Tensor, bias_M: Tensor | None) -> Tensor:
    return x_NK.new_empty(x_NK.shape[0], weight_MK.shape[0])


@register_flop_formula(torch.ops.gpt_ladder.product)
def _flops(x_shape: Any, weight_shape: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return mm_flop(x_shape, (weight_shape[1], weight_shape[0]))
