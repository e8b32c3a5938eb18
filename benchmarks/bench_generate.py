"""Time generation: prefill and decoding by batch, against an uncached loop, transformers, and memory bandwidth.

    python benchmarks/bench_generate.py                           # 4 layers x 384, 1,000 tokens; minutes on 2 cores
    python benchmarks/bench_generate.py runs/NAME --batches 1 16 --tokens 500 --no-whole

The uncached loop passes over all tokens for each new one. transformers' generate uses its own cache and the same
weights. All take the likeliest token and decode in turn, a block of tokens each, so that other load on the machine
slows all of them alike. The uncached loop runs at the first batch only, without padding.

A decoding step reads all weights but the embeddings, and each row's keys and values. These bytes divided by its time
are compared with a triad (a = b + s c; McCalpin 1995), which is measured between the blocks. Ratios are of seconds, and
of CPU seconds, which other load changes less. Last line: JSON. Expect the uncached loop to take at least 5 times as
long over 1,000 tokens, and transformers longer at every batch.
"""

import itertools
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import tyro
from torch import Tensor

from common.errors import InputError, one_line_errors
from model.checkpoint import load_model
from model.config import ModelConfig
from model.cost import count_cache_bytes
from model.generation.decoding import CachedPasses, Passes, Row, WholePasses, generate_rows, make_ready
from model.generation.sampling import Sampling
from model.gpt import GPT, build_model
from model.hf.format import check_expressible, to_hugging_face

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WARM_UP_TOKENS = 2  # one prefill and one step, which may be compiled
TRIAD_BYTES = 2**26  # of each of the three arrays; more than caches hold

Advance = Callable[[int], None]  # decodes a number of tokens for each row


@dataclass(frozen=True)
class Options:
    """Options of the benchmark."""

    path: Annotated[str | None, tyro.conf.Positional] = None
    """RUN, RUN@STEP or a checkpoint to load; None: random weights of the shape below."""
    num_layers: int = 4
    """Number of blocks."""
    num_heads: int = 6
    """Number of attention heads."""
    width: int = 384
    """Size of the residual stream."""
    vocab_size: int = 50_257
    """Tokens in the vocabulary."""
    batches: tuple[int, ...] = (1, 8)
    """Numbers of rows that are decoded together."""
    prompt_tokens: int = 16
    """Length of the prompts before decoding."""
    tokens: int = 1000
    """Tokens to decode in each row."""
    block: int = 50
    """Tokens that are timed together."""
    prefill_tokens: int = 512
    """Length of the prompts when prefill is timed."""
    whole: bool = True
    """Also time the uncached loop."""
    compile: bool = False
    """Also time the compiled step."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of products, keys and values."""


def model_of(options: Options, device: torch.device) -> GPT:
    """Return the model to time. Raise InputError for a shape that cannot be, or a model without a cache."""
    dtype = DTYPES[options.dtype]
    if options.path is None:
        config = ModelConfig(
            num_layers=options.num_layers,
            num_heads=options.num_heads,
            width=options.width,
            vocab_size=options.vocab_size,
        )
        if config.faults():
            raise InputError("; ".join(config.faults()).replace("--model.", "--"))
        return build_model(config, seed=1, device=device, compute_dtype=dtype).eval()
    model = load_model(options.path, device=device, dtype=dtype).model
    if not isinstance(model, GPT):
        raise InputError(f"{options.path}: --model.kind {model.config.kind} has no cache to time")
    return model


def some_prompts(model: GPT, num_rows: int, length: int) -> list[list[int]]:
    """Return `num_rows` random prompts, the same on every call."""
    generator = torch.Generator().manual_seed(1)
    tokens_BT: list[list[int]] = torch.randint(
        model.config.vocab_size, (num_rows, length), generator=generator
    ).tolist()
    return tokens_BT


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- The contestants --------------------------------------------------------------------------------------------------


def advancing(passes: Passes, prompts: Sequence[Sequence[int]]) -> tuple[Advance, Callable[[], list[list[int]]]]:
    """Return a function that advances our loop, and one that returns its tokens."""
    rows = [Row(list(prompt), torch.Generator()) for prompt in prompts]
    steps = generate_rows(passes, rows, sampling=Sampling(temperature=0.0))

    def advance(num_tokens: int) -> None:
        for _ in itertools.islice(steps, num_tokens):
            pass

    return advance, lambda: [row.tokens for row in rows]


