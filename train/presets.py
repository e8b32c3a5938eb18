"""Named recipes. Every field a preset does not name keeps its default from config.py."""

from pathlib import Path

from model.config import NAMED_SHAPES, ModelConfig
from train.config import Config, DataConfig, OptimConfig, SaveConfig, TrackConfig, TrainConfig, ValidateConfig


def gpt2_small() -> Config:
    """GPT-2 small, 124M, on 10B tokens of FineWeb-Edu: 19,073 steps of 524,288 tokens.

    Learning rate 6e-4 with 700 steps of warm-up, cosine to 0: llm.c, scripts/run_gpt2_124M.sh; batch and decay:
    Brown et al. 2020, table 2.1 and appendix B.
    """
    return Config(preset="gpt2-small", model=NAMED_SHAPES["gpt2-small"])


def shakespeare_char_cpu() -> Config:
    """Tiny Shakespeare by characters on a CPU: nanoGPT's README recipe of this shape, minutes on 2 cores.

    4 layers, 4 heads, 128 wide, context 64, batch 12, 2,000 steps, learning rate 1e-3 to 1e-4, beta2 0.99.
    nanoGPT ends at 1.884 to 1.887.
    """
    return Config(
        preset="shakespeare-char-cpu",
        data=DataConfig(dir=Path("data/tinyshakespeare")),
        model=ModelConfig(num_layers=4, num_heads=4, width=128),
        train=TrainConfig(seq_len=64, steps=2000, batch_tokens=768, micro_batch=12, dtype="fp32", compile=False),
        optim=OptimConfig(lr_peak=1e-3, lr_final=1e-4, warmup_steps=100, beta2=0.99),
        validate=ValidateConfig(every=500, tokens=None),
        save=SaveConfig(every=500),
        track=TrackConfig(every=10),
    )


def quickstart() -> Config:
    """The Makefile's first run: the text inside CPython by characters, two processes, a few minutes on 2 cores."""
    return Config(
        preset="quickstart",
        data=DataConfig(dir=Path("data/python-docs")),
        model=ModelConfig(num_layers=4, num_heads=4, width=128),
        train=TrainConfig(seq_len=128, steps=800, batch_tokens=4096, micro_batch=16, dtype="fp32", compile=False),
        optim=OptimConfig(lr_peak=2e-3, lr_final=1e-4, warmup_steps=50, beta2=0.99),
        validate=ValidateConfig(every=200, tokens=65_536),
        save=SaveConfig(every=200),
        track=TrackConfig(every=10),
    )


PRESETS = {config.preset: config for config in (gpt2_small(), shakespeare_char_cpu(), quickstart())}
