"""Let a trained model speak.

    python model/generate.py runs/NAME --prompt "The " --temperature 0.8 --top-k 50 --num-samples 3 --seed 1

Streams as it samples: 1,000 characters of the quickstart's model take 5 s on 2 CPU cores, start-up included. Each
token is one pass over the whole context (there is no cache yet).
"""

import codecs
import itertools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import tyro

from data_prep.codec import Codec
from data_prep.errors import InputError, one_line_errors
from model.sampling import Sampling, generate_tokens
from model.trained import load_trained


@dataclass(frozen=True)
class Options:
    """Let a trained model speak."""

    path: Annotated[str, tyro.conf.Positional]
    """RUN directory, RUN@STEP, the path of one checkpoint, or a Hugging Face folder of GPT-2's."""
    prompt: str = ""
    """What to continue; empty: a new document."""
    num_samples: int = 1
    """Continuations, each from the same prompt."""
    max_tokens: int = 200
    """Longest continuation."""
    temperature: float = 0.8
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int | None = 50
    """Choose among the k likeliest tokens; None: among all."""
    seed: int = 1
    """Sample i of a seed is the same however many are asked for."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to run."""


def encode_prompt(codec: Codec, prompt: str) -> list[int]:
    """A document so far: EOT (where there is one), then the prompt; a line break where that would be nothing."""
    begin = [] if codec.eot_id is None else [codec.eot_id]
    tokens = begin + [int(index) for index in codec.encode(prompt)]
    return tokens or [int(index) for index in codec.encode("\n")]


def stream_text(codec: Codec, tokens: Iterable[int]) -> Iterator[str]:
    """Text as soon as its bytes are whole characters; broken ones become U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        yield decoder.decode(codec.decode_bytes([token]))
    yield decoder.decode(b"", final=True)


def sample_generator(seed: int, index: int) -> torch.Generator:
    """The random numbers of sample `index`, whatever other samples are drawn."""
    return torch.Generator().manual_seed(seed * 1_000_003 + index)


def main(args: list[str] | None = None) -> None:
    with one_line_errors("generate"):
        options = tyro.cli(Options, args=args, description=__doc__)
        for flag, value in (("--num-samples", options.num_samples), ("--max-tokens", options.max_tokens)):
            if value < 1:
                raise InputError(f"{flag} {value} must be at least 1")
        if options.device.startswith("cuda") and not torch.cuda.is_available():
            raise InputError(f"--device {options.device}: torch {torch.__version__} sees no GPU here; use --device cpu")
        sampling = Sampling(options.temperature, options.top_k)
        trained = load_trained(options.path, device=options.device)
        try:
            prompt = encode_prompt(trained.codec, options.prompt)
        except InputError as error:
            raise InputError(f"--prompt {options.prompt!r}: {error}") from error
        for index in range(options.num_samples):
            if options.num_samples > 1:
                print(f"--- sample {index + 1}")
            tokens = generate_tokens(
                trained.model,
                prompt,
                sampling=sampling,
                generator=sample_generator(options.seed, index),
                stop_id=trained.codec.eot_id,
            )
            print(options.prompt, end="", flush=True)
            for piece in stream_text(trained.codec, itertools.islice(tokens, options.max_tokens)):
                print(piece, end="", flush=True)
            print()


if __name__ == "__main__":
    main()