def load_transformers(model: GPT, dtype: torch.dtype) -> Any | str:
    """Return the same weights as a GPT2LMHeadModel, or the reason why this is not possible."""
    try:
        check_expressible(model.config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        return "transformers is not installed"
    except InputError as error:
        return str(error)
    config = model.config
    hf_model: Any = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.context_len,
            n_embd=config.width,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            n_inner=config.resolved_mlp_width,
            activation_function={"gelu": "gelu_new"}.get(config.mlp, config.mlp),
            tie_word_embeddings=config.tie,
            layer_norm_epsilon=1e-5,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    )
    hf_model.load_state_dict(to_hugging_face(model.state_dict(), config))
    return hf_model.to(dtype=dtype, device=next(model.parameters()).device).eval()


def advancing_transformers(hf_model: Any, prompts: list[list[int]]) -> tuple[Advance, Callable[[], list[list[int]]]]:
    """Return the same two functions for transformers' generate, which goes on with the cache that it has filled."""
    from transformers import DynamicCache

    cache = DynamicCache(config=hf_model.config)
    tokens_BT = torch.tensor(prompts, device=hf_model.device)

    def advance(num_tokens: int) -> None:
        nonlocal tokens_BT
        tokens_BT = hf_model.generate(
            tokens_BT,
            attention_mask=torch.ones_like(tokens_BT),
            past_key_values=cache,
            do_sample=False,
            max_new_tokens=num_tokens,
        )

    return advance, lambda: tokens_BT.tolist()


# --- Measurements -----------------------------------------------------------------------------------------------------


