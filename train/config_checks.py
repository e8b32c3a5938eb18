"""Values that cannot be, for one error that lists them, and settings that do nothing in a run, for warnings."""

import dataclasses
import itertools
import math

from common.errors import InputError
from common.names import require_printable
from common.seeds import seed_fault
from train.config import (
    FIRST_MOMENTUM,
    Config,
    OptimConfig,
    SampleConfig,
    SaveConfig,
    TrackConfig,
    TrainConfig,
    parse_duration,
    parse_steps,
)


def faults_of(config: Config) -> list[str]:
    """Return everything wrong with the values themselves: value, rule and flag, one line each."""
    train, optim = config.train, config.optim
    at_least_one = {
        "--train.seq-len": train.seq_len,
        "--train.steps": train.steps,
        "--train.batch-tokens": train.batch_tokens,
        "--train.loss-chunk-tokens": train.loss_chunk_tokens,
        "--train.micro-batch": None if train.micro_batch == "auto" else train.micro_batch,
        "--save.every": config.save.every,
        "--save.keep": config.save.keep,
        "--save.keep-every": config.save.keep_every,
        "--save.failures-in-a-row": config.save.failures_in_a_row,
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
    faults += dataclasses.replace(config.model, context_len=train.seq_len).faults() + faults_of_fp8(config)
    try:
        require_printable("--run-dir", str(config.directory))
    except InputError as error:
        faults.append(str(error))
    faults += faults_of_stages(train)
    if train.tokens is not None and train.tokens < train.batch_tokens:
        faults.append(
            f"--train.tokens {train.tokens} is less than one step of --train.batch-tokens {train.batch_tokens}"
        )
    at_least_zero = {
        "--optim.lr-final": optim.lr_final,
        "--optim.warmup-steps": optim.warmup_steps,
        "--optim.momentum-warmup-steps": optim.momentum_warmup_steps,
        "--optim.weight-decay": optim.weight_decay,
    }
    if (seed := seed_fault(config.seed)) is not None:
        faults.append(seed)
    faults += [f"{flag} {value} must not be negative" for flag, value in at_least_zero.items() if value < 0]
    more_than_zero = {
        "--optim.lr-peak": optim.lr_peak,
        "--optim.embedding-lr": optim.embedding_lr,
        "--optim.head-lr": optim.head_lr,
        "--optim.vector-lr": optim.vector_lr,
        "--optim.epsilon": optim.epsilon,
        "--optim.clip-norm": optim.clip_norm,
        "--train.diverged-above": train.diverged_above,
        "--track.peak-tflops": config.track.peak_tflops,
        "--save.every-seconds": config.save.every_seconds,
        "--save.retry-seconds": config.save.retry_seconds,
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
        if isinstance(value, float) and not math.isfinite(value)
    ]
    decays = {
        "--optim.beta1": optim.beta1,
        "--optim.beta2": optim.beta2,
        "--optim.momentum": optim.momentum,
        "--optim.average-decay": optim.average_decay,
    }
    for flag, value in decays.items():
        if value is not None and not 0 <= value < 1:
            faults.append(f"{flag} {value} must lie in [0, 1)")
    if optim.name == "muon" and config.model.kind != "gpt":
        faults.append(
            f"--optim.name muon is for the matrices of blocks, which --model.kind {config.model.kind} does not have; "
            "use --optim.name adamw"
        )
    if optim.head_lr is not None and config.model.tie and config.model.kind == "gpt":
        faults.append(
            f"--optim.head-lr {optim.head_lr}: with --model.tie the head is the embedding, whose rate is "
            "--optim.embedding-lr; give that, or --model.no-tie"
        )
    fractions = {
        "--optim.warmdown-fraction": optim.warmdown_fraction,
        "--optim.average-fraction": optim.average_fraction,
    }
    for flag, value in fractions.items():
        if value is not None and not 0 < value <= 1:
            faults.append(f"{flag} {value} must lie in (0, 1]")
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
    if train.cuda_graphs and train.micro_batch == "auto":
        faults.append("--train.cuda-graphs keeps memory that --train.micro-batch auto cannot see; give a number")
    if train.cuda_graphs and config.model.attention == "flex":
        faults.append("--train.cuda-graphs cannot capture the document masks of --model.attention flex; use sdpa")
    if config.sample.every is not None and not config.sample.prompts:
        faults.append("--sample.prompts names no prompt; give one, or --sample.every None")
    return faults


def faults_of_stages(train: TrainConfig) -> list[str]:
    """Return what is wrong with --train.batch-tokens and --train.batch-stages, apart from how processes share them."""
    try:
        stages = train.stages
    except InputError as error:
        return [str(error)]
    if train.seq_len < 1 or train.batch_tokens < 1:
        return []
    faults = []
    for stage in stages:
        if stage.tokens % train.seq_len:
            lower = stage.tokens // train.seq_len * train.seq_len
            nearest = " or ".join(f"{n}" for n in (lower, lower + train.seq_len) if n)
            name = f"{stage.flag}{stage.tokens}"
            faults.append(f"{name} is not divisible by --train.seq-len {train.seq_len}; try {nearest}")
    for before, stage in itertools.pairwise(stages):
        if stage.first_step <= before.first_step:
            name, other = f"{stage.flag}{stage.tokens}", f"{before.flag}{before.tokens}"
            return [*faults, f"{name} does not come after {other}; give the stages in the order of their steps"]
    num_steps = train.steps if train.tokens is None else train.steps_of(train.tokens)
    late = [f"{stage.flag}{stage.tokens}" for stage in stages[1:] if stage.first_step >= num_steps]
    return faults + [f"{name}: the run has only {num_steps} steps; leave it out or train longer" for name in late]


def faults_of_fp8(config: Config) -> list[str]:
    """Return what keeps --train.fp8 from computing this model: torch's kernels take rows of a multiple of 16."""
    train, model = config.train, config.model
    if train.fp8 is None:
        return []
    faults = []
    if train.dtype != "bf16":
        faults.append(f"--train.fp8 {train.fp8} needs --train.dtype bf16 (it is {train.dtype})")
    if model.kind != "gpt":
        faults.append(f"--train.fp8 {train.fp8}: only for --model.kind gpt, not for {model.kind}")
    needed = {"--model.width": model.width}
    if train.fp8 != "head":
        needed["the MLP's width, --model.mlp-width,"] = model.resolved_mlp_width
    if train.fp8 != "blocks":
        needed["--model.vocab-multiple"] = model.vocab_multiple
    faults += [
        f"{name} {size} must be a multiple of 16 for --train.fp8 {train.fp8}"
        for name, size in needed.items()
        if size % 16
    ]
    return faults


def settings_without_effect(config: Config, device_type: str, world: int, mode: str) -> list[str]:
    """Return one line for each setting that does nothing here, for a warning.

    `world` processes on a "cpu" or "cuda" device share the model as `mode` says.
    """
    warnings = []
    parallel, model = config.parallel, config.model
    if model.kind != "gpt" and config.train.activation_checkpointing:
        warnings.append(
            f"--train.activation-checkpointing has no effect with --model.kind {model.kind}: it has no blocks"
        )
    if model.window == config.train.seq_len:
        warnings.append(f"--model.window {model.window} has no effect with --train.seq-len {config.train.seq_len}")
    if model.value_residual and model.num_layers == 1:
        warnings.append("--model.value-residual has no effect with --model.num-layers 1: there are no later blocks")
    if model.skips and model.num_layers == 1:
        warnings.append("--model.skips has no effect with --model.num-layers 1: there are no later blocks")
    if model.softcap_form != "tanh" and model.logit_softcap is None:
        warnings.append(f"--model.softcap-form {model.softcap_form} has no effect without --model.logit-softcap")
    backend = config.train.attention_backend
    if backend != "auto" and (model.attention != "sdpa" or model.kind != "gpt"):
        which = f"--model.attention {model.attention}" if model.kind == "gpt" else f"--model.kind {model.kind}"
        warnings.append(f"--train.attention-backend {backend} has no effect with {which}")
    if config.train.loss == "plain" and config.train.loss_chunk_tokens != TrainConfig.loss_chunk_tokens:
        warnings.append(
            f"--train.loss-chunk-tokens {config.train.loss_chunk_tokens} has no effect with --train.loss plain"
        )
    if model.attention == "flex" and model.eot_id is None:
        warnings.append("--model.attention flex finds no documents: the data's tokenizer has no end-of-text token")
    if model.attention == "flex" and not config.train.compile:
        warnings.append("--model.attention flex with --train.no-compile holds all scores, as naive does")
    if config.train.compile_mode != "default" and not config.train.compile:
        warnings.append(f"--train.compile-mode {config.train.compile_mode} has no effect with --train.no-compile")
    if parallel.shard_size is not None and mode != "hsdp":
        warnings.append(f"--parallel.shard-size {parallel.shard_size} has no effect with --parallel.mode {mode}")
    if mode in ("none", "ddp") and not parallel.reshard_after_forward:
        warnings.append(f"--parallel.no-reshard-after-forward has no effect with --parallel.mode {mode}")
    if mode in ("none", "ddp") and parallel.reduce_gradients != "auto":
        warnings.append(
            f"--parallel.reduce-gradients {parallel.reduce_gradients} has no effect with --parallel.mode {mode}"
        )
    if world == 1 and parallel.reduce_dtype != "fp32":
        warnings.append(f"--parallel.reduce-dtype {parallel.reduce_dtype} has no effect with one process")
    if config.preflight and config.dry_run:
        warnings.append("--preflight has no effect with --dry-run")
    track, sample, trace_ranks = config.track, config.sample, " ".join(map(str, config.trace_ranks))
    if config.trace is not None and parse_steps(config.trace).start >= config.train.steps:
        warnings.append(f"--trace {config.trace} has no effect: the run has {config.train.steps} steps")
    if config.trace is not None and not set(config.trace_ranks) & set(range(world)):
        warnings.append(f"--trace-ranks {trace_ranks}: there are only ranks 0 to {world - 1}, so --trace has no effect")
    if track.wandb == "disabled" and (track.group is not None or track.tags or track.project != TrackConfig.project):
        warnings.append("--track.project, --track.group and --track.tags have no effect with --track.wandb disabled")
    if sample.every is None and (sample.prompts, sample.tokens) != (SampleConfig.prompts, SampleConfig.tokens):
        warnings.append("--sample.prompts and --sample.tokens have no effect with --sample.every None")
    retries = config.save.failures_in_a_row, config.save.retry_seconds
    if config.save.on_failure == "stop" and retries != (SaveConfig.failures_in_a_row, SaveConfig.retry_seconds):
        warnings.append("--save.failures-in-a-row and --save.retry-seconds have no effect with --save.on-failure stop")
    if config.validate.hellaswag is None and (
        config.validate.hellaswag_every != type(config.validate).hellaswag_every
        or config.validate.hellaswag_items is not None
    ):
        warnings.append(
            "--validate.hellaswag-every and --validate.hellaswag-items have no effect without --validate.hellaswag"
        )
    if config.validate.hellaswag is not None and config.validate.hellaswag_every is None:
        warnings.append("--validate.hellaswag has no effect with --validate.hellaswag-every None")
    if config.train.dtype == "tf32" and device_type != "cuda":
        warnings.append("--train.dtype tf32 has no effect on a CPU: it computes in fp32")
    if config.trace is None and config.trace_ranks != (0,):
        warnings.append("--trace-ranks has no effect without --trace")
    if config.optim.schedule == "constant" and config.optim.lr_final:
        warnings.append(f"--optim.lr-final {config.optim.lr_final} has no effect with --optim.schedule constant")
    if config.optim.schedule != "wsd" and config.optim.warmdown_fraction != OptimConfig.warmdown_fraction:
        warnings.append(
            f"--optim.warmdown-fraction {config.optim.warmdown_fraction} has no effect with "
            f"--optim.schedule {config.optim.schedule}"
        )
    if config.optim.momentum_warmup_steps and config.optim.momentum <= FIRST_MOMENTUM:
        warnings.append(
            f"--optim.momentum-warmup-steps has no effect with --optim.momentum {config.optim.momentum}: the momentum "
            f"rises from {FIRST_MOMENTUM}"
        )
    fraction = config.optim.average_fraction
    if fraction is not None and round(fraction * config.train.steps) <= 1:
        warnings.append(f"--optim.average-fraction {fraction} has no effect: it is of one step's weights")
    momentum = config.optim.momentum, config.optim.momentum_warmup_steps
    if config.optim.name != "muon" and momentum != (OptimConfig.momentum, OptimConfig.momentum_warmup_steps):
        warnings.append("--optim.momentum and --optim.momentum-warmup-steps have no effect without --optim.name muon")
    if config.optim.average_decay is not None and config.optim.average_fraction is None:
        warnings.append(
            f"--optim.average-decay {config.optim.average_decay} has no effect without --optim.average-fraction"
        )
    if config.optim.warmup_steps >= config.train.steps:
        warnings.append(
            f"--optim.warmup-steps {config.optim.warmup_steps} is not shorter than the run of "
            f"{config.train.steps} steps: the learning rate never reaches its peak"
        )
    return warnings
