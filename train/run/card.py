"""The run card: what a run is going to be, printed once before step 0 and by --dry-run."""

from dataclasses import replace

import torch

from data_prep.manifest import Manifest
from model.config import ModelConfig, flag_of
from model.cost import model_cost
from model.costs.memory import Memory, StepShape, memory
from train.config import Config, OptimConfig
from train.data import BatchPlan
from train.metrics.meters import peak_of
from train.muon import update_dtype
from train.parallel.communication import LINK_BYTES_PER_SECOND, seconds_between_hosts, step_communication
from train.parallel.plan import ParallelPlan, saved_bytes
from train.parallel.precision import compute_dtype

CPU = "CPU process"  # in place of a GPU's name
USUAL_MFU = 0.4  # with which a step's computing is held against its communication
MIN_SHOWN = 0.01  # of the memory peak: smaller components are shown together as "other"


def run_card(
    config: Config, manifest: Manifest | None, plan: BatchPlan, parallel_plan: ParallelPlan, device: str
) -> str:
    """Return the card's lines: model, data, step, length, optimizer, device, layout, network and memory.

    `manifest` None: the data is not there yet.
    """
    cost = model_cost(config.model)
    train, model, optim = config.train, config.model, config.optim
    is_auto, world = train.micro_batch == "auto", parallel_plan.shards * parallel_plan.replicas
    total_tokens = train.total_tokens
    total_flops = cost.flops_per_token * total_tokens
    switches = "".join(f", {flag_of(name)} {value}" for name, value in model.switched().items())
    options = {
        train.dtype: True,
        "compiled" if train.compile else "eager": True,
        train.compile_mode: train.compile and train.compile_mode != "default",
        "CUDA graphs": train.cuda_graphs,
        f"loss in chunks of {train.loss_chunk_tokens:,} tokens": train.loss == "chunked",
        f"FP8 in {'head and blocks' if train.fp8 == 'all' else train.fp8}": train.fp8 is not None,
        f"attention by {train.attention_backend}": train.attention_backend != "auto",
        "activation checkpointing": train.activation_checkpointing,
        "deterministic": train.deterministic,
    }
    lines = {
        "run": f"{config.directory}  preset {config.preset}  seed {config.seed}",
        "model": f"{_shape(model)}: {cost.num_parameters:,} parameters (+{cost.num_padding_parameters:,} vocabulary "
        f"padding){switches}",
        "data": _data_line(config, manifest, total_tokens),
        "step": "\n          ".join(
            f"{f'after {stage.first_step:,} steps ' if stage.first_step else ''}{stage.tokens:,} tokens = {world} "
            f"processes x {_sequences(own, is_auto=is_auto)} sequences x {train.seq_len}"
            for stage, own in zip(train.stages, plan.all, strict=True)
        ),
        "length": f"{train.steps:,} steps = {total_tokens:,} tokens; {total_flops:.3g} FLOPs "
        f"({total_flops / 1e14 / 3600:,.1f} hours per sustained 100 TFLOP/s)",
        "optimizer": f"{optim.name}, {optim.schedule} {optim.lr_peak:g}{_other_rates(optim)} after "
        f"{optim.warmup_steps} steps, clip {optim.clip_norm}{_average(optim)}",
        "device": f"{world} x {device}, {', '.join(name for name, is_on in options.items() if is_on)}; "
        f"checkpoint {saved_bytes(config) / 1e9:.2f} GB",
        "parallel": _parallel_line(parallel_plan, plan),
    }
    if world > 1 and not (is_auto and parallel_plan.is_sharded):  # DDP sends the same whatever the micro-batch
        peak = peak_of(config, device)
        own_flops = cost.flops_per_token * train.batch_tokens / world
        compute_seconds = None if peak is None else own_flops / (USUAL_MFU * peak)
        lines["network"] = _network_line(config, plan, parallel_plan, compute_seconds, on_cpu=device == CPU)
    if model.kind == "gpt":
        lines["memory"] = _memory_line(config, plan, parallel_plan, on_cpu=device == CPU)
    return "\n".join(f"{name:<10}{text}" for name, text in lines.items())


def _sequences(plan: BatchPlan, *, is_auto: bool) -> str:
    if is_auto:
        return f"{plan.sequences_per_rank} (micro-batch auto)"
    return f"{plan.accumulation} micro-batches x {plan.micro_batch}"


def _shape(model: ModelConfig) -> str:
    if model.kind == "bigram":  # one table, without layers or width
        return f"context {model.context_len}"
    layers = f"{model.num_layers} layers x " if model.kind == "gpt" else ""
    heads = f" x {model.num_heads} heads" if model.kind != "head" else ""
    return f"{layers}{model.width} wide{heads}, context {model.context_len}"


def _other_rates(optim: OptimConfig) -> str:
    rates = {"embeddings": optim.embedding_lr, "head": optim.head_lr, "vectors": optim.vector_lr}
    parts = ", ".join(f"{name} {rate:g}" for name, rate in rates.items() if rate is not None)
    return f" ({parts})" if parts else ""


def _average(optim: OptimConfig) -> str:
    return "" if optim.average_fraction is None else f", mean of the weights over the last {optim.average_fraction:.0%}"


