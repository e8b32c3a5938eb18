"""What the model says to fixed prompts as it learns, with the same random numbers every time."""

from collections.abc import Callable
from dataclasses import dataclass

from data_prep.codec import Codec
from data_prep.errors import InputError
from model.generate import encode_prompt, sample_generator
from model.gpt import GPT
from model.sampling import Sampling, generate_rows
from train.config import SampleConfig


@dataclass(frozen=True)
class Sample:
    """One continuation: bytes that are no whole character are U+FFFD."""

    prompt: str
    text: str


class Sampler:
    """Continues --sample.prompts together. InputError if the tokenizer cannot encode one of them.

    `num_rows` None: as many as there are prompts; else the rows of the model's every call (see generate_rows).
    """

    def __init__(self, config: SampleConfig, codec: Codec, *, seed: int, num_rows: int | None) -> None:
        self._config = config
        self._codec = codec
        self._seed = seed
        self._num_rows = num_rows
        self._prompts = [self._encoded(prompt) for prompt in config.prompts]

    def _encoded(self, prompt: str) -> list[int]:
        try:
            return encode_prompt(self._codec, prompt)
        except InputError as error:
            raise InputError(f"--sample.prompts {prompt!r}: {error}") from error

    def draw(self, model: GPT, is_stopped: Callable[[], bool]) -> list[Sample] | None:
        """A sample for each prompt; None if `is_stopped`, asked at each token, says so. The model must not be sharded,
        or every rank must draw."""
        model.eval()
        ends: list[list[int]] = []
        size = self._num_rows or len(self._prompts)
        for start in range(0, len(self._prompts), size):
            prompts = self._prompts[start : start + size]
            rows = generate_rows(
                model,
                prompts,
                sampling=Sampling(),
                generators=[sample_generator(self._seed, start + index) for index in range(len(prompts))],
                stop_id=self._codec.eot_id,
                num_rows=self._num_rows,
            )
            drawn: list[list[int]] = [[] for _ in prompts]
            nothing: list[int | None] = [None] * len(prompts)  # when all have ended
            for _ in range(self._config.tokens):  # asked as often on every rank, whatever each has drawn
                if is_stopped():
                    model.train()
                    return None
                for end, token in zip(drawn, next(rows, nothing), strict=True):
                    end += [] if token is None else [token]
            ends += drawn
        model.train()
        return [
            Sample(prompt, self._codec.decode_bytes(end).decode("utf-8", errors="replace"))
            for prompt, end in zip(self._config.prompts, ends, strict=True)
        ]
