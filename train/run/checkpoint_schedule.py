"""When a checkpoint is written, and the order that a kill at any moment needs.

Rows are on disk before the checkpoint that they lead up to. status.json names a step only once its checkpoint has its
name.
"""

from dataclasses import replace

from train.config import SaveConfig
from train.guards.watchdog import Watchdog
from train.metrics.logger import RunLogger
from train.metrics.meters import Meters
from train.run.checkpoints import CheckpointWriter, Progress
from train.run.directory import RunDirectory


class CheckpointSchedule:
    """Saves at every interval of --save.every, when --save.every-seconds have passed, and at the end.

    `is_requested` and `is_written` are set by the loop, alike on every rank: a save is wanted now; every rank has
    written its part of the checkpoint under way.
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
        watchdog: Watchdog,
    ) -> None:
        self.is_requested = self.is_written = False
        self.writer = writer
        self._every = config.every
        self._last_step = last_step
        self._directory = directory
        self._logger = logger
        self._meters = meters
        self._watchdog = watchdog

    def is_due(self, step: int) -> bool:
        return step % self._every == 0 or self.is_requested or step == self._last_step

    def save(self, progress: Progress) -> None:
        """Begin a checkpoint, and finish it at once unless saves are asynchronous. Collective."""
        if self.writer.is_under_way:
            self._logger.log("warning: the checkpoint before this one is still being written; waiting for it")
        self.finish(progress)
        self._watchdog.heartbeat(f"saving after step {progress.step}")
        self._logger.make_durable()
        self.writer.begin(replace(progress, seconds=self._meters.seconds))
        self.is_requested = False
        if not self.writer.is_async:
            self.finish(progress)

    def finish(self, progress: Progress) -> None:
        """Give the checkpoint under way, if there is one, its name once every rank has written its part. Collective."""
        self._watchdog.heartbeat(f"finishing a save before step {progress.step + 1}")
        step = self.writer.finish()
        self.is_written = False
        if step is not None:
            self._directory.report(step)

    def save_at_the_end(self, progress: Progress) -> None:
        """Leave a checkpoint of `progress`, unless there is one already or no step has been made. Collective."""
        self.finish(progress)
        if progress.step not in (0, self.writer.saved_step):
            self.save(progress)
            self.finish(progress)
