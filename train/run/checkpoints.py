"""Writes checkpoints. model/checkpoint.py describes their format; train/run/resume.py loads them.

A thread of each rank stages and writes its part (hashed and fsynced) under a temporary name. When every rank's part is
written, rank 0 hears of all parts, and its thread seals the whole. When that is done, rank 0 gives the checkpoint its
final name. Both happen at step boundaries that all ranks agree on, and no thread communicates. So a kill at any moment
leaves the checkpoint before it intact.
"""

import base64
import functools
import shutil
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import InputError, writing_to
from common.files import fsync_directory, move_aside
from common.reading import is_there
from model.base import LanguageModel
from model.checkpoint import CHECKPOINTS, list_checkpoints, model_tensors, step_of
from model.dcp_reader import last_line_of
from train.config import SaveConfig
from train.optim import Optimizer
from train.parallel.apply import local
from train.parallel.precision import LossScale
from train.processes.group import ProcessGroup
from train.run.checkpoint_files import Part, seal, write_part
from train.run.shares import divide, share_of

SPARE_BYTES = 16 * 2**20  # for state.json, .metadata and the file system's own needs


@dataclass(frozen=True)
class Progress:
    """The progress of a run: optimizer steps, sequences consumed, tokens seen, seconds of training."""

    step: int = 0
    position: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def advanced(self, *, sequences: int, tokens: int) -> "Progress":
        """Return the progress after one more step."""
        return replace(self, step=self.step + 1, position=self.position + sequences, tokens=self.tokens + tokens)


@dataclass(frozen=True)
class PendingCheckpoint:
    """A checkpoint being written."""

    step: int
    temporary: Path
    final: Path
    staged: torch.cuda.Event | None  # recorded when the tensors are copied out of the GPU; None: nothing to copy
    state: dict[str, Any]  # for state.json
    written: Future[Part]  # this rank's part, or the error that writing it met
    sealed: Future[None] | None = None  # after `seal`: on rank 0 done, or the error that sealing met; else done


