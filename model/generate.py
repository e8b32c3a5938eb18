"""Let a trained model speak.

    python model/generate.py runs/NAME --prompt "The " --temperature 0.8 --top-k 50 --num-samples 3 --seed 1
    python model/generate.py runs/NAME --prompts-file prompts.jsonl --top-p 0.9 --stop "." > said.jsonl
    echo '"The "' | python model/generate.py runs/NAME --prompts-file -

A prompt streams as it is continued. A file of prompts, a JSON string or {"prompt": "..."} on each line, comes back as
JSON lines, in its order: prompt, sample (from 1), text, tokens, stopped_by (eot, stop or max_tokens).

Past the context a token costs a whole pass, see --keep: 1,000 characters of a model of the quickstart's shape take
5.4 s on 2 CPU cores, with --keep 64 2.6 s, and start-up some seconds. What a token costs against transformers and
against the memory's bandwidth: benchmarks/bench_generate.py.
"""

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
import tyro

from common.errors import InputError, first_line, one_line_errors, reading_from
from data_prep.tokenizer import Tokenizer
from model.base import LanguageModel
from model.checkpoint import check_device, load_model
from model.generation.decoding import CachedPasses, Passes, Row, WholePasses, generate_rows, make_ready
from model.generation.sampling import Sampling
from model.generation.text_stream import Continuation
from model.gpt import GPT

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Options:
    """Let a trained model speak."""

    path: Annotated[str, tyro.conf.Positional]
    """RUN directory, RUN@STEP, the path of one checkpoint, or a Hugging Face folder of GPT-2's."""
    prompt: str = ""
    """What to continue; empty: a new document."""
    prompts_file: str | None = None
    """JSON lines of prompts; -: standard input. JSON lines come out."""
    num_samples: int = 1
    """Continuations of each prompt."""
    max_tokens: int = 200
    """Longest continuation."""
    temperature: float = 0.8
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int | None = 50
    """Choose among the k likeliest tokens; None: among all."""
    top_p: float | None = None
    """Of those, among the fewest whose probability reaches p (the nucleus)."""
    min_p: float | None = None
    """Among those at least p times as likely as the likeliest."""
    stop: tuple[str, ...] = ()
    """Texts that end a continuation, which then ends before them."""
    seed: int = 1
    """Sample i of prompt n is the same however many are asked for, and whatever is computed beside it (but for
    rounding)."""
    batch_size: int = 8
    """Continuations computed together."""
    keep: int | None = None
    """How many tokens of a full context go on when one more comes. None: all but the oldest; each token is then a whole
    pass. Half a context is far faster, and the model sees between half and all of it."""
    cache: bool = True
    """Keep keys and values; without, each token is a whole pass."""
    compile: bool = False
    """Compile the one-token step: half a minute's start or more, for faster tokens."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of the products, and of the keys and values that are kept."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to run."""


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """A document so far: EOT (where there is one), then the prompt; a line break where that would be nothing."""
    begin = [] if tokenizer.eot_id is None else [tokenizer.eot_id]
    tokens = begin + [int(index) for index in tokenizer.encode(prompt)]
    return tokens or [int(index) for index in tokenizer.encode("\n")]


def sample_generator(seed: int, index: int, prompt_index: int = 0) -> torch.Generator:
    """The random numbers of sample `index` of a prompt, whatever other samples are drawn."""
    # mt19937 takes 32 bits of a seed: prompts are spread over them by the golden ratio (Knuth, TAOCP 3, section 6.4).
    return torch.Generator().manual_seed(seed * 1_000_003 + index + prompt_index * 2_654_435_761 % 2**32)


@dataclass(frozen=True)
class Job:
    """One continuation to come."""

    prompt: str
    sample: int  # from 0
    row: Row
    said: Continuation


def jobs_of(prompts: Iterable[tuple[str, str]], tokenizer: Tokenizer, options: Options) -> Iterator[Job]:
    """`num_samples` of each (where it stands, prompt)."""
    for prompt_index, (place, prompt) in enumerate(prompts):
        try:
            tokens = encode_prompt(tokenizer, prompt)
        except InputError as error:
            raise InputError(f"{place} {prompt!r}: {error}") from error
        for sample in range(options.num_samples):
            row = Row(list(tokens), sample_generator(options.seed, sample, prompt_index))
            yield Job(
                prompt, sample, row, Continuation(tokenizer, max_tokens=options.max_tokens, stop_requests=options.stop)
            )


