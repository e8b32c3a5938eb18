"""The accounting against torch's own counters and the published counts."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.budget import budget, count_forward_flops, count_parameters
from model.config import NAMED_SHAPES, ModelConfig
from model.gpt import GPT, build_model
from train.config import OptimConfig
from train.optim import build_optimizer
from train.saves import checkpoint_tensors

TINY = ModelConfig(num_layers=3, num_heads=2, width=32, vocab_size=100, context_len=16)


def test_flops_equal_torchs_counter() -> None:
    model = build_model(TINY, seed=1)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits_BTV = model(torch.zeros(4, 16, dtype=torch.int64))
        forward = counter.get_total_flops()
        logits_BTV.sum().backward()
    counted = sum(count_forward_flops(TINY, batch=4, seq_len=16).values())
    assert counted == forward
    assert 3 * counted == counter.get_total_flops()
    assert budget(TINY).flops_per_token * 4 * 16 == counter.get_total_flops()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gpt2-small", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_parameters_equal_the_models(name: str, parameters: int) -> None:
    config = NAMED_SHAPES[name]
    with torch.device("meta"):
        held = sum(p.numel() for p in GPT(config).parameters())
    cost = budget(config)
    assert cost.num_parameters == parameters == sum(count_parameters(config).values())
    assert cost.num_parameters + cost.num_padding_parameters == held


def test_bytes_equal_the_tensors() -> None:
    model = build_model(TINY, seed=1)
    tensors = checkpoint_tensors(model, build_optimizer(model, OptimConfig()))
    in_checkpoint = sum(t.numel() * t.element_size() for name, t in tensors.items() if not name.endswith(".step"))
    assert budget(TINY).checkpoint_bytes == in_checkpoint
    gradients = sum(p.numel() * p.element_size() for p in model.parameters())
    assert budget(TINY).state_bytes == in_checkpoint + gradients
