"""Rows that grow side by side: with and without a cache, past the context, whatever other rows there are."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from model import ladder
from model.base import LanguageModel, init_weights
from model.config import ModelConfig
from model.generation.decoding import CachedPasses, Passes, Row, WholePasses, generate_rows, make_ready
from model.generation.sampling import Sampling
from model.gpt import GPT, build_model
from model.layers import Linear
from tests.unit.model.test_switches import MODERN, moved

SMALL = ModelConfig(2, 2, 32, vocab_size=50, context_len=8)
GREEDY = Sampling(0.0, None)
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], list(range(12, 24))]


def small(**switches: Any) -> GPT:
    """Return a model that predicts different tokens after different windows."""
    model = moved(dataclasses.replace(SMALL, **switches))
    with torch.no_grad():
        for block in model.blocks:
            for parameter in block.parameters():
                parameter.mul_(4)
    return model


def rows_of(prompts: Sequence[Sequence[int]], seed: int = 1) -> list[Row]:
    return [Row(list(prompt), torch.Generator().manual_seed(seed + i)) for i, prompt in enumerate(prompts)]


def continued(passes: Passes, rows: Sequence[Row], num_tokens: int, sampling: Sampling = GREEDY) -> list[list[int]]:
    for _ in itertools.islice(generate_rows(passes, rows, sampling=sampling), num_tokens):
        pass
    return [row.tokens for row in rows]


def likeliest(model: LanguageModel, prompt: Sequence[int], num_tokens: int, keep: int = 8) -> list[int]:
    """Continue a prompt greedily, one whole pass per token, by the rule of `keep` for a context of 8."""
    tokens, start = list(prompt), 0
    for _ in range(num_tokens):
        start = len(tokens) - keep if len(tokens) - start > 8 else start
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens[start:]]))[0, -1, :50].argmax()))
    return tokens


@pytest.mark.parametrize(("switches", "keep"), [({}, None), ({}, 1), (MODERN, None), (MODERN, 5)], ids=str)
def test_the_model_sees_the_documented_window(switches: dict[str, Any], keep: int | None) -> None:
    """Prompts have different lengths, one more than the context; alone and together, cached and not."""
    model = small(**switches)
    expected = [likeliest(model, prompt, 16, keep or 8) for prompt in PROMPTS]
    assert expected[0] != likeliest(model, PROMPTS[0], 16, keep=3), "the model must depend on its window"
    for passes in (
        CachedPasses(model, num_rows=4, keep=keep),
        WholePasses(model, keep=keep),
        WholePasses(model, num_rows=5, keep=keep),
    ):
        assert continued(passes, rows_of(PROMPTS), 16) == expected
    # One cache also serves one batch after the other.
    alone = CachedPasses(model, num_rows=1, keep=keep)
    assert [continued(alone, rows_of([prompt]), 16)[0] for prompt in PROMPTS] == expected


def test_a_seeds_sample_does_not_depend_on_its_batch() -> None:
    model, sampling = small(), Sampling(1.0, 20, 0.95)
    together = continued(CachedPasses(model, num_rows=4), rows_of(PROMPTS), 30, sampling)
    alone = [continued(CachedPasses(model, num_rows=1), [row], 30, sampling)[0] for row in rows_of(PROMPTS)]
    whole = continued(WholePasses(model), rows_of(PROMPTS), 30, sampling)
    assert together == alone == whole
    assert continued(WholePasses(model), rows_of(PROMPTS, seed=100), 30, sampling) != whole


@pytest.mark.parametrize("is_cached", [True, False])
def test_a_row_that_is_done_gets_no_more_tokens(is_cached: bool) -> None:
    model = small()
    passes = CachedPasses(model, num_rows=4) if is_cached else WholePasses(model)
    rows, lengths = rows_of(PROMPTS), [4, 1, 12, 6]
    for number, tokens in enumerate(generate_rows(passes, rows, sampling=GREEDY), start=1):
        assert [token is None for token in tokens] == [number > length for length in lengths]
        for row, length in zip(rows, lengths, strict=True):
            row.is_done = number >= length
    expected = [likeliest(model, prompt, length) for prompt, length in zip(PROMPTS, lengths, strict=True)]
    assert [row.tokens for row in rows] == expected


@pytest.mark.parametrize("name", ["bigram", "head", "heads", "block"])
def test_the_rungs_below_gpt_generate_without_a_cache(name: Any) -> None:
    model = ladder.make_model(ModelConfig(kind=name, num_heads=4, width=32, vocab_size=50, context_len=8))
    init_weights(model, 1)
    expected = [likeliest(model, prompt, 12) for prompt in PROMPTS]
    assert continued(WholePasses(model), rows_of(PROMPTS), 12) == expected


def test_make_ready_keeps_the_numbers() -> None:
    tokens_BT, last_B = torch.tensor(PROMPTS[:1] * 3), torch.tensor([0, 1, 2])
    other = dataclasses.replace(SMALL, vocab_multiple=1, logit_softcap=5.0, tie=False)
    for dtype, config in itertools.product((torch.float32, torch.bfloat16), (SMALL, other)):
        model = build_model(config, seed=1, compute_dtype=dtype)
        with torch.no_grad():
            before, before_last = model(tokens_BT), model.logits_at(tokens_BT, last_B)
            make_ready(model)
            assert torch.equal(model(tokens_BT), before)
            torch.testing.assert_close(model.logits_at(tokens_BT, last_B), before_last, rtol=0, atol=1e-6)
        assert {module.weight.dtype for module in model.modules() if isinstance(module, Linear)} == {dtype}
        assert model.transformer["wte"].weight.dtype == torch.float32
