"""The configuration of a run: frozen dataclasses, which train/command_line.py fills and config_checks.py checks."""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from common.errors import InputError
from common.flags import HIDDEN
from common.redaction import redacted
from model.config import ModelConfig
from model.costs.gpu_peaks import DType

FIRST_MOMENTUM = 0.85  # where --optim.momentum-warmup-steps begin (Jordan et al. 2024, modded-nanogpt)
FREE_TEXT = ("project", "group", "tags", "prompts")  # settings that nothing reads back


@dataclass(frozen=True)
class DataConfig:
    dir: Path = Path("data/fineweb_edu_10B")
    """Data directory, as data_prep/ makes it."""
    skip_sequences: tuple[int, ...] = ()
    """Training sequences that are never read, such as those of a step that was not finite. The next sequence of the
    data takes the place of each. The list may grow when a run is continued."""
    verify: bool = True
    """Before the first step, hold the shards to the manifest's hashes and vocabulary. Each host reads a shard once and
    again only if its size, times or inode have changed."""


@dataclass(frozen=True)
class TrainConfig:
    seq_len: int = 1024
    """Tokens per sequence; also the model's context."""
    steps: int = 19_073
    """Optimizer steps."""
    tokens: int | None = None
    """Training length in tokens, instead of --train.steps; rounded down to whole steps."""
    batch_tokens: int = 524_288
    """Tokens per optimizer step over all processes, whatever their number."""
    batch_stages: tuple[str, ...] = ()
    """STEP:TOKENS ..., such as 1000:524288 4000:1048576: after so many steps, a step has so many tokens. The learning
    rate's schedule counts steps, whatever their size."""
    micro_batch: int | Literal["auto"] = 16
    """Sequences in one forward pass of one process. It must divide the process's share of the batch, or may exceed it;
    gradient accumulation makes up the rest. auto: the largest that fits the GPU, measured before step 0 and kept in
    config.json."""
    dtype: DType = "bf16"
    """Precision of activations and matrix products. Weights, gradients and their reduction are fp32. fp16 uses a loss
    scale. tf32 is fp32 with matrix products in TF32 on a GPU. fp32 never uses TF32."""
    compile: bool = True
    """Compile the model block by block with torch.compile."""
    compile_mode: Literal["default", "max-autotune-no-cudagraphs"] = "default"
    """torch.compile's mode. max-autotune-no-cudagraphs: time several kernels for each product and fusion and take the
    fastest, which takes minutes at the start."""
    cuda_graphs: bool = False
    """Capture a micro-batch's forward and backward pass as one CUDA graph, for small models, whose kernels are done
    before the next is launched. One process on one GPU."""
    loss: Literal["plain", "chunked"] = "plain"
    """chunked: the same loss without ever holding the logits of a whole micro-batch."""
    loss_chunk_tokens: int = 8192
    """chunked: tokens whose logits are computed at once; 8,192 take 1.6 GB in fp32 with GPT-2's vocabulary."""
    attention_backend: Literal["auto", "flash", "cudnn", "efficient", "fa3"] = "auto"
    """--model.attention sdpa: the library whose kernel is used. auto: the fastest for this GPU and these shapes,
    measured before step 0 and kept in config.json; on a CPU, torch's choice. flash: FlashAttention 2. fa3:
    FlashAttention 3, which needs its package, flash_attn_interface. efficient: CUTLASS."""
    fp8: Literal["head", "blocks", "all"] | None = None
    """Compute the matrix products of the head, of the blocks or of both in FP8, with a scale for each row; gradients of
    weights stay in bf16, and evaluations compute without FP8. Faster and less exact; needs --train.dtype bf16 and a GPU
    with FP8 units."""
    activation_checkpointing: bool = False
    """Keep only each block's input and compute the block again in the backward pass: less memory for one more forward
    pass."""
    deterministic: bool = False
    """Use deterministic kernels only: bitwise repeatable on a GPU too, somewhat slower."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do when a step's loss or gradient is not finite; its update is never made. stop: save the state before
    it, name its sequences and fail. skip: record its sequences and go on, but stop after 20 such steps in a row."""
    diverged_above: float | None = None
    """End the run as failed once the loss is above this in two consecutive rows of metrics.jsonl; None: never."""

    @property
    def stages(self) -> list["Stage"]:
        """Return --train.batch-tokens and --train.batch-stages as stages. Raise InputError if one cannot be read."""
        return [Stage("--train.batch-tokens ", 0, self.batch_tokens), *map(parse_stage, self.batch_stages)]

    @property
    def total_tokens(self) -> int:
        """Return the tokens of all steps."""
        ends = [stage.first_step for stage in self.stages[1:]] + [self.steps]
        return sum((end - stage.first_step) * stage.tokens for stage, end in zip(self.stages, ends, strict=True))

    def steps_of(self, tokens: int) -> int:
        """Return the number of whole steps that `tokens` are enough for."""
        stages, steps = self.stages, 0
        for stage, following in zip(stages, [*stages[1:], None], strict=True):
            steps = stage.first_step + tokens // stage.tokens
            if following is None or steps < following.first_step:
                break
            tokens -= (following.first_step - stage.first_step) * stage.tokens
        return steps