class CheckpointWriter:
    """Writes a run's checkpoints: `begin`, then `finish` at once (--save.mode sync) or some steps later (async).

    Each rank writes a share of the tensors that several ranks hold alike. Synchronous saves write the tensors in place,
    so nothing may change them until `finish` returns. Asynchronous saves copy them first: on a CPU in `begin`; on a GPU
    during the next step's forward and backward passes, so call `wait_until_staged` before that step's update. They go
    on by `advance`, whenever `has_written` is true on every rank.

    `attempt` makes temporary names unique to this start. `state` is what state.json holds beside progress and random
    state. `loaded` is the checkpoint that this run continued from; it is never deleted. As a context, the writer waits
    for its thread at the end.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        attempt: int,
        model: LanguageModel,
        optimizer: Optimizer,
        loss_scale: LossScale | None = None,
        config: SaveConfig,
        state: dict[str, Any],
        loaded: Path | None,
        group: ProcessGroup,
    ) -> None:
        is_cuda = group.device.type == "cuda"
        self.is_async = config.mode == "async" or (config.mode == "auto" and is_cuda)
        self.saved_step = None if loaded is None else step_of(loaded)  # the newest checkpoint's
        self._run_dir = run_dir
        self._attempt = attempt
        self._parts = model, optimizer, loss_scale
        self._config = config
        self._state = state
        self._loaded = loaded
        self._group = group
        self._pending: PendingCheckpoint | None = None
        self._undeletable: set[Path] = set()
        self._has_saved = False  # a checkpoint with these tensors
        self._last_try = time.monotonic()
        self._is_retrying = False  # the last save failed
        # Each thread has its own current CUDA device, and DCP copies from the current one.
        on_gpu = functools.partial(torch.cuda.set_device, group.device) if is_cuda else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saves", initializer=on_gpu)
        self._purging: Future[None] | None = None
        self._division: dict[str, list[int]] = {}  # which ranks write each tensor
        self._copies: dict[str, Tensor] = {}
        self._stream = torch.cuda.Stream(group.device) if is_cuda and self.is_async else None

    def begin(self, progress: Progress) -> None:
        """Start writing step_N. Collective; all earlier work on the device must be done.

        Raise InputError if the disk has too little room; earlier checkpoints stay as they are.
        """
        assert self._pending is None, "finish the pending checkpoint first"
        self._last_try = time.monotonic()
        folder = self._run_dir / CHECKPOINTS
        final = folder / f"step_{progress.step:08d}"
        temporary = folder / f".{final.name}.writing_{self._attempt}"
        tensors = checkpoint_tensors(*self._parts, step=progress.step)
        self._group.on_main(lambda: self._make_room(folder, temporary, tensors))
        content = self._state | {"progress": asdict(progress), "random": _random_state(self._group.device)}
        if self._division.keys() != tensors.keys():  # at the first save, and at the first with a mean of the weights
            self._division, self._copies, self._has_saved = divide(tensors, self._group), {}, False
        own, staged = share_of(tensors, self._division, self._group.rank), None
        if self.is_async:
            own, staged = self._copy(own)
        written = self._thread.submit(self._write, own, staged, temporary)
        self._pending = PendingCheckpoint(progress.step, temporary, final, staged, content, written)

    def _copy(self, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
        """Copy tensors to host memory, allocated once; return the copies and the event of their end (None: copied)."""
        stream = self._stream
        for name, tensor in tensors.items():
            if name not in self._copies:
                self._copies[name] = torch.empty_like(tensor, device="cpu", pin_memory=stream is not None)
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # None: changes nothing
            for name, tensor in tensors.items():
                local(self._copies[name]).copy_(local(tensor), non_blocking=stream is not None)
        return self._copies, None if stream is None else stream.record_event()

    def wait_until_staged(self) -> None:
        """Make the GPU, not the host, wait for the pending save's copies. Call before tensors change."""
        if self._pending is not None and self._pending.staged is not None:
            torch.cuda.current_stream().wait_event(self._pending.staged)

    @property
    def is_under_way(self) -> bool:
        return self._pending is not None

    def has_written(self) -> bool:
        """Return whether a save is pending and this rank's work on it has ended, successfully or not."""
        return self._pending is not None and (self._pending.sealed or self._pending.written).done()

    def is_overdue(self) -> bool:
        """Return whether --save.every-seconds have passed since the last save began. False on ranks other than 0.

        After a failed save also whether --save.retry-seconds have passed since it failed.
        """
        if self._pending is not None or not self._group.is_main:
            return False
        waited_seconds, every_seconds = time.monotonic() - self._last_try, self._config.every_seconds
        is_retry_due = self._is_retrying and waited_seconds >= self._config.retry_seconds
        return is_retry_due or (every_seconds is not None and waited_seconds >= every_seconds)

    def retry_later(self) -> None:
        """Note that a save has failed."""
        self._last_try = time.monotonic()
        self._is_retrying = True

    def advance(self) -> int | None:
        """Go on with the pending save as far as that needs no waiting. Collective.

        Return its step if it has its final name now, else None. Raise InputError as `finish` does.
        """
        if self._pending is None:
            return None
        if self._pending.sealed is None:
            self._seal(self._pending)
            return None
        return self.finish() if self._group.on_main(self.has_written) else None

    def finish(self) -> int | None:
        """Wait for the pending save, give it its final name and delete old checkpoints. Collective.

        Return its step, or None if none is pending. If any rank's part failed, remove the save and raise InputError.
        """
        if self._pending is not None and self._pending.sealed is None:
            self._seal(self._pending)
        if self._pending is None:
            return None
        save, self._pending = self._pending, None
        assert save.sealed is not None
        error = save.sealed.exception()
        self._raise_together(save, [] if error is None else [last_line_of(error)], error)
        self._group.on_main(lambda: _rename(save.temporary, save.final))
        self.saved_step, self._has_saved = save.step, True
        self._is_retrying = False
        if self._group.is_main:
            protected = {save.final} | ({self._loaded} if self._loaded else set())
            self._purging = self._thread.submit(self._purge, protected)
        return save.step

    def _seal(self, save: PendingCheckpoint) -> None:
        """Wait until every rank's part is written, and let rank 0's thread seal the whole. Collective."""
        error = save.written.exception()
        parts = self._group.gather_on_main(save.written.result() if error is None else last_line_of(error))
        self._pending = None
        self._raise_together(save, [part if isinstance(part, str) else None for part in parts], error)
        sealed = Future[None]()
        if self._group.is_main:
            is_first = not self._has_saved
            sealed = self._thread.submit(seal, save.temporary, parts, save.state, is_first=is_first)
        else:
            sealed.set_result(None)
        self._pending = replace(save, sealed=sealed)

    def _raise_together(self, save: PendingCheckpoint, faults: list[str | None], error: BaseException | None) -> None:
        """Remove the save and raise InputError on every rank if rank 0 has faults, by rank. Collective.

        `error` is this rank's own: whatever it is, all ranks raise it together.
        """

        def reasons() -> str:
            ranks: dict[str, int] = {}  # of each distinct fault, the first rank that had it
            for rank, fault in enumerate(faults):
                if fault is not None:
                    ranks.setdefault(fault, rank)
            if ranks:
                shutil.rmtree(save.temporary, ignore_errors=True)
            return "; ".join(f"rank {rank}: {fault}" for fault, rank in ranks.items())

        if text := self._group.on_main(reasons):
            raise InputError(f"{save.final}: not saved; {text}; fix that, then give the same command again") from error

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def _make_room(self, folder: Path, temporary: Path, tensors: dict[str, Tensor]) -> None:
        """Make the temporary folder. Raise InputError if the whole checkpoint does not fit on the disk."""
        purging, self._purging = self._purging, None
        if purging is not None:
            purging.result()
        needed = sum(tensor.nbytes for tensor in tensors.values()) + SPARE_BYTES
        with writing_to(folder):
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            free = shutil.disk_usage(folder).free
        if free < needed:
            raise InputError(
                f"{folder}: {free / 1e9:.2f} GB free, but a checkpoint needs {needed / 1e9:.2f} GB; "
                "make room or set --run-dir elsewhere, then give the same command again"
            )
        with writing_to(folder):
            temporary.mkdir()

    def _write(self, own: dict[str, Tensor], staged: torch.cuda.Event | None, temporary: Path) -> Part:
        """Write this rank's part, in the thread."""
        if staged is not None:
            staged.synchronize()
        return write_part(temporary, own, self._group.rank)

    def _purge(self, protected: set[Path]) -> None:
        """Delete old checkpoints, in the thread; warn once of each that cannot be deleted."""
        for checkpoint in list_checkpoints(self._run_dir)[: -self._config.keep]:
            is_nth = self._config.keep_every is not None and step_of(checkpoint) % self._config.keep_every == 0
            if checkpoint in protected or is_nth:
                continue
            doomed = checkpoint.with_name(f".{checkpoint.name}.deleting")
            try:
                shutil.rmtree(doomed, ignore_errors=True)
                checkpoint.rename(doomed)
                shutil.rmtree(doomed)
            except OSError as error:
                if checkpoint not in self._undeletable:
                    print(f"warning: {checkpoint} could not be deleted: {error}", file=sys.stderr)
                self._undeletable.add(checkpoint)


def checkpoint_tensors(
    model: LanguageModel, optimizer: Optimizer, loss_scale: LossScale | None = None, *, step: int = 0
) -> dict[str, Tensor]:
    """Return the live tensors of a step's checkpoint by name.

    model.NAME, optimizer.NAME.KEY, loss_scale.NAME, and average.NAME from the first averaged step on.
    """
    tensors = model_tensors(model)
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{name}.{key}"] = value
    if optimizer.average is not None:
        tensors |= optimizer.average.tensors(step)
    return tensors if loss_scale is None else tensors | loss_scale.tensors()


def _rename(temporary: Path, final: Path) -> None:
    with writing_to(final):
        if final.is_dir() and not final.is_symlink():  # a damaged checkpoint, which this start passed over
            shutil.rmtree(final)
        elif is_there(final):
            move_aside(final)
        temporary.rename(final)
        fsync_directory(final.parent)


def _random_state(device: torch.device) -> dict[str, str]:
    """Return the states of this rank's random generators. Training does not draw from them yet; future code may."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {name: base64.b64encode(value.numpy().tobytes()).decode("ascii") for name, value in states.items()}