class Triad:
    """The memory bandwidth of a = b + s c, computed by torch."""

    def __init__(self, device: torch.device) -> None:
        self._a, self._b, self._c = torch.ones(3, TRIAD_BYTES // 4, device=device).unbind()
        self._device = device
        self.bytes_per_second: list[float] = []

    def measure(self) -> None:
        """Time one triad and append its bytes per second."""
        synchronize(self._device)
        started = time.perf_counter()
        torch.add(self._b, self._c, alpha=3.0, out=self._a)
        synchronize(self._device)
        self.bytes_per_second.append(3 * TRIAD_BYTES / (time.perf_counter() - started))


def in_turn(
    advances: dict[str, Advance], *, tokens: int, block: int, triad: Triad, device: torch.device
) -> dict[str, list[tuple[float, float]]]:
    """Return the (seconds, CPU seconds) of every block of each contestant."""
    for advance in advances.values():
        advance(WARM_UP_TOKENS)
    triad.measure()  # the first one is slow
    triad.bytes_per_second.clear()
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in advances}
    for _ in range(tokens // block):
        for name, advance in advances.items():
            synchronize(device)
            started = time.perf_counter(), time.process_time()
            advance(block)
            synchronize(device)
            seconds[name].append((time.perf_counter() - started[0], time.process_time() - started[1]))
        triad.measure()
    return seconds


def step_bytes(model: GPT, slots: float, num_rows: int) -> float:
    """Return the bytes that a decoding step reads when each row has `slots` tokens in the cache."""
    parts: list[Tensor] = [*model.blocks.parameters(), *model.transformer["ln_f"].parameters(), model.lm_head.weight]
    weights = sum(part.nbytes for part in parts)
    return weights + num_rows * slots * count_cache_bytes(model.config, model.compute_dtype.itemsize)


def prefill_seconds(model: GPT, passes: CachedPasses, num_rows: int, length: int) -> float:
    """Return the median seconds of five prefills, after an uncounted one."""
    prompts = dict(enumerate(some_prompts(model, num_rows, length)))
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        with torch.no_grad():
            passes.prefill(prompts).cpu()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def measure(options: Options, model: GPT, hf_model: Any | None, num_rows: int, *, is_first: bool) -> dict[str, Any]:
    """Return the results at one batch, with those of every contestant by name."""
    device = next(model.parameters()).device
    prompts = some_prompts(model, num_rows, options.prompt_tokens)
    cached = CachedPasses(model, num_rows=num_rows)
    prefill = prefill_seconds(model, cached, num_rows, options.prefill_tokens)
    runs = {"cached": advancing(cached, prompts)}
    if options.compile:
        runs["compiled"] = advancing(CachedPasses(model, num_rows=num_rows, compile_backend="inductor"), prompts)
    if hf_model is not None:
        runs["transformers"] = advancing_transformers(hf_model, prompts)
    if options.whole and is_first:
        runs["whole"] = advancing(WholePasses(model), prompts)
    triad = Triad(device)
    advances = {name: advance for name, (advance, _) in runs.items()}
    seconds = in_turn(advances, tokens=options.tokens, block=options.block, triad=triad, device=device)
    tokens_by_name = {name: tokens() for name, (_, tokens) in runs.items()}
    num_steps = options.tokens // options.block * options.block
    slots = options.prompt_tokens + WARM_UP_TOKENS + num_steps / 2
    bandwidth = statistics.median(triad.bytes_per_second)
    results: dict[str, Any] = {
        "prefill_ms": round(prefill * 1e3, 3),
        "prefill_tokens_per_second": round(num_rows * options.prefill_tokens / prefill, 1),
        "triad_gb_per_second": round(bandwidth / 1e9, 2),
    }
    ours, ours_cpu = (sum(times) for times in zip(*seconds["cached"], strict=True))
    for name in runs:
        total, cpu = (sum(times) for times in zip(*seconds[name], strict=True))
        ratios = [block[0] / our[0] for block, our in zip(seconds[name], seconds["cached"], strict=True)]
        results[name] = {
            "ms_per_token": round(total / num_steps * 1e3, 3),
            "tokens_per_second": round(num_rows * num_steps / total, 1),
            "slower": round(total / ours, 3),
            "slower_cpu": round(cpu / ours_cpu, 3),
            "slower_by_block": [round(number, 3) for number in (min(ratios), statistics.median(ratios), max(ratios))],
            "same_tokens": tokens_by_name[name] == tokens_by_name["cached"],
        }
        if name != "whole":
            rate = step_bytes(model, slots, num_rows) * num_steps / total
            results[name] |= {
                "gb_per_second": round(rate / 1e9, 2),
                "of_triad": round(rate / bandwidth, 3),
            }
    return results


def lines_of(num_rows: int, results: dict[str, Any], prefill_tokens: int) -> list[str]:
    """Return the printed lines of one batch's results."""
    header = (
        f"batch {num_rows}: prefill of {prefill_tokens} tokens {results['prefill_ms']:.1f} ms, "
        f"{results['prefill_tokens_per_second']:,.0f} tokens/s; triad {results['triad_gb_per_second']:.1f} GB/s"
    )
    lines = [header]
    for name, numbers in results.items():
        if isinstance(numbers, dict):
            least, median, most = numbers["slower_by_block"]
            line = (
                f"  {name:<14}{numbers['ms_per_token']:>9.2f} ms/token{numbers['tokens_per_second']:>10,.0f} tokens/s"
                f"{numbers['slower']:>8.2f} x cached (by block {least:.2f} {median:.2f} {most:.2f}; CPU "
                f"{numbers['slower_cpu']:.2f})"
            )
            if "gb_per_second" in numbers:
                line += f"{numbers['gb_per_second']:>7.1f} GB/s, {100 * numbers['of_triad']:.0f} % of triad"
            lines.append(line + ("" if numbers["same_tokens"] else ", other tokens"))
    return lines


def check(options: Options, model: GPT) -> None:
    """Raise InputError for options that cannot be measured."""
    for flag in ("prompt_tokens", "tokens", "block", "prefill_tokens"):
        if getattr(options, flag) < 1:
            raise InputError(f"--{flag.replace('_', '-')} {getattr(options, flag)} must be at least 1")
    if not options.batches or min(options.batches) < 1:
        raise InputError(f"--batches {' '.join(map(str, options.batches))}: give sizes of at least 1")
    if options.tokens < options.block:
        raise InputError(f"--tokens {options.tokens} must be at least --block {options.block}")
    context_len = model.config.context_len
    longest = max(options.prompt_tokens + WARM_UP_TOKENS + options.tokens, options.prefill_tokens)
    if longest > context_len:
        raise InputError(
            f"{longest} tokens exceed the model's context of {context_len}; lower --tokens, --prompt-tokens or "
            "--prefill-tokens"
        )


def main(args: list[str] | None = None) -> None:
    with one_line_errors("bench_generate"):
        options = tyro.cli(Options, args=args, description=__doc__)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = model_of(options, device)
        check(options, model)
        hf_model = load_transformers(model, DTYPES[options.dtype])
        if isinstance(hf_model, str):
            print(f"transformers left out: {hf_model}")
            hf_model = None
        make_ready(model)
        batches = dict[str, dict[str, Any]]()
        for index, num_rows in enumerate(options.batches):
            batches[str(num_rows)] = measure(options, model, hf_model, num_rows, is_first=index == 0)
            print("\n".join(lines_of(num_rows, batches[str(num_rows)], options.prefill_tokens)), flush=True)
        conditions = {
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "dtype": options.dtype,
            "num_layers": model.config.num_layers,
            "width": model.config.width,
            "vocab_size": model.config.vocab_size,
            "context_len": model.config.context_len,
            "prompt_tokens": options.prompt_tokens,
            "tokens": options.tokens // options.block * options.block,
        }
        print(json.dumps(conditions | {"batches": batches}))


if __name__ == "__main__":
    main()
