"""From logits to the next token: temperature and top-k, padding excluded, one generator per sample."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from data_prep.errors import InputError
from model.gpt import GPT


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


@torch.inference_mode()
def generate_tokens(
    model: GPT,
    prompt: list[int],
    *,
    sampling: Sampling,
    generator: torch.Generator,
    stop_id: int | None = None,
) -> Iterator[int]:
    """Tokens after `prompt` without end, or up to `stop_id`; the model sees the last context_len of them.

    Every call of the model has the same shape (the context, padded on the right, where causality hides the
    padding), so that a compiled model is not compiled again for each length.
    """
    context_len = model.config.context_len
    device = next(model.parameters()).device
    tokens = list(prompt)
    while True:
        context = tokens[-context_len:]
        padded = torch.zeros(1, context_len, dtype=torch.int64)
        padded[0, : len(context)] = torch.tensor(context)
        logits_V = model(padded.to(device))[0, len(context) - 1].cpu()
        probabilities = next_token_probabilities(logits_V, sampling, model.config.vocab_size)
        token = int(torch.multinomial(probabilities, 1, generator=generator))
        if token == stop_id:
            return
        tokens.append(token)
        yield token
