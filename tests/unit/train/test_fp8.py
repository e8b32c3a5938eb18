"""--train.fp8: its operands and products against exact ones, what it costs a tiny run, and where it is refused.

torch's kernel for products of 8-bit floats runs on CPUs too, so all but the hardware is what runs on a GPU.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import InputError
from model.config import ModelConfig
from model.gpt import GPT, build_model
from train.config import Config, TrainConfig
from train.config_checks import faults_of
from train.losses import LossModel
from train.parallel import fp8
from train.parallel.auto_micro_batch import check_device
from train.run.identity import differing

CONFIG = ModelConfig(num_layers=2, num_heads=2, width=64, vocab_size=150, context_len=32)
SCALE = torch.tensor(1 / (8 * 32))
PARTS = ("head", "blocks", "all")


def some(*shape: int, seed: int = 1) -> Tensor:
    """Return bf16 numbers whose rows have very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-6, 3, shape[0])[:, None]
    return (torch.randn(*shape, generator=generator) * sizes).bfloat16()


def relative(value: Tensor, expected: Tensor) -> float:
    return ((value.float() - expected.float()).norm() / expected.float().norm()).item()


def test_every_row_keeps_the_formats_relative_precision() -> None:
    """Half of the last of three bits, for what is not far smaller than the row's largest."""
    x_MK = some(64, 256)
    values, scale = fp8.scaled(x_MK)
    back_MK = values.float() * scale
    is_normal = x_MK.float().abs() > scale * 2**-6
    assert is_normal.float().mean() > 0.98
    assert ((back_MK - x_MK) / x_MK)[is_normal].abs().max() <= 2**-4 * 1.001
    torch.testing.assert_close(back_MK.abs().amax(dim=1), x_MK.float().abs().amax(dim=1), rtol=1e-6, atol=0)


def test_rows_of_zeros_stay_zeros_and_what_is_not_finite_shows() -> None:
    x_MK = some(3, 32)
    x_MK[0], x_MK[1, 5], x_MK[2, 7] = 0, float("inf"), float("nan")
    values, scale = fp8.scaled(x_MK)
    assert not values[0].float().any()
    assert not (values[1:].float() * scale[1:]).sum(dim=1).isfinite().any()
    tiny = torch.full((1, 32), 1e-40, dtype=torch.bfloat16)
    assert not (fp8.scaled(tiny).values.float() * fp8.scaled(tiny).scale).isnan().any()


@pytest.mark.parametrize("is_forward", [True, False])
def test_a_product_is_that_of_its_operands(is_forward: bool) -> None:
    a, b = fp8.scaled(some(48, 64)), fp8.scaled(some(32, 64, seed=2))
    exact = (a.values.double() * a.scale) @ (b.values.double() * b.scale).t()
    result = fp8.product(a, b, torch.bfloat16, is_forward=is_forward)
    assert result.dtype == torch.bfloat16 and result.shape == (48, 32)
    assert relative(result, exact) <= 2**-7  # rounded to bf16 twice


def test_a_linear_and_its_gradients_are_the_exact_ones_to_three_bits() -> None:
    x_BTD, weight = some(6, 64).view(2, 3, 64).requires_grad_(), some(48, 64, seed=2).requires_grad_()
    gradient = some(6, 48, seed=3).view(2, 3, 48)
    y, exact = fp8.linear(x_BTD, weight), F.linear(x_BTD.float(), weight.float())
    assert y.shape == exact.shape and relative(y, exact) <= 0.05
    x_gradient, weight_gradient = torch.autograd.grad(y, (x_BTD, weight), gradient)
    exact_x, exact_weight = torch.autograd.grad(exact, (x_BTD, weight), gradient.float())
    assert relative(x_gradient, exact_x) <= 0.05
    assert relative(weight_gradient, exact_weight) <= 2**-7  # in bf16


def loss_model_of(part: str | None, chunk_tokens: int | None = None) -> LossModel:
    model = build_model(CONFIG, seed=1, compute_dtype=torch.bfloat16)
    if part in ("blocks", "all"):
        fp8.use_in_blocks(model)
    return LossModel(model, chunk_tokens=chunk_tokens, is_fp8=part in ("head", "all"))


def batch(step: int = 0) -> tuple[Tensor, Tensor]:
    """Return sequences in which each token mostly follows from the one before it."""
    generator = torch.Generator().manual_seed(step)
    tokens_BT = torch.randint(150, (8, 33), generator=generator)
    for position in range(1, 33):
        follows = torch.rand(8, generator=generator) < 0.8
        tokens_BT[follows, position] = (tokens_BT[follows, position - 1] * 7 + 3) % 150
    return tokens_BT[:, :-1], tokens_BT[:, 1:]