def read_prompts(name: str) -> Iterator[tuple[str, str]]:
    """(where it stands, prompt) of each line that is not blank, as they come."""
    with (
        reading_from(f"--prompts-file {name}"),
        nullcontext(sys.stdin.buffer) if name == "-" else Path(name).open("rb") as file,
    ):
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                found = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"--prompts-file {name}:{number}: no JSON: {first_line(error)}") from error
            prompt = found["prompt"] if isinstance(found, dict) and list(found) == ["prompt"] else found
            if not isinstance(prompt, str):
                raise InputError(f'--prompts-file {name}:{number}: give a JSON string, or {{"prompt": "..."}} alone')
            yield f"--prompts-file {name}:{number}:", prompt


def speak(passes: Passes, jobs: Iterator[Job], options: Options, sampling: Sampling) -> Iterator[list[Job]]:
    """The jobs in batches; each batch again after each of its tokens, until all of it has been said."""
    while batch := list(itertools.islice(jobs, options.batch_size)):
        for tokens in generate_rows(passes, [job.row for job in batch], sampling=sampling):
            for job, token in zip(batch, tokens, strict=True):
                if token is not None:
                    job.said.add(token)
                    job.row.is_done = job.said.stopped_by is not None
            yield batch


def print_text(spoken: Iterable[list[Job]], num_samples: int) -> None:
    """As it comes, one sample after the other: those beside the one that streams wait for its end."""
    sample, length = 0, None  # which streams, and how much of it is out
    for batch in spoken:
        for job in batch[sample - batch[0].sample :]:
            if length is None:
                heading = f"--- sample {sample + 1}\n" if num_samples > 1 else ""
                print(heading + job.prompt, end="")
            print(job.said.text[length or 0 :], end="", flush=True)
            length = len(job.said.text)
            if not job.row.is_done:
                break
            print()
            sample, length = sample + 1, None


def print_json(spoken: Iterable[list[Job]]) -> None:
    """A line for each, when its batch is done."""
    for batch in spoken:
        if all(job.row.is_done for job in batch):
            for job in batch:
                said = job.said
                line = {"prompt": job.prompt, "sample": job.sample + 1, "text": said.text, "tokens": said.tokens}
                print(json.dumps(line | {"stopped_by": said.stopped_by}), flush=True)


def checked(options: Options) -> Sampling:
    """How to choose; InputError for flags that cannot be."""
    for flag in ("num_samples", "max_tokens", "batch_size"):
        if getattr(options, flag) < 1:
            raise InputError(f"--{flag.replace('_', '-')} {getattr(options, flag)} must be at least 1")
    if "" in options.stop:
        raise InputError("--stop '' is at the end of every text; give one that is not empty")
    if options.prompt and options.prompts_file is not None:
        raise InputError("--prompt and --prompts-file: give one of them")
    check_device(options.device)
    return Sampling(options.temperature, options.top_k, options.top_p, options.min_p)


def passes_of(model: LanguageModel, options: Options) -> Passes:
    """With a KV cache, where the model and --no-cache allow it."""
    context_len, kind = model.config.context_len, model.config.kind
    if options.keep is not None and not 1 <= options.keep <= context_len:
        raise InputError(f"--keep {options.keep} must be at least 1 and at most the model's context, {context_len}")
    num_rows = options.batch_size if options.prompts_file else min(options.batch_size, options.num_samples)
    if isinstance(model, GPT) and options.cache:
        backend = "inductor" if options.compile else None
        return CachedPasses(model, num_rows=num_rows, keep=options.keep, compile_backend=backend)
    if options.compile:
        odd = f"--model.kind {kind} has no cache" if options.cache else "not with --no-cache"
        raise InputError(f"--compile compiles the step of one token after a cache: {odd}")
    return WholePasses(model, keep=options.keep)


def main(args: list[str] | None = None) -> None:
    with one_line_errors("generate"):
        options = tyro.cli(Options, args=args, description=__doc__)
        sampling = checked(options)
        trained = load_model(options.path, device=options.device, dtype=DTYPES[options.dtype])
        passes = passes_of(trained.model, options)
        make_ready(trained.model)
        given = [("--prompt", options.prompt)] if options.prompts_file is None else read_prompts(options.prompts_file)
        spoken = speak(passes, jobs_of(given, trained.tokenizer, options), options, sampling)
        if options.prompts_file is None:
            print_text(spoken, options.num_samples)
        else:
            print_json(spoken)


if __name__ == "__main__":
    main()
