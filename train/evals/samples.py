"""Samples: continuations of fixed prompts as the model learns, with the same random numbers every time."""

from collections.abc import Callable
from dataclasses import dataclass

from common.errors import InputError
from data_prep.tokenizer import Tokenizer
from model.generate import encode_prompt, sample_generator
from model.generation.decoding import Row, WholePasses, generate_rows
from model.generation.sampling import Sampling
from train.config import SampleConfig
from train.losses import LossModel


@dataclass(frozen=True)
class Sample:
    """A prompt and its continuation, with U+FFFD for bytes that are no whole character."""

    prompt: str
    text: str


class Sampler:
    """The sampler of --sample.prompts. Raises InputError if the tokenizer cannot encode a prompt.

    `num_rows` is the batch size of every forward pass (see WholePasses); None: the number of prompts.
    """

    def __init__(self, config: SampleConfig, tokenizer: Tokenizer, *, seed: int, num_rows: int | None) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._seed = seed
        self._num_rows = num_rows
        self._prompts = [self._encoded(prompt) for prompt in config.prompts]

    def _encoded(self, prompt: str) -> list[int]:
        try:
            return encode_prompt(self._tokenizer, prompt)
        except InputError as error:
            raise InputError(f"--sample.prompts {prompt!r}: {error}") from error

    def draw(self, loss_model: LossModel, is_stopped: Callable[[], bool]) -> list[Sample] | None:
        """Return a sample for each prompt, or None if `is_stopped` returns True at some token. Collective.

        All ranks must call the model and `is_stopped` equally often, whatever they draw. So tokens after an end of
        text are drawn too, and cut off.
        """
        loss_model.eval()
        continuations: list[list[int]] = []
        size = self._num_rows or len(self._prompts)
        for start in range(0, len(self._prompts), size):
            prompts = self._prompts[start : start + size]
            passes = WholePasses(loss_model, num_rows=self._num_rows or len(prompts))
            rows = [Row(list(prompt), sample_generator(self._seed, start + i)) for i, prompt in enumerate(prompts)]
            tokens_by_step = generate_rows(passes, rows, sampling=Sampling())
            batch: list[list[int]] = [[] for _ in prompts]
            for _ in range(self._config.tokens):
                if is_stopped():
                    loss_model.train()
                    return None
                for tokens, token in zip(batch, next(tokens_by_step), strict=True):
                    assert token is not None, "no row is marked as done"
                    tokens.append(token)
            continuations += batch
        loss_model.train()
        return [
            Sample(prompt, self._tokenizer.decode_bytes(self._until_end(tokens)).decode("utf-8", errors="replace"))
            for prompt, tokens in zip(self._config.prompts, continuations, strict=True)
        ]

    def _until_end(self, tokens: list[int]) -> list[int]:
        return tokens[: tokens.index(self._tokenizer.eot_id)] if self._tokenizer.eot_id in tokens else tokens
