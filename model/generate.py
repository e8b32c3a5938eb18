"""Generate text with a trained model.

    python model/generate.py runs/NAME --prompt "The " --temperature 0.8 --top-k 50 --num-samples 3 --seed 1
    python model/generate.py runs/NAME --prompts-file prompts.jsonl --top-p 0.9 --stop "." > texts.jsonl
    echo '"The "' | python model/generate.py runs/NAME --prompts-file -

The text of one prompt streams. A file of prompts has a JSON string or {"prompt": "..."} on each line; the output is
JSON lines in the same order: prompt, sample (from 1), text, tokens, stopped_by (eot, stop or max_tokens).

Past the context a token costs a whole pass (see --keep). 1,000 characters of a model of the quickstart's shape take
5.4 s on 2 CPU cores, or 2.6 s with --keep 64, after some seconds of start-up. benchmarks/bench_generate.py compares the
cost of a token with transformers and with the memory's bandwidth.
"""

import functools
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from common.byte_order import HEAD_BYTES, left_out, mark_bytes
from common.compile_cache import take_compile_cache
from common.errors import InputError, first_line, one_line_errors, reading_from, warn
from common.flags import POSITIONAL, mark_for_tyro
from common.reading import parse_json
from common.seeds import as_32_bits, seed_fault
from data_prep.tokenizer import Tokenizer
from model.base import LanguageModel
from model.checkpoint import check_device, load_model
from model.generation.decoding import CachedPasses, Passes, Row, WholePasses, generate_rows, make_ready
from model.generation.sampling import Sampling
from model.generation.text_stream import Continuation
from model.gpt import GPT

