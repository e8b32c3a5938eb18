"""Compiled models compute what they compute in eager mode: logits, gradients, loss, documents, generated tokens."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from model.generation.decoding import CachedPasses, generate_rows, make_ready
from model.gpt import GPT, build_model
from tests.unit.model.test_decoding import GREEDY, PROMPTS, continued, likeliest, rows_of, small
from tests.unit.model.test_switches import MODERN, RECIPE, in_own_documents, moved, some_tokens, switched
from train.losses import LossModel

ANOTHER = {"norm": "rmsnorm", "norm_place": "post", "mlp": "relu2", "attention": "naive"}
# Inductor compiles C++ for half a minute to one and a half.
every_backend = pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])


def compile_in_parts(model: GPT, backend: Any = "inductor") -> GPT:
    torch.compiler.reset()
    for part in model.compiled_parts:
        part.forward = torch.compile(part.forward, dynamic=False, backend=backend)
    return model


def logits_and_gradient(model: GPT) -> tuple[Tensor, Tensor]:
    logits_BTV = model(some_tokens())
    logits_BTV.float().square().sum().backward()
    gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    return logits_BTV.detach().float(), torch.cat(gradients)


@every_backend
@pytest.mark.parametrize(
    ("switches", "dtype"),
    [
        (MODERN, torch.float32),
        (RECIPE, torch.float32),
        (ANOTHER, torch.bfloat16),
        ({"window": 5}, torch.float32),
    ],
    ids=["modern", "recipe", "another", "window"],
)
def test_compiled_equals_eager(switches: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    eager, compiled = (moved(switched(**switches), compute_dtype=dtype) for _ in range(2))
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    compile_in_parts(compiled, backend)
    for expected, value in zip(logits_and_gradient(eager), logits_and_gradient(compiled), strict=True):
        assert (expected - value).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("has_gradients", [True, False])
@pytest.mark.parametrize(
    ("switches", "num_kinds"),
    [
        ({}, 1),
        ({"embedding_shortcut": True}, 1),
        ({"skips": True}, 2),
        ({"value_embeddings": 2}, 2),
        ({"value_embeddings": 3, "embedding_shortcut": True, "skips": True}, 2),
        (RECIPE | {"value_embeddings": 2}, 5),
    ],
    ids=["gpt2", "shortcut", "skips", "value embeddings", "all alike", "recipe"],
)
def test_blocks_that_are_alike_share_a_graph(switches: dict[str, Any], num_kinds: int, has_gradients: bool) -> None:
    """Also where a block gets its input once more, as the embedding or as the output of the block before."""
    counter = CompileCounterWithBackend("eager")
    model = compile_in_parts(build_model(switched(num_layers=6, **switches), seed=1), counter)
    with torch.set_grad_enabled(has_gradients):
        model.hidden_states(some_tokens())
    assert counter.frame_count == num_kinds + 1  # and the norms


@torch.no_grad()
@pytest.mark.slow
def test_compiled_flex_attention_stays_within_documents() -> None:
    """This takes a minute of C++ compilation."""
    tokens_BT = some_tokens(3)
    tokens_BT[0, [4, 5, 11]] = 3
    model = build_model(switched(position_embedding="rope", attention="flex", eot_id=3), seed=1)
    logits_BTV = compile_in_parts(model)(tokens_BT)
    torch.testing.assert_close(logits_BTV, in_own_documents(tokens_BT, 3), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["tanh", "rsqrt"])
@pytest.mark.parametrize("chunk_tokens", [None, 1024])
def test_a_compiled_loss_has_the_softcap(chunk_tokens: int | None, form: str) -> None:
    torch.compiler.reset()
    model = moved(switched(logit_softcap=2.0, softcap_form=form))
    inputs_BT, targets_BT = some_tokens(), some_tokens().roll(1, dims=1)
    losses, gradients = [], []
    for compiled in (False, True):
        loss = LossModel(model, chunk_tokens=chunk_tokens, compiled=compiled)(inputs_BT, targets_BT, torch.ones(()))[0]
        losses.append(loss)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@every_backend
def test_the_one_token_step_is_compiled_once_and_gives_the_same_tokens(backend: str) -> None:
    """Rows have all lengths, there are fewer than the cache has room for, and they pass the context."""
    torch.compiler.reset()
    model = small(num_layers=1)
    make_ready(model)
    passes = CachedPasses(model, num_rows=4, keep=4, compile_backend=backend)
    first = rows_of(PROMPTS[:3])
    rounds = generate_rows(passes, first, sampling=GREEDY)
    next(rounds), next(rounds)  # a prefill, and the first run of the step
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(10):
            next(rounds)
        assert [row.tokens for row in first] == [likeliest(model, prompt, 12, keep=4) for prompt in PROMPTS[:3]]
        assert continued(passes, rows_of(PROMPTS), 12) == [likeliest(model, prompt, 12, keep=4) for prompt in PROMPTS]
