"""Evaluations in the training loop: validation, HellaSwag and samples, each at its own interval.

No evaluation changes the model or draws from training's random generators: a run is bitwise the same without them.
Once there is a mean of the weights (train/parallel/averaging.py), it takes the model's place while an evaluation runs.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from train.evals import hellaswag, validation
from train.evals.hellaswag import HellaSwag
from train.evals.samples import Sampler
from train.evals.validation import Scoring, ValidationSet
from train.guards.watchdog import Watchdog
from train.losses import LossModel
from train.metrics.logger import RunLogger
from train.metrics.meters import Meters
from train.parallel.averaging import WeightAverage
from train.processes.group import ProcessGroup
from train.processes.stop_requests import StopRequests
from train.run.checkpoints import Progress

Row = dict[str, Any]


@dataclass(frozen=True)
class PeriodicEvaluation:
    """One evaluation: due every `every` steps, at the last step and, if `at_start`, at step 0.

    `evaluate` returns the values to report, or None if a stop is requested meanwhile. `done_steps`: the steps that
    have been reported, also before a restart. `shapes`: (rows, tokens) of the model's calls, to be compiled ahead.
    Values of the weights' mean are reported with "averaged".
    """

    every: int
    last_step: int
    done_steps: set[int]
    evaluate: Callable[[Progress], Row | None]
    report: Callable[[Progress, Row], None]
    average: WeightAverage | None
    at_start: bool = False
    shapes: tuple[tuple[int, int], ...] = ()

    def is_due(self, step: int) -> bool:
        if step in self.done_steps or (step == 0 and not self.at_start):
            return False
        return step % self.every == 0 or step == self.last_step

    def run(self, progress: Progress) -> bool:
        """Evaluate and report; return False, with nothing reported, if a stop is requested meanwhile. Collective."""
        average = self.average if self.average is not None and self.average.has_begun(progress.step) else None
        with nullcontext() if average is None else average.in_place_of_the_weights():
            values = self.evaluate(progress)
        if values is None:
            return False
        self.done_steps.add(progress.step)
        self.report(progress, values if average is None else values | {"averaged": True})
        return True


@dataclass(frozen=True)
class Evaluator:
    """The parts of a run that every evaluation needs; each method returns one PeriodicEvaluation."""

    loss_model: LossModel
    last_step: int
    group: ProcessGroup
    stop_requests: StopRequests
    watchdog: Watchdog
    logger: RunLogger
    meters: Meters
    average: WeightAverage | None = None

    @property
    def _scoring(self) -> Scoring:
        return Scoring(self.group, self.stop_requests, self.watchdog.heartbeat)

    def validation(self, data: ValidationSet, *, every: int) -> PeriodicEvaluation:
        """Return the evaluation of the validation loss and bits per byte, also before the first step."""

        def evaluate(progress: Progress) -> Row | None:
            result = validation.validate(self.loss_model, data, self._scoring)
            if result is None:
                return None
            values = {"loss": result.loss, "loss_stderr": result.stderr, "bits_per_byte": result.bits_per_byte}
            return {f"val_{name}": value for name, value in values.items()}

        done, shapes = self.logger.validated_steps, (data.shape,)
        return self._periodic(every, done, evaluate, self._log_row, at_start=True, shapes=shapes)

    def hellaswag(self, data: HellaSwag, *, every: int) -> PeriodicEvaluation:
        """Return the evaluation of HellaSwag's score, in the completion style."""

        def evaluate(progress: Progress) -> Row | None:
            losses_Q4 = hellaswag.ending_losses(self.loss_model, data, self._scoring)
            if losses_Q4 is None:
                return None
            values = asdict(hellaswag.score(data.questions, losses_Q4)) | {"pinned": data.is_pinned}
            return {
                f"hellaswag_{name}": None if value is not None and not math.isfinite(value) else value
                for name, value in values.items()
            }

        done, shapes = self.logger.scored_steps, tuple(data.shapes)
        return self._periodic(every, done, evaluate, self._log_row, shapes=shapes)

    def samples(self, sampler: Sampler, *, every: int, shape: tuple[int, int]) -> PeriodicEvaluation:
        """Return the evaluation that continues the fixed prompts, alike on every rank."""

        def evaluate(progress: Progress) -> Row | None:
            def is_stopped() -> bool:
                self.watchdog.heartbeat(f"sampling after step {progress.step}")
                return self.group.any(self.stop_requests.wanted())

            samples = sampler.draw(self.loss_model, is_stopped)
            return None if samples is None else {"samples": samples}

        def report(progress: Progress, values: Row) -> None:
            self.logger.samples({"step": progress.step} | values)

        return self._periodic(every, self.logger.sampled_steps, evaluate, report, shapes=(shape,))

    def _periodic(
        self,
        every: int,
        done_steps: set[int],
        evaluate: Callable[[Progress], Row | None],
        report: Callable[[Progress, Row], None],
        **options: Any,
    ) -> PeriodicEvaluation:
        return PeriodicEvaluation(every, self.last_step, done_steps, evaluate, report, self.average, **options)

    def _log_row(self, progress: Progress, values: Row) -> None:
        axes = self.meters.axes(step=progress.step, tokens=progress.tokens, seconds=self.meters.seconds)
        self.logger.row(axes | values)
