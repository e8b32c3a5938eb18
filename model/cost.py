"""Count what a model costs: parameters, FLOPs, bytes and days, structurally, matrix by matrix.

    python model/cost.py gpt2-xl --model.mlp swiglu --model.position-embedding rope --batch 1 --seq-len 1024
    python model/cost.py gpt2-small --card a100 --num-cards 8 --mfu 0.4 --tokens 10000000000

This takes half a second. The run card, the meters, this command and every plan use these counts. The FLOPs are those
of the matrix products and equal torch.utils.flop_counter's; other operations are not counted. The first command prints
1,560,992,448 parameters. How long a step takes on a card at best: train/roofline.py.
"""

import itertools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeVar

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.errors import InputError, one_line_errors
from common.flags import mark_for_tyro
from common.former_flags import refuse_former_flags
from model.config import NAMED_SHAPES, ModelConfig
from model.costs.activations import FP32_BYTES, StepShape
from model.costs.gpu_peaks import peak_flops
from model.costs.memory import count_activations, memory

TOKENS_PER_PARAMETER = 20  # Hoffmann et al. 2022, table 3: the lowest loss for a number of FLOPs
COMPUTE_BYTES = {"bf16": 2, "fp16": 2, "tf32": 4, "fp32": 4}


@dataclass(frozen=True)
class Cost:
    """A model's totals. num_parameters leaves out vocabulary padding; flops_per_token is of both passes, full context.

    gradient_bytes and state_bytes (weights, gradients and AdamW's two moments) are what one process holds in fp32;
    checkpoint_bytes (weights and moments) is what it saves.
    """

    num_parameters: int
    num_padding_parameters: int
    flops_per_token: int
    gradient_bytes: int
    state_bytes: int
    checkpoint_bytes: int


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Return the parameters by component, without vocabulary padding. A tied head counts as embedding only."""
    D, F, L, V = config.width, config.resolved_mlp_width, config.num_layers, config.vocab_size
    if config.kind == "bigram":
        return {"head": V * V}
    if config.kind != "gpt":
        is_block = config.kind == "block"
        return {
            "token embedding": V * D,
            "position embedding": config.context_len * D,
            "attention": (3 + is_block) * D * D,
            "mlp": is_block * 2 * D * 4 * D,
            "norms": is_block * 3 * D,
            "head": V * D,
        }
    inner = config.num_mlp_matrices - 1  # the MLP's matrices D x F; one more is F x D
    num_norms = 0 if config.norm == "none" else 2 * L + config.has_last_norm + config.embedding_norm
    num_tables_read = sum(config.value_table(index) is not None for index in range(L))
    norm = 2 * D if config.norm == "layernorm" and config.bias else D
    return {
        "token embedding": V * D,
        "position embedding": config.context_len * D if config.position_embedding == "learned" else 0,
        "value embeddings": config.value_embeddings * V * D,
        "attention": L * 4 * D * (D + config.bias) + (L - 1) * config.value_residual + num_tables_read,
        "mlp": L * ((inner + 1) * D * F + config.bias * (inner * F + D)),
        "norms": num_norms * norm + L * 2 * config.head_size * config.qk_norm,
        "shortcuts and skips": L * config.embedding_shortcut + L // 2 * config.skips,
        "head": 0 if config.tie else V * D,
    }


def count_forward_flops(config: ModelConfig, *, batch: int, seq_len: int) -> dict[str, int]:
    """Return the FLOPs of the matrix products of one forward pass by component.

    A product of m x k and k x n takes 2 m n k FLOPs. Attention scores count in full, not halved for the causal mask, as
    in Chowdhery et al. 2022 (PaLM), appendix B, and in flop_counter. The head counts with its padding, since the model
    computes that too.
    """
    D, L, T, tokens = config.width, config.num_layers, seq_len, batch * seq_len
    if config.kind == "bigram":
        return {"head": 2 * tokens * config.vocab_size**2}  # the input rows are one-hot
    projections, mlp, V = 4 * D * D, config.num_mlp_matrices * D * config.resolved_mlp_width, config.padded_vocab_size
    if config.kind != "gpt":
        is_block = config.kind == "block"
        L, projections, mlp, V = 1, (3 + is_block) * D * D, is_block * 2 * D * 4 * D, config.vocab_size
    return {
        "attention projections": 2 * tokens * L * projections,
        "attention scores": 2 * tokens * L * T * D,
        "attention values": 2 * tokens * L * T * D,
        "mlp": 2 * tokens * L * mlp,
        "head": 2 * tokens * D * V,
    }


def count_backward_flops(config: ModelConfig, *, batch: int, seq_len: int) -> dict[str, int]:
    """Return the FLOPs of the backward pass: two products for each forward one, a gradient per operand.

    A bigram takes one, since its one-hot rows are data and need no gradient.
    """
    operands = 1 if config.kind == "bigram" else 2
    forward = count_forward_flops(config, batch=batch, seq_len=seq_len)
    return {part: operands * flops for part, flops in forward.items()}


def count_cache_bytes(config: ModelConfig, compute_bytes: int) -> int:
    """Return the bytes of one token's keys and values in all blocks, which generation caches."""
    return 2 * config.num_layers * config.width * compute_bytes


