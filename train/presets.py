"""The presets: named recipes. A field that a preset does not set has its default from train/config.py."""

from dataclasses import replace
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
    return Config(preset="gpt2-small", model=NAMED_SHAPES["gpt2-small"], train=TrainConfig(micro_batch="auto"))


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


def gpt2_small_134m() -> Config:
    """GPT-2 small with RoPE, no biases, an untied head and a vocabulary of 32,000: 134.1M parameters.

    10B tokens, rates and batch as gpt2-small. Data: data_prep/bpe.py --vocab-size 32000 on a part of the text, then
    data_prep/textfiles.py --tokenizer FOLDER on all of it.
    Cost: 7.7e18 FLOPs; 0.68 hours on 8 H100 at 40 % of their peak.
    """
    return Config(
        preset="gpt2-small-134m",
        data=DataConfig(dir=Path("data/fineweb_edu_32k")),
        model=NAMED_SHAPES["gpt2-small-134m"],
        train=TrainConfig(micro_batch="auto"),
    )


def tinystories() -> Config:
    """TinyStories with a vocabulary of 10,000: RMSNorm, RoPE, SwiGLU, no biases, an untied head, 35.9M parameters.

    5,000 steps of 128 sequences of 256, 163.8M tokens, learning rate 2e-3. The published validation loss
    is 1.349; 1.45 is the usual target. Data: data_prep/bpe.py --vocab-size 10000, then
    data_prep/textfiles.py --tokenizer FOLDER.
    Cost: 3.2e16 FLOPs; some 3 minutes on an H100 at 20 % of its peak. Not measured.
    """
    return Config(
        preset="tinystories",
        data=DataConfig(dir=Path("data/tinystories-10k")),
        model=NAMED_SHAPES["tinystories"],
        train=TrainConfig(seq_len=256, steps=5000, batch_tokens=32_768, micro_batch=128),
        optim=OptimConfig(lr_peak=2e-3, warmup_steps=250),
        validate=ValidateConfig(every=500, tokens=2_097_152),
        sample=SampleConfig(every=1000, prompts=("", "Once upon a time")),
        track=TrackConfig(wandb="disabled"),
    )


def openwebtext_32k() -> Config:
    """The shape of tinystories on OpenWebText with a vocabulary of 32,000: 58.5M parameters, 42.1M with --model.tie.

    20,000 steps of 128 sequences of 512 tokens, 1.3B tokens. Data: data_prep/bpe.py --vocab-size 32000 on a part of the
    text, then data_prep/textfiles.py openwebtext --tokenizer FOLDER.
    Cost: 3.6e17 FLOPs; 15 minutes on an H100 at 40 % of its peak.
    """
    return Config(
        preset="openwebtext-32k",
        data=DataConfig(dir=Path("data/openwebtext-32k")),
        model=NAMED_SHAPES["openwebtext-32k"],
        train=TrainConfig(seq_len=512, steps=20_000, batch_tokens=65_536, micro_batch=64),
        optim=OptimConfig(lr_peak=2e-3, warmup_steps=1000),
        validate=ValidateConfig(every=1000, tokens=2_097_152),
        track=TrackConfig(wandb="disabled"),
    )


def phase1() -> Config:
    """A first model on a CPU: Tiny Shakespeare by characters, 2 layers, 4 heads, 128 wide, 0.4M parameters, 10 epochs.

    `python launch/sweep.py epochs` trains it and prints a row for each epoch: loss and sample.
    Cost: 2.9e13 FLOPs; 12 minutes of one core.
    """
    return Config(
        preset="phase1",
        data=DataConfig(dir=Path("data/tinyshakespeare")),
        model=ModelConfig(num_layers=2, num_heads=4, width=128),
        train=TrainConfig(seq_len=128, steps=1225, batch_tokens=8192, micro_batch=64, dtype="fp32", compile=False),
        optim=OptimConfig(lr_peak=2e-3, lr_final=1e-4, warmup_steps=100, beta2=0.99),
        validate=ValidateConfig(every=122, tokens=None),
        sample=SampleConfig(every=122, prompts=("ROMEO:",)),
        save=SaveConfig(every=122),
        track=TrackConfig(wandb="disabled"),
    )


def phase2() -> Config:
    """A second model on one GPU: 6 layers, 8 heads, 512 wide, GPT-2's vocabulary, 44.9M parameters, on 250 MB of text.

    Data: data_prep/fineweb.py --max-tokens 60000000 --out data/fineweb_edu_60M. Four epochs, since up to four
    are nearly as good as new text (Muennighoff et al. 2023): 3,660 steps of 65,536 tokens.
    Cost: 6.9e16 FLOPs; 3 minutes on an H100 at 40 % of its peak. The third model is gpt2-small.
    """
    return Config(
        preset="phase2",
        data=DataConfig(dir=Path("data/fineweb_edu_60M")),
        model=ModelConfig(num_layers=6, num_heads=8, width=512),
        train=TrainConfig(seq_len=512, steps=3660, batch_tokens=65_536, micro_batch=32),
        optim=OptimConfig(lr_peak=1e-3, warmup_steps=200),
        validate=ValidateConfig(every=250, tokens=1_048_576),
        sample=SampleConfig(every=500),
        track=TrackConfig(wandb="disabled"),
    )


