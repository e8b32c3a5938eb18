"""What a run is going to be, printed once before step 0 and by --dry-run."""

from data_prep.manifest import Manifest
from model.budget import budget
from train.batches import BatchPlan
from train.config import Config


def run_card(config: Config, manifest: Manifest | None, plan: BatchPlan, world: int, device: str) -> str:
    """Parameters, tokens per step, accumulation, steps, epochs, FLOPs, memory; `manifest` None: data not there."""
    cost = budget(config.model)
    train, model = config.train, config.model
    total_tokens = train.steps * train.batch_tokens
    total_flops = cost.flops_per_token * total_tokens
    sharing = f"{plan.accumulation} micro-batches x {plan.micro_batch}"
    if train.micro_batch == "auto":
        sharing = f"{plan.windows_per_rank} (micro-batch auto)"
    options = [
        train.dtype,
        "compiled" if train.compile else "eager",
        *(["chunked loss"] if train.loss == "chunked" else []),
        *(["activation checkpointing"] if train.activation_checkpointing else []),
        *(["deterministic"] if train.deterministic else []),
    ]
    lines = [
        ("run", f"{config.directory}  preset {config.preset}  seed {config.seed}"),
        (
            "model",
            f"{model.num_layers} layers x {model.width} wide x {model.num_heads} heads, context {model.context_len}: "
            f"{cost.num_parameters:,} parameters (+{cost.num_padding_parameters:,} vocabulary padding)",
        ),
        ("data", _data_line(config, manifest, total_tokens)),
        (
            "step",
            f"{train.batch_tokens:,} tokens = {world} processes x {sharing} windows x {train.seq_len}",
        ),
        (
            "length",
            f"{train.steps:,} steps = {total_tokens:,} tokens; {total_flops:.3g} FLOPs "
            f"({total_flops / 1e14 / 3600:,.1f} hours per sustained 100 TFLOP/s)",
        ),
        (
            "optimizer",
            f"{config.optim.name}, {config.optim.schedule} {config.optim.lr_peak:g} after {config.optim.warmup_steps} "
            f"steps, clip {config.optim.clip_norm}",
        ),
        (
            "device",
            f"{world} x {device}, {', '.join(options)}; weights, gradients and "
            f"optimizer {cost.state_bytes / 1e9:.2f} GB per process; checkpoint {cost.checkpoint_bytes / 1e9:.2f} GB",
        ),
    ]
    return "\n".join(f"{name:<10}{text}" for name, text in lines)


def _data_line(config: Config, manifest: Manifest | None, total_tokens: int) -> str:
    if manifest is None:
        return f"{config.data.dir}: not there yet; vocabulary taken to be {config.model.vocab_size:,}"
    tokens = manifest.splits["train"].tokens
    epochs = total_tokens / tokens
    warning = "  WARNING: more than one epoch" if epochs > 1 else ""
    vocabulary = f"vocabulary {manifest.vocab_size:,}"
    left_out = len(set(config.data.leave_out))
    without = f", {left_out} windows left out" if left_out else ""
    return f"{config.data.dir}: {tokens:,} training tokens{without}, {vocabulary}, {epochs:.2f} epochs{warning}"
