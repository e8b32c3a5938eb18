"""oneDNN's product of a linear layer is torch's own product, with its gradients, eager and compiled."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from model import linear as products
from model.linear import FEWEST_ROWS, linear

pytestmark = pytest.mark.skipif(not products.HAS_ONEDNN, reason="this build of torch has no oneDNN")


def operands(rows: tuple[int, ...], *, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    x, weight, bias_M = (
        torch.randn(shape, generator=generator).requires_grad_() for shape in ((*rows, 24), (40, 24), (40,))
    )
    return x, weight, bias_M if bias else None


def gradients(y: Tensor, *operands: Tensor | None) -> list[Tensor]:
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    return list(torch.autograd.grad(y, [each for each in operands if each is not None], direction))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(64,), (4, 16), (2, 3, 32)])
def test_product_and_gradients_are_those_of_torch(rows: tuple[int, ...], bias: bool) -> None:
    x, weight, bias_M = operands(rows, bias=bias)
    y, expected = linear(x, weight, bias_M), F.linear(x, weight, bias_M)
    assert "OneDNN" in str(y.grad_fn) + str(y.grad_fn and y.grad_fn.next_functions)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients(y, x, weight, bias_M), gradients(expected, x, weight, bias_M), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert ours.is_contiguous()


def test_strided_operands_and_a_frozen_input() -> None:
    x, weight, _ = operands((64,))
    y = linear(x.detach().t().contiguous().t(), weight.detach().t().contiguous().t().requires_grad_())
    torch.testing.assert_close(y, F.linear(x, weight), rtol=1e-5, atol=1e-5)
    y.sum().backward()  # of the weight alone: no gradient of the input is asked for


def test_few_rows_and_other_dtypes_take_torchs_own_product() -> None:
    x, weight, bias_M = operands((FEWEST_ROWS - 1,))
    assert torch.equal(linear(x, weight, bias_M), F.linear(x, weight, bias_M))
    half = [each.bfloat16() for each in operands((64,)) if each is not None]
    assert torch.equal(linear(*half), F.linear(*half))


def test_compiled_without_a_break_its_products_are_the_same_to_the_bit() -> None:
    x, weight, bias_M = operands((4, 16))
    eager, compiled = linear(x, weight, bias_M), torch.compile(linear, fullgraph=True)(x, weight, bias_M)
    assert torch.equal(eager, compiled)
    ours, theirs = gradients(compiled, x, weight, bias_M), gradients(eager, x, weight, bias_M)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    torch.testing.assert_close(ours[2], theirs[2])  # the compiler adds the rows up in another order


def test_its_flops_are_counted() -> None:
    x, weight, bias_M = operands((64,))
    with FlopCounterMode(display=False) as counter:
        linear(x, weight, bias_M).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 64 * 24 * 40