class Stage(NamedTuple):
    """The size of a step's batch from a step (counted from 0) on, and the flag that says so, up to its tokens."""

    flag: str
    first_step: int
    tokens: int


def parse_stage(text: str) -> Stage:
    """Return the stage that --train.batch-stages names 1000:524288. Raise InputError for anything else."""
    match = re.fullmatch(r"([0-9]{1,18}):([0-9]{1,18})", text)
    if match is None or not int(match[1]) or not int(match[2]):
        raise InputError(
            f"--train.batch-stages {text}: needs STEP:TOKENS, both at least 1, as in --train.batch-stages 1000:524288"
        )
    return Stage(f"--train.batch-stages {match[1]}:", int(match[1]), int(match[2]))


@dataclass(frozen=True)
class OptimConfig:
    name: Literal["adamw", "muon"] = "adamw"
    """adamw: Loshchilov & Hutter 2019. muon: Muon for the matrices of the blocks (Jordan et al. 2024), AdamW for the
    rest. A usual --optim.lr-peak is 0.02 for muon's matrices; AdamW's rates below are smaller or larger."""
    lr_peak: float = 6e-4
    """Learning rate after warm-up. The rates below follow the same schedule."""
    embedding_lr: float | None = None
    """Learning rate of the embeddings after warm-up, and of a tied head; None: --optim.lr-peak."""
    head_lr: float | None = None
    """Learning rate of an untied head after warm-up; None: --optim.lr-peak."""
    vector_lr: float | None = None
    """Learning rate of norms, biases and single numbers after warm-up; None: --optim.lr-peak."""
    lr_final: float = 0.0
    """Learning rate at the end of the schedules cosine and wsd."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """Learning rate after warm-up. wsd: constant, then linear down to --optim.lr-final."""
    warmdown_fraction: float = 0.2
    """Part of all steps, at the end, in which wsd falls to --optim.lr-final."""
    warmup_steps: int = 700
    """Steps of linear warm-up."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the square root of the second moment."""
    momentum: float = 0.95
    """muon: decay of the momentum, which is Nesterov's."""
    momentum_warmup_steps: int = 0
    """muon: steps in which the momentum rises from 0.85."""
    weight_decay: float = 0.1
    """Decoupled weight decay. adamw: of matrices and embeddings; biases and norms have none. muon: of the matrices of
    the blocks alone."""
    clip_norm: float | None = 1.0
    """Largest global gradient norm; None: no clipping."""
    average_fraction: float | None = None
    """Part of all steps, at the end, over which an exponential mean of the weights is kept. Evaluations, samples,
    exports and every command that reads the run take the mean for the weights. None: no mean."""
    average_decay: float | None = None
    """How much a step's weights count in the mean, as a part of the next step's. None: N / (N + 10) for N averaged
    steps, so that the mean reaches back over a tenth of them."""