def finetune() -> Config:
    """GPT-2 small's own weights, trained further on your text: give --data.dir, tokenized with --tokenizer gpt2.

    --from-checkpoint is the Hugging Face folder `gpt2` unless given. Another size needs its --model.num-layers,
    --model.num-heads and --model.width. 20 steps of 32 sequences of 1,024 at a constant 3e-5,
    without warm-up: nanoGPT, config/finetune_shakespeare.py (there GPT-2 XL, on 2.2 epochs of Tiny Shakespeare). With a
    shorter --train.seq-len, the folder's first positions are taken. Not measured with OpenAI's weights.
    Cost: 5.6e14 FLOPs; some seconds on a recent GPU.
    """
    return Config(
        preset="finetune",
        from_checkpoint="gpt2",
        data=DataConfig(dir=Path("data/mine")),
        model=NAMED_SHAPES["gpt2-small"],
        train=TrainConfig(steps=20, batch_tokens=32_768, micro_batch=4),
        optim=OptimConfig(lr_peak=3e-5, schedule="constant", warmup_steps=0),
        validate=ValidateConfig(every=5, tokens=327_680),
        sample=SampleConfig(every=10),
        save=SaveConfig(every=10),
        track=TrackConfig(every=1, wandb="disabled"),
    )


def shakespeare_char() -> Config:
    """Tiny Shakespeare by characters on one GPU: 6 layers, 6 heads, 384 wide, context 256, batch 64, 10.7M parameters.

    Shape, rates, 5,000 steps and dropout 0.2 are nanoGPT's (config/train_shakespeare_char.py, val 1.4697, best near
    step 1,750). Its dropout is on attention's weights too, ours is not; our loss is not measured.
    Cost: 5.8e15 FLOPs, some minutes on a recent GPU.
    """
    return Config(
        preset="shakespeare-char",
        data=DataConfig(dir=Path("data/tinyshakespeare")),
        model=ModelConfig(num_layers=6, num_heads=6, width=384, dropout=0.2),
        train=TrainConfig(seq_len=256, steps=5000, batch_tokens=16_384, micro_batch=64),
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

    A run takes about a minute on one core. Data: 2 MB of stories with a vocabulary of 1,000.
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
    """The run of `make quickstart`: the text inside CPython by characters, two processes, 3 minutes on 2 cores."""
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


# Switches and rates of the fast recipes, which docs/recipe.md measures rung by rung.
FAST = ModelConfig(
    position_embedding="rope",
    norm="rmsnorm",
    mlp="relu2",
    tie=False,
    bias=False,
    qk_norm=True,
    zero_init_projections=True,
)
FAST_RATES = OptimConfig(
    name="muon",
    lr_peak=0.02,
    embedding_lr=0.1,
    head_lr=0.005,
    vector_lr=0.01,
    schedule="wsd",
    warmdown_fraction=0.5,
    warmup_steps=10,
)


def speedrun() -> Config:
    """GPT-2 small's layers with Muon, heads of 128 and the switches of docs/recipe.md, on FineWeb-Edu: 162M parameters.

    3,240 steps of 524,288 tokens, 1.7B. A plain script of modded-nanogpt reaches GPT-2 small's usual loss with so many
    (2.95B by AdamW); gpt2-small takes 10B. Rates and steps are not measured at this size.
    Cost: 1.45e18 FLOPs; 0.127 hours on 8 H100 at 40 % of their peak.
    """
    return Config(
        preset="speedrun",
        model=replace(FAST, num_heads=6, value_residual=True, embedding_shortcut=True, logit_softcap=15.0),
        train=TrainConfig(steps=3240, micro_batch="auto"),
        optim=replace(FAST_RATES, warmup_steps=100, momentum_warmup_steps=300),
    )


def speedrun_cpu() -> Config:
    """The loss of `quickstart` for a tenth of its tokens, on the same text: Muon and the switches of docs/recipe.md.

    Val 1.758 (quickstart: 1.822). Cost: 320 steps of 1,024 tokens, half a minute in two processes.
    """
    plain = quickstart()
    return replace(
        plain,
        preset="speedrun-cpu",
        model=replace(FAST, num_layers=4, num_heads=4, width=128),
        train=replace(plain.train, steps=320, batch_tokens=1024, micro_batch=4),
        optim=FAST_RATES,
        validate=replace(plain.validate, every=80),
        sample=replace(plain.sample, every=80),
        save=replace(plain.save, every=80),
    )


PRESETS = {
    config.preset: config
    for config in (
        *(gpt2_small(), gpt2_medium(), gpt2_large(), gpt2_xl(), gpt2_small_134m(), phase1(), phase2(), tinystories()),
        *(openwebtext_32k(), finetune(), shakespeare_char(), shakespeare_char_cpu(), stories_cpu(), quickstart()),
        *(speedrun(), speedrun_cpu()),
    )
}
