"""Our step as a run takes it, and a bare loop's step of the same model and parallelism, for benchmarks to time."""

import contextlib
import dataclasses
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from common.errors import InputError
from data_prep.manifest import read_manifest
from data_prep.textfiles import Options as TextOptions
from data_prep.textfiles import prepare
from model.gpt import GPT, build_model
from train.config import Config, DataConfig, OptimConfig, SampleConfig, TrackConfig, resolve, with_vocabulary
from train.data import plan_batches
from train.guards.watchdog import Watchdog
from train.loop import accumulate_gradients, read_result, take_step
from train.metrics.garbage import collected_between_steps
from train.metrics.meters import Startup
from train.parallel.auto_micro_batch import check_device
from train.parallel.plan import ParallelPlan, agree_on_parallel_plan
from train.parallel.precision import compute_dtype, set_numerics
from train.parallel.warm_up import warm_up
from train.presets import PRESETS
from train.processes.group import ProcessGroup
from train.processes.stop_requests import StopRequests
from train.run.directory import RunDirectory
from train.setup import set_up
from train.state import Run

Step = Callable[[], None]
MICRO_BATCH = 16


MUON = OptimConfig(name="muon", lr_peak=0.02, embedding_lr=1e-3, vector_lr=1e-3)


def configured(
    folder: Path, *, preset: str, sequences: int, vocab_size: int, optim: Literal["adamw", "muon"] = "adamw"
) -> Config:
    """Return the preset on generated text, with `sequences` in a step. Raise InputError for bad flags.

    In place of a micro-batch of auto, which would leave no memory for the loop beside ours, it has MICRO_BATCH.
    """
    if vocab_size < 256:
        raise InputError(f"--vocab-size {vocab_size} must be at least 256: the text is read as bytes")
    if preset not in PRESETS:
        raise InputError(f"--preset {preset}: there are {', '.join(PRESETS)}")
    text = folder / "text.txt"
    text.write_text("A line of text that stands for any other.\n" * 20_000, encoding="utf-8")
    prepare(TextOptions(input=(str(text),), out=folder / "data", tokenizer="byte"))
    config = PRESETS[preset]
    config = dataclasses.replace(
        config,
        run_dir=folder / "run",
        data=DataConfig(folder / "data"),
        train=dataclasses.replace(
            config.train,
            batch_tokens=sequences * config.train.seq_len,
            micro_batch=MICRO_BATCH if config.train.micro_batch == "auto" else config.train.micro_batch,
            steps=10**6,
        ),
        optim=MUON if optim == "muon" else config.optim,
        sample=SampleConfig(every=None),
        track=TrackConfig(wandb="disabled"),
    )
    return with_vocabulary(resolve(config), vocab_size)


@contextlib.contextmanager
def opened_run(config: Config, group: ProcessGroup) -> Iterator[tuple[Run, Step]]:
    """Yield a warmed-up run as train/main.py sets it up, and its step. Collective; it saves only on request."""
    check_device(config, group.device)
    gc.collect()  # the previous run's models are full of reference cycles
    torch.compiler.reset()  # its graphs would count towards Dynamo's limit of recompilations
    if group.device.type == "cuda":
        torch.cuda.empty_cache()
    manifest, parallel_plan = read_manifest(config.data.dir), agree_on_parallel_plan(config, group)
    set_numerics(config.train, group.device)
    with (
        StopRequests(config.directory, is_main=group.is_main) as stop_requests,
        RunDirectory(config, manifest.fingerprint, group) as directory,
        Watchdog(config.parallel, group, directory) as watchdog,
    ):
        run = set_up(
            config,
            plan_batches(config, group.world),
            manifest,
            group=group,
            parallel_plan=parallel_plan,
            directory=directory,
            stop_requests=stop_requests,
            watchdog=watchdog,
            startup=Startup(time.perf_counter()),
        )
        with (
            contextlib.closing(run.data.batches),
            run.reports.checkpoints.writer,
            run.reports.logger,
            collected_between_steps() as collect_garbage,
        ):
            warm_up(run, accumulate_gradients)
            run.reports.meters.start()
            yield run, our_step(run, collect_garbage)


def our_step(run: Run, collect: Callable[[int], int]) -> Step:
    """Return a step as train/loop.py takes it, which reads and logs results one step late."""
    results = []

    def step() -> None:
        results.append(take_step(run))
        run.state.progress = results[-1].progress
        if len(results) > 1:
            read_result(run, results.pop(0))
        if run.must_stop:
            raise InputError("stopped")  # the run handles the signals that would end a script
        if run.state.progress.step % run.config.track.every == 0:
            collect(1)

    return step


def bare_step(config: Config, parallel_plan: ParallelPlan, group: ProcessGroup) -> Step:
    """Return a step of a bare loop on fixed tokens: forward, backward, clip, update.

    It follows `parallel_plan` in as few lines as torch needs, and communicates what our step does.
    """
    plain = build_model(config.model, seed=1, device=group.device, compute_dtype=compute_dtype(config.train))
    score = mean_loss
    if config.train.compile:
        for part in plain.compiled_parts:
            part.forward = torch.compile(part.forward)
        score = torch.compile(score)
    model = bare_spread(plain, parallel_plan)
    optimizers = bare_optimizers(model, plain, config.optim)
    plan = plan_batches(config, group.world)
    shape = (plan.accumulation, plan.micro_batch, config.train.seq_len + 1)
    tokens = torch.randint(config.model.vocab_size, shape, device=group.device)

    def forward(rows: Tensor, is_last: bool) -> Tensor:
        if isinstance(model, DistributedDataParallel):
            model.require_backward_grad_sync = is_last
        elif isinstance(model, FSDPModule):
            model.set_reshard_after_backward(is_last, recurse=False)
            if parallel_plan.whole_gradients:
                model.set_requires_gradient_sync(is_last)
        return score(model(rows[:, :-1]), rows[:, 1:], config.model.vocab_size)

    return plain_step(tokens, forward, model, *optimizers)