def model_cost(config: ModelConfig) -> Cost:
    """Return the totals of a model."""
    parameters = sum(count_parameters(config).values())
    num_padding_rows = config.padded_vocab_size - config.vocab_size if config.kind == "gpt" else 0
    padding = num_padding_rows * config.width * ((1 if config.tie else 2) + config.value_embeddings)
    passes = (count_forward_flops, count_backward_flops)
    flops = sum(sum(count(config, batch=1, seq_len=config.context_len).values()) for count in passes)
    num_stored = parameters + padding
    return Cost(
        num_parameters=parameters,
        num_padding_parameters=padding,
        flops_per_token=flops // config.context_len,
        gradient_bytes=FP32_BYTES * num_stored,
        state_bytes=4 * FP32_BYTES * num_stored,
        checkpoint_bytes=3 * FP32_BYTES * num_stored,
    )


# --- The command ------------------------------------------------------------------------------------------------------


# Name -> memory in GB from the datasheet, and the name in torch and in model/costs/gpu_peaks.py.
CARDS = {
    "rtx-4090": (24, "NVIDIA GeForce RTX 4090"),
    "rtx-5090": (32, "NVIDIA GeForce RTX 5090"),
    "l4": (24, "NVIDIA L4"),
    "l40s": (48, "NVIDIA L40S"),
    "a100-40gb": (40, "NVIDIA A100-SXM4-40GB"),
    "a100": (80, "NVIDIA A100-SXM4-80GB"),
    "h100": (80, "NVIDIA H100 80GB HBM3"),
    "h200": (141, "NVIDIA H200"),
    "b200": (180, "NVIDIA B200"),
    "mi300x": (192, "AMD Instinct MI300X"),
}


@dataclass(frozen=True)
class ModelOnCard:
    """Say which model, which micro-batch and which card; train/roofline.py takes these options too."""

    model: ModelConfig = field(default_factory=ModelConfig)
    vocab_size: int = 50257
    """Number of the tokenizer's ids."""
    batch: int = 1
    """Sequences in a micro-batch."""
    seq_len: int = 1024
    """Tokens in a sequence, and the model's context."""
    dtype: Literal["bf16", "fp16", "tf32", "fp32"] = "bf16"
    """Number format of activations and products; weights, gradients and optimizer state are fp32."""
    card: str = "h100"
    """Name of a card, or its memory in GB (10^9 bytes)."""
    peak_tflops: float | None = None
    """The card's dense peak at --dtype in TFLOP/s. None: the listed peak of a named card, unknown for any other."""

    def faults(self) -> list[str]:
        """Return every reason why nothing can be counted."""
        faults = replace(self.model, context_len=self.seq_len).faults()
        if self.model.kind != "gpt":
            faults.append(f"--model.kind {self.model.kind}: this command counts gpt only; use train/main.py --dry-run")
        faults += self.not_positive("vocab_size", "batch", "seq_len", "peak_tflops")
        memory_bytes, _ = memory_and_peak(self)
        if not 0 < memory_bytes < math.inf:
            faults.append(f"--card {self.card}: its memory in GB must be a finite number above 0")
        return faults

    def not_positive(self, *names: str) -> list[str]:
        """Return a fault for each of these fields that is neither None nor a finite number above 0."""
        return [
            f"--{name.replace('_', '-')} {value} must be a finite number above 0"
            for name in names
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf
        ]


