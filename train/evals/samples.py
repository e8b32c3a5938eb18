"""What the model says to fixed prompts as it learns, with the same random numbers every time."""

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
    """One continuation: bytes that are no whole character are U+FFFD."""

    prompt: str
    text: str


class Sampler:
    """Continues --sample.prompts together. InputError if the tokenizer cannot encode one of them.

    `num_rows` None: as many as there are prompts; else the rows of the model's every call (see WholePasses).
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
        """A sample for each prompt; None if `is_stopped`, asked at each token, says so. Every rank must draw: it calls
        the model and asks equally often, whatever is drawn, so tokens after an end are drawn too, and cut off."""
        loss_model.eval()
        ends: list[list[int]] = []
        size = self._num_rows or len(self._prompts)
        for start in range(0, len(self._prompts), size):
            prompts = self._prompts[start : start + size]
            passes = WholePasses(loss_model, num_rows=self._num_rows or len(prompts))
            rows = [Row(list(prompt), sample_generator(self._seed, start + i)) for i, prompt in enumerate(prompts)]
            tokens_by_step = generate_rows(passes, rows, sampling=Sampling())
            drawn: list[list[int]] = [[] for _ in prompts]
            for _ in range(self._config.tokens):
                if is_stopped():
                    loss_model.train()
                    return None
                for end, token in zip(drawn, next(tokens_by_step), strict=True):
                    assert token is not None, "no row was said to be done"
                    end.append(token)
            ends += drawn
        loss_model.train()
        return [
            Sample(prompt, self._tokenizer.decode_bytes(self._until_end(end)).decode("utf-8", errors="replace"))
            for prompt, end in zip(self._config.prompts, ends, strict=True)
        ]

    def _until_end(self, tokens: list[int]) -> list[int]:
        return tokens[: tokens.index(self._tokenizer.eot_id)] if self._tokenizer.eot_id in tokens else tokens
