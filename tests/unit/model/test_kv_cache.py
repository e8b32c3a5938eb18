"""What the cache gives is what the whole window gives, for each switch of the model, alone and side by side."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import NAMED_SHAPES, ModelConfig
from model.cost import count_cache_bytes
from model.generation.decoding import CachedPasses, Row
from model.generation.kv_cache import KVCache, Past
from model.gpt import GPT
from tests.unit.model.test_switches import ONE_BY_ONE, moved, named, some_tokens, switched

EOT = 3
FLEX: dict[str, Any] = {"attention": "flex", "eot_id": EOT}
SWITCHES = [{}, *ONE_BY_ONE, FLEX, FLEX | {"position_embedding": "rope", "value_residual": True}, {"attention": "flex"}]
every_switch = pytest.mark.parametrize("switches", SWITCHES, ids=named)
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def tokens_with_documents(B: int) -> Tensor:
    tokens_BT = some_tokens(B)
    tokens_BT[0, [4, 5, 11]] = EOT
    return tokens_BT


def a_row(tokens: list[int]) -> Row:
    return Row(tokens, torch.Generator())


def assert_follows(model: GPT, tokens_BT: Tensor, lengths: list[int]) -> None:
    """Rows that begin with so many tokens, then get their others one by one, have the logits of the whole rows."""
    with torch.no_grad():
        whole_BTV = model(tokens_BT)
        passes = CachedPasses(model, num_rows=len(lengths))
        rows = [a_row(tokens[:length]) for tokens, length in zip(tokens_BT.tolist(), lengths, strict=True)]
        T = tokens_BT.shape[1]
        while not all(row.is_done for row in rows):
            found_BV = passes.next_logits(rows)
            for row, found_V, tokens, whole_TV in zip(rows, found_BV, tokens_BT.tolist(), whole_BTV, strict=True):
                if not row.is_done:
                    length = len(row.tokens)
                    torch.testing.assert_close(found_V, whole_TV[length - 1], rtol=0, atol=1e-5)
                    row.is_done = length == T
                    row.tokens = tokens[: length + 1]


@every_switch
def test_cached_logits_are_the_whole_windows_at_every_position(switches: dict[str, Any]) -> None:
    """Alone from the first token on, and side by side with others that began with more, with all, and with one."""
    model = moved(switched(**switches))
    assert_follows(model, tokens_with_documents(1), [1])
    assert_follows(model, tokens_with_documents(4), [7, 16, 1, 12])


@torch.no_grad()
@every_switch
def test_a_prefill_gives_every_positions_logits(switches: dict[str, Any]) -> None:
    model = moved(switched(**switches))
    tokens_BT = tokens_with_documents(2)
    cache = KVCache(model.config, num_rows=3, dtype=torch.float32)
    past = Past(cache, torch.tensor([2, 0]), torch.arange(16).expand(2, 16))
    found_BTV = model.logits(model.hidden_states(tokens_BT, past))
    torch.testing.assert_close(found_BTV, model(tokens_BT), rtol=0, atol=1e-5)
    assert all(keys[0].any() and keys[2].any() and not keys[1].any() for keys in cache.keys)


@torch.no_grad()
def test_tokens_can_come_several_at_a_time() -> None:
    model = moved(switched(**FLEX))
    tokens_BT = tokens_with_documents(2)
    cache = KVCache(model.config, num_rows=2, dtype=torch.float32)
    found = []
    for begin, end in ((0, 5), (5, 12), (12, 16)):
        positions_BT = torch.arange(begin, end).expand(2, -1)
        past = Past(cache, torch.arange(2), positions_BT, num_slots=end)
        found.append(model.logits(model.hidden_states(tokens_BT[:, begin:end], past)))
    torch.testing.assert_close(torch.cat(found, dim=1), model(tokens_BT), rtol=0, atol=1e-5)


@torch.no_grad()
def test_bfloat16_is_kept_as_bfloat16() -> None:
    model = moved(switched())
    model.compute_dtype = torch.bfloat16
    passes = CachedPasses(model, num_rows=1)
    assert {tensor.dtype for tensor in passes.cache.keys + passes.cache.values} == {torch.bfloat16}
    row = a_row(some_tokens(1)[0].tolist())
    row.tokens, rest = row.tokens[:4], row.tokens[4:]
    for token in rest:
        found_V = passes.next_logits([row])[0]
        whole_V = model(torch.tensor([row.tokens]))[0, -1]
        assert (found_V - whole_V).abs().max() < 0.02 * whole_V.abs().max()
        row.tokens.append(token)


@pytest.mark.parametrize("name", ["gpt2-small", "tinystories"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_budget_counts_its_bytes(name: str, dtype: torch.dtype) -> None:
    config = dataclasses.replace(NAMED_SHAPES[name], context_len=64)
    cache = KVCache(config, num_rows=3, dtype=dtype, device="meta")
    assert cache.num_bytes == 3 * 64 * count_cache_bytes(config, dtype.itemsize)


def test_documents_are_told_apart_only_where_attention_does() -> None:
    def keeps_tokens(config: ModelConfig) -> bool:
        return KVCache(config, num_rows=1, dtype=torch.float32).tokens is not None

    assert keeps_tokens(switched(**FLEX))
    assert not keeps_tokens(switched(eot_id=EOT)) and not keeps_tokens(switched(attention="flex", eot_id=None))
