"""Dropout's masks: reproducible, uniform, independent of each other, and where they stand in the model."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from model.dropout import WORD, dropped, hashes, mix_, place_keys
from model.gpt import GPT, Block, build_model
from tests.unit.model.test_switches import MODERN, moved, some_tokens, switched
from train.losses import LossModel

P = 0.2


def some_seeds(B: int) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (B,), generator=torch.Generator().manual_seed(3))


def masks(seeds_B: Tensor, *, num_places: int = 3, T: int = 64, D: int = 128, probability: float = P) -> Tensor:
    """Return where elements are dropped, [places, B, T, D]."""
    ones_BTD = torch.ones(len(seeds_B), T, D)
    return torch.stack([dropped(ones_BTD, keys_B2, probability) == 0 for keys_B2 in place_keys(seeds_B, num_places)])


# --- The hash ---------------------------------------------------------------------------------------------------------


def mixed_in_python(x: int) -> int:
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        x = (x ^ (x >> shift)) * factor % 2**32
    return x ^ (x >> 15)


def test_the_hash_is_that_of_unbounded_integers() -> None:
    numbers = [0, 1, 2, 0x7FFFFFFF, 0x80000000, WORD, *range(12345, 2**32, 99_999_999)]
    assert mix_(torch.tensor(numbers)).tolist() == [mixed_in_python(number) for number in numbers]


def test_masks_are_the_same_on_every_machine() -> None:
    """These numbers are part of a run: if they change, a continued run is another one."""
    keys_PB2 = place_keys(torch.tensor([0, 1, -1, 2**63 - 1]), 2)
    low_B, high_B = [0, 1, WORD, WORD], [0, 0, WORD, 2**31 - 1]
    for place, keys_B2 in enumerate(keys_PB2.tolist()):
        salt = mixed_in_python(place)
        for low, high, (first, second) in zip(low_B, high_B, keys_B2, strict=True):
            assert first == mixed_in_python(mixed_in_python(low ^ salt) ^ high)
            assert second == mixed_in_python(mixed_in_python((first + high) % 2**32) ^ low)
    first, second = keys_PB2[1, 2].tolist()
    expected = mixed_in_python(((mixed_in_python(5 * 7 + 3) ^ first) + second) % 2**32)
    assert hashes(keys_PB2[1], 6, 7)[2, 5, 3].item() == expected


def within(observed: Tensor, expected: float, num_samples: int, probability: float = P) -> bool:
    """Return whether all shares lie within 5 standard deviations of a mean of independent draws."""
    deviation = math.sqrt(probability * (1 - probability) / num_samples)
    return bool(((observed - expected).abs() <= 5 * deviation).all())


@pytest.mark.parametrize("seeds", ["random", "consecutive"])
def test_hashes_are_uniform(seeds: str) -> None:
    """Each bit is set in half of the numbers, and 256 classes of the highest and the lowest bits are equally full."""
    seeds_B = some_seeds(32) if seeds == "random" else torch.arange(32)
    x = hashes(place_keys(seeds_B, 5)[4], 128, 128).flatten()
    assert x.min() >= 0 and x.max() <= WORD
    bits = torch.stack([(x >> bit & 1).double().mean() for bit in range(32)])
    assert within(bits, 0.5, len(x), 0.5)
    for shift in (0, 12, 24):
        counts = torch.bincount(x >> shift & 255, minlength=256).double()
        chi_squared = ((counts - len(x) / 256) ** 2 / (len(x) / 256)).sum().item()
        assert abs(chi_squared - 255) < 5 * math.sqrt(2 * 255), (shift, chi_squared)


@pytest.mark.parametrize("seeds", ["random", "consecutive"])
def test_masks_have_the_right_share_everywhere_and_are_independent(seeds: str) -> None:
    """By row, position, channel and place; and of any two of them both are dropped as often as chance would have it."""
    seeds_B = some_seeds(32) if seeds == "random" else torch.arange(32)
    dropped_PBTD = masks(seeds_B).double()
    total = dropped_PBTD.numel()
    assert within(dropped_PBTD.mean(), P, total)
    for kept_dimension in range(4):
        others = [dimension for dimension in range(4) if dimension != kept_dimension]
        size = dropped_PBTD.shape[kept_dimension]
        assert within(dropped_PBTD.mean(dim=others), P, total // size)
        pairs = dropped_PBTD.movedim(kept_dimension, 0).flatten(1)
        both = (pairs @ pairs.T / pairs.shape[1])[~torch.eye(size, dtype=torch.bool)]
        assert within(both, P * P, pairs.shape[1], P * P)
    along = dropped_PBTD.flatten(2)
    for lag in (1, 2, 3, 127, 128, 129, 4096):
        assert within((along[..., lag:] * along[..., :-lag]).mean(), P * P, along[..., lag:].numel(), P * P)


def test_kept_elements_are_scaled_so_that_mean_and_gradient_stay() -> None:
    x_BTD = torch.full((64, 64, 128), 3.0, requires_grad=True)
    y_BTD = dropped(x_BTD, place_keys(some_seeds(64), 1)[0], 0.25)
    assert y_BTD.unique().tolist() == [0.0, 4.0]
    assert y_BTD.mean().item() == pytest.approx(3, abs=0.01)
    assert y_BTD.var().item() == pytest.approx(0.25 * 0.75 * 16, rel=0.01)
    (gradient_BTD,) = torch.autograd.grad(y_BTD.sum(), x_BTD)
    assert torch.equal(gradient_BTD, y_BTD.detach() / 3)
    assert dropped(x_BTD, None, 0.25) is x_BTD


def test_a_higher_probability_drops_more_of_the_same_and_rows_do_not_depend_on_each_other() -> None:
    seeds_B = some_seeds(6)
    few, many = masks(seeds_B, probability=0.1), masks(seeds_B, probability=0.5)
    assert not (few & ~many).any() and many.sum() > 4 * few.sum()
    assert torch.equal(masks(seeds_B[[4, 1]]), masks(seeds_B)[:, [4, 1]])


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_masks_are_those_of_eager_mode(backend: str) -> None:
    torch.compiler.reset()
    keys_B2 = place_keys(some_seeds(5), 2)[1]
    x_BTD = torch.ones(5, 31, 67)
    for dtype in (torch.float32, torch.bfloat16):
        compiled = torch.compile(dropped, dynamic=False, backend=backend)(x_BTD.to(dtype), keys_B2, P)
        assert torch.equal(compiled, dropped(x_BTD.to(dtype), keys_B2, P))
    assert torch.equal(torch.compile(hashes, backend=backend)(keys_B2, 31, 67), hashes(keys_B2, 31, 67))


# --- In the model -----------------------------------------------------------------------------------------------------


def loss_and_gradients(model: GPT, seeds_B: Tensor | None) -> list[Tensor]:
    tokens_BT = some_tokens()
    loss = LossModel(model, chunk_tokens=None)(tokens_BT, tokens_BT.roll(-1, 1), torch.ones(()), seeds_B)[0]
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("place", ["pre", "post"])
def test_the_masks_stand_after_the_embeddings_attention_and_the_mlp(place: Any) -> None:
    """By the equations, with nanoGPT's places."""
    model, seeds_B = moved(switched(dropout=P, norm_place=place)), some_seeds(2)
    factors_PBTD = (~masks(seeds_B, num_places=7, T=16, D=32)).float() / (1 - P)
    assert len({tuple(factors_TD.flatten().tolist()) for factors_TD in factors_PBTD.flatten(0, 1)}) == 14
    tokens_BT, weights = some_tokens(), dict(model.named_parameters())
    x_BTD = factors_PBTD[0] * (weights["transformer.wte.weight"][tokens_BT] + weights["transformer.wpe.weight"])
    for index, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        after_attention, after_mlp = factors_PBTD[1 + 2 * index : 3 + 2 * index]
        q, k, v = (
            y.view(2, 16, 2, 16).transpose(1, 2)
            for y in block.attn.c_attn(x_BTD if place == "post" else block.ln_1(x_BTD)).chunk(3, dim=2)
        )
        scores = (q @ k.transpose(2, 3) / 4).masked_fill(torch.ones(16, 16, dtype=torch.bool).triu(1), -torch.inf)
        x_BTD = x_BTD + after_attention * block.attn.c_proj((scores.softmax(3) @ v).transpose(1, 2).flatten(2))
        if place == "post":
            x_BTD = block.ln_1(x_BTD)
        x_BTD = x_BTD + after_mlp * block.mlp(x_BTD if place == "post" else block.ln_2(x_BTD))
        if place == "post":
            x_BTD = block.ln_2(x_BTD)
    expected_BTD = model.transformer["ln_f"](x_BTD)
    torch.testing.assert_close(model.training_states(tokens_BT, seeds_B), expected_BTD, rtol=1e-4, atol=1e-5)
    assert (model.hidden_states(tokens_BT) - expected_BTD).abs().max() > 0.1


