"""Named recipes. Every field a preset does not name keeps its default from config.py."""

from pathlib import Path

from model.config import NAMED_SHAPES, ModelConfig
from train.config import (
    Config,
    DataConfig,
    OptimConfig,
    SampleConfig,
    SaveConfig,
    TrackConfig,
    TrainConfig,
    ValidateConfig,
)

FINEWEB_EDU_100B = DataConfig(dir=Path("data/fineweb_edu_100B"))


def gpt2_small() -> Config:
    """GPT-2 small, 124M, on 10B tokens of FineWeb-Edu: 19,073 steps of 524,288 tokens.

    Learning rate 6e-4 with 700 steps of warm-up, cosine to 0: llm.c, scripts/run_gpt2_124M.sh; batch and decay:
    Brown et al. 2020, table 2.1 and appendix B.
    Cost: 8.5e18 FLOPs; 0.75 hours on 8 H100 at 40 % of their peak.
    """
    return Config(preset="gpt2-small", model=NAMED_SHAPES["gpt2-small"])


def gpt2_medium() -> Config:
    """GPT-2 medium, 355M, on 31B tokens: 60,000 steps of 524,288, learning rate 3e-4 (llm.c, run_gpt2_350M.sh).

    Cost: 7.6e19 FLOPs; 6.7 hours on 8 H100 at 40 % of their peak (llm.c: 13.7 hours on 8 A100).
    """
    return Config(
        preset="gpt2-medium",
        data=FINEWEB_EDU_100B,
        model=NAMED_SHAPES["gpt2-medium"],
        train=TrainConfig(steps=60_000, micro_batch="auto"),
        optim=OptimConfig(lr_peak=3e-4),
    )


def gpt2_large() -> Config:
    """GPT-2 large, 774M, on 150B tokens: 286,102 steps of 524,288, learning rate 2.5e-4 (llm.c, run_gpt2_774M.sh).

    Cost: 7.8e20 FLOPs; 68 hours on 8 H100 at 40 % of their peak (llm.c: 135 hours on 8 A100).
    """
    return Config(
        preset="gpt2-large",
        data=FINEWEB_EDU_100B,
        model=NAMED_SHAPES["gpt2-large"],
        train=TrainConfig(steps=286_102, micro_batch="auto", loss="chunked"),
        optim=OptimConfig(lr_peak=2.5e-4),
    )


def gpt2_xl() -> Config:
    """GPT-2 XL, 1558M, on 34B tokens: 32,000 steps of 1,048,576, learning rate 6e-4 to 6e-5 (llm.c, run_gpt2_1558M.sh).

    Cost: 3.5e20 FLOPs; 30 hours on 8 H100 at 40 % of their peak (llm.c: 24 hours). Weights, gradients and optimizer
    take 25 GB of each GPU.
    """
    return Config(
        preset="gpt2-xl",
        data=FINEWEB_EDU_100B,
        model=NAMED_SHAPES["gpt2-xl"],
        train=TrainConfig(steps=32_000, batch_tokens=1_048_576, micro_batch="auto", loss="chunked"),
        optim=OptimConfig(lr_peak=6e-4, lr_final=6e-5),
    )


def shakespeare_char() -> Config:
    """Tiny Shakespeare by characters on one GPU: 6 layers, 6 heads, 384 wide, context 256, batch 64, 10.7M parameters.

    Shape and rates are nanoGPT's (config/train_shakespeare_char.py, val 1.4697 with dropout 0.2, best near step 1,750
    of its 5,000). There is no dropout here, so the run is shorter: 1,500 steps, 24 epochs; its loss is not measured.
    Cost: 1.7e15 FLOPs, a minute or so on a recent GPU.
    """
    return Config(
        preset="shakespeare-char",
        data=DataConfig(dir=Path("data/tinyshakespeare")),
        model=ModelConfig(num_layers=6, num_heads=6, width=384),
        train=TrainConfig(seq_len=256, steps=1500, batch_tokens=16_384, micro_batch=64),
        optim=OptimConfig(lr_peak=1e-3, lr_final=1e-4, warmup_steps=100, beta2=0.99),
        validate=ValidateConfig(every=250, tokens=None),
        sample=SampleConfig(every=250, tokens=300),
        save=SaveConfig(every=250),
        track=TrackConfig(wandb="disabled"),
    )


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
        sample=SampleConfig(every=500),
        save=SaveConfig(every=500),
        track=TrackConfig(wandb="disabled"),
    )


def stories_cpu() -> Config:
    """TinyStories on a CPU, for sweeps (launch/sweep.py): 4 layers, 4 heads, 128 wide, context 128, 150 steps.

    A run takes about a minute on one core. Data: 2 MB of stories with an own vocabulary of 1,000.
    """
    return Config(
        preset="stories-cpu",
        data=DataConfig(dir=Path("data/stories-1k")),
        model=ModelConfig(num_layers=4, num_heads=4, width=128),
        train=TrainConfig(seq_len=128, steps=150, batch_tokens=2048, micro_batch=16, dtype="fp32", compile=False),
        optim=OptimConfig(lr_peak=2e-3, warmup_steps=15),
        validate=ValidateConfig(every=50, tokens=32_768),
        sample=SampleConfig(every=None),
        save=SaveConfig(every=150, keep=1),
        track=TrackConfig(every=5, wandb="disabled"),
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
        sample=SampleConfig(every=200, prompts=("The ",)),
        save=SaveConfig(every=200),
        track=TrackConfig(wandb="disabled"),
    )


PRESETS = {
    config.preset: config
    for config in (
        gpt2_small(),
        gpt2_medium(),
        gpt2_large(),
        gpt2_xl(),
        shakespeare_char(),
        shakespeare_char_cpu(),
        stories_cpu(),
        quickstart(),
    )
}