@dataclass(frozen=True)
class ValidateConfig:
    every: int | None = 250
    """Steps between validations, besides the first and the last; None: no validation."""
    tokens: int | None = 10_485_760
    """Validation tokens, from the start of the split, the same each time; None: the whole split."""
    hellaswag: Path | None = None
    """Also score HellaSwag: the directory of data_prep/hellaswag.py, or a file in the original form; None: do not."""
    hellaswag_every: int | None = 1000
    """Steps between HellaSwag scores, besides the last; None: no scores."""
    hellaswag_items: int | None = None
    """Number of HellaSwag items to score, from the first on; None: all."""


@dataclass(frozen=True)
class SampleConfig:
    every: int | None = 1000
    """Steps between samples, besides the last; None: no samples."""
    prompts: tuple[str, ...] = ("",)
    """Prompts to continue, each with the same random numbers every time; empty: a new document."""
    tokens: int = 100
    """Tokens in each continuation."""


@dataclass(frozen=True)
class SaveConfig:
    every: int = 1000
    """Steps between checkpoints, besides the last."""
    every_seconds: float | None = None
    """Also save when this many seconds have passed since the last save began; None: by steps only."""
    mode: Literal["auto", "sync", "async"] = "auto"
    """async: copy the state to host memory (its size, spread over all processes) and write it while training goes on.
    auto: async on GPUs, sync on CPUs."""
    keep: int = 2
    """Newest checkpoints to keep, besides the one that this attempt continued from."""
    keep_every: int | None = None
    """Also keep every checkpoint whose step is a multiple of this; None: only the newest."""
    on_failure: Literal["retry", "stop"] = "retry"
    """What to do when a save fails, as on a full disk. retry: warn, train on, and save again when the next save is due
    or after --save.retry-seconds. stop: end the run. Both for synchronous and asynchronous saves."""
    failures_in_a_row: int = 10
    """retry: end the run after so many failed saves in a row; at most one is counted in --save.retry-seconds."""
    retry_seconds: float = 60.0
    """retry: save again so long after a failure if no save is due sooner; at the run's end, keep trying for so long."""


@dataclass(frozen=True)
class ParallelConfig:
    mode: Literal["auto", "none", "ddp", "fsdp", "hsdp"] = "auto"
    """ddp: every process holds all weights, gradients and optimizer state. fsdp: each holds an equal part (FSDP2).
    hsdp: each holds a part within its group of --parallel.shard-size. auto: ddp while the state fills at most half of a
    process's memory, else fsdp, or over several hosts hsdp where one host can hold a copy."""
    shard_size: int | None = None
    """hsdp: processes that together hold one copy; None: those of one host."""
    reshard_after_forward: bool = True
    """fsdp, hsdp: free each block's gathered weights between its forward and backward passes, and gather them twice."""
    reduce_gradients: Literal["auto", "step", "micro_batch"] = "auto"
    """fsdp, hsdp: when gradients are reduced. step: once a step, for 4 more bytes per parameter. micro_batch: after
    each micro-batch, keeping only the own shard. auto: step while whole gradients fit comfortably."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """ddp, fsdp: the dtype in which gradients are sent and added up over the processes. bf16 halves what is sent and
    rounds each sum to 8 bits; gradients, their norm and the update stay fp32."""
    init_timeout_seconds: float = 1800
    """End the run as hung after this long without progress before the first step is done (loading, compilation)."""
    timeout_seconds: float = 600
    """End the run as hung after this long without progress later on. The longest single piece of work is a save."""


@dataclass(frozen=True)
class TrackConfig:
    every: int = 10
    """Steps between rows in metrics.jsonl, on the console and in W&B."""
    wandb: Literal["online", "offline", "disabled"] = "online"
    """Weights & Biases. online without a login goes offline, and reports it."""
    project: str = "gpt-ladder"
    """W&B project."""
    group: str | None = None
    """W&B group."""
    tags: tuple[str, ...] = ()
    """W&B tags."""
    peak_tflops: float | None = None
    """The GPU's dense peak in TFLOP/s at --train.dtype, for MFU; None: from the table in model/costs/gpu_peaks.py."""


