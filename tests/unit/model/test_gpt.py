"""The model against Hugging Face's, its count, its initial weights."""

import dataclasses
import warnings
from typing import Any

import pytest
import torch

from model.config import NAMED_SHAPES, ModelConfig
from model.gpt import GPT, build_model
from model.hf.format import from_hugging_face, to_hugging_face

TINY = ModelConfig(num_layers=2, num_heads=2, width=32, vocab_size=100, context_len=16)
SMALL = NAMED_SHAPES["gpt2-small"]


def hugging_face(config: ModelConfig) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import GPT2Config, GPT2LMHeadModel
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.context_len,
            n_embd=config.width,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Every parameter away from its initial 0 or 1, so that none can be mixed up unseen."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.empty(max(parameter.numel() for parameter in model.parameters()))
    with torch.no_grad():
        for parameter in model.parameters():
            some = noise[: parameter.numel()].normal_(std=0.02, generator=generator)
            parameter.add_(some.view_as(parameter))


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((TINY, 16), id="tiny"),
        pytest.param((SMALL, 64), id="small", marks=pytest.mark.long(reason="two models of 124 million parameters")),
    ],
)
def models(request: pytest.FixtureRequest) -> tuple[Any, GPT, int]:
    """Hugging Face's model, ours of the same shape, and how long a sequence to give them."""
    config, T = request.param
    return hugging_face(config).eval(), build_model(config, seed=1), T


@pytest.mark.parametrize("direction", ["from", "to"])
def test_logits_and_gradients_equal_hugging_faces(models: tuple[Any, GPT, int], direction: str) -> None:
    theirs, ours, T = models
    config = ours.config
    theirs.zero_grad()
    ours.zero_grad()
    if direction == "from":
        randomize(theirs, seed=3)
        ours.load_state_dict(from_hugging_face(theirs.state_dict(), config))
    else:  # away from what both hold by now, so that nothing but the conversion can make them equal
        randomize(ours, seed=4)
        theirs.load_state_dict(to_hugging_face(ours.state_dict(), config))
    tokens_BT = torch.randint(config.vocab_size, (2, T), generator=torch.Generator().manual_seed(5))
    their_logits = theirs(tokens_BT).logits
    our_logits = ours(tokens_BT)[..., : config.vocab_size]
    torch.testing.assert_close(our_logits, their_logits, rtol=0, atol=1e-4)

    for logits in (their_logits, our_logits):
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten()).backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters() if parameter.grad is not None}
    in_their_form = to_hugging_face(gradients, config)
    for name, parameter in theirs.named_parameters():
        assert in_their_form[name].shape == parameter.grad.shape, name
        assert (in_their_form[name] - parameter.grad).abs_().max() <= 1e-4, name  # a tenth of assert_close's time


def test_gpt2_small_has_124439808_parameters() -> None:
    with torch.device("meta"):
        padded = GPT(SMALL)
        theirs = hugging_face(SMALL)
    padding = (50304 - 50257) * 768
    assert sum(p.numel() for p in padded.parameters()) - padding == 124_439_808
    assert sum(p.numel() for p in theirs.parameters()) == 124_439_808
    assert padded.lm_head.weight is padded.transformer["wte"].weight


def test_state_dict_names_are_hugging_faces() -> None:
    assert build_model(TINY, seed=0).state_dict().keys() == hugging_face(TINY).state_dict().keys()


def test_initial_weights_have_gpt2s_statistics() -> None:
    weights = dict(build_model(SMALL, seed=7).named_parameters())
    for name, parameter in weights.items():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif ".ln_" in name:
            assert (parameter == 1).all(), name
        else:
            expected = 0.02 / 24**0.5 if name.endswith("c_proj.weight") else 0.02
            rows = 50257 if name == "transformer.wte.weight" else None
            assert parameter[:rows].std().item() == pytest.approx(expected, rel=0.01), name
            assert abs(parameter[:rows].mean().item()) < 1e-4, name
    assert not weights["transformer.wte.weight"][50257:].any()


def test_initial_weights_depend_on_the_seed_alone() -> None:
    before = build_model(TINY, seed=1).state_dict()
    torch.manual_seed(99)
    again, other = build_model(TINY, seed=1).state_dict(), build_model(TINY, seed=2).state_dict()
    assert all(torch.equal(before[name], again[name]) for name in before)
    assert not torch.equal(before["transformer.wpe.weight"], other["transformer.wpe.weight"])
    deeper = build_model(dataclasses.replace(TINY, vocab_size=64), seed=1).state_dict()
    assert torch.equal(before["transformer.h.1.attn.c_attn.weight"], deeper["transformer.h.1.attn.c_attn.weight"])


def test_no_two_parameters_are_drawn_alike() -> None:
    weights = build_model(TINY, seed=1).state_dict()
    first, second = (weights[f"transformer.h.{layer}.mlp.c_fc.weight"] for layer in (0, 1))
    assert not torch.equal(first, second)


def test_the_model_is_causal() -> None:
    model = build_model(TINY, seed=1)
    tokens_BT = torch.randint(100, (1, 16))
    changed_BT = tokens_BT.clone()
    changed_BT[0, 9] = (changed_BT[0, 9] + 1) % 100
    before, after = model(tokens_BT), model(changed_BT)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.equal(before[:, 9:], after[:, 9:])


def test_padding_makes_the_vocabulary_a_multiple() -> None:
    for vocab_size, padded in ((50257, 50304), (64, 64), (65, 128)):
        assert dataclasses.replace(TINY, vocab_size=vocab_size).padded_vocab_size == padded
    assert dataclasses.replace(TINY, vocab_multiple=1).padded_vocab_size == 100
    assert dataclasses.replace(TINY, vocab_multiple=128).padded_vocab_size == 128


def test_too_long_a_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="17 tokens exceed the model's context of 16"):
        build_model(TINY, seed=1)(torch.zeros(1, 17, dtype=torch.int64))
