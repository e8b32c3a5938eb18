"""The training loop: the step, and what is due between steps. Read it top to bottom.

A step enqueues its work on the device and returns. The host reads its results (loss, norm, finiteness, requests of the
ranks) one step later, all in one copy and alike on every rank, so that no step waits for the host.
"""

import math
import time
from collections import deque
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from train import optim
from train.guards import nonfinite
from train.metrics.garbage import collected_between_steps
from train.parallel import apply
from train.parallel.warm_up import warm_up
from train.run.checkpoints import Progress
from train.state import Run

Number = TypeVar("Number")


class StepNumbers(NamedTuple, Generic[Number]):
    """A step's results: scalars on the device at first, plain numbers once the host has read them."""

    loss: Number
    norm: Number
    is_finite: Number
    is_bad: Number
    stops: Number  # ranks that were asked to stop, or could not read their tokens
    saves_due: Number  # ranks for which --save.every-seconds have passed
    saves_written: Number  # ranks that have written their part of the checkpoint under way
    loss_scale: Number


class StepResult(NamedTuple):
    """A step whose numbers, fp64 [8] in the order of StepNumbers, may still be on their way to the host.

    On a GPU `ready` marks their arrival. On a CPU it is None: they are there, and were at `seconds` of training.
    """

    before: Progress
    progress: Progress
    lr: float
    numbers: Tensor
    ready: torch.cuda.Event | None
    seconds: float
    data_wait_seconds: float


def train(run: Run) -> tuple[str, str | None]:
    """Train from run.state.progress to the last step or a stop. Return the state and reason for status.json."""
    config, state, meters, checkpoints = run.config, run.state, run.reports.meters, run.reports.checkpoints
    num_steps = config.train.steps
    pending: deque[StepResult] = deque()
    if state.progress.step < num_steps:
        run.must_stop = warm_up(run, accumulate_gradients)
        run.reports.startup.done("warm-up and compilation")
    run.must_stop = run.must_stop or evaluate(run)
    run.reports.startup.done("validation")
    with collected_between_steps() as collect_garbage:
        meters.start()
        while state.progress.step < num_steps and not run.must_stop:
            pending.append(take_step(run))
            state.progress = pending[-1].progress
            step = state.progress.step
            is_boundary = run.data.is_evaluation_due(step) or checkpoints.is_due(step)
            while len(pending) > (0 if is_boundary else 1):  # in between, one step stays unread
                read_result(run, pending.popleft())
            if step % config.track.every == 0:
                collect_garbage(1)  # activation checkpointing in eager mode leaves cycles behind
            if checkpoints.is_written:
                checkpoints.advance(state.progress)
            if is_boundary:
                meters.pause()
                run.must_stop |= evaluate(run)
                if checkpoints.is_due(step):
                    checkpoints.save(state.progress)
                collect_garbage(2)
                meters.start()
        while pending:
            read_result(run, pending.popleft())
        meters.pause()
    if run.reports.trace is not None:
        run.reports.trace.close()
    if isinstance(run.failure, nonfinite.DivergedError):
        checkpoints.finish(state.progress)  # a save of diverged weights would displace the good ones
    else:
        checkpoints.save_at_the_end(state.progress)
    if run.failure is not None:
        raise run.failure
    return end_of(run)


def end_of(run: Run) -> tuple[str, str | None]:
    """Return `done`, or `stopped` and the first rank's reason. Collective."""
    group, stop_requests = run.processes.group, run.processes.stop_requests
    group.on_main(stop_requests.remove_file)
    is_unfinished = run.data.is_evaluation_due(run.state.progress.step)  # a stop interrupted the last evaluation
    if run.state.progress.step == run.config.train.steps and not is_unfinished:
        return "done", None
    return "stopped", next(reason for reason in group.gather(stop_requests.reason) if reason)