def step_of(loss_model: LossModel) -> tuple[float, Tensor]:
    loss_pair = loss_model(*batch(), SCALE)
    loss_pair[0].backward()
    gradients = [parameter.grad.flatten() for parameter in loss_model.parameters() if parameter.grad is not None]
    return loss_pair[1].item(), torch.cat(gradients)


@pytest.mark.parametrize("chunk_tokens", [None, 100])
@pytest.mark.parametrize("part", PARTS)
def test_loss_and_gradient_are_those_of_bf16_within_a_tolerance(part: str, chunk_tokens: int | None) -> None:
    loss, gradient = step_of(loss_model_of(None))
    fp8_loss, fp8_gradient = step_of(loss_model_of(part, chunk_tokens))
    assert fp8_loss != loss and fp8_loss == pytest.approx(loss, rel=5e-4)
    assert 0.005 < relative(fp8_gradient, gradient) <= 0.1


def losses_of(part: str | None, steps: int) -> Tensor:
    loss_model = loss_model_of(part, 100)
    optimizer = torch.optim.AdamW(loss_model.parameters(), lr=1e-2)
    losses = []
    for step in range(steps):
        loss_pair = loss_model(*batch(step), SCALE)
        loss_pair[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss_pair[0].item())
    return torch.tensor(losses)


def test_a_short_run_loses_no_more_quality_than_another_seed_would() -> None:
    """Both fall by two nats. Over three seeds and 300 steps, bf16 ends at 1.811 to 1.821 and FP8 at 1.791 to 1.837."""
    plain, in_fp8 = losses_of(None, 60), losses_of("all", 60)
    assert plain[0] - plain[-20:].mean() > 2
    assert abs(in_fp8[-20:].mean() - plain[-20:].mean()) <= 0.1


def test_evaluations_compute_without_fp8() -> None:
    plain, in_fp8 = (loss_model_of(part).token_losses(*batch()) for part in (None, "all"))
    assert torch.equal(plain, in_fp8)


def test_off_it_leaves_the_model_as_it_was() -> None:
    """No module has a forward of its own, so nothing is asked or computed anew."""

    def replaced(model: GPT) -> list[str]:
        return [name for name, module in model.named_modules() if "forward" in vars(module)]

    models = {part: loss_model_of(part).model for part in (None, "blocks")}
    assert all(isinstance(model, GPT) for model in models.values())
    assert replaced(models[None]) == []  # type: ignore[arg-type]
    matrices = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert replaced(models["blocks"]) == [f"transformer.h.{i}.{name}" for i in range(2) for name in matrices]  # type: ignore[arg-type]


def with_fp8(part: object, **model: object) -> Config:
    train = TrainConfig(fp8=part, seq_len=32)  # type: ignore[arg-type]
    return Config(train=train, model=dataclasses.replace(CONFIG, **model))  # type: ignore[arg-type]


@pytest.mark.parametrize("part", PARTS)
def test_a_cpu_is_refused_in_one_line(part: str) -> None:
    assert faults_of(with_fp8(part)) == []
    with pytest.raises(
        InputError, match=f"--train.fp8 {part} needs an NVIDIA GPU .* and this is a CPU; leave the flag out"
    ):
        check_device(with_fp8(part), torch.device("cpu"))
    check_device(with_fp8(None), torch.device("cpu"))


def test_what_cannot_be_is_refused_with_every_reason() -> None:
    config = with_fp8("all", num_heads=1, width=40, mlp_width=100, vocab_multiple=1)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, dtype="fp16"))
    assert faults_of(config) == [
        "--train.fp8 all needs --train.dtype bf16 (it is fp16)",
        "--model.width 40 must be a multiple of 16 for --train.fp8 all",
        "the MLP's width, --model.mlp-width, 100 must be a multiple of 16 for --train.fp8 all",
        "--model.vocab-multiple 1 must be a multiple of 16 for --train.fp8 all",
    ]
    assert faults_of(with_fp8("blocks", vocab_multiple=1)) == faults_of(with_fp8("head", mlp_width=100)) == []
    assert faults_of(with_fp8("head", kind="bigram")) == ["--train.fp8 head: only for --model.kind gpt, not for bigram"]


def test_it_belongs_to_what_a_run_is() -> None:
    """As --train.dtype does: a run is not continued in another precision. Older records have none."""
    old = Config().to_json()
    del old["train"]["fp8"]
    assert differing(old, Config().to_json()) == []
    assert differing(
        old, with_fp8("head").to_json() | {"model": old["model"], "train": old["train"] | {"fp8": "head"}}
    ) == ["--train.fp8 head (was None)"]