@dataclass(frozen=True)
class Options(ModelOnCard):
    """Count what a model costs: parameters, FLOPs, bytes, days."""

    num_cards: int = 8
    """Cards that train together, each with the whole model (DDP)."""
    mfu: float = 0.4
    """Fraction of the cards' peak that the model's own FLOPs reach (Chowdhery et al. 2022, appendix B)."""
    tokens: int | None = None
    """Tokens to train on. None: 20 per parameter (Hoffmann et al. 2022)."""

    def faults(self) -> list[str]:
        faults = super().faults() + self.not_positive("num_cards", "mfu", "tokens")
        if self.mfu > 1:
            faults.append(f"--mfu {self.mfu} must be at most 1; it is a fraction of the peak, like 0.4")
        return faults


AnyOptions = TypeVar("AnyOptions", bound=ModelOnCard)


def parse_as(kind: type[AnyOptions], args: Sequence[str], *, program: str, text: str | None) -> AnyOptions:
    """Return the options of `[SHAPE] [--flags]`. Raise one InputError with every fault. `text` opens the help."""
    import tyro  # here, because every run counts with this module

    name, flags = ("gpt2-small", list(args)) if not args or args[0].startswith("-") else (args[0], list(args[1:]))
    if name not in NAMED_SHAPES:
        raise InputError(f"no shape {name!r}; there are {', '.join(NAMED_SHAPES)}")
    refuse_former_flags(flags)
    shape = NAMED_SHAPES[name]
    mark_for_tyro(ModelConfig)
    options = tyro.cli(
        kind,
        prog=f"{program} {name}",
        description=f"{text} The first argument may be a shape: {', '.join(NAMED_SHAPES)}.",
        args=flags,
        default=kind(model=shape, vocab_size=shape.vocab_size, seq_len=shape.context_len),
    )
    if faults := options.faults():
        raise InputError("; ".join(faults))
    return replace(options, model=replace(options.model, vocab_size=options.vocab_size, context_len=options.seq_len))


def parse(args: Sequence[str]) -> Options:
    """Return this command's options."""
    return parse_as(Options, args, program="model/cost.py", text=__doc__)


def memory_and_peak(options: ModelOnCard) -> tuple[float, float | None]:
    """Return the card's bytes of memory and its dense FLOP/s at --dtype, None if unknown."""
    peak = None if options.peak_tflops is None else options.peak_tflops * 1e12
    if options.card in CARDS:
        gigabytes, name = CARDS[options.card]
        return gigabytes * 1e9, peak or peak_flops(name, options.dtype)
    try:
        return float(options.card) * 1e9, peak
    except ValueError:
        raise InputError(f"--card {options.card}: give its memory in GB, or one of {', '.join(CARDS)}") from None


def largest_batch(config: ModelConfig, shape: StepShape, memory_bytes: float) -> int:
    """Return the most sequences of a micro-batch whose step fits into memory, 0 if one is too many."""

    def fits(sequences: int) -> bool:
        return memory(config, replace(shape, micro_batch=sequences)).peak_bytes <= memory_bytes

    if not fits(1):
        return 0
    fitting, failing = 1, 2
    while fits(failing):
        fitting, failing = failing, 2 * failing
    while failing - fitting > 1:
        middle = (fitting + failing) // 2
        fitting, failing = (middle, failing) if fits(middle) else (fitting, middle)
    return fitting


def report(options: Options) -> str:
    """Return everything that the command prints."""
    config, batch, seq_len = options.model, options.batch, options.seq_len
    cost = model_cost(config)
    switches = " ".join(f"{name}={value}" for name, value in config.switched().items())
    lines = [
        f"{config.num_layers} layers x {config.width} wide x {config.num_heads} heads, "
        f"MLP {config.resolved_mlp_width}, context {seq_len}; {switches or 'GPT-2 as published'}",
        "",
        f"{'parameters':<24}{'':>16}{'share':>8}",
        *table(count_parameters(config), "{:,}".format),
        f"{'  of vocabulary padding':<24}{cost.num_padding_parameters:>16,}    more",
        "",
        f"{f'FLOPs of {batch} x {seq_len}':<24}{'forward':>16}{'share':>8}{'backward':>16}",
        *flops_table(config, batch, seq_len),
        "",
        f"{'bytes':<24}",
        *bytes_table(options, cost),
        "",
        *memory_table(options),
        "",
        time_line(options, cost),
    ]
    return "\n".join(lines)


