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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from model.base import LanguageModel
from train import optim
from train.config import Config
from train.data import BatchPlan, Prefetcher
from train.evals import hellaswag, validation
from train.evals.samples import Sampler
from train.guards import nonfinite
from train.guards.stragglers import Stragglers
from train.guards.watchdog import Watchdog
from train.losses import LossModel
from train.metrics.logger import NONFINITE_FILE, RunLogger
from train.metrics.meters import Meters, Startup
from train.metrics.profiler import Trace
from train.parallel import apply
from train.parallel.plan import ParallelPlan
from train.parallel.precision import LossScale
from train.processes.group import ProcessGroup
from train.processes.stop_requests import StopRequests
from train.run.checkpoints import CheckpointWriter, Progress
from train.run.directory import RunDirectory


@dataclass
class Asked:
    """What the last results said that some rank asks for; so all ranks know it at the same step."""

    stop: bool = False
    save: bool = False
    finish_save: bool = False  # every rank's part of the checkpoint under way is written


@dataclass
class Run:
    """What a run is made of. `module` is what trains: `objective` itself, or wrapped for many processes."""

    config: Config
    group: ProcessGroup
    parallel_plan: ParallelPlan
    directory: RunDirectory
    plan: BatchPlan
    batches: Prefetcher
    validation: validation.ValidationSet | None
    hellaswag: hellaswag.HellaSwag | None
    sampler: Sampler | None
    model: LanguageModel
    loss_model: LossModel
    module: nn.Module
    optimizer: torch.optim.AdamW
    mean: Tensor  # turns a rank's sum of token losses into its part of the global batch's mean
    loss_scale: LossScale | None  # with fp16
    logger: RunLogger
    stop_requests: StopRequests
    watchdog: Watchdog
    stragglers: Stragglers
    progress: Progress
    meters: Meters
    startup: Startup
    trace: Trace | None
    checkpoint_writer: CheckpointWriter
    guard: nonfinite.NonFiniteGuard
    loaded: Path | None  # the checkpoint this run continued from
    asked: Asked = field(default_factory=Asked)
    failure: Exception | None = None  # to raise once what was done is saved
    rows_above: int = 0  # in a row, with a loss above --train.diverged-above


@dataclass(frozen=True)
class StepResult:
    """A step whose results may still be on their way to the host: fp64 [loss, norm, finite, bad, stops, saves wanted,
    parts of a save written, loss scale].

    `ready` marks them on a GPU; without one they are there, and were at `seconds` of training.
    """

    before: Progress
    progress: Progress
    lr: float
    results: Tensor
    ready: torch.cuda.Event | None
    seconds: float
    data_wait_seconds: float


def train(run: Run) -> tuple[str, str | None]:
    """Train from run.progress to the last step or a stop. Returns the state and reason for status.json."""
    config, num_steps = run.config, run.config.train.steps
    reports: deque[StepResult] = deque()
    if run.progress.step < num_steps:
        run.asked.stop = warm_up(run)
        run.startup.done("warm-up and compilation")
    run.asked.stop = run.asked.stop or look(run)
    run.startup.done("validation")
    with garbage_collected_by_hand() as collect:
        run.meters.start()
        while run.progress.step < num_steps and not run.asked.stop:
            reports.append(take_step(run))
            run.progress = reports[-1].progress
            is_boundary = is_due_to_look(run) or is_due_to_save(run)
            while len(reports) > (0 if is_boundary else 1):
                record(run, reports.popleft())
            if run.progress.step % config.track.every == 0:
                collect(1)  # what a few steps left, if anything: activation checkpointing in eager mode does
            if run.asked.finish_save:
                finish_save(run)
            if is_boundary:
                run.meters.pause()
                run.asked.stop |= look(run)
                if is_due_to_save(run):
                    save_now(run)
                collect(2)
                run.meters.start()
        while reports:
            record(run, reports.popleft())
        run.meters.pause()
    if run.trace is not None:
        run.trace.close()
    if isinstance(run.failure, nonfinite.DivergedError):
        finish_save(run)  # and no more: weights that diverged would displace those that had not
    else:
        save_at_the_end(run)
    if run.failure is not None:
        raise run.failure
    run.group.on_main(run.stop_requests.remove_file)
    if run.progress.step == num_steps and not is_due_to_look(run):
        return "done", None
    reasons = [reason for reason in run.group.gather(run.stop_requests.reason) if reason]
    return "stopped", reasons[0]


