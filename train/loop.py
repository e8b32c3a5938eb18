"""The step and its calendar, read top to bottom.

A step enqueues its work and returns; the host reads the results (loss, norm, finiteness, stop request) one
step later, all in one copy and alike on every rank, so that no step waits for the host.
"""

import contextlib
import gc
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.gpt import GPT
from train import optim, parallel, saves, validate
from train.batches import BatchPlan, Prefetcher
from train.config import Config
from train.losses import Objective
from train.mesh import Mesh
from train.meters import Meters, Startup
from train.numerics import LossScale
from train.run_dir import RunDirectory
from train.samples import Sampler
from train.saves import Progress
from train.sinks import Sinks
from train.stops import Stops
from train.stragglers import Stragglers
from train.traces import Trace
from train.watchdog import Watchdog

LEAST_LOSS_SCALE = 1.0  # below it fp16's small numbers are lost: what still overflows then is no matter of scale


class NonFiniteError(RuntimeError):
    """A step's loss or gradient was not finite. Its update was not made."""


@dataclass
class Run:
    """What a run is made of. `module` is what trains: `objective` itself, or wrapped for many processes."""

    config: Config
    mesh: Mesh
    directory: RunDirectory
    plan: BatchPlan
    batches: Prefetcher
    validation: validate.ValidationSet | None
    sampler: Sampler | None
    model: GPT
    objective: Objective
    module: nn.Module
    optimizer: torch.optim.AdamW
    mean: Tensor  # turns a rank's sum of token losses into its part of the global batch's mean
    loss_scale: LossScale | None  # with fp16
    sinks: Sinks
    stops: Stops
    watchdog: Watchdog
    stragglers: Stragglers
    progress: Progress
    meters: Meters
    startup: Startup
    trace: Trace | None
    state: dict[str, Any]  # what a checkpoint records beside tensors and progress
    loaded: Path | None  # the checkpoint this run continued from
    saved_step: int | None  # of the newest checkpoint


@dataclass(frozen=True)
class Report:
    """A step whose results may still be on their way: fp64 [loss, norm, finite, stops, loss scale], on the host.

    `ready` marks them on a GPU; without one they are there, and were at `seconds` of training.
    """

    progress: Progress
    lr: float
    results: Tensor
    ready: torch.cuda.Event | None
    seconds: float
    data_wait_seconds: float


def train(run: Run) -> tuple[str, str | None]:
    """Train from run.progress to the last step or a stop. Returns the state and reason for status.json."""
    config, num_steps = run.config, run.config.train.steps
    reports: deque[Report] = deque()
    if run.progress.step < num_steps:
        warm_up(run)
        run.startup.done("warm-up and compilation")
    stop = look(run)
    run.startup.done("validation")
    with garbage_collected_by_hand() as collect:
        run.meters.start()
        while run.progress.step < num_steps and not stop:
            reports.append(take_step(run))
            run.progress = reports[-1].progress
            is_boundary = is_due_to_validate(run) or is_due_to_sample(run) or is_due_to_save(run)
            while len(reports) > (0 if is_boundary else 1):
                stop |= record(run, reports.popleft())
            if run.progress.step % config.track.every == 0:
                collect(1)  # what a few steps left, if anything: activation checkpointing in eager mode does
            if is_boundary:
                run.meters.pause()
                stop |= look(run)
                if is_due_to_save(run):
                    save_now(run)
                collect(2)
                run.meters.start()
        while reports:
            record(run, reports.popleft())
        run.meters.pause()
    if run.trace is not None:
        run.trace.close()
    if run.progress.step not in (0, run.saved_step):
        save_now(run)
    if run.progress.step == num_steps and not is_due_to_validate(run) and not is_due_to_sample(run):
        return "done", None
    reasons = [reason for reason in run.mesh.gather(run.stops.reason) if reason]
    run.stops.honoured()
    return "stopped", reasons[0]