def table(parts: dict[str, int], form: Callable[[int], str]) -> list[str]:
    """Return a row with its share for each part that is not 0, and a row for the total."""
    total = sum(parts.values())
    rows = [f"{f'  {part}':<24}{form(n):>16}{100 * n / total:>6.1f} %" for part, n in parts.items() if n]
    return [*rows, f"{'  total':<24}{form(total):>16}"]


def flops_table(config: ModelConfig, batch: int, seq_len: int) -> list[str]:
    """Return the rows of `table` for the forward pass, each with the FLOPs of the backward pass."""
    backward = count_backward_flops(config, batch=batch, seq_len=seq_len)
    last_column = [*backward.values(), sum(backward.values())]
    rows = table(count_forward_flops(config, batch=batch, seq_len=seq_len), in_flops)
    return [f"{row:<48}{in_flops(flops):>16}" for row, flops in zip(rows, last_column, strict=True)]


def in_flops(flops: int) -> str:
    """Return FLOPs as text, in GFLOP up to 10,000 GFLOP and then in TFLOP."""
    return f"{flops / 1e9:,.0f} GFLOP" if flops < 1e13 else f"{flops / 1e12:,.1f} TFLOP"


def in_bytes(num_bytes: float) -> str:
    """Return bytes as text in kB, MB or GB (powers of 1,000)."""
    size, unit = next((n, u) for n, u in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if num_bytes >= n / 10 or u == "kB")
    return f"{num_bytes / size:,.{1 if unit == 'kB' else 2}f} {unit}"


def bytes_table(options: Options, cost: Cost) -> list[str]:
    """Return the rows of a run's lasting bytes: published weights, what a process holds, what it saves."""
    parts = {
        "weights, fp32": FP32_BYTES * cost.num_parameters,
        "weights with padding": cost.gradient_bytes,
        "gradients, fp32": cost.gradient_bytes,
        "AdamW's moments, fp32": 2 * cost.gradient_bytes,
        "checkpoint": cost.checkpoint_bytes,
        "KV cache per token": count_cache_bytes(options.model, COMPUTE_BYTES[options.dtype]),
    }
    return [f"{f'  {part}':<24}{in_bytes(n):>16}" for part, n in parts.items()]


def memory_table(options: Options) -> list[str]:
    """Return rows with activations, peak of a step and largest batch, by attention and checkpointing."""
    memory_bytes, _ = memory_and_peak(options)
    head = f"one process, {options.dtype}, eager, plain loss"
    rows = [f"{head:<48}{'activations':>16}{'peak of a step':>16}{'largest batch':>16}"]
    kinds: dict[str, Literal["sdpa", "naive"]] = {"fused attention": "sdpa", "written-out attention": "naive"}
    for (name, attention), checkpointing in itertools.product(kinds.items(), (False, True)):
        config = replace(options.model, attention=attention)
        shape = StepShape(
            micro_batch=options.batch,
            seq_len=options.seq_len,
            compute_bytes=COMPUTE_BYTES[options.dtype],
            activation_checkpointing=checkpointing,
        )
        batch = largest_batch(config, shape, memory_bytes)
        activations, peak = count_activations(config, shape), memory(config, shape).peak_bytes
        label = f"  {name}{', checkpointing' if checkpointing else ''}"
        rows.append(f"{label:<48}{in_bytes(activations):>16}{in_bytes(peak):>16}{batch:>16,}")
    return [
        *rows,
        f"(largest batch: sequences of {options.seq_len} in {memory_bytes / 1e9:g} GB, --card {options.card})",
    ]


def time_line(options: Options, cost: Cost) -> str:
    """Return the line that goes from tokens to FLOPs to days."""
    tokens = options.tokens or TOKENS_PER_PARAMETER * cost.num_parameters
    flops = tokens * cost.flops_per_token
    text = f"{tokens:,} tokens x {cost.flops_per_token:.3g} FLOPs = {flops:.3g} FLOPs"
    _, peak = memory_and_peak(options)
    if peak is None:
        return f"{text}; give --peak-tflops to see how long that takes"
    seconds = flops / (options.num_cards * peak * options.mfu)
    return (
        f"{text}: {seconds / 86400:,.2f} days on {options.num_cards} x {options.card} at {100 * options.mfu:g} % of "
        f"{peak / 1e12:,.1f} TFLOP/s each"
    )


def main(args: Sequence[str] | None = None) -> None:
    """Print what the model of the command line costs."""
    with one_line_errors("cost"):
        print(report(parse(sys.argv[1:] if args is None else args)))


if __name__ == "__main__":
    main()