@dataclass(frozen=True)
class Config:
    """Train a GPT. The same command line again continues the run."""

    preset: Annotated[str, HIDDEN] = "gpt2-small"
    run_dir: Path | None = None
    """Run directory; None: runs/PRESET."""
    seed: int = 1337
    """Seed of the initial weights and of the order of the data."""
    resume: bool = True
    """Continue from the newest sound checkpoint; --no-resume refuses a run directory that has one."""
    from_checkpoint: str | None = None
    """RUN or RUN@STEP: begin a new run with the weights of another run's newest checkpoint, or of one step. Or a
    Hugging Face folder of a GPT-2: if its context is longer than --train.seq-len, its first positions are taken."""
    stop_after: str | None = None
    """Stop with a checkpoint when this process has run for so long: 3h50m, 90m, 1d12h. A restart counts anew."""
    dry_run: bool = False
    """Print the run card and stop."""
    preflight: bool = False
    """First check hosts, GPUs and the shared run directory; refuse to start where they are unfit."""
    trace: str | None = None
    """FIRST:END: profile the steps from FIRST up to, not including, END into RUN_DIR/traces."""
    trace_ranks: tuple[int, ...] = (0,)
    """Ranks that --trace profiles."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    validate: ValidateConfig = field(default_factory=ValidateConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    track: TrackConfig = field(default_factory=TrackConfig)

    @property
    def directory(self) -> Path:
        return self.run_dir or Path("runs") / self.preset

    @property
    def sequences_per_step(self) -> int:
        """The global batch in sequences of seq_len tokens, before any of --train.batch-stages."""
        return self.train.batch_tokens // self.train.seq_len

    def to_json(self) -> dict[str, Any]:
        """Return plain values, as config.json and checkpoints hold them: free text without secrets."""
        return dataclasses.asdict(self, dict_factory=_plain)


def _plain(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in pairs}
    free = {name: plain[name] for name in FREE_TEXT if plain.get(name)}
    return plain | {n: tuple(map(redacted, v)) if isinstance(v, tuple) else redacted(v) for n, v in free.items()}


SECONDS_PER = {"d": 86_400, "h": 3600, "m": 60, "s": 1}


def parse_duration(text: str) -> int:
    """Return the seconds of 3h50m, 90m, 1d12h or 45s. Raise InputError for anything else."""
    match = re.fullmatch(r"(\d+d)?(\d+h)?(\d+m)?(\d+s)?", text)
    seconds = sum(int(part[:-1]) * SECONDS_PER[part[-1]] for part in match.groups() if part) if match else 0
    if seconds == 0:
        raise InputError(f"{text} is not a duration; write it like 3h50m, 90m, 1d12h or 45s")
    return seconds


def parse_steps(text: str) -> range:
    """Return range(10, 15) for `10:15`, the steps of metrics rows 11 to 15. Raise InputError for anything else."""
    match = re.fullmatch(r"(\d+):(\d+)", text, re.ASCII)
    if match is None or int(match[1]) >= int(match[2]):
        raise InputError(f"--trace {text}: needs FIRST:END with 0 <= FIRST < END, as in --trace 10:15")
    return range(int(match[1]), int(match[2]))


def resolve(config: Config) -> Config:
    """Fill in the fields that follow from others: steps from tokens, the model's context from the sequence length."""
    train = config.train
    if train.tokens is not None:
        train = dataclasses.replace(train, steps=train.steps_of(train.tokens), tokens=None)
    model = dataclasses.replace(config.model, context_len=train.seq_len)
    return dataclasses.replace(config, train=train, model=model)


def with_vocabulary(config: Config, vocab_size: int, eot_id: int | None = None) -> Config:
    """Return the config for a data set's vocabulary and its end-of-text token, if it has one."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab_size, eot_id=eot_id))