def test_without_seeds_there_is_no_dropout_and_training_needs_them() -> None:
    plain, model = build_model(switched(), seed=1), build_model(switched(dropout=P), seed=1)
    assert torch.equal(plain(some_tokens()), model(some_tokens()))
    tokens_BT = some_tokens()
    losses = [LossModel(each, chunk_tokens=None).token_losses(tokens_BT, tokens_BT) for each in (plain, model)]
    assert torch.equal(*losses)
    for each, seeds_B in ((plain, some_seeds(2)), (model, None)):
        with pytest.raises(AssertionError):
            loss_and_gradients(each, seeds_B)


def test_a_row_has_its_masks_in_any_micro_batch() -> None:
    model, seeds_B, tokens_BT = moved(switched(dropout=P, **MODERN)), some_seeds(4), some_tokens(4)
    whole = model.training_states(tokens_BT, seeds_B)
    for rows in ([0, 1], [3], [2, 0, 3]):
        torch.testing.assert_close(
            model.training_states(tokens_BT[rows], seeds_B[rows]), whole[rows], rtol=1e-5, atol=1e-5
        )
    assert (model.training_states(tokens_BT, seeds_B + 1) - whole).abs().amax(dim=(1, 2)).min() > 0.1


@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_recomputed_block_has_the_masks_of_its_forward_pass(is_compiled: bool) -> None:
    """Bit by bit in eager mode; compiled, up to roundings and with one graph for all blocks."""
    torch.compiler.reset()
    expected = loss_and_gradients(moved(switched(dropout=P)), some_seeds(2))
    model, counter = moved(switched(dropout=P)), CompileCounterWithBackend("aot_eager")

    def recomputed(block: Block, *inputs: Any) -> Any:
        return checkpoint(Block.forward, block, *inputs, use_reentrant=False, preserve_rng_state=False)

    for block in model.blocks:
        block.forward = recomputed.__get__(block)
        if is_compiled:
            block.forward = torch.compile(block.forward, dynamic=False, backend=counter)
    found = loss_and_gradients(model, some_seeds(2))
    assert counter.frame_count == is_compiled
    tolerance = 1e-5 if is_compiled else 0
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_on_another_device_nothing_of_it_is_on_the_cpu_and_nothing_waits() -> None:
    """Meta tensors refuse operands of another device, and have no numbers that the host could wait for."""
    with torch.device("meta"):
        model = GPT(switched(dropout=P), compute_dtype=torch.bfloat16)
        tokens_BT, seeds_B = torch.empty(2, 16, dtype=torch.int64), torch.empty(2, dtype=torch.int64)
    x_BTD = model.training_states(tokens_BT, seeds_B)
    x_BTD.sum().backward()
    assert x_BTD.dtype == torch.bfloat16 and all(p.grad is not None for p in model.blocks.parameters())


@pytest.mark.parametrize("dropout", [-0.1, 1.0, 1.5, math.nan, math.inf])
def test_probabilities_outside_the_range_are_refused(dropout: float) -> None:
    assert switched(dropout=dropout).faults() == [f"--model.dropout {dropout} must lie in [0, 1)"]


def test_the_smaller_models_have_none() -> None:
    assert switched(kind="block", dropout=0.1).faults() == ["--model.dropout: only for --model.kind gpt, not for block"]
