"""The configuration: frozen dataclasses, one `parse`, and every cross-check, reported all at once."""

import dataclasses
import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from common.errors import InputError
from model.config import ModelConfig
from model.costs.gpu_peaks import DType
from train.metrics.profiler import parse_steps


@dataclass(frozen=True)
class DataConfig:
    dir: Path = Path("data/fineweb_edu_10B")
    """Data directory, as data_prep/ makes it."""
    skip_sequences: tuple[int, ...] = ()
    """Training sequences never to read, such as made a step non-finite: the one after each in the data stands in its
    place. May be added to when a run is continued."""


@dataclass(frozen=True)
class TrainConfig:
    seq_len: int = 1024
    """Tokens per sequence; also the model's context."""
    steps: int = 19_073
    """Optimizer steps."""
    tokens: int | None = None
    """Training length in tokens, in place of --train.steps (rounded down to whole steps)."""
    batch_tokens: int = 524_288
    """Tokens per step over all processes, whatever their number."""
    micro_batch: int | Literal["auto"] = 16
    """TrainingSequences of one process's forward pass; must divide its share of the batch, or be the whole of it where the share
    is less. Accumulation makes up the rest. auto: the largest that fits the GPU, found before step 0 and kept in
    config.json."""
    dtype: DType = "bf16"
    """Of the activations and matrix products; weights, gradients and their reduction are fp32. fp16 comes with a
    loss scale; tf32 is fp32 with products in TF32 on the GPU; fp32 never uses TF32."""
    compile: bool = True
    """torch.compile, block by block."""
    loss: Literal["plain", "chunked"] = "plain"
    """chunked: the same loss without ever holding the logits of a whole micro-batch."""
    activation_checkpointing: bool = False
    """Keep only each block's input and compute the block again in the backward pass: less memory for one more
    forward pass."""
    deterministic: bool = False
    """Deterministic kernels only: bitwise repeatable on a GPU too, somewhat slower."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """When a step's loss or gradient is not finite, its update is never made. stop: save the state before it, name its
    sequences, fail. skip: note its sequences and go on, but for 20 such steps in a row."""
    diverged_above: float | None = None
    """A loss above this in two rows of metrics.jsonl, one after the other, ends the run as failed."""


@dataclass(frozen=True)
class OptimConfig:
    name: Literal["adamw"] = "adamw"
    """The optimizer."""
    lr_peak: float = 6e-4
    """Learning rate after warm-up."""
    lr_final: float = 0.0
    """Learning rate at the end of cosine and wsd."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """Course of the learning rate after warm-up; wsd: constant, then a linear warm-down."""
    warmdown_fraction: float = 0.2
    """Last part of all steps in which wsd falls to lr_final."""
    warmup_steps: int = 700
    """Steps of linear warm-up."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices and embeddings; biases and norms have none."""
    clip_norm: float | None = 1.0
    """Largest global gradient norm; None for no clipping."""


@dataclass(frozen=True)
class ValidateConfig:
    every: int | None = 250
    """Steps between validations, beside the first and the last; None for no validation at all."""
    tokens: int | None = 10_485_760
    """Validation tokens, from the start of the split and the same each time; None for all of them."""
    hellaswag: Path | None = None
    """Score HellaSwag, too: data_prep/hellaswag.py's directory, or a file in the original form. None: do not."""
    hellaswag_every: int | None = 1000
    """Steps between its scores, beside the last; None for none."""
    hellaswag_items: int | None = None
    """Score the first so many of its items; None for all."""


@dataclass(frozen=True)
class SampleConfig:
    every: int | None = 1000
    """Steps between samples, beside the last; None for none."""
    prompts: tuple[str, ...] = ("",)
    """What to continue, each with the same random numbers every time; empty: a new document."""
    tokens: int = 100
    """Length of each continuation."""


@dataclass(frozen=True)
class SaveConfig:
    every: int = 1000
    """Steps between checkpoints, beside the last."""
    every_seconds: float | None = None
    """Also save when this long has passed since the last save began."""
    mode: Literal["auto", "sync", "async"] = "auto"
    """async: copy the state, which takes its size in host memory over all processes, and write it while training goes
    on. auto: async on GPUs, sync on CPUs."""
    keep: int = 2
    """Newest checkpoints to keep, beside the one that this attempt continued from."""
    keep_every: int | None = None
    """Also keep every checkpoint whose step this divides."""


