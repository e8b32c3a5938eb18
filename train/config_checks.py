"""Settings that do nothing in a run, for warnings. Impossible values are refused in train/config.py."""

from train.config import Config, OptimConfig, SampleConfig, SaveConfig, TrackConfig, parse_steps


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
    if model.value_residual and model.num_layers == 1:
        warnings.append("--model.value-residual has no effect with --model.num-layers 1: there are no later blocks")
    if model.attention == "flex" and model.eot_id is None:
        warnings.append("--model.attention flex finds no documents: the data's tokenizer has no end-of-text token")
    if model.attention == "flex" and not config.train.compile:
        warnings.append("--model.attention flex with --train.no-compile holds all scores, as naive does")
    if parallel.shard_size is not None and mode != "hsdp":
        warnings.append(f"--parallel.shard-size {parallel.shard_size} has no effect with --parallel.mode {mode}")
    if mode in ("none", "ddp") and not parallel.reshard_after_forward:
        warnings.append(f"--parallel.no-reshard-after-forward has no effect with --parallel.mode {mode}")
    if mode in ("none", "ddp") and parallel.reduce_gradients != "auto":
        warnings.append(
            f"--parallel.reduce-gradients {parallel.reduce_gradients} has no effect with --parallel.mode {mode}"
        )
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
    if config.optim.warmup_steps >= config.train.steps:
        warnings.append(
            f"--optim.warmup-steps {config.optim.warmup_steps} is not shorter than the run of "
            f"{config.train.steps} steps: the learning rate never reaches its peak"
        )
    return warnings