def take_step(run: Run) -> Report:
    """Enqueue one optimizer step at run.progress: batches, gradients, agreement, update."""
    config, mesh, scale = run.config, run.mesh, run.loss_scale
    if run.trace is not None:
        run.trace.before_step(run.progress.step)
    run.watchdog.beat(f"step {run.progress.step + 1}, waiting for its data")
    run.stragglers.begin()
    before = time.perf_counter()
    batches = run.batches.take(run.progress.position)
    run.meters.waited_for_data(time.perf_counter() - before)
    run.watchdog.beat(f"step {run.progress.step + 1}")

    loss_sum = accumulate_gradients(run, batches)
    totals = torch.stack([loss_sum, torch.full_like(loss_sum, run.stops.wanted())])  # a fill: no copy, no wait
    mesh.sum_(totals)
    loss = totals[0] / config.train.batch_tokens
    norm = optim.global_norm(p.grad for p in run.model.parameters() if p.grad is not None)
    if scale is not None:
        norm = norm / scale.scale
    is_finite = torch.isfinite(norm) & torch.isfinite(loss)
    lr = optim.learning_rate(run.progress.step, config.optim, config.train.steps)
    optim.update(run.optimizer, lr, norm, is_finite, config.optim.clip_norm, scale.scale if scale else None)
    parallel.zero_gradients(run.module)
    used_scale = torch.ones_like(loss) if scale is None else scale.scale.double()
    if scale is not None:
        scale.update(is_finite)

    results = torch.stack([loss, norm.double(), is_finite.double(), totals[1], used_scale])
    ready = None
    if mesh.device.type == "cuda":
        results = results.to("cpu", non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
    if run.trace is not None:
        run.trace.after_step(run.progress.step)
    progress = run.progress.advanced(windows=run.plan.windows, tokens=config.train.batch_tokens)
    return Report(progress, lr, results, ready, run.meters.seconds, run.meters.data_wait_seconds)


def accumulate_gradients(run: Run, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Gradients of (sum of token losses / tokens of the global batch), reduced once; this rank's loss sum, fp64."""
    scale = run.mean if run.loss_scale is None else run.mean * run.loss_scale.scale
    loss_sum = torch.zeros((), dtype=torch.float64, device=run.mesh.device)
    for index, (inputs_BT, targets_BT) in enumerate(batches):
        run.watchdog.beat()
        is_last = index == len(batches) - 1
        parallel.set_gradient_sync(run.module, is_last)
        scaled, unscaled = run.module(inputs_BT, targets_BT, scale)
        if is_last:
            run.stragglers.end()  # the backward pass waits for the other ranks
        scaled.backward()
        loss_sum += unscaled.detach()
    return loss_sum


def warm_up(run: Run) -> None:
    """Two forward and backward passes that train nothing: they compile, and let DDP settle its buckets.

    DDP lays its buckets out anew at its second forward pass, and with three or more ranks the layout decides
    the order of addition. Without this, the first step after a resume would round differently. What validation
    and sampling call is compiled here too, under the long time-out.
    """
    run.watchdog.beat("warm-up and compilation")
    shape = (run.plan.micro_batch, run.config.train.seq_len)
    zeros_BT = torch.zeros(shape, dtype=torch.int64, device=run.mesh.device)
    for _ in range(2):
        accumulate_gradients(run, [(zeros_BT, zeros_BT)])
        parallel.zero_gradients(run.module)
    if run.config.train.compile and (run.validation is not None or run.sampler is not None):
        run.objective.token_losses(zeros_BT, zeros_BT)


def record(run: Run, report: Report) -> bool:
    """Read a step's results, log them if it is their turn; True if any rank was asked to stop."""
    run.watchdog.beat(f"step {report.progress.step}, waiting for its results")
    seconds = report.seconds
    if report.ready is not None:
        report.ready.synchronize()
        seconds = run.meters.seconds
    loss, norm, finite, stop, scale = report.results.tolist()
    progress, config = report.progress, run.config
    run.watchdog.beat(f"step {progress.step}, reporting")
    run.stragglers.record(progress.step)
    if not finite and (scale <= LEAST_LOSS_SCALE or not math.isfinite(loss)):
        raise NonFiniteError(
            f"step {progress.step}: loss {loss}, gradient norm {norm}; its update was not made. It read the windows "
            f"at positions {progress.position - run.plan.windows} to {progress.position - 1}"
        )
    if progress.step == 1 or progress.step % config.track.every == 0 or progress.step == config.train.steps:
        row = run.meters.row(
            step=progress.step,
            tokens=progress.tokens,
            seconds=seconds,
            data_wait_seconds=report.data_wait_seconds,
            loss=loss,
            lr=report.lr,
            norm=norm if finite else None,
        )
        run.sinks.row(row if run.loss_scale is None else row | {"loss_scale": scale})
    if (account := run.startup.first_step()) is not None:
        run.sinks.say(account)
        run.watchdog.expect_steps()
    return bool(stop)


def look(run: Run) -> bool:
    """Validate and sample where it is their turn; True if a stop was asked for meanwhile, and the rest left undone."""
    if is_due_to_validate(run) and validate_now(run):
        return True
    if is_due_to_sample(run):
        sample_now(run)
    return False


def is_due_to_validate(run: Run) -> bool:
    """At step 0, at every interval and at the end, unless this very step was validated before a restart."""
    step, every = run.progress.step, run.config.validate.every
    if run.validation is None or every is None or step in run.sinks.validated_steps:
        return False
    return step % every == 0 or step == run.config.train.steps


def is_due_to_sample(run: Run) -> bool:
    """At every interval and at the end, unless this very step was sampled before a restart."""
    step, every = run.progress.step, run.config.sample.every
    if run.sampler is None or every is None or step in run.sinks.sampled_steps:
        return False
    return step > 0 and (step % every == 0 or step == run.config.train.steps)


def is_due_to_save(run: Run) -> bool:
    step = run.progress.step
    return step % run.config.save.every == 0 or step == run.config.train.steps


def validate_now(run: Run) -> bool:
    """Validate and log; True, and nothing logged, if a stop was asked for meanwhile."""
    assert run.validation is not None
    found = validate.validate(run.objective, run.validation, mesh=run.mesh, stops=run.stops, beat=run.watchdog.beat)
    if found is None:
        return True
    progress = run.progress
    run.sinks.validated_steps.add(progress.step)
    axes = run.meters.axes(step=progress.step, tokens=progress.tokens, seconds=run.meters.seconds)
    run.sinks.row(
        axes | {"val_loss": found.loss, "val_loss_stderr": found.stderr, "val_bits_per_byte": found.bits_per_byte}
    )
    return False


def sample_now(run: Run) -> None:
    """Draw the fixed prompts' continuations, alike on every rank, and log them."""
    assert run.sampler is not None
    run.watchdog.beat(f"sampling after step {run.progress.step}")
    run.sinks.sampled_steps.add(run.progress.step)
    run.sinks.samples(run.progress.step, run.sampler.draw(run.model))


def save_now(run: Run) -> None:
    """Make a checkpoint of where the run stands; rows up to here are on disk before it is."""
    run.watchdog.beat(f"saving after step {run.progress.step}")
    run.progress = replace(run.progress, seconds=run.meters.seconds)
    run.sinks.make_durable()
    saves.save(
        run.directory.path,
        model=run.model,
        optimizer=run.optimizer,
        loss_scale=run.loss_scale,
        progress=run.progress,
        state=run.state,
        config=run.config.save,
        loaded=run.loaded,
        mesh=run.mesh,
    )
    run.saved_step = run.progress.step
    run.directory.report(run.progress.step)


@contextlib.contextmanager
def garbage_collected_by_hand() -> Iterator[Callable[[int], int]]:
    """Python's cycle collector runs when the yielded function is called, not in the middle of some step.

    It would stop one rank, and so all of them, for tens of milliseconds now and then. The function takes the oldest
    generation to collect, 0 to 2. What was made before (the model, the modules) is left out of every collection.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield gc.collect
    finally:
        gc.enable()
        gc.unfreeze()