def take_step(run: Run) -> StepResult:
    """Enqueue one optimizer step: batches, gradients, one all-reduce of what the ranks agree on, update."""
    config, state, processes, reports = run.config, run.state, run.processes, run.reports
    group, loss_scale, meters, writer = processes.group, state.loss_scale, reports.meters, reports.checkpoints.writer
    if reports.trace is not None:
        reports.trace.before_step(state.progress.step)
    processes.watchdog.heartbeat(f"step {state.progress.step + 1}, waiting for its data")
    processes.stragglers.begin_step()
    wait_began = time.perf_counter()
    batches = run.data.batches.take(state.progress.position)
    meters.waited_for_data(time.perf_counter() - wait_began)
    if processes.parallel_plan.is_sharded:
        processes.stragglers.end()  # gathering waits for the other ranks
    processes.watchdog.heartbeat(f"step {state.progress.step + 1}")

    scale = None if loss_scale is None else loss_scale.scale
    weight, num_tokens = run.token_weight(state.progress.position), run.step_tokens(state.progress.position)
    loss_sum = accumulate_gradients(run, batches, weight if scale is None else weight * scale)
    squares = optim.sum_of_squares(state.model.parameters()) / processes.parallel_plan.replicas
    flags = (run.wants_to_stop(), writer.is_overdue(), writer.has_written())
    totals = group.sum_(torch.stack([loss_sum, squares, *(torch.full_like(loss_sum, flag) for flag in flags)]))
    loss, norm = totals[0] / num_tokens, totals[1].sqrt().float()
    if scale is not None:
        norm = norm / scale
    is_finite, is_bad = state.guard.judge(loss, norm, loss_scale)
    lr = optim.learning_rate(state.progress.step, config.optim, config.train.steps)
    writer.wait_until_staged()
    optim.update(state.optimizer, state.progress.step, lr, norm, is_finite, scale)
    apply.zero_gradients(state.module)
    used_scale = torch.ones_like(loss) if scale is None else scale.clone()
    if loss_scale is not None:
        loss_scale.update(is_finite, frozen=state.guard.is_halted | is_bad)

    _, _, stops, saves_due, saves_written = totals
    results = StepNumbers(loss, norm, is_finite, is_bad, stops, saves_due, saves_written, used_scale)
    numbers = torch.stack([each.double() for each in results])
    ready = None
    if group.device.type == "cuda":
        numbers = numbers.to("cpu", non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
    if reports.trace is not None:
        reports.trace.after_step(state.progress.step)
    progress = state.progress.advanced(sequences=num_tokens // config.train.seq_len, tokens=num_tokens)
    return StepResult(state.progress, progress, lr, numbers, ready, meters.seconds, meters.data_wait_seconds)


def accumulate_gradients(run: Run, batches: list[tuple[Tensor, ...]], weight: Tensor) -> Tensor:
    """Add up gradients of (token losses x `weight`) over micro-batches; return the sum of token losses, fp64."""
    state, processes = run.state, run.processes
    loss_sum = torch.zeros((), dtype=torch.float64, device=processes.group.device)
    for index, (inputs_BT, targets_BT, *seeds) in enumerate(batches):
        processes.watchdog.heartbeat()
        is_last = index == len(batches) - 1
        apply.set_gradient_sync(state.module, processes.parallel_plan, is_last)
        scaled, unscaled = state.module(inputs_BT, targets_BT, weight, *seeds)
        if is_last:
            processes.stragglers.end_step()  # the backward pass waits for the other ranks
        scaled.backward()
        loss_sum += unscaled.detach()
    return loss_sum


def read_result(run: Run, result: StepResult) -> None:
    """Read a step's numbers on the host: act on requests and on a bad step, and log the step if its turn has come."""
    config, processes, reports, guard = run.config, run.processes, run.reports, run.state.guard
    step = result.progress.step
    processes.watchdog.heartbeat(f"step {step}, waiting for its results")
    seconds = result.seconds
    if result.ready is not None:
        result.ready.synchronize()
        seconds = reports.meters.seconds
    numbers: StepNumbers[float] = StepNumbers(*result.numbers.tolist())
    processes.watchdog.heartbeat(f"step {step}, reporting")
    processes.stragglers.record(step)
    if numbers.stops > 0:
        run.must_stop = processes.group.on_all(run.data.batches.refuse_fault)
    reports.checkpoints.is_requested |= numbers.saves_due > 0
    reports.checkpoints.is_written |= numbers.saves_written == processes.group.world
    guard.num_in_a_row = guard.num_in_a_row + 1 if numbers.is_bad else 0
    if numbers.is_bad:
        skip_or_stop(run, result, numbers)
    if step == 1 or step % config.track.every == 0 or step == config.train.steps:
        row = reports.meters.row(
            step=step,
            tokens=result.progress.tokens,
            seconds=seconds,
            data_wait_seconds=result.data_wait_seconds,
            loss=numbers.loss if math.isfinite(numbers.loss) else None,
            lr=result.lr,
            norm=numbers.norm if numbers.is_finite else None,
        )
        reports.logger.row(row if run.state.loss_scale is None else row | {"loss_scale": numbers.loss_scale})
        if (divergence := guard.check_divergence(step, numbers.loss)) is not None:
            run.must_stop, run.failure = True, divergence
    if (account := reports.startup.first_step()) is not None:
        reports.logger.log(account)
        processes.watchdog.expect_steps()


def skip_or_stop(run: Run, result: StepResult, numbers: StepNumbers[float]) -> None:
    """Record the sequences of a step whose update was not made; then go on, or save the state before it and stop."""
    guard, step, suspects = run.state.guard, result.progress.step, list[int]()
    if guard.mode == "stop":
        run.state.progress, suspects = result.before, find_suspects(run, result.before)
    run.reports.logger.note_nonfinite(
        {"step": step, "attempt": run.reports.directory.attempt}
        | {"loss": str(numbers.loss), "grad_norm": str(numbers.norm)}
        | {"sequences": run.data.batches.sequence_ids(result.before.position), "suspects": suspects}
    )
    message = f"step {step}: loss {numbers.loss}, gradient norm {numbers.norm}; its update was not made"
    if guard.mode == "stop":
        run.reports.checkpoints.save_at_the_end(run.state.progress)
        raise nonfinite.stop_error(message, run.config, step=step, suspects=suspects)
    run.reports.logger.log(nonfinite.skip_warning(message))
    if guard.num_in_a_row == nonfinite.MOST_IN_A_ROW:
        run.must_stop, run.failure = True, nonfinite.too_many_error(message)


def find_suspects(run: Run, progress: Progress) -> list[int]:
    """Return the sequences of the step at `progress` that are not finite by themselves. Collective."""
    state, group = run.state, run.processes.group

    def is_finite(*batch: Tensor) -> bool:
        run.processes.watchdog.heartbeat(f"step {progress.step + 1}, searching for what is not finite")
        apply.zero_gradients(state.module)
        loss_sum = accumulate_gradients(run, [batch], run.token_weight(progress.position))
        return not group.any(not math.isfinite(loss_sum + optim.sum_of_squares(state.model.parameters())))

    batches, own_ids = run.data.batches.take(progress.position), run.data.batches.own_ids(progress.position)
    suspects = nonfinite.find_suspects(batches, own_ids, is_finite, group=group)
    apply.zero_gradients(state.module)
    return suspects


def evaluate(run: Run) -> bool:
    """Run the evaluations that are due; return True if a stop was asked for meanwhile, and the rest left undone."""
    progress = run.state.progress
    is_stopped = False
    for evaluation in run.data.evaluations:
        is_stopped = is_stopped or (evaluation.is_due(progress.step) and not evaluation.run(progress))
    apply.free_gathered(run.state.module)
    return is_stopped
