"""GPT-2 against transformers' GPT-2: logits, gradients, names, parameters; and its initial weights."""

import dataclasses
import warnings
from typing import Any

import pytest
import torch

from model.config import ModelConfig
from model.gpt import build_model
from model.hf.format import as_ours, to_hugging_face

TINY = ModelConfig(num_layers=2, num_heads=2, width=32, vocab_size=100, context_len=16)


def hugging_face(config: ModelConfig) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import GPT2Config, GPT2LMHeadModel
    their_config = GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.context_len,
        n_embd=config.width,
        n_layer=config.num_layers,
        n_head=config.num_heads,
    )
    return GPT2LMHeadModel(their_config).eval()


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Move every parameter away from its initial 0 or 1, so that a mix-up of two shows."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.empty(max(parameter.numel() for parameter in model.parameters()))
    with torch.no_grad():
        for parameter in model.parameters():
            some = noise[: parameter.numel()].normal_(std=0.02, generator=generator)
            parameter.add_(some.view_as(parameter))


@pytest.mark.parametrize("direction", ["from", "to"])
def test_logits_and_gradients_equal_transformers(direction: str) -> None:
    theirs, ours = hugging_face(TINY), build_model(TINY, seed=1)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    if direction == "from":
        randomize(theirs, seed=3)
        ours.load_state_dict({name: as_ours(name, tensor, TINY) for name, tensor in theirs.state_dict().items()})
    else:
        randomize(ours, seed=4)
        theirs.load_state_dict(to_hugging_face(ours.state_dict(), TINY))
    tokens_BT = torch.randint(TINY.vocab_size, (2, 16), generator=torch.Generator().manual_seed(5))
    logits = [ours(tokens_BT)[..., : TINY.vocab_size], theirs(tokens_BT).logits]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)
    for logits_BTV in logits:
        torch.nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten()).backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters() if parameter.grad is not None}
    in_their_form = to_hugging_face(gradients, TINY)
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(in_their_form[name], parameter.grad, rtol=0, atol=1e-4, msg=name)


def test_initial_weights_have_gpt2s_statistics() -> None:
    config = ModelConfig(num_layers=12, num_heads=4, width=256, vocab_size=5_000, context_len=256)
    weights = dict(build_model(config, seed=7).named_parameters())
    for name, parameter in weights.items():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif ".ln_" in name:
            assert (parameter == 1).all(), name
        else:
            expected = 0.02 / 24**0.5 if name.endswith("c_proj.weight") else 0.02
            rows = parameter[:5_000]  # without the vocabulary's padding
            assert rows.std().item() == pytest.approx(expected, rel=0.015), name
            assert abs(rows.mean().item()) < 3e-4, name
    assert not weights["transformer.wte.weight"][5_000:].any()


def test_initial_weights_depend_on_the_seed_and_the_name_alone() -> None:
    weights = build_model(TINY, seed=1).state_dict()
    torch.manual_seed(99)
    again, other = build_model(TINY, seed=1).state_dict(), build_model(TINY, seed=2).state_dict()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert not torch.equal(weights["transformer.wpe.weight"], other["transformer.wpe.weight"])
    last = "transformer.h.1.mlp.c_fc.weight"
    assert torch.equal(weights[last], build_model(dataclasses.replace(TINY, vocab_size=64), seed=1).state_dict()[last])
    assert not torch.equal(weights[last], weights["transformer.h.0.mlp.c_fc.weight"])


def test_padding_makes_the_vocabulary_a_multiple() -> None:
    for vocab_size, multiple, padded in (
        (50257, 64, 50304),
        (64, 64, 64),
        (65, 64, 128),
        (100, 1, 100),
        (100, 128, 128),
    ):
        config = dataclasses.replace(TINY, vocab_size=vocab_size, vocab_multiple=multiple)
        assert config.padded_vocab_size == padded
