"""Plain and chunked cross-entropy against a written-out log-softmax and each other, and their largest tensors."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.config import ModelConfig
from model.gpt import GPT, build_model
from train.losses import IGNORED, LossModel, token_losses

CONFIG = ModelConfig(num_layers=1, num_heads=2, width=16, vocab_size=150, context_len=40)
SCALE = torch.tensor(0.25)
CHUNK = 32  # of 120 tokens: four chunks, the last one shorter


def batch(B: int = 3, T: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs_BT, targets_BT = torch.randint(CONFIG.vocab_size, (2, B, T), generator=generator)
    targets_BT[0, :7] = IGNORED
    return inputs_BT, targets_BT


def gradients_of(model: GPT, chunk_tokens: int | None) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    inputs_BT, targets_BT = batch()
    loss_pair = LossModel(model, chunk_tokens=chunk_tokens)(inputs_BT, targets_BT, SCALE)
    loss_pair[0].backward()
    return loss_pair.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def model() -> GPT:
    return build_model(CONFIG, seed=1)


@pytest.mark.parametrize("chunk_tokens", [None, CHUNK])
def test_the_loss_is_log_softmax_over_the_vocabulary_without_padding(model: GPT, chunk_tokens: int | None) -> None:
    inputs_BT, targets_BT = batch()
    with torch.no_grad():
        model.lm_head.weight[CONFIG.vocab_size :] = 100.0  # padding that would win if it were scored
        scores_BTV = model(inputs_BT)[..., : CONFIG.vocab_size].log_softmax(dim=2)
    scored = [
        -scores_BTV[b, t, targets_BT[b, t]].item() for b in range(3) for t in range(40) if targets_BT[b, t] != IGNORED
    ]
    loss_model = LossModel(model, chunk_tokens=chunk_tokens)
    scaled, loss = loss_model(inputs_BT, targets_BT, SCALE).tolist()
    assert len(scored) == 113
    assert loss == pytest.approx(math.fsum(scored), rel=1e-6) and scaled == pytest.approx(loss / 4, rel=1e-7)
    losses_BT = loss_model.token_losses(inputs_BT, targets_BT)
    torch.testing.assert_close(losses_BT[targets_BT != IGNORED], torch.tensor(scored), rtol=0, atol=2e-6)
    assert not losses_BT[targets_BT == IGNORED].any()


def test_chunked_equals_plain(model: GPT) -> None:
    plain, plain_gradients = gradients_of(model, None)
    chunked, chunked_gradients = gradients_of(model, CHUNK)
    torch.testing.assert_close(chunked, plain, rtol=1e-6, atol=0)
    assert chunked_gradients.keys() == plain_gradients.keys()
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(chunked_gradients[name], gradient, rtol=0, atol=1e-6, msg=name)
    assert not chunked_gradients["transformer.wte.weight"][CONFIG.vocab_size :].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_chunked_equals_plain_within_half_precision(dtype: torch.dtype) -> None:
    model = build_model(CONFIG, seed=1, compute_dtype=dtype)
    plain, plain_gradients = gradients_of(model, None)
    chunked, chunked_gradients = gradients_of(model, CHUNK)
    torch.testing.assert_close(chunked, plain, rtol=1e-5, atol=0)
    for name, gradient in plain_gradients.items():
        assert (chunked_gradients[name] - gradient).norm() <= 0.02 * gradient.norm(), name


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by Dynamo, as it traces one
def test_chunked_compiles_into_one_graph(model: GPT) -> None:
    inputs_BT, targets_BT = batch()
    # Dynamo finds graph breaks without compiling kernels, which test_precision.py does.
    whole = torch.compile(LossModel(model, chunk_tokens=CHUNK), fullgraph=True, backend="aot_eager")
    expected = LossModel(model, chunk_tokens=CHUNK)(inputs_BT, targets_BT, SCALE)
    torch.testing.assert_close(whole(inputs_BT, targets_BT, SCALE), expected, rtol=1e-6, atol=0)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.mark.parametrize("chunk_tokens", [None, CHUNK])
def test_chunked_never_holds_the_logits(chunk_tokens: int | None) -> None:
    model = build_model(CONFIG, seed=1)
    loss_model = LossModel(model, chunk_tokens=chunk_tokens)
    logits = 3 * 40 * CONFIG.padded_vocab_size
    with LargestTensor() as training:
        loss_model(*batch(), SCALE)[0].backward()
    with LargestTensor() as validation:
        loss_model.token_losses(*batch())
    chunk, hidden = CHUNK * CONFIG.padded_vocab_size, 3 * 40 * CONFIG.resolved_mlp_width
    expected = max(chunk, hidden) if chunk_tokens else logits
    assert training.elements == expected and validation.elements == expected


def test_bf16_logits_are_scored_in_fp32() -> None:
    logits_NV, targets_N = torch.randn(64, 40).bfloat16(), torch.randint(40, (64,))
    losses_N = token_losses(logits_NV, targets_N, 40)
    assert losses_N.dtype == torch.float32
    torch.testing.assert_close(losses_N, token_losses(logits_NV.float(), targets_N, 40))