LONGEST_LINE = 2**24  # of prompts, in bytes
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Options:
    """Generate text with a trained model."""

    path: Annotated[str, POSITIONAL]
    """RUN directory, RUN@STEP, path of a checkpoint, or Hugging Face folder of a GPT-2."""
    prompt: str = ""
    """Text to continue. Empty: begin a new document."""
    prompts_file: str | None = None
    """File with a prompt on each line, as JSON; - is standard input. The output is JSON lines, too."""
    num_samples: int = 1
    """Number of continuations of each prompt."""
    max_tokens: int = 200
    """Most tokens of a continuation."""
    temperature: float = 0.8
    """Number that divides the logits. 0: always take the likeliest token."""
    top_k: int | None = 50
    """Draw among the k likeliest tokens only. None: among all tokens."""
    top_p: float | None = None
    """Draw among the fewest of these tokens whose probability reaches p (the nucleus). None: no such limit."""
    min_p: float | None = None
    """Draw among tokens at least p times as likely as the likeliest one. None: no such limit."""
    stop: tuple[str, ...] = ()
    """Stop strings. The text ends before the first one that appears."""
    seed: int = 1
    """Seed of the random numbers. Sample i of prompt n depends on neither --num-samples nor --batch-size (but for
    rounding)."""
    batch_size: int = 8
    """Number of continuations computed together."""
    keep: int | None = None
    """Tokens to keep when the context is full. None: all but the oldest, so that each further token costs a whole pass.
    Half a context is far faster; the model then sees between half of the context and all of it."""
    cache: bool = True
    """Cache keys and values. Without the cache each token costs a whole pass."""
    compile: bool = False
    """Compile the one-token step: faster tokens after half a minute or more of start-up."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Number format of the matrix products and of the cached keys and values."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Device to run on: cpu, cuda, cuda:1, ..."""


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return the tokens of a document that begins with the prompt: EOT if there is one, then the prompt.

    If that is nothing, return a line break, since a model needs at least one token.
    """
    begin = [] if tokenizer.eot_id is None else [tokenizer.eot_id]
    tokens = begin + [int(index) for index in tokenizer.encode(prompt)]
    return tokens or [int(index) for index in tokenizer.encode("\n")]


def sample_generator(seed: int, index: int, prompt_index: int = 0) -> torch.Generator:
    """Return the generator of sample `index` of a prompt, which depends on no other sample."""
    # The golden ratio spreads prompts over the 32 bits (Knuth, TAOCP 3, section 6.4).
    return torch.Generator().manual_seed(as_32_bits(seed) * 1_000_003 + index + prompt_index * 2_654_435_761 % 2**32)


@dataclass(frozen=True)
class Job:
    """One continuation of a prompt; `sample` counts from 0."""

    prompt: str
    sample: int
    row: Row
    continuation: Continuation


def make_jobs(prompts: Iterable[tuple[str, str]], tokenizer: Tokenizer, options: Options) -> Iterator[Job]:
    """Yield `num_samples` jobs for each (name of the prompt's origin, prompt)."""
    for prompt_index, (origin, prompt) in enumerate(prompts):
        try:
            tokens = encode_prompt(tokenizer, prompt)
        except InputError as error:
            raise InputError(f"{origin} {prompt!r}: {error}") from error
        for sample in range(options.num_samples):
            row = Row(list(tokens), sample_generator(options.seed, sample, prompt_index))
            continuation = Continuation(tokenizer, max_tokens=options.max_tokens, stop_strings=options.stop)
            yield Job(prompt, sample, row, continuation)


def read_prompts(name: str) -> Iterator[tuple[str, str]]:
    """Yield (file and line number, prompt) of each line that is not blank, as soon as the line is there."""
    with (
        reading_from(f"--prompts-file {name}"),
        nullcontext(sys.stdin.buffer) if name == "-" else Path(name).open("rb") as file,
    ):
        lines = iter(functools.partial(file.readline, LONGEST_LINE + 1), b"")
        for number, line in enumerate(lines, start=1):
            if len(line) > LONGEST_LINE:
                raise InputError(f"--prompts-file {name}:{number}: a line of more than {LONGEST_LINE:,} bytes")
            if number == 1 and (mark := mark_bytes(line[:HEAD_BYTES], name, flag="--prompts-file")):
                warn("generate", left_out(f"--prompts-file {name}"))
                line = line[mark:]
            if not line.strip():
                continue
            try:
                content = parse_json(line)
            except ValueError as error:
                raise InputError(f"--prompts-file {name}:{number}: no JSON: {first_line(error)}") from error
            prompt = content["prompt"] if isinstance(content, dict) and list(content) == ["prompt"] else content
            if not isinstance(prompt, str):
                raise InputError(f'--prompts-file {name}:{number}: give a JSON string, or {{"prompt": "..."}} alone')
            yield f"--prompts-file {name}:{number}:", prompt


def generate_batches(passes: Passes, jobs: Iterator[Job], options: Options, sampling: Sampling) -> Iterator[list[Job]]:
    """Run the jobs in batches. Yield a batch after each round of tokens, until all its jobs are done."""
    while batch := list(itertools.islice(jobs, options.batch_size)):
        for tokens in generate_rows(passes, [job.row for job in batch], sampling=sampling):
            for job, token in zip(batch, tokens, strict=True):
                if token is not None:
                    job.continuation.add(token)
                    job.row.is_done = job.continuation.stopped_by is not None
            yield batch


def print_text(batches: Iterable[list[Job]], num_samples: int) -> None:
    """Print the samples one after the other, each as it grows. Later samples of a batch wait for earlier ones."""
    sample, num_printed = 0, None  # the sample that streams; how many of its characters are out
    for batch in batches:
        for job in batch[sample - batch[0].sample :]:
            if num_printed is None:
                heading = f"--- sample {sample + 1}\n" if num_samples > 1 else ""
                print(heading + job.prompt, end="")
            print(job.continuation.text[num_printed or 0 :], end="", flush=True)
            num_printed = len(job.continuation.text)
            if not job.row.is_done:
                break
            print()
            sample, num_printed = sample + 1, None


def print_json(batches: Iterable[list[Job]]) -> None:
    """Print a JSON line for each job when its batch is done."""
    for batch in batches:
        if all(job.row.is_done for job in batch):
            for job in batch:
                line = {
                    "prompt": job.prompt,
                    "sample": job.sample + 1,
                    "text": job.continuation.text,
                    "tokens": job.continuation.tokens,
                    "stopped_by": job.continuation.stopped_by,
                }
                print(json.dumps(line), flush=True)


def check_options(options: Options) -> Sampling:
    """Return the settings of sampling. Raise InputError for flags that are out of range or contradict others."""
    for flag in ("num_samples", "max_tokens", "batch_size"):
        if getattr(options, flag) < 1:
            raise InputError(f"--{flag.replace('_', '-')} {getattr(options, flag)} must be at least 1")
    if (fault := seed_fault(options.seed)) is not None:
        raise InputError(fault)
    if "" in options.stop:
        raise InputError("--stop '' must not be empty, since every text contains the empty string")
    if options.prompt and options.prompts_file is not None:
        raise InputError("--prompt and --prompts-file: give one of them")
    check_device(options.device)
    return Sampling(options.temperature, options.top_k, options.top_p, options.min_p)


def make_passes(model: LanguageModel, options: Options) -> Passes:
    """Return passes with a KV cache if the model and --no-cache allow it, else whole passes."""
    context_len, kind = model.config.context_len, model.config.kind
    if options.keep is not None and not 1 <= options.keep <= context_len:
        raise InputError(f"--keep {options.keep} must be at least 1 and at most the model's context, {context_len}")
    num_rows = options.batch_size if options.prompts_file else min(options.batch_size, options.num_samples)
    if isinstance(model, GPT) and options.cache:
        backend = "inductor" if options.compile else None
        return CachedPasses(model, num_rows=num_rows, keep=options.keep, compile_backend=backend)
    if options.compile:
        reason = f"--model.kind {kind} has no cache" if options.cache else "not with --no-cache"
        raise InputError(f"--compile compiles the step of one token after a cache: {reason}")
    return WholePasses(model, keep=options.keep)


def main(args: list[str] | None = None) -> None:
    """Print continuations of the command line's prompts."""
    import tyro  # here, because every run samples with this module

    with one_line_errors("generate"):
        mark_for_tyro(Options)
        options = tyro.cli(Options, args=args, description=__doc__)
        sampling = check_options(options)
        if options.compile:
            take_compile_cache()
        trained = load_model(options.path, device=options.device, dtype=DTYPES[options.dtype])
        passes = make_passes(trained.model, options)
        make_ready(trained.model)
        prompts = [("--prompt", options.prompt)] if options.prompts_file is None else read_prompts(options.prompts_file)
        jobs = make_jobs(prompts, trained.tokenizer, options)
        batches = generate_batches(passes, jobs, options, sampling)
        if options.prompts_file is None:
            print_text(batches, options.num_samples)
        else:
            print_json(batches)


if __name__ == "__main__":
    main()
