"""Decides when a checkpoint is written, and keeps the order of writes that a kill at any moment requires.

Metrics rows are on disk before the checkpoint of their step. status.json names a step only after its checkpoint has its
final name.
"""

from collections.abc import Callable
from dataclasses import replace

from train.config import SaveConfig
from train.metrics.logger import RunLogger
from train.metrics.meters import Meters
from train.run.checkpoints import CheckpointWriter, Progress
from train.run.directory import RunDirectory


class CheckpointSchedule:
    """Saves every --save.every steps, after --save.every-seconds, and at the end.

    The loop sets two flags, alike on every rank. `is_requested`: a save is wanted now. `is_written`: every rank has
    written its part of the pending checkpoint.
    """

    def __init__(
        self,
        config: SaveConfig,
        *,
        last_step: int,
        writer: CheckpointWriter,
        directory: RunDirectory,
        logger: RunLogger,
        meters: Meters,
        heartbeat: Callable[[str], None],
    ) -> None:
        self.is_requested = self.is_written = False
        self.writer = writer
        self._every = config.every
        self._last_step = last_step
        self._directory = directory
        self._logger = logger
        self._meters = meters
        self._heartbeat = heartbeat

    def is_due(self, step: int) -> bool:
        """Return whether to save after this step."""
        return step % self._every == 0 or self.is_requested or step == self._last_step

    def save(self, progress: Progress) -> None:
        """Begin a checkpoint; finish it at once unless saves are asynchronous. Collective."""
        if self.writer.is_under_way:
            self._logger.log("warning: the checkpoint before this one is still being written; waiting for it")
        self.finish(progress)
        self._heartbeat(f"saving after step {progress.step}")
        self._logger.make_durable()
        self.writer.begin(replace(progress, seconds=self._meters.seconds))
        self.is_requested = False
        if not self.writer.is_async:
            self.finish(progress)

    def finish(self, progress: Progress) -> None:
        """Wait for the pending checkpoint, if any, and give it its final name. Collective."""
        self._heartbeat(f"finishing a save before step {progress.step + 1}")
        step = self.writer.finish()
        self.is_written = False
        if step is not None:
            self._directory.report(step)

    def save_at_the_end(self, progress: Progress) -> None:
        """Save `progress`, unless it is saved already or no step has been made. Collective."""
        self.finish(progress)
        if progress.step not in (0, self.writer.saved_step):
            self.save(progress)
            self.finish(progress)
