"""Rows that grow together: with and without a cache, past the context, whatever stands beside them, compiled."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from model import ladder
from model.base import init_weights
from model.config import ModelConfig
from model.generation.decoding import CachedPasses, Passes, Row, WholePasses, generate_rows, make_ready
from model.generation.sampling import Sampling
from model.gpt import GPT, Linear, build_model
from tests.unit.model.test_switches import MODERN, moved

SMALL = ModelConfig(2, 2, 32, vocab_size=50, context_len=8)
GREEDY = Sampling(0.0, None)
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], list(range(12, 24))]


def small(**switches: Any) -> GPT:
    """A model that says other things to other windows."""
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


def by_hand(model: GPT, prompt: Sequence[int], num_tokens: int, keep: int = 8) -> list[int]:
    """The likeliest token after the last 8 of all, or after the last `keep` and those that came since."""
    tokens, start = list(prompt), 0
    for _ in range(num_tokens):
        start = len(tokens) - keep if len(tokens) - start > 8 else start
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens[start:]]))[0, -1, :50].argmax()))
    return tokens


@pytest.mark.parametrize(("switches", "keep"), [({}, None), ({}, 1), (MODERN, None), (MODERN, 5)], ids=str)
def test_past_the_context_the_stated_window_is_what_the_model_sees(switches: dict[str, Any], keep: int | None) -> None:
    """Prompts of different lengths, one of them longer than the context, alone and together, cached and not."""
    model = small(**switches)
    wanted = [by_hand(model, prompt, 16, keep or 8) for prompt in PROMPTS]
    assert wanted[0] != by_hand(model, PROMPTS[0], 16, keep=3), "this model does not look at its window"
    assert continued(CachedPasses(model, num_rows=4, keep=keep), rows_of(PROMPTS), 16) == wanted
    assert continued(WholePasses(model, keep=keep), rows_of(PROMPTS), 16) == wanted
    assert continued(WholePasses(model, num_rows=5, keep=keep), rows_of(PROMPTS), 16) == wanted
    alone = CachedPasses(model, num_rows=1, keep=keep)
    assert [continued(alone, rows_of([prompt]), 16)[0] for prompt in PROMPTS] == wanted


def test_a_seeds_sample_does_not_depend_on_its_batch() -> None:
    model, sampling = small(), Sampling(1.0, 20, 0.95)
    together = continued(CachedPasses(model, num_rows=4), rows_of(PROMPTS), 30, sampling)
    alone = [continued(CachedPasses(model, num_rows=1), [row], 30, sampling)[0] for row in rows_of(PROMPTS)]
    whole = continued(WholePasses(model), rows_of(PROMPTS), 30, sampling)
    assert together == alone == whole
    assert continued(WholePasses(model), rows_of(PROMPTS, seed=100), 30, sampling) != whole


@pytest.mark.parametrize("kind", ["cached", "whole"])
def test_a_row_that_is_done_stays_as_it_is(kind: str) -> None:
    model = small()
    passes = CachedPasses(model, num_rows=4) if kind == "cached" else WholePasses(model)
    rows = rows_of(PROMPTS)
    lengths = [4, 1, 12, 6]
    for number, tokens in enumerate(generate_rows(passes, rows, sampling=GREEDY), start=1):
        assert [token is None for token in tokens] == [number > length for length in lengths]
        for row, length in zip(rows, lengths, strict=True):
            row.is_done = number >= length
    assert [row.tokens for row in rows] == [
        by_hand(model, prompt, length) for prompt, length in zip(PROMPTS, lengths, strict=True)
    ]


def test_a_cache_serves_one_batch_after_the_other() -> None:
    model = small()
    passes = CachedPasses(model, num_rows=3)
    assert continued(passes, rows_of(PROMPTS[:3]), 6) == [by_hand(model, prompt, 6) for prompt in PROMPTS[:3]]
    assert continued(passes, rows_of(PROMPTS[3:]), 6) == [by_hand(model, prompt, 6) for prompt in PROMPTS[3:]]


@pytest.mark.parametrize("name", ["bigram", "head", "heads", "block"])
def test_the_rungs_below_go_without(name: Any) -> None:
    model = ladder.make_model(ModelConfig(kind=name, num_heads=4, width=32, vocab_size=50, context_len=8))
    init_weights(model, 1)
    rows = continued(WholePasses(model), rows_of(PROMPTS), 12)
    for prompt, row in zip(PROMPTS, rows, strict=True):
        assert row[: len(prompt)] == prompt and len(row) == len(prompt) + 12
        for end in range(len(prompt), len(row)):
            with torch.no_grad():
                assert row[end] == int(model(torch.tensor([row[max(0, end - 8) : end]]))[0, -1].argmax())


def test_a_model_made_ready_gives_the_same_numbers() -> None:
    tokens_BT, last_B = torch.tensor(PROMPTS[:1] * 3), torch.tensor([0, 1, 2])
    for dtype in (torch.float32, torch.bfloat16):
        other = dataclasses.replace(SMALL, vocab_multiple=1, logit_softcap=5.0, tie=False)
        for config in (SMALL, other):
            model = build_model(config, seed=1, compute_dtype=dtype)
            with torch.no_grad():
                before, before_last = model(tokens_BT), model.logits_at(tokens_BT, last_B)
                make_ready(model)
                assert torch.equal(model(tokens_BT), before)
                torch.testing.assert_close(model.logits_at(tokens_BT, last_B), before_last, rtol=0, atol=1e-6)
            assert {module.weight.dtype for module in model.modules() if isinstance(module, Linear)} == {dtype}
            assert model.transformer["wte"].weight.dtype == torch.float32


@pytest.mark.parametrize(
    "backend",
    ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)],  # half a minute of C++ compilation
)
def test_a_compiled_step_is_compiled_once_and_says_the_same(backend: str) -> None:
    """Rows of all lengths, fewer rows than there is room for, and past the context."""
    torch.compiler.reset()
    model = small(num_layers=1)
    make_ready(model)
    passes = CachedPasses(model, num_rows=4, keep=4, compile_backend=backend)
    first = rows_of(PROMPTS[:3])
    found = generate_rows(passes, first, sampling=GREEDY)
    next(found), next(found)  # a prefill, and the first token of the step
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(10):
            next(found)
        assert [row.tokens for row in first] == [by_hand(model, prompt, 12, keep=4) for prompt in PROMPTS[:3]]
        assert continued(passes, rows_of(PROMPTS), 12) == [by_hand(model, prompt, 12, keep=4) for prompt in PROMPTS]
