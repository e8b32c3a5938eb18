"""What a run is going to be, printed once before step 0 and by --dry-run."""

from dataclasses import replace

from data_prep.manifest import Manifest
from model.config import ModelConfig, flag_of
from model.cost import model_cost
from model.costs.memory import Memory, StepShape, memory
from train.config import Config
from train.data import BatchPlan
from train.losses import CHUNK_TOKENS
from train.parallel.communication import step_communication
from train.parallel.plan import ParallelPlan
from train.parallel.precision import compute_dtype

SHOWN = 0.01  # of the peak: what is less is added up


CPU = "CPU process"  # in place of a GPU's name


def run_card(
    config: Config, manifest: Manifest | None, plan: BatchPlan, parallel_plan: ParallelPlan, device: str
) -> str:
    """Parameters, tokens per step, accumulation, steps, epochs, FLOPs, how the model is spread and the memory that it
    takes; `manifest` None: data not there."""
    cost = model_cost(config.model)
    train, model, world = config.train, config.model, parallel_plan.shards * parallel_plan.replicas
    total_tokens = train.steps * train.batch_tokens
    total_flops = cost.flops_per_token * total_tokens
    sharing = f"{plan.accumulation} micro-batches x {plan.micro_batch}"
    if train.micro_batch == "auto":
        sharing = f"{plan.sequences_per_rank} (micro-batch auto)"
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
            f"{_shape(model)}: {cost.num_parameters:,} parameters (+{cost.num_padding_parameters:,} vocabulary padding)"
            + "".join(f", {flag_of(name)} {value}" for name, value in model.switched().items()),
        ),
        ("data", _data_line(config, manifest, total_tokens)),
        (
            "step",
            f"{train.batch_tokens:,} tokens = {world} processes x {sharing} sequences x {train.seq_len}",
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
            f"{world} x {device}, {', '.join(options)}; checkpoint {cost.checkpoint_bytes / 1e9:.2f} GB",
        ),
        ("parallel", _parallel_line(parallel_plan, plan)),
        *(
            [("network", _network_line(config, plan, parallel_plan))]
            if world > 1 and train.micro_batch != "auto"
            else []
        ),
        *([("memory", _memory_line(config, plan, parallel_plan, on_cpu=device == CPU))] if model.kind == "gpt" else []),
    ]
    return "\n".join(f"{name:<10}{text}" for name, text in lines)


def _shape(model: ModelConfig) -> str:
    """What there is of it: a bigram reads nothing but its table."""
    layers = f"{model.num_layers} layers x " if model.kind == "gpt" else ""
    heads = f" x {model.num_heads} heads" if model.kind not in ("bigram", "head") else ""
    size = "" if model.kind == "bigram" else f"{layers}{model.width} wide{heads}, "
    return f"{size}context {model.context_len}"


def _data_line(config: Config, manifest: Manifest | None, total_tokens: int) -> str:
    if manifest is None:
        return f"{config.data.dir}: not there yet; vocabulary taken to be {config.model.vocab_size:,}"
    tokens = manifest.splits["train"].tokens
    epochs = total_tokens / tokens
    warning = "  WARNING: more than one epoch" if epochs > 1 else ""
    vocabulary = f"vocabulary {manifest.vocab_size:,}"
    left_out = len(set(config.data.skip_sequences))
    without = f", {left_out} sequences left out" if left_out else ""
    return f"{config.data.dir}: {tokens:,} training tokens{without}, {vocabulary}, {epochs:.2f} epochs{warning}"


def _parallel_line(parallel_plan: ParallelPlan, plan: BatchPlan) -> str:
    if not parallel_plan.is_sharded:
        return f"{parallel_plan.mode} ({parallel_plan.reason})"
    copies = f", {parallel_plan.replicas} copies" if parallel_plan.replicas > 1 else ""
    parts = [f"{parallel_plan.mode}, {parallel_plan.shards} shards{copies} ({parallel_plan.reason})"]
    if plan.accumulation > 1:
        parts.append(
            "whole gradients reduced once a step" if parallel_plan.whole_gradients else "gradients reduced each time"
        )
    parts.append(
        "weights gathered " + ("for each pass" if parallel_plan.reshard_after_forward else "once for both passes")
    )
    return "; ".join(parts)


def _network_line(config: Config, plan: BatchPlan, parallel_plan: ParallelPlan) -> str:
    found = step_communication(
        config.model, parallel_plan, micro_batches=plan.accumulation, compute_dtype=compute_dtype(config.train)
    )
    kinds = {
        "all-gathers": found.all_gathers,
        "reduce-scatters": found.reduce_scatters,
        "all-reduces": found.all_reduces,
    }
    said = [f"{kind.count} {name} of {kind.num_bytes / 1e9:.3g} GB" for name, kind in kinds.items() if kind.count]
    return f"each rank, each step: {', '.join(said)}"


def _memory_line(config: Config, plan: BatchPlan, parallel_plan: ParallelPlan, *, on_cpu: bool) -> str:
    """The peak and what it is made of; that of one sequence where --train.micro-batch auto is still to be found."""
    is_found = config.train.micro_batch != "auto"
    found = step_memory(config, plan if is_found else replace(plan, micro_batch=1), parallel_plan, on_cpu=on_cpu)
    peak = found.peak_bytes
    shown = {part: n for part, n in sorted(found.peak.items(), key=lambda item: -item[1]) if n >= SHOWN * peak}
    shown |= {"other": peak - sum(shown.values())} if sum(shown.values()) < peak else {}
    parts = ", ".join(f"{part} {n / 1e9:.2f}" for part, n in shown.items())
    given = "" if is_found else " with a micro-batch of 1"
    limit = "  WARNING: more than there is" if peak > parallel_plan.memory_bytes else ""
    about = "at most" if config.train.compile else "about"
    return (
        f"{about} {peak / 1e9:.2f} of {parallel_plan.memory_bytes / 1e9:.1f} GB per process{given}, "
        f"in {found.peak_phase}: {parts}{limit}"
    )


def step_memory(config: Config, plan: BatchPlan, parallel_plan: ParallelPlan, *, on_cpu: bool) -> Memory:
    """What a rank's step takes, by phase and component."""
    train = config.train
    shape = StepShape(
        micro_batch=plan.micro_batch,
        seq_len=train.seq_len,
        accumulation=plan.accumulation,
        compute_bytes=compute_dtype(train).itemsize,
        activation_checkpointing=train.activation_checkpointing,
        chunk_tokens=CHUNK_TOKENS if train.loss == "chunked" else None,
        mode=parallel_plan.mode,
        shards=parallel_plan.shards,
        reshard_after_forward=parallel_plan.reshard_after_forward,
        whole_gradients=parallel_plan.whole_gradients,
        on_cpu=on_cpu,
    )
    return memory(config.model, shape)