def _data_line(config: Config, manifest: Manifest | None, total_tokens: int) -> str:
    if manifest is None:
        return f"{config.data.dir}: not there yet; vocabulary taken to be {config.model.vocab_size:,}"
    tokens, num_skipped = manifest.splits["train"].tokens, len(set(config.data.skip_sequences))
    epochs = total_tokens / tokens
    skipped = f", {num_skipped} sequences left out" if num_skipped else ""
    warning = "  WARNING: more than one epoch" if epochs > 1 else ""
    vocabulary = f"vocabulary {manifest.vocab_size:,}"
    if not config.data.verify:
        warning += "  WARNING: not held to its hashes (--data.no-verify)"
    return f"{config.data.dir}: {tokens:,} training tokens{skipped}, {vocabulary}, {epochs:.2f} epochs{warning}"


def _parallel_line(parallel_plan: ParallelPlan, plan: BatchPlan) -> str:
    if not parallel_plan.is_sharded:
        return f"{parallel_plan.mode} ({parallel_plan.reason})"
    copies = f", {parallel_plan.replicas} copies" if parallel_plan.replicas > 1 else ""
    gradients = ""
    if plan.largest_accumulation > 1:
        is_whole = parallel_plan.whole_gradients
        gradients = "whole gradients reduced once a step; " if is_whole else "gradients reduced each time; "
    gathered = "for each pass" if parallel_plan.reshard_after_forward else "once for both passes"
    shards = f"{parallel_plan.mode}, {parallel_plan.shards} shards{copies} ({parallel_plan.reason})"
    return f"{shards}; {gradients}weights gathered {gathered}"


def _network_line(
    config: Config, plan: BatchPlan, parallel_plan: ParallelPlan, compute_seconds: float | None, *, on_cpu: bool
) -> str:
    communication = step_communication(
        config.model,
        parallel_plan,
        micro_batches=plan.accumulation,
        compute_dtype=compute_dtype(config.train),
        update_dtype=update_dtype("cpu" if on_cpu else "cuda") if config.optim.name == "muon" else None,
    )
    kinds = {
        "all-gathers": communication.all_gathers,
        "reduce-scatters": communication.reduce_scatters,
        "all-reduces": communication.all_reduces,
        "all-to-alls": communication.all_to_alls,
    }
    parts = [f"{kind.count} {name} of {kind.num_bytes / 1e9:.3g} GB" for name, kind in kinds.items() if kind.count]
    line = f"each rank, each step{' of the first stage' if plan.later else ''}: {', '.join(parts)}"
    if parallel_plan.reduce_dtype != torch.float32:
        line += "; gradients in bf16"
    sending_seconds = seconds_between_hosts(communication, parallel_plan)
    if compute_seconds is None or sending_seconds <= compute_seconds:
        return line
    advice = "a larger --train.batch-tokens hides it"
    if parallel_plan.mode == "ddp" and parallel_plan.reduce_dtype == torch.float32:
        advice = f"--parallel.reduce-dtype bf16 halves it, {advice}"
    return (
        f"{line}  WARNING: the network binds: {1e3 * sending_seconds:.1f} ms at {LINK_BYTES_PER_SECOND / 1e9:.0f} GB/s "
        f"between hosts, {1e3 * compute_seconds:.1f} ms of computing at {USUAL_MFU:.0%} of the peak; {advice}"
    )


def _memory_line(config: Config, plan: BatchPlan, parallel_plan: ParallelPlan, *, on_cpu: bool) -> str:
    """Return the peak and its components; with --train.micro-batch auto, those of a micro-batch of one sequence."""
    is_auto = config.train.micro_batch == "auto"
    peak = step_memory(config, replace(plan, micro_batch=1) if is_auto else plan, parallel_plan, on_cpu=on_cpu)
    components = sorted(peak.peak.items(), key=lambda item: -item[1])
    shown = {part: num_bytes for part, num_bytes in components if num_bytes >= MIN_SHOWN * peak.peak_bytes}
    if (other := peak.peak_bytes - sum(shown.values())) > 0:
        shown["other"] = other
    parts = ", ".join(f"{part} {num_bytes / 1e9:.2f}" for part, num_bytes in shown.items())
    return (
        f"{'at most' if config.train.compile else 'about'} {peak.peak_bytes / 1e9:.2f} of "
        f"{parallel_plan.memory_bytes / 1e9:.1f} GB per process{' with a micro-batch of 1' if is_auto else ''}, "
        f"in {peak.peak_phase}: {parts}"
        f"{'  WARNING: more than there is' if peak.peak_bytes > parallel_plan.memory_bytes else ''}"
    )


def step_memory(config: Config, plan: BatchPlan, parallel_plan: ParallelPlan, *, on_cpu: bool) -> Memory:
    """Return the bytes that a rank's step needs, by phase and component."""
    train = config.train
    shape = StepShape(
        micro_batch=plan.micro_batch,
        seq_len=train.seq_len,
        accumulation=plan.largest_accumulation,
        compute_bytes=compute_dtype(train).itemsize,
        activation_checkpointing=train.activation_checkpointing,
        chunk_tokens=train.loss_chunk_tokens if train.loss == "chunked" else None,
        mode=parallel_plan.mode,
        shards=parallel_plan.shards,
        reshard_after_forward=parallel_plan.reshard_after_forward,
        whole_gradients=parallel_plan.whole_gradients,
        reduce_bytes=parallel_plan.reduce_dtype.itemsize,
        is_muon=config.optim.name == "muon",
        replicas=parallel_plan.replicas,
        on_cpu=on_cpu,
        has_average=config.optim.average_fraction is not None,
    )
    return memory(config.model, shape)
