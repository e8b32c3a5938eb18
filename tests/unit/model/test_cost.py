"""The counts against torch's own counters, the tensors themselves, and published figures."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.config import NAMED_SHAPES, ModelConfig
from model.cost import CARDS, count_forward_flops, count_parameters, largest_batch, main, model_cost, parse
from model.costs.activations import StepShape, block_shapes, num_learned_numbers, root_shapes
from model.costs.gpu_peaks import PEAKS
from model.costs.memory import count_activations, memory
from model.gpt import GPT, build_model
from tests.helpers.runs import called
from tests.unit.model.test_switches import MODERN, ONE_BY_ONE, RECIPE, named
from train.config import OptimConfig
from train.optim import build_optimizer
from train.run.checkpoints import checkpoint_tensors

TINY = ModelConfig(num_layers=3, num_heads=2, width=32, vocab_size=100, context_len=16)
ALL_SWITCHES = [{}, *ONE_BY_ONE, {"norm_place": "post", "bias": False, "qk_norm": True, "mlp": "swiglu", "tie": False}]
COMPONENTS = {".wte.": "token embedding", ".wpe.": "position embedding", "_norm.": "norms", ".ln_": "norms"}
COMPONENTS |= {".attn.": "attention", ".mlp.": "mlp", "lm_head": "head", ".vte.": "value embeddings"}
COMPONENTS |= {"_scale": "shortcuts and skips"}


@pytest.mark.parametrize("switches", ALL_SWITCHES, ids=named)
def test_flops_equal_torchs_counter(switches: dict[str, Any]) -> None:
    config = dataclasses.replace(TINY, **switches)
    model = build_model(config, seed=1)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits_BTV = model(torch.zeros(4, 16, dtype=torch.int64))
        forward = counter.get_total_flops()
        logits_BTV.sum().backward()
    assert sum(count_forward_flops(config, batch=4, seq_len=16).values()) == forward
    assert model_cost(config).flops_per_token * 4 * 16 == counter.get_total_flops() == 3 * forward


@pytest.mark.parametrize("switches", ALL_SWITCHES, ids=named)
def test_parameters_equal_the_models_by_component(switches: dict[str, Any]) -> None:
    config = dataclasses.replace(TINY, **switches)
    with torch.device("meta"):
        model = GPT(config)
    counts = dict.fromkeys(count_parameters(config), 0)
    for name, parameter in model.named_parameters():
        counts[next(component for part, component in COMPONENTS.items() if part in name)] += parameter.numel()
    padding = (config.padded_vocab_size - config.vocab_size) * config.width
    counts["token embedding"] -= padding
    counts["head"] -= 0 if config.tie else padding
    counts["value embeddings"] -= config.value_embeddings * padding
    assert count_parameters(config) == counts
    num_held = sum(parameter.numel() for parameter in model.parameters())
    cost = model_cost(config)
    assert cost.num_parameters + cost.num_padding_parameters == num_held
    shapes = root_shapes(config) + config.num_layers * block_shapes(config)
    # The shapes are those of a block with every learned number, some of which other blocks lack.
    num_numbers = sum(parameter.numel() == 1 for parameter in model.parameters())
    lacking = config.num_layers * num_learned_numbers(config) - num_numbers
    assert sum(math.prod(shape) for shape in shapes) == num_held + lacking
    assert 0 <= lacking <= 4


def test_the_parameters_of_gpt2s_sizes_are_the_published_ones() -> None:
    published = {"small": 124_439_808, "medium": 354_823_168, "large": 774_030_080, "xl": 1_557_611_200}
    assert {size: model_cost(NAMED_SHAPES[f"gpt2-{size}"]).num_parameters for size in published} == published


@pytest.mark.parametrize("switches", [{}, MODERN, RECIPE], ids=["gpt2", "modern", "recipe"])
def test_bytes_equal_the_tensors(switches: dict[str, Any]) -> None:
    config = dataclasses.replace(TINY, **switches)
    model = build_model(config, seed=1)
    tensors = checkpoint_tensors(model, build_optimizer(model, OptimConfig()))
    in_checkpoint = sum(t.numel() * t.element_size() for name, t in tensors.items() if not name.endswith(".step"))
    assert model_cost(config).checkpoint_bytes == in_checkpoint
    gradients = sum(p.numel() * p.element_size() for p in model.parameters())
    assert model_cost(config).state_bytes == in_checkpoint + gradients


# --- The command ------------------------------------------------------------------------------------------------------

LLAMA_LIKE = "--model.norm rmsnorm --model.mlp swiglu --model.position-embedding rope --model.no-tie --model.no-bias"
LLAMA_LIKE += " --model.vocab-multiple 1 --model.mlp-width"


def printed(*flags: str) -> str:
    done = called(main, *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout


def row(text: str, name: str, last: bool = False) -> list[str]:
    """Return the figures of the first or last line that begins with `name`."""
    rows = [line.split(name)[1].split() for line in text.splitlines() if line.strip().startswith(name)]
    return rows[-1 if last else 0]


def test_the_published_tables_of_a_llama_like_shape_come_out_digit_by_digit() -> None:
    texts = {}
    for size, gigaflop in (("small", "350"), ("medium", "1,033"), ("large", "2,258"), ("xl", "4,513")):
        mlp_width = 4 * NAMED_SHAPES[f"gpt2-{size}"].width
        texts[size] = printed(f"gpt2-{size}", *LLAMA_LIKE.split(), str(mlp_width))
        assert row(texts[size], "total", last=True)[:2] == [gigaflop, "GFLOP"]
    assert row(texts["xl"], "total") == ["2,127,057,600"] and row(texts["xl"], "weights, fp32") == ["8.51", "GB"]
    names = ("attention projections", "attention scores", "attention values", "mlp", "head")
    assert [row(texts["small"], name, last=True)[2] for name in names] == ["16.6", "5.5", "5.5", "49.8", "22.6"]
    long_context = ["gpt2-xl", *LLAMA_LIKE.split(), "6400", "--seq-len", "16384"]
    assert row(printed(*long_context), "total", last=True)[:2] == ["149.5", "TFLOP"]
    flops = count_forward_flops(parse(long_context).model, batch=1, seq_len=16384)
    assert f"{100 * (flops['attention scores'] + flops['attention values']) / sum(flops.values()):.1f}" == "55.2"


def test_a_window_is_held_to_the_sequences_of_the_command() -> None:
    assert called(main, "gpt2-small", "--model.window", "2048", "--seq-len", "4096").returncode == 0
    refused = called(main, "gpt2-small", "--model.window", "512", "--seq-len", "256")
    assert refused.returncode == 2 and "--model.window 512 must lie between 1 and --train.seq-len 256" in refused.stderr


def test_the_command_without_arguments_counts_gpt2_small() -> None:
    text = printed()
    assert "GPT-2 as published" in text
    assert row(text, "total") == ["124,439,808"]
    assert row(text, "of vocabulary padding")[0] == "36,096"
    assert row(text, "KV cache per token") == ["36.9", "kB"]  # 2 x 12 x 768 x 2 bytes


def test_activations_peak_and_largest_batch_are_those_of_the_memory_account() -> None:
    config, shape = NAMED_SHAPES["gpt2-small"], StepShape(micro_batch=16, seq_len=1024, compute_bytes=2)
    fused = row(printed("gpt2-small", "--batch", "16", "--card", "rtx-4090"), "fused attention")
    largest = largest_batch(config, shape, 24e9)
    assert fused[2:] == [f"{memory(config, shape).peak_bytes / 1e9:.2f}", "GB", str(largest)]
    recomputed = dataclasses.replace(shape, activation_checkpointing=True)
    assert count_activations(config, recomputed) == 16 * 1024 * (12 * 768 * 2 + 768 * (4 + 2) + 8)
    peaks = [memory(config, dataclasses.replace(shape, micro_batch=n)).peak_bytes for n in (largest, largest + 1)]
    assert peaks[0] <= 24e9 < peaks[1]
    assert largest_batch(config, shape, 1e9) == 0
    assert CARDS["rtx-4090"][0] == 24 and all(name in PEAKS for _, name in CARDS.values())


def test_the_days_of_training() -> None:
    """GPT-2 small on 10B tokens takes 0.75 hours on 8 H100 at 40 %."""
    text = printed("gpt2-small", "--tokens", "9999745024", "--card", "h100", "--num-cards", "8")
    assert "9,999,745,024 tokens x 8.55e+08 FLOPs = 8.55e+18 FLOPs: 0.03 days on 8 x h100" in text
    text = printed("--card", "80", "--peak-tflops", "100", "--num-cards", "1", "--mfu", "0.5")
    days = 20 * 124_439_808 * model_cost(NAMED_SHAPES["gpt2-small"]).flops_per_token / 50e12 / 86400
    assert f": {days:.2f} days on 1 x 80 at 50 % of 100.0 TFLOP/s each" in text
    assert "give --peak-tflops" in printed("--card", "80")


def test_bad_input_is_one_line() -> None:
    for flags, message in (
        ("gpt3", "no shape 'gpt3'; there are gpt2-small, "),
        ("--card a1000", "--card a1000: give its memory in GB, or one of rtx-4090, "),
        ("--batch 0 --mfu -1", "--batch 0 must be a finite number above 0; --mfu -1.0 must be a finite"),
        ("--peak-tflops inf", "--peak-tflops inf must be a finite number above 0"),
        ("--mfu 40", "--mfu 40.0 must be at most 1"),
        ("--model.num-heads 7", "--model.width 768 is not divisible by --model.num-heads 7"),
    ):
        done = called(main, *flags.split())
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith(f"cost: {message}") and done.stderr.count("\n") == 1
