"""The accounting against torch's own counters and the published counts."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.config import NAMED_SHAPES, ModelConfig
from model.cost import CARDS, count_forward_flops, count_parameters, largest_batch, main, model_cost, parse
from model.costs.activations import StepShape, block_shapes, root_shapes
from model.costs.gpu_peaks import PEAKS
from model.costs.memory import count_activations, memory
from model.gpt import GPT, build_model
from tests.helpers.runs import called
from tests.unit.model.test_switches import MODERN, ONE_BY_ONE, named
from train.config import OptimConfig
from train.optim import build_optimizer
from train.run.checkpoints import checkpoint_tensors

TINY = ModelConfig(num_layers=3, num_heads=2, width=32, vocab_size=100, context_len=16)


@pytest.mark.parametrize("switches", [{}, *ONE_BY_ONE], ids=named)
def test_flops_equal_torchs_counter(switches: dict[str, Any]) -> None:
    config = dataclasses.replace(TINY, **switches)
    model = build_model(config, seed=1)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits_BTV = model(torch.zeros(4, 16, dtype=torch.int64))
        forward = counter.get_total_flops()
        logits_BTV.sum().backward()
    counted = sum(count_forward_flops(config, batch=4, seq_len=16).values())
    assert counted == forward
    assert 3 * counted == counter.get_total_flops()
    assert model_cost(config).flops_per_token * 4 * 16 == counter.get_total_flops()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gpt2-small", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_parameters_equal_the_models(name: str, parameters: int) -> None:
    config = NAMED_SHAPES[name]
    with torch.device("meta"):
        held = sum(p.numel() for p in GPT(config).parameters())
    cost = model_cost(config)
    assert cost.num_parameters == parameters == sum(count_parameters(config).values())
    assert cost.num_parameters + cost.num_padding_parameters == held


GRID = [
    {
        "position_embedding": positions,
        "norm": norm,
        "norm_place": place,
        "mlp": mlp,
        "tie": tie,
        "bias": bias,
        "qk_norm": bias,
    }
    for positions in ("learned", "rope")
    for norm in ("layernorm", "rmsnorm", "none")
    for place in ("pre", "post")
    for mlp in ("gelu", "swiglu")
    for tie in (True, False)
    for bias in (True, False)
    if (norm, place) != ("none", "post")
]


@pytest.mark.parametrize("switches", [*GRID, *ONE_BY_ONE], ids=named)
def test_parameters_equal_the_models_switch_by_switch(switches: dict[str, Any]) -> None:
    config = dataclasses.replace(TINY, **switches)
    with torch.device("meta"):
        model = GPT(config)
    found = dict.fromkeys(count_parameters(config), 0)
    for name, parameter in model.named_parameters():
        found[component_of(name)] += parameter.numel()
    padding = (config.padded_vocab_size - config.vocab_size) * config.width
    found["token embedding"] -= padding
    found["head"] -= 0 if config.tie else padding
    assert count_parameters(config) == found
    shapes = root_shapes(config) + config.num_layers * block_shapes(config)
    assert sum(math.prod(shape) for shape in shapes) == (
        sum(parameter.numel() for parameter in model.parameters()) + config.value_residual  # the first block's
    )


def component_of(name: str) -> str:
    if "_norm." in name or ".ln_" in name:
        return "norms"
    named = {".wte.": "token embedding", ".wpe.": "position embedding", ".attn.": "attention", ".mlp.": "mlp"}
    return next((component for part, component in named.items() if part in name), "head")


@pytest.mark.parametrize("switches", [{}, MODERN], ids=["gpt2", "modern"])
def test_bytes_equal_the_tensors(switches: dict[str, Any]) -> None:
    config = dataclasses.replace(TINY, **switches)
    model = build_model(config, seed=1)
    tensors = checkpoint_tensors(model, build_optimizer(model, OptimConfig()))
    in_checkpoint = sum(t.numel() * t.element_size() for name, t in tensors.items() if not name.endswith(".step"))
    assert model_cost(config).checkpoint_bytes == in_checkpoint
    gradients = sum(p.numel() * p.element_size() for p in model.parameters())
    assert model_cost(config).state_bytes == in_checkpoint + gradients


# --- The command: the published tables of a Llama-like shape, to the printed digit ------------------------------------

PUBLISHED = "--model.norm rmsnorm --model.mlp swiglu --model.position-embedding rope --model.no-tie --model.no-bias"
PUBLISHED += " --model.vocab-multiple 1 --model.mlp-width"


def printed(name: str, *flags: str) -> str:
    width = NAMED_SHAPES[name].width
    done = called(main, name, *PUBLISHED.split(), str(4 * width), *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout


def row(text: str, name: str, last: bool = False) -> list[str]:
    """The figures of the (last) line that begins with `name`."""
    found = [line.split(name)[1].split() for line in text.splitlines() if line.strip().startswith(name)]
    return found[-1 if last else 0]


def test_the_published_parameters_and_bytes_of_xl() -> None:
    text = printed("gpt2-xl", "--batch", "1", "--seq-len", "1024")
    assert row(text, "total") == ["2,127,057,600"]
    assert row(text, "weights, fp32") == ["8.51", "GB"]


@pytest.mark.parametrize(
    ("size", "gigaflop"), [("small", "350"), ("medium", "1,033"), ("large", "2,258"), ("xl", "4,513")]
)
def test_the_published_flops(size: str, gigaflop: str) -> None:
    forward, unit, *_ = row(printed(f"gpt2-{size}"), "total", last=True)
    assert (forward, unit) == (gigaflop, "GFLOP")


def test_the_published_shares_of_small() -> None:
    text = printed("gpt2-small")
    names = ("attention projections", "attention scores", "attention values", "mlp", "head")
    shares = [row(text, name, last=True)[2] for name in names]
    assert shares == ["16.6", "5.5", "5.5", "49.8", "22.6"]


def test_the_published_long_context_of_xl() -> None:
    text = printed("gpt2-xl", "--seq-len", "16384")
    assert row(text, "total", last=True)[:2] == ["149.5", "TFLOP"]
    config = dataclasses.replace(parse(["gpt2-xl", *PUBLISHED.split(), "6400"]).model, context_len=16384)
    flops = count_forward_flops(config, batch=1, seq_len=16384)
    share = (flops["attention scores"] + flops["attention values"]) / sum(flops.values())
    assert f"{100 * share:.1f}" == "55.2"


def test_gpt2_as_published() -> None:
    text = called(main).stdout
    assert "GPT-2 as published" in text
    assert row(text, "total") == ["124,439,808"]
    assert row(text, "of vocabulary padding")[0] == "36,096"
    assert row(text, "KV cache per token") == ["36.9", "kB"]  # 2 x 12 x 768 x 2 bytes


def test_activations_and_peaks_are_those_of_the_memory_account() -> None:
    text = called(main, "gpt2-small", "--batch", "16").stdout
    shape = StepShape(micro_batch=16, seq_len=1024, compute_bytes=2)
    found = next(line for line in text.splitlines() if line.startswith("  fused attention  ")).split()
    peak = memory(NAMED_SHAPES["gpt2-small"], shape).peak_bytes
    assert found[-3:-1] == [f"{peak / 1e9:.2f}", "GB"]
    recomputed = dataclasses.replace(shape, activation_checkpointing=True)
    kept = count_activations(NAMED_SHAPES["gpt2-small"], recomputed)
    assert kept == 16 * 1024 * (12 * 768 * 2 + 768 * (4 + 2) + 8)


def test_the_largest_batch_fits_and_one_more_does_not() -> None:
    config, shape = NAMED_SHAPES["gpt2-small"], StepShape(micro_batch=1, seq_len=1024, compute_bytes=2)
    sequences = largest_batch(config, shape, 24e9)
    peaks = [memory(config, dataclasses.replace(shape, micro_batch=n)).peak_bytes for n in (sequences, sequences + 1)]
    assert peaks[0] <= 24e9 < peaks[1]
    assert largest_batch(config, shape, 1e9) == 0
    line = next(line for line in called(main, "--card", "rtx-4090").stdout.splitlines() if "fused attention  " in line)
    assert line.split()[-1] == str(sequences)
    assert CARDS["rtx-4090"].gigabytes == 24 and all(card.name in PEAKS for card in CARDS.values())


def test_the_days() -> None:
    """GPT-2 small on 10B tokens: 0.75 hours on 8 H100 at 40 %, as its preset says."""
    text = called(main, "gpt2-small", "--tokens", "9999745024", "--card", "h100", "--num-cards", "8").stdout
    assert "9,999,745,024 tokens x 8.55e+08 FLOPs = 8.55e+18 FLOPs: 0.03 days on 8 x h100" in text
    text = called(main, "--card", "80", "--peak-tflops", "100", "--num-cards", "1", "--mfu", "0.5").stdout
    days = 20 * 124_439_808 * model_cost(NAMED_SHAPES["gpt2-small"]).flops_per_token / 50e12 / 86400
    assert f": {days:.2f} days on 1 x 80 at 50 % of 100.0 TFLOP/s each" in text
    assert "--peak-tflops tells" in called(main, "--card", "80").stdout


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("gpt3", "no shape 'gpt3'; there are gpt2-small, "),
        ("--card a1000", "--card a1000: give its memory in GB, or one of rtx-4090, "),
        ("--batch 0 --mfu -1", "--batch 0 must be more than 0; --mfu -1.0 must be more than 0"),
        ("--model.num-heads 7", "--model.width 768 is not divisible by --model.num-heads 7"),
    ],
)
def test_bad_input_is_one_line(flags: str, said: str) -> None:
    done = called(main, *flags.split())
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"budget: {said}") and done.stderr.count("\n") == 1