def bare_optimizers(model: nn.Module, plain: GPT, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """Return fused AdamW; with Muon, torch's for the matrices of the blocks and AdamW for the rest."""
    rest, optimizers = list(model.parameters()), list[torch.optim.Optimizer]()
    if config.name == "muon":
        matrices = [parameter for parameter in plain.blocks.parameters() if parameter.dim() == 2]
        optimizers = [torch.optim.Muon(matrices, lr=config.lr_peak, weight_decay=config.weight_decay)]
        own = set(matrices)
        rest = [parameter for parameter in rest if parameter not in own]
    return [*optimizers, torch.optim.AdamW(rest, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)]


def plain_step(
    tokens: Tensor, forward: Callable[[Tensor, bool], Tensor], model: nn.Module, *optimizers: torch.optim.Optimizer
) -> Step:
    """Return a step over the micro-batches `tokens`: gradients of the mean loss, clipped, and an update.

    `forward`: a micro-batch, and whether it is the last -> its mean loss.
    """

    def step() -> None:
        for index, rows in enumerate(tokens):
            loss = forward(rows, index == len(tokens) - 1)
            (loss / len(tokens)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)

    return step


def mean_loss(logits_BTV: Tensor, targets_BT: Tensor, vocab_size: int) -> Tensor:
    """Return the mean cross-entropy in fp32, without the padding's logits."""
    return F.cross_entropy(logits_BTV[..., :vocab_size].float().flatten(0, 1), targets_BT.flatten())


def bare_spread(model: GPT, parallel_plan: ParallelPlan) -> nn.Module:
    """Return the model in DDP, or sharded by FSDP2 block by block and then as a whole.

    As in our step, the root stays in fp32, and the last block stays gathered between its passes.
    """
    if parallel_plan.mode == "ddp":
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    if parallel_plan.mode == "fsdp":
        policy = MixedPrecisionPolicy(
            param_dtype=None if model.compute_dtype == torch.float32 else model.compute_dtype,
            reduce_dtype=torch.float32,
        )
        for block in model.blocks:
            reshard = parallel_plan.reshard_after_forward and block is not model.blocks[-1]
            fully_shard(block, mp_policy=policy, reshard_after_forward=reshard)
        fully_shard(model, reshard_after_forward=False)
    assert parallel_plan.mode != "hsdp", "the bare loop has no HSDP"
    return model


def seconds_of(step: Step, count: int, group: ProcessGroup) -> tuple[float, float]:
    """Return the wall seconds and this process's CPU seconds of `count` steps."""
    group.barrier()
    started, started_cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        step()
    if group.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, time.process_time() - started_cpu


def compare(ours: Step, bare: Step, *, rounds: int, block: int, group: ProcessGroup) -> dict[str, Any]:
    """Return the ratios of rounds of bare, ours, bare, `block` steps each, after an uncounted block of each.

    bare_over_bare, the A/A control, tells how far the machine can be trusted. On shared CPUs the ratio of rank 0's CPU
    seconds says more.
    """
    for step in (ours, bare):
        seconds_of(step, block, group)
    timed_rounds = [[seconds_of(step, block, group) for step in (bare, ours, bare)] for _ in range(rounds)]
    seconds, cpu_seconds = ([[times[clock] for times in timed] for timed in timed_rounds] for clock in (0, 1))
    return {
        "ours_over_bare": summary([2 * middle / (first + last) for first, middle, last in seconds]),
        "bare_over_bare": summary([last / first for first, _, last in seconds]),
        "cpu_ours_over_bare": summary([2 * middle / (first + last) for first, middle, last in cpu_seconds]),
        "cpu_bare_over_bare": summary([last / first for first, _, last in cpu_seconds]),
        "bare_step_ms": round(statistics.median((first + last) / 2 for first, _, last in seconds) / block * 1e3, 3),
        "ours_step_ms": round(statistics.median(middle for _, middle, _ in seconds) / block * 1e3, 3),
    }


def summary(ratios: list[float]) -> dict[str, float]:
    """Return the median, and the 95 % interval of the mean log ratio (normal approximation)."""
    logs = [math.log(ratio) for ratio in ratios]
    half = 1.96 * statistics.stdev(logs) / math.sqrt(len(logs))
    mean = statistics.mean(logs)
    return {
        "median": round(statistics.median(ratios), 4),
        "low": round(math.exp(mean - half), 4),
        "high": round(math.exp(mean + half), 4),
    }


def conditions(config: Config, group: ProcessGroup) -> dict[str, Any]:
    """Return the conditions that a result depends on, for the JSON line."""
    return {
        "preset": config.preset,
        "processes": group.world,
        "vocab_size": config.model.vocab_size,
        "loss": config.train.loss,
        "tokens_per_step": config.train.batch_tokens,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
