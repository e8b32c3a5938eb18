"""The parts of a run: state, data, processes and reports."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from model.base import LanguageModel
from train.config import Config
from train.data import BatchPlan, Prefetcher
from train.evals.periodic import PeriodicEvaluation
from train.guards.nonfinite import NonFiniteGuard
from train.guards.stragglers import Stragglers
from train.guards.watchdog import Watchdog
from train.losses import LossModel
from train.metrics.logger import RunLogger
from train.metrics.meters import Meters, Startup
from train.metrics.profiler import Trace
from train.optim import Optimizer
from train.parallel.plan import ParallelPlan
from train.parallel.precision import LossScale
from train.processes.group import ProcessGroup
from train.processes.stop_requests import StopRequests
from train.run.checkpoint_schedule import CheckpointSchedule
from train.run.checkpoints import Progress
from train.run.directory import RunDirectory


@dataclass
class TrainState:
    """The state that a step changes.

    `module` is the trained module: `loss_model` itself, or DDP around it. `loss_scale` is None except for fp16.
    `loaded` is the checkpoint from which the run continues, None for a new run.
    """

    model: LanguageModel
    loss_model: LossModel
    module: nn.Module
    optimizer: Optimizer
    loss_scale: LossScale | None
    guard: NonFiniteGuard
    progress: Progress
    loaded: Path | None


@dataclass(frozen=True)
class RunData:
    """The data of the run: batches, and the evaluations with their own data."""

    batch_plan: BatchPlan
    batches: Prefetcher
    evaluations: list[PeriodicEvaluation]

    def is_evaluation_due(self, step: int) -> bool:
        return any(evaluation.is_due(step) for evaluation in self.evaluations)


@dataclass(frozen=True)
class Processes:
    """The processes, the layout of the model, and the guards that watch them."""

    group: ProcessGroup
    parallel_plan: ParallelPlan
    stop_requests: StopRequests
    watchdog: Watchdog
    stragglers: Stragglers


@dataclass(frozen=True)
class Reports:
    """The files and messages that the run writes."""

    directory: RunDirectory
    logger: RunLogger
    meters: Meters
    startup: Startup
    trace: Trace | None
    checkpoints: CheckpointSchedule


@dataclass
class Run:
    """A run, ready to train. `failure` is raised once the finished steps are saved."""

    config: Config
    state: TrainState
    data: RunData
    processes: Processes
    reports: Reports
    must_stop: bool = False
    failure: Exception | None = None

    def step_tokens(self, position: int) -> int:
        """Return the tokens of the step that begins at `position`, of all processes together."""
        return self.data.batch_plan.at(position).sequences * self.config.train.seq_len

    def token_weight(self, position: int) -> Tensor:
        """Return what turns a rank's sum of token losses into its part of the mean over the step at `position`."""
        group = self.processes.group
        return torch.full((), group.world / self.step_tokens(position), device=group.device)

    def wants_to_stop(self) -> bool:
        """Return whether this rank was asked to stop, or could not read its tokens. Cheap enough for every step."""
        return self.processes.stop_requests.wanted() or self.data.batches.has_fault
