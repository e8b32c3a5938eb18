"""Logits with the KV cache equal those of the whole window, for each switch, alone and side by side."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import NAMED_SHAPES
from model.cost import count_cache_bytes
from model.generation.decoding import CachedPasses, Row
from model.generation.kv_cache import KVCache, Past
from model.gpt import GPT
from tests.unit.model.test_switches import ONE_BY_ONE, moved, named, some_tokens, switched

EOT = 3
FLEX: dict[str, Any] = {"attention": "flex", "eot_id": EOT}
SWITCHES = [{}, *ONE_BY_ONE, FLEX, FLEX | {"position_embedding": "rope", "value_residual": True}, {"eot_id": EOT}]
SWITCHES += [{"attention": "flex", "eot_id": None}, FLEX | {"window": 3}, {"window": 1}, {"window": 16}]
SWITCHES += [{"attention": kind, "eot_id": None, "window": 3} for kind in ("flex", "naive")]
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def tokens_with_documents(B: int) -> Tensor:
    tokens_BT = some_tokens(B)
    tokens_BT[0, [4, 5, 11]] = EOT
    return tokens_BT


def assert_follows(model: GPT, tokens_BT: Tensor, lengths: list[int]) -> None:
    """Begin rows with these lengths and append the rest one by one; compare with the logits of the whole rows."""
    whole_BTV = model(tokens_BT)
    passes = CachedPasses(model, num_rows=len(lengths))
    all_tokens = tokens_BT.tolist()
    rows = [Row(tokens[:length], torch.Generator()) for tokens, length in zip(all_tokens, lengths, strict=True)]
    while not all(row.is_done for row in rows):
        logits_BV = passes.next_logits(rows)
        for row, logits_V, tokens, whole_TV in zip(rows, logits_BV, all_tokens, whole_BTV, strict=True):
            if not row.is_done:
                length = len(row.tokens)
                torch.testing.assert_close(logits_V, whole_TV[length - 1], rtol=0, atol=1e-5)
                row.is_done = length == len(tokens)
                row.tokens = tokens[: length + 1]


@torch.no_grad()
@pytest.mark.parametrize("switches", SWITCHES, ids=named)
def test_cached_logits_equal_the_whole_windows(switches: dict[str, Any]) -> None:
    """A row alone from its first token on; rows that begin with more, with all and with one; a bare prefill."""
    model = moved(switched(**switches))
    assert_follows(model, tokens_with_documents(1), [1])
    assert_follows(model, tokens_with_documents(4), [7, 16, 1, 12])
    tokens_BT = tokens_with_documents(2)
    cache = KVCache(model.config, num_rows=3, dtype=torch.float32)
    past = Past(cache, torch.tensor([2, 0]), torch.arange(16).expand(2, 16))
    logits_BTV = model.logits(model.hidden_states(tokens_BT, past))
    torch.testing.assert_close(logits_BTV, model(tokens_BT), rtol=0, atol=1e-5)
    assert all(keys[0].any() and keys[2].any() and not keys[1].any() for keys in cache.keys)


@torch.no_grad()
def test_a_bfloat16_model_has_a_bfloat16_cache() -> None:
    model = moved(switched())
    model.compute_dtype = torch.bfloat16
    passes = CachedPasses(model, num_rows=1)
    assert {tensor.dtype for tensor in passes.cache.keys + passes.cache.values} == {torch.bfloat16}
    tokens = some_tokens(1)[0].tolist()
    row = Row(tokens[:4], torch.Generator())
    for token in tokens[4:]:
        logits_V = passes.next_logits([row])[0]
        whole_V = model(torch.tensor([row.tokens]))[0, -1]
        assert (logits_V - whole_V).abs().max() < 0.02 * whole_V.abs().max()
        row.tokens.append(token)


def test_the_cost_account_has_the_caches_bytes() -> None:
    for name, dtype in (("gpt2-small", torch.float32), ("tinystories", torch.bfloat16)):
        config = dataclasses.replace(NAMED_SHAPES[name], context_len=64)
        cache = KVCache(config, num_rows=3, dtype=dtype, device="meta")
        num_bytes = sum(tensor.nbytes for tensor in cache.keys + cache.values)
        assert num_bytes == 3 * 64 * count_cache_bytes(config, dtype.itemsize)