@dataclass(frozen=True)
class ParallelConfig:
    mode: Literal["auto", "none", "ddp", "fsdp", "hsdp"] = "auto"
    """ddp: every process holds all weights, gradients and optimizer state; fsdp: an equal part of them; hsdp: a part
    within each group of --parallel.shard-size. auto: ddp while they fill at most half of a process's memory, else fsdp,
    or over several hosts hsdp where a host can hold them."""
    shard_size: int | None = None
    """hsdp: processes that together hold one copy; None: those of one host."""
    reshard_after_forward: bool = True
    """fsdp, hsdp: free each block's gathered weights between its forward and backward passes, and gather them twice."""
    reduce_gradients: Literal["auto", "step", "micro_batch"] = "auto"
    """fsdp, hsdp: add up whole gradients over micro-batches and reduce them once a step, for 4 bytes per parameter, or
    reduce them after each and keep the own shard. auto: whole while they fit comfortably."""
    init_timeout_seconds: float = 1800
    """The run hangs, and is ended, after so long without progress before its first step is done: reads, compilation."""
    timeout_seconds: float = 600
    """The same after it. The longest single piece of work is a checkpoint's."""


@dataclass(frozen=True)
class TrackConfig:
    every: int = 10
    """Steps between rows in metrics.jsonl, on the console and in W&B."""
    wandb: Literal["online", "offline", "disabled"] = "online"
    """Weights & Biases. online without a login goes offline, and says so."""
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

    preset: Annotated[str, tyro.conf.Suppress] = "gpt2-small"
    run_dir: Path | None = None
    """Run directory; None: runs/PRESET."""
    seed: int = 1337
    """Of the initial weights and the order of the data."""
    resume: bool = True
    """Continue from the newest sound checkpoint; --no-resume refuses a run directory that has one."""
    from_checkpoint: str | None = None
    """RUN or RUN@STEP: begin a new run with the weights of another's newest checkpoint, or of one step. Or a Hugging
    Face folder of GPT-2's; of a longer context than --train.seq-len its first positions are taken."""
    stop_after: str | None = None
    """Stop with a checkpoint when this process is so old: 3h50m, 90m, 1d12h. A restart counts anew."""
    dry_run: bool = False
    """Print the run card and stop."""
    preflight: bool = False
    """Look over versions, GPUs and the shared run directory first; refuse to start where they are unfit."""
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
        """The global batch in sequences of seq_len tokens."""
        return self.train.batch_tokens // self.train.seq_len

    def to_json(self) -> dict[str, Any]:
        """Plain values, as config.json and checkpoints hold them."""
        return dataclasses.asdict(self, dict_factory=_plain)


def _plain(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in pairs}


def parse(args: Sequence[str], presets: dict[str, Config]) -> Config:
    """`[PRESET] [--section.field value ...]` -> a resolved Config; every fault in one InputError."""
    name, flags = ("gpt2-small", list(args)) if not args or args[0].startswith("-") else (args[0], list(args[1:]))
    if name not in presets:
        raise InputError(f"no preset {name!r}{_suggestion(name, presets)}; there are {', '.join(presets)}")
    preset = presets[name]
    config, unknown = tyro.cli(
        Config,
        prog=f"train/main.py {name}",
        description=f"{Config.__doc__} Presets, first on the line: {', '.join(presets)}.",
        args=flags,
        default=preset,
        return_unknown_args=True,
    )
    if unknown:
        known = _flags_of(Config)
        unknown = [given for given in unknown if given.startswith("-")] or unknown  # without the flags' values
        raise InputError("; ".join(f"unknown {flag!r}{_suggestion(flag.split('=')[0], known)}" for flag in unknown))
    faults = faults_of(config)
    if config.train.tokens is not None and config.train.steps != preset.train.steps:
        faults.append("--train.steps and --train.tokens both set the length of the run; give one")
    if faults:
        raise InputError("\n  ".join([f"{len(faults)} faults:", *faults]) if len(faults) > 1 else faults[0])
    return resolve(config)


SECONDS_PER = {"d": 86_400, "h": 3600, "m": 60, "s": 1}


def parse_duration(text: str) -> int:
    """Seconds of 3h50m, 90m, 1d12h or 45s; InputError for anything else."""
    match = re.fullmatch(r"(\d+d)?(\d+h)?(\d+m)?(\d+s)?", text)
    seconds = sum(int(part[:-1]) * SECONDS_PER[part[-1]] for part in match.groups() if part) if match else 0
    if seconds == 0:
        raise InputError(f"{text} is no time; write it like 3h50m, 90m, 1d12h or 45s")
    return seconds


