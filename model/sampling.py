"""From logits to the next token: temperature and top-k, padding excluded, one generator per sample."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from data_prep.errors import InputError
from model.config import ModelConfig


class Predictor(Protocol):
    """What sampling needs of a model: a GPT, or what stands around one that is spread over processes."""

    @property
    def config(self) -> ModelConfig: ...

    def logits_at(self, tokens_BT: Tensor, places_B: Tensor) -> Tensor: ...

    def parameters(self) -> Iterator[Parameter]: ...


@dataclass(frozen=True)
class Sampling:
    """How to choose. temperature 0 is greedy; top_k None keeps every token."""

    temperature: float = 0.8
    top_k: int | None = 50

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise InputError(f"--temperature {self.temperature} must not be negative (0 is greedy)")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"--top-k {self.top_k} must be at least 1")


def next_token_probabilities(logits_V: Tensor, sampling: Sampling, vocab_size: int) -> Tensor:
    """Logits of one position -> probabilities fp32 [vocab_size]; padding columns are cut off.

    Greedy puts all on the largest logit. top_k keeps the k largest, ties by the lower id.
    """
    logits_V = logits_V[:vocab_size].float()
    if sampling.temperature == 0:
        return torch.nn.functional.one_hot(logits_V.argmax(), vocab_size).float()
    logits_V = logits_V / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < vocab_size:
        dropped = logits_V.sort(descending=True, stable=True).indices[sampling.top_k :]
        logits_V = logits_V.index_fill(0, dropped, -torch.inf)
    return logits_V.softmax(dim=0)


@torch.no_grad()
def generate_rows(
    model: Predictor,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    stop_id: int | None = None,
    num_rows: int | None = None,
) -> Iterator[list[int | None]]:
    """The next token of every prompt, again and again; None for one that has met `stop_id`. Ends when all have.

    The model sees the last context_len tokens of each. Every call of it has the same shape, [num_rows or
    len(prompts), context_len], padded on the right, where causality hides the padding: a compiled model is not
    compiled again for each length, nor for sampling at all if `num_rows` is a batch size that it knows.
    """
    context_len = model.config.context_len
    device = next(model.parameters()).device
    rows = [list(prompt) for prompt in prompts]
    is_done = [False] * len(rows)
    while True:
        padded = torch.zeros(num_rows or len(rows), context_len, dtype=torch.int64)
        places = torch.zeros(len(padded), dtype=torch.int64)
        for index, row in enumerate(rows):
            context = row[-context_len:]
            padded[index, : len(context)] = torch.tensor(context)
            places[index] = len(context) - 1
        logits_BV = model.logits_at(padded.to(device), places.to(device)).cpu()
        tokens: list[int | None] = []
        for index, row in enumerate(rows):
            probabilities = next_token_probabilities(logits_BV[index], sampling, model.config.vocab_size)
            token = int(torch.multinomial(probabilities, 1, generator=generators[index]))
            is_done[index] |= token == stop_id
            row.append(token)
            tokens.append(None if is_done[index] else token)
        if all(is_done):
            return
        yield tokens


def generate_tokens(
    model: Predictor,
    prompt: Sequence[int],
    *,
    sampling: Sampling,
    generator: torch.Generator,
    stop_id: int | None = None,
) -> Iterator[int]:
    """Tokens after `prompt` without end, or up to `stop_id`."""
    for (token,) in generate_rows(model, [prompt], sampling=sampling, generators=[generator], stop_id=stop_id):
        assert token is not None
        yield token
