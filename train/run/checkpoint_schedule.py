"""Decides when a checkpoint is written, and keeps the order of writes that a kill at any moment requires.

Metrics rows are on disk before the checkpoint of their step. status.json names a step only after its checkpoint has its
final name. A save that fails does not end the run, unless --save.on-failure says so: the next one may succeed.
"""

import time
from collections.abc import Callable
from dataclasses import replace

from common.errors import InputError
from train.config import SaveConfig
from train.metrics.logger import RunLogger
from train.metrics.meters import Meters
from train.processes.group import ProcessGroup
from train.run.checkpoints import CheckpointWriter, Progress
from train.run.directory import RunDirectory

SECONDS_BETWEEN_TRIES = 2.0  # at the end of the run
ADVICE_AT_THE_END = ", then give the same command again"  # of an error that ended the run


class CheckpointSchedule:
    """Saves every --save.every steps, after --save.every-seconds, after a failed save, and at the end.

    The loop sets two flags, alike on every rank. `is_requested`: a save is wanted now. `is_written`: every rank has
    ended its work on the pending checkpoint. What fails, on whichever rank, fails on all of them.
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
        group: ProcessGroup,
        heartbeat: Callable[[str], None],
    ) -> None:
        self.is_requested = self.is_written = False
        self.writer = writer
        self._config = config
        self._last_step = last_step
        self._directory = directory
        self._logger = logger
        self._meters = meters
        self._group = group
        self._heartbeat = heartbeat
        self._num_failures = 0  # since the last save that succeeded, as far as they are counted
        self._last_counted = 0.0

    def is_due(self, step: int) -> bool:
        """Return whether to save after this step."""
        return step % self._config.every == 0 or self.is_requested or step == self._last_step

    def save(self, progress: Progress) -> None:
        """Begin a checkpoint; finish it at once unless saves are asynchronous. Collective."""
        if self.writer.is_under_way:
            self._logger.log("warning: the checkpoint before this one is still being written; waiting for it")
        self.finish(progress)
        self.is_requested = False
        try:
            self._begin(progress)
        except InputError as error:
            self._note_failure(error)
        if not self.writer.is_async:
            self.finish(progress)

    def advance(self, progress: Progress) -> None:
        """Go on with the pending checkpoint, if any, as far as that needs no waiting. Collective."""
        self._go_on(progress, self.writer.advance)

    def finish(self, progress: Progress) -> None:
        """Wait for the pending checkpoint, if any, and give it its final name. Collective."""
        self._go_on(progress, self.writer.finish)

    def _go_on(self, progress: Progress, act: Callable[[], int | None]) -> None:
        self._heartbeat(f"finishing a save before step {progress.step + 1}")
        self.is_written = False
        try:
            self._note(act())
        except InputError as error:
            self._note_failure(error)

    def save_at_the_end(self, progress: Progress) -> None:
        """Save `progress`, unless it is saved already or no step has been made. Collective."""
        self.finish(progress)
        if progress.step not in (0, self.writer.saved_step):
            self.insist(lambda: self._save_now(progress))

    def insist(self, write: Callable[[], None]) -> None:
        """Call a collective that writes; when it fails, again and again for --save.retry-seconds. Collective.

        For the end of a run. Raise the InputError of the last try.
        """
        end, warned = time.monotonic() + self._config.retry_seconds, set[str]()
        while True:
            try:
                return write()
            except InputError as error:
                is_over = self._group.on_main(lambda: time.monotonic() >= end)
                if is_over or self._config.on_failure == "stop":
                    raise
                if (text := trouble_of(error)) not in warned:
                    self._logger.log(f"warning: {text}; trying for {self._config.retry_seconds:g} s")
                    self._report(self._directory.step, text)
                warned.add(text)
            self._heartbeat("waiting to save again")
            time.sleep(min(SECONDS_BETWEEN_TRIES, self._config.retry_seconds / 10))

    def _save_now(self, progress: Progress) -> None:
        self._begin(progress)
        self._note(self.writer.finish())

    def _begin(self, progress: Progress) -> None:
        self._heartbeat(f"saving after step {progress.step}")
        self._logger.make_durable()
        self.writer.begin(replace(progress, seconds=self._meters.seconds))

    def _note(self, step: int | None) -> None:
        """Report a checkpoint that has its final name now; None: there is none."""
        if step is not None:
            self._num_failures = 0
            self._report(step, None)

    def _note_failure(self, error: InputError) -> None:
        """Warn that a save has failed and will be tried again. Raise the error if it must end the run. Collective."""
        if self._config.on_failure == "stop":
            raise error
        self.writer.retry_later()
        now = self._group.on_main(time.monotonic)
        if self._num_failures == 0 or now - self._last_counted >= self._config.retry_seconds:
            self._num_failures += 1
            self._last_counted = now
        if self._num_failures == self._config.failures_in_a_row:
            raise InputError(f"{self._num_failures} saves in a row have failed, the last: {error}") from error
        text = trouble_of(error)
        next_try = f"with the next save, or after {self._config.retry_seconds:g} s"
        count = f"failure {self._num_failures} of {self._config.failures_in_a_row}"
        self._logger.log(f"warning: {text}; training goes on and tries again {next_try} ({count})")
        self._report(self._directory.step, text)

    def _report(self, step: int, trouble: str | None) -> None:
        try:
            self._directory.report(step, None if trouble is None else f"{trouble}; trying again")
        except InputError as error:  # often the same full disk; the next report may succeed
            if self._config.on_failure == "stop":
                raise
            self._logger.log(f"warning: {trouble_of(error)}")


def trouble_of(error: InputError) -> str:
    """Return an error's text without the advice for a run that has ended."""
    return str(error).removesuffix(ADVICE_AT_THE_END)