def take_step(run: Run) -> StepResult:
    """Enqueue one optimizer step at run.progress: batches, gradients, agreement, update."""
    config, group, scale, checkpoint_writer = run.config, run.group, run.loss_scale, run.checkpoint_writer
    if run.trace is not None:
        run.trace.before_step(run.progress.step)
    run.watchdog.heartbeat(f"step {run.progress.step + 1}, waiting for its data")
    run.stragglers.begin_step()
    before = time.perf_counter()
    batches = run.batches.take(run.progress.position)
    run.meters.waited_for_data(time.perf_counter() - before)
    if run.parallel_plan.is_sharded:
        run.stragglers.end()  # gathering waits for the other ranks
    run.watchdog.heartbeat(f"step {run.progress.step + 1}")

    loss_sum = accumulate_gradients(run, batches, run.mean if scale is None else run.mean * scale.scale)
    squares = optim.sum_of_squares(run.model.parameters()) / run.parallel_plan.replicas
    flags = (run.stop_requests.wanted(), checkpoint_writer.is_overdue(), checkpoint_writer.has_written())
    fills = [torch.full_like(loss_sum, flag) for flag in flags]  # no copy, no wait
    totals = group.sum_(torch.stack([loss_sum, squares, *fills]))
    loss, norm = totals[0] / config.train.batch_tokens, totals[1].sqrt().float()
    if scale is not None:
        norm = norm / scale.scale
    is_finite, is_bad = run.guard.judge(loss, norm, scale)
    lr = optim.learning_rate(run.progress.step, config.optim, config.train.steps)
    checkpoint_writer.wait_until_staged()
    optim.update(run.optimizer, lr, norm, is_finite, config.optim.clip_norm, scale.scale if scale else None)
    apply.zero_gradients(run.module)
    used_scale = torch.ones_like(loss) if scale is None else scale.scale.double()
    if scale is not None:
        scale.update(is_finite, frozen=run.guard.is_halted | is_bad)

    results = torch.stack([loss, norm.double(), is_finite.double(), is_bad.double(), *totals[2:], used_scale])
    ready = None
    if group.device.type == "cuda":
        results = results.to("cpu", non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
    if run.trace is not None:
        run.trace.after_step(run.progress.step)
    progress = run.progress.advanced(sequences=run.plan.sequences, tokens=config.train.batch_tokens)
    return StepResult(run.progress, progress, lr, results, ready, run.meters.seconds, run.meters.data_wait_seconds)


def accumulate_gradients(run: Run, batches: list[tuple[Tensor, Tensor]], scale: Tensor) -> Tensor:
    """Gradients of (sum of token losses x scale), averaged over the ranks; this rank's loss sum, fp64."""
    loss_sum = torch.zeros((), dtype=torch.float64, device=run.group.device)
    for index, (inputs_BT, targets_BT) in enumerate(batches):
        run.watchdog.heartbeat()
        is_last = index == len(batches) - 1
        apply.set_gradient_sync(run.module, run.parallel_plan, is_last)
        scaled, unscaled = run.module(inputs_BT, targets_BT, scale)
        if is_last:
            run.stragglers.end_step()  # the backward pass waits for the other ranks
        scaled.backward()
        loss_sum += unscaled.detach()
    return loss_sum


def warm_up(run: Run) -> bool:
    """Two forward and backward passes that train nothing: they compile, and let DDP settle its buckets.

    DDP lays its buckets out anew at its second forward pass, and with three or more ranks the layout decides
    the order of addition. Without this, the first step after a resume would round differently. What validation
    and sampling call is compiled here too, under the long time-out. True if a stop was asked for meanwhile.
    """
    run.watchdog.heartbeat("warm-up and compilation")
    shape = (run.plan.micro_batch, run.config.train.seq_len)
    zeros_BT = torch.zeros(shape, dtype=torch.int64, device=run.group.device)
    for _ in range(2):
        if is_stopped(run):
            return True
        accumulate_gradients(run, [(zeros_BT, zeros_BT)], run.mean)
        apply.zero_gradients(run.module)
    if run.config.train.compile:
        shapes = [shape] if run.validation is not None or run.sampler is not None else []
        for shape in [*shapes, *(run.hellaswag.shapes if run.hellaswag is not None else [])]:
            run.watchdog.heartbeat()
            zeros_BT = torch.zeros(shape, dtype=torch.int64, device=run.group.device)
            run.loss_model.token_losses(zeros_BT, zeros_BT)
        apply.free_gathered(run.module)
    return is_stopped(run)


def is_stopped(run: Run) -> bool:
    """Was any rank asked to stop? For where no step carries the answer: the host waits for every rank."""
    return run.group.any(run.stop_requests.wanted())


def record(run: Run, report: StepResult) -> None:
    """Read a step's results: note what they ask for, log them if it is their turn."""
    run.watchdog.heartbeat(f"step {report.progress.step}, waiting for its results")
    seconds = report.seconds
    if report.ready is not None:
        report.ready.synchronize()
        seconds = run.meters.seconds
    loss, norm, finite, bad, stop_requests, saves, written, scale = report.results.tolist()
    progress, config = report.progress, run.config
    run.watchdog.heartbeat(f"step {progress.step}, reporting")
    run.stragglers.record(progress.step)
    run.asked.stop |= stop_requests > 0
    run.asked.save |= saves > 0
    run.asked.finish_save |= written == run.group.world
    run.guard.num_in_a_row = run.guard.num_in_a_row + 1 if bad else 0
    if bad:
        skip_or_stop(run, report, loss, norm)
    if progress.step == 1 or progress.step % config.track.every == 0 or progress.step == config.train.steps:
        row = run.meters.row(
            step=progress.step,
            tokens=progress.tokens,
            seconds=seconds,
            data_wait_seconds=report.data_wait_seconds,
            loss=loss if math.isfinite(loss) else None,
            lr=report.lr,
            norm=norm if finite else None,
        )
        run.logger.row(row if run.loss_scale is None else row | {"loss_scale": scale})
        end_if_diverged(run, progress.step, loss)
    if (account := run.startup.first_step()) is not None:
        run.logger.say(account)
        run.watchdog.expect_steps()


def skip_or_stop(run: Run, report: StepResult, loss: float, norm: float) -> None:
    """A step whose update was not made: note its sequences; then go on, or stop with all that was done saved."""
    config, step = run.config, report.progress.step
    sequences, suspects = run.batches.sequence_ids(report.before.position), list[int]()
    if run.guard.mode == "stop":
        run.progress = report.before
        suspects = find_suspects(run)
    run.logger.note_nonfinite(
        {"step": step, "attempt": run.directory.attempt, "loss": str(loss), "grad_norm": str(norm)}
        | {"sequences": sequences, "suspects": suspects}
    )
    what = f"step {step}: loss {loss}, gradient norm {norm}; its update was not made"
    if run.guard.mode == "stop":
        save_at_the_end(run)
        to_do = nonfinite.advice(data=config.data.dir, seq_len=config.train.seq_len, suspects=suspects)
        saved = f"step {step - 1} is saved" if step > 1 else "there was no step before it"
        raise nonfinite.NonFiniteError(f"{what}, and {saved}. {to_do}")
    run.logger.say(f"warning: {what} (--train.on-nonfinite skip); its sequences are in {NONFINITE_FILE}")
    if run.guard.num_in_a_row == nonfinite.MOST_IN_A_ROW:
        run.asked.stop = True
        run.failure = nonfinite.NonFiniteError(f"{what}, nor were those of the {run.guard.num_in_a_row - 1} before it")


def end_if_diverged(run: Run, step: int, loss: float) -> None:
    """Every rank reads the same loss, and so ends after the same step."""
    limit = run.config.train.diverged_above
    run.rows_above = run.rows_above + 1 if limit is not None and not loss <= limit else 0
    if run.rows_above == nonfinite.ROWS_ABOVE:
        run.asked.stop = True
        what = f"step {step}: loss {loss:.4f} is above --train.diverged-above {limit:g}"
        to_do = "a lower --optim.lr-peak may learn, in another --run-dir"
        run.failure = nonfinite.DivergedError(f"{what}, as in the row before; {to_do}")


def find_suspects(run: Run) -> list[int]:
    """The sequences of the step at run.progress, of any rank, whose own loss or gradient is not finite. Collective.

    Every pass is one of all ranks, since a gradient may be spread over them: each micro-batch as it was; of one that is
    bad, halves of the ranks and halves of those, while the others read zeros; of a bad rank each sequence in its place.
    None where zeros are not finite either: that is no matter of sequences.
    """
    plan, group, found = run.plan, run.group, list[int]()
    own = run.batches.sequence_ids(run.progress.position)[group.rank * plan.sequences_per_rank :]
    zeros_BT = torch.zeros((plan.micro_batch, run.config.train.seq_len), dtype=torch.int64, device=group.device)
    if not is_finite(run, zeros_BT, zeros_BT):
        return []
    for index, batch in enumerate(run.batches.take(run.progress.position)):
        groups = [range(group.world)]
        while groups:
            ranks = groups.pop()
            if is_finite(run, *(batch if group.rank in ranks else (zeros_BT, zeros_BT))):
                continue
            if len(ranks) > 1:
                groups += [ranks[: len(ranks) // 2], ranks[len(ranks) // 2 :]]
                continue
            for row in range(plan.micro_batch):  # repeated to a micro-batch: the shape that is compiled
                repeated = [tensor_BT[row].expand_as(tensor_BT).contiguous() for tensor_BT in batch]
                if not is_finite(run, *(repeated if group.rank in ranks else (zeros_BT, zeros_BT))):
                    found += [own[index * plan.micro_batch + row]] if group.rank in ranks else []
    apply.zero_gradients(run.module)
    return sorted(number for numbers in group.gather(found) for number in numbers)


def is_finite(run: Run, inputs_BT: Tensor, targets_BT: Tensor) -> bool:
    """Are the loss and the gradient of all ranks' micro-batches finite, with the weights as they are? Collective."""
    run.watchdog.heartbeat(f"step {run.progress.step + 1}, looking for what is not finite")
    apply.zero_gradients(run.module)
    loss_sum = accumulate_gradients(run, [(inputs_BT, targets_BT)], run.mean)
    return not run.group.any(not math.isfinite(loss_sum + optim.sum_of_squares(run.model.parameters())))


def look(run: Run) -> bool:
    """Validate, score HellaSwag and sample where it is their turn; True if a stop was asked for meanwhile, and the rest
    left undone."""
    stopped = (
        (is_due_to_validate(run) and validate_now(run))
        or (is_due_to_score(run) and score_now(run))
        or (is_due_to_sample(run) and sample_now(run))
    )
    apply.free_gathered(run.module)
    return stopped


def is_due_to_look(run: Run) -> bool:
    """Has anything its turn that looks at the model and changes nothing?"""
    return is_due_to_validate(run) or is_due_to_score(run) or is_due_to_sample(run)


def is_due_to_validate(run: Run) -> bool:
    """At step 0, at every interval and at the end, unless this very step was validated before a restart."""
    step, every = run.progress.step, run.config.validate.every
    if run.validation is None or every is None or step in run.logger.validated_steps:
        return False
    return step % every == 0 or step == run.config.train.steps


def is_due_to_score(run: Run) -> bool:
    """HellaSwag, at every interval of its own and at the end, unless this very step was scored before a restart."""
    step, every = run.progress.step, run.config.validate.hellaswag_every
    if run.hellaswag is None or every is None or step in run.logger.scored_steps:
        return False
    return step > 0 and (step % every == 0 or step == run.config.train.steps)


def is_due_to_sample(run: Run) -> bool:
    """At every interval and at the end, unless this very step was sampled before a restart."""
    step, every = run.progress.step, run.config.sample.every
    if run.sampler is None or every is None or step in run.logger.sampled_steps:
        return False
    return step > 0 and (step % every == 0 or step == run.config.train.steps)


def is_due_to_save(run: Run) -> bool:
    """At every interval, when --save.every-seconds have passed, and at the end."""
    step = run.progress.step
    return step % run.config.save.every == 0 or run.asked.save or step == run.config.train.steps


def validate_now(run: Run) -> bool:
    """Validate and log; True, and nothing logged, if a stop was asked for meanwhile."""
    assert run.validation is not None
    found = validation.validate(
        run.loss_model,
        run.validation,
        group=run.group,
        stop_requests=run.stop_requests,
        heartbeat=run.watchdog.heartbeat,
    )
    if found is None:
        return True
    progress = run.progress
    run.logger.validated_steps.add(progress.step)
    axes = run.meters.axes(step=progress.step, tokens=progress.tokens, seconds=run.meters.seconds)
    run.logger.row(
        axes | {"val_loss": found.loss, "val_loss_stderr": found.stderr, "val_bits_per_byte": found.bits_per_byte}
    )
    return False


def score_now(run: Run) -> bool:
    """Score HellaSwag and log it; True, and nothing logged, if a stop was asked for meanwhile."""
    assert run.hellaswag is not None
    losses_Q4 = hellaswag.ending_losses(
        run.loss_model,
        run.hellaswag,
        group=run.group,
        stop_requests=run.stop_requests,
        heartbeat=run.watchdog.heartbeat,
    )
    if losses_Q4 is None:
        return True
    found = hellaswag.score(run.hellaswag.questions, losses_Q4)
    progress = run.progress
    run.logger.scored_steps.add(progress.step)
    axes = run.meters.axes(step=progress.step, tokens=progress.tokens, seconds=run.meters.seconds)
    values = {name: value if value is None or math.isfinite(value) else None for name, value in asdict(found).items()}
    values["pinned"] = run.hellaswag.is_pinned
    run.logger.row(axes | {f"hellaswag_{name}": value for name, value in values.items()})
    return False


def sample_now(run: Run) -> bool:
    """Draw the fixed prompts' continuations, alike on every rank, and log them; True, and nothing logged, if a stop
    was asked for meanwhile."""
    assert run.sampler is not None

    def is_stopped_here() -> bool:
        run.watchdog.heartbeat(f"sampling after step {run.progress.step}")
        return is_stopped(run)

    samples = run.sampler.draw(run.loss_model, is_stopped_here)
    if samples is None:
        return True
    run.logger.sampled_steps.add(run.progress.step)
    run.logger.samples(run.progress.step, samples)
    return False


def save_now(run: Run) -> None:
    """Begin a checkpoint of where the run stands, and finish it unless saves are asynchronous. Rows up to here are on
    disk before it is."""
    if run.checkpoint_writer.is_under_way:
        run.logger.say("warning: the checkpoint before this one is still being written; waiting for it")
    finish_save(run)
    run.watchdog.heartbeat(f"saving after step {run.progress.step}")
    run.progress = replace(run.progress, seconds=run.meters.seconds)
    run.logger.make_durable()
    run.checkpoint_writer.begin(run.progress)
    run.asked.save = False
    if not run.checkpoint_writer.is_async:
        finish_save(run)


def save_at_the_end(run: Run) -> None:
    """Leave a checkpoint of where the run stands, if there is not one already."""
    finish_save(run)
    if run.progress.step not in (0, run.checkpoint_writer.saved_step):
        save_now(run)
        finish_save(run)


def finish_save(run: Run) -> None:
    """Give the checkpoint under way, if there is one, its name as soon as every rank has written its part."""
    run.watchdog.heartbeat(f"finishing a save before step {run.progress.step + 1}")
    step = run.checkpoint_writer.finish()
    run.asked.finish_save = False
    if step is not None:
        run.directory.report(step)


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