def resolve(config: Config) -> Config:
    """Fill in what follows from other fields: the steps from the tokens, the context from the sequence."""
    train = config.train
    if train.tokens is not None:
        train = dataclasses.replace(train, steps=train.tokens // train.batch_tokens, tokens=None)
    model = dataclasses.replace(config.model, context_len=train.seq_len)
    return dataclasses.replace(config, train=train, model=model)


def with_vocabulary(config: Config, vocab_size: int, eot_id: int | None = None) -> Config:
    """The config for a data set: its vocabulary is the model's, and so is the token that begins a document, if any."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab_size, eot_id=eot_id))


def faults_of(config: Config) -> list[str]:
    """Everything wrong with the values themselves: value, rule and flag, one line each."""
    train, optim = config.train, config.optim
    at_least_one = {
        "--train.seq-len": train.seq_len,
        "--train.steps": train.steps,
        "--train.batch-tokens": train.batch_tokens,
        "--train.micro-batch": None if train.micro_batch == "auto" else train.micro_batch,
        "--save.every": config.save.every,
        "--save.keep": config.save.keep,
        "--save.keep-every": config.save.keep_every,
        "--validate.every": config.validate.every,
        "--validate.tokens": config.validate.tokens,
        "--validate.hellaswag-every": config.validate.hellaswag_every,
        "--validate.hellaswag-items": config.validate.hellaswag_items,
        "--sample.every": config.sample.every,
        "--sample.tokens": config.sample.tokens,
        "--track.every": config.track.every,
        "--parallel.shard-size": config.parallel.shard_size,
    }
    faults = [
        f"{flag} {value} must be at least 1" for flag, value in at_least_one.items() if value is not None and value < 1
    ]
    faults += config.model.faults()
    if train.seq_len > 0 and train.batch_tokens > 0 and train.batch_tokens % train.seq_len:
        lower = train.batch_tokens // train.seq_len * train.seq_len
        nearest = " or ".join(str(n) for n in (lower, lower + train.seq_len) if n)
        faults.append(
            f"--train.batch-tokens {train.batch_tokens} "
            f"is not divisible by --train.seq-len {train.seq_len}; try {nearest}"
        )
    if train.tokens is not None and train.tokens < train.batch_tokens:
        faults.append(
            f"--train.tokens {train.tokens} is less than one step of --train.batch-tokens {train.batch_tokens}"
        )
    at_least_zero = {
        "--optim.lr-final": optim.lr_final,
        "--optim.warmup-steps": optim.warmup_steps,
        "--optim.weight-decay": optim.weight_decay,
        "--seed": config.seed,
    }
    faults += [f"{flag} {value} must not be negative" for flag, value in at_least_zero.items() if value < 0]
    more_than_zero = {
        "--optim.lr-peak": optim.lr_peak,
        "--optim.epsilon": optim.epsilon,
        "--optim.clip-norm": optim.clip_norm,
        "--train.diverged-above": train.diverged_above,
        "--track.peak-tflops": config.track.peak_tflops,
        "--save.every-seconds": config.save.every_seconds,
        "--parallel.init-timeout-seconds": config.parallel.init_timeout_seconds,
        "--parallel.timeout-seconds": config.parallel.timeout_seconds,
    }
    faults += [
        f"{flag} {value} must be more than 0"
        for flag, value in more_than_zero.items()
        if value is not None and not value > 0
    ]
    faults += [
        f"{flag} {value} must be a finite number"
        for flag, value in (at_least_zero | more_than_zero).items()
        if value is not None and not math.isfinite(value)
    ]
    for flag, value in {"--optim.beta1": optim.beta1, "--optim.beta2": optim.beta2}.items():
        if not 0 <= value < 1:
            faults.append(f"{flag} {value} must lie in [0, 1)")
    if not 0 < optim.warmdown_fraction <= 1:
        faults.append(f"--optim.warmdown-fraction {optim.warmdown_fraction} must lie in (0, 1]")
    if config.trace is not None:
        try:
            parse_steps(config.trace)
        except InputError as error:
            faults.append(str(error))
    if config.stop_after is not None:
        try:
            parse_duration(config.stop_after)
        except InputError as error:
            faults.append(f"--stop-after {error}")
    if config.sample.every is not None and not config.sample.prompts:
        faults.append("--sample.prompts names no prompt; give one, or --sample.every None")
    return faults


def settings_without_effect(config: Config, device_type: str, world: int, mode: str) -> list[str]:
    """What was set and does nothing in `world` processes on a "cpu" or "cuda" device that share a model as `mode` says,
    one line each, for a warning."""
    said = []
    parallel, model = config.parallel, config.model
    if model.kind != "gpt" and config.train.activation_checkpointing:
        said.append(f"--train.activation-checkpointing has no effect with --model.kind {model.kind}: it has no blocks")
    if model.value_residual and model.num_layers == 1:
        said.append("--model.value-residual has no effect with --model.num-layers 1: there are no later blocks")
    if model.attention == "flex" and model.eot_id is None:
        said.append("--model.attention flex finds no documents: the data's tokenizer has no end-of-text token")
    if model.attention == "flex" and not config.train.compile:
        said.append("--model.attention flex with --train.no-compile holds all scores, as naive does")
    if parallel.shard_size is not None and mode != "hsdp":
        said.append(f"--parallel.shard-size {parallel.shard_size} has no effect with --parallel.mode {mode}")
    if mode in ("none", "ddp") and not parallel.reshard_after_forward:
        said.append(f"--parallel.no-reshard-after-forward has no effect with --parallel.mode {mode}")
    if mode in ("none", "ddp") and parallel.reduce_gradients != "auto":
        said.append(
            f"--parallel.reduce-gradients {parallel.reduce_gradients} has no effect with --parallel.mode {mode}"
        )
    if config.preflight and config.dry_run:
        said.append("--preflight has no effect with --dry-run")
    track, sample, trace_ranks = config.track, config.sample, " ".join(map(str, config.trace_ranks))
    if config.trace is not None and parse_steps(config.trace).start >= config.train.steps:
        said.append(f"--trace {config.trace} has no effect: the run has {config.train.steps} steps")
    if config.trace is not None and not set(config.trace_ranks) & set(range(world)):
        said.append(f"--trace-ranks {trace_ranks}: there are only ranks 0 to {world - 1}, so --trace has no effect")
    if track.wandb == "disabled" and (track.group is not None or track.tags or track.project != TrackConfig.project):
        said.append("--track.project, --track.group and --track.tags have no effect with --track.wandb disabled")
    if sample.every is None and (sample.prompts, sample.tokens) != (SampleConfig.prompts, SampleConfig.tokens):
        said.append("--sample.prompts and --sample.tokens have no effect with --sample.every None")
    if config.validate.hellaswag is None and (
        config.validate.hellaswag_every != ValidateConfig.hellaswag_every or config.validate.hellaswag_items is not None
    ):
        said.append(
            "--validate.hellaswag-every and --validate.hellaswag-items have no effect without --validate.hellaswag"
        )
    if config.validate.hellaswag is not None and config.validate.hellaswag_every is None:
        said.append("--validate.hellaswag has no effect with --validate.hellaswag-every None")
    if config.train.dtype == "tf32" and device_type != "cuda":
        said.append("--train.dtype tf32 has no effect on a CPU: it computes in fp32")
    if config.trace is None and config.trace_ranks != (0,):
        said.append("--trace-ranks has no effect without --trace")
    if config.optim.schedule == "constant" and config.optim.lr_final:
        said.append(f"--optim.lr-final {config.optim.lr_final} has no effect with --optim.schedule constant")
    if config.optim.schedule != "wsd" and config.optim.warmdown_fraction != OptimConfig.warmdown_fraction:
        said.append(
            f"--optim.warmdown-fraction {config.optim.warmdown_fraction} has no effect with "
            f"--optim.schedule {config.optim.schedule}"
        )
    if config.optim.warmup_steps >= config.train.steps:
        said.append(
            f"--optim.warmup-steps {config.optim.warmup_steps} is not shorter than the run of "
            f"{config.train.steps} steps: the learning rate never reaches its peak"
        )
    return said


def _flags_of(kind: Any, prefix: str = "--") -> list[str]:
    flags = []
    for item in dataclasses.fields(kind):
        if tyro.conf.Suppress in getattr(item.type, "__metadata__", ()):
            continue
        flag = prefix + item.name.replace("_", "-")
        if dataclasses.is_dataclass(item.type):
            flags += _flags_of(item.type, flag + ".")
        elif item.type is bool:
            flags += [flag, prefix + "no-" + item.name.replace("_", "-")]
        else:
            flags.append(flag)
    return flags


def _suggestion(given: str, known: Sequence[str] | dict[str, Config]) -> str:
    near = difflib.get_close_matches(given, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""
