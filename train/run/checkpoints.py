"""Writes checkpoints. model/checkpoint.py describes their format; train/run/resume.py loads them.

A thread of each rank stages, writes and seals (hashes and fsyncs) the checkpoint under a temporary name. The threads
communicate over a gloo group of their own. When every rank's part is written, rank 0 gives the checkpoint its final
name, at a step boundary that all ranks agree on. So a kill at any moment leaves the checkpoint before it intact.
"""

import base64
import functools
import shutil
import sys
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from common.errors import InputError, writing_to
from common.files import fsync_directory, move_aside, sha256_of_file, write_atomically, write_json_atomically
from common.reading import is_there
from model.base import LanguageModel
from model.checkpoint import (
    CHECKPOINTS,
    STATE_FILE,
    SUMS_FILE,
    list_checkpoints,
    model_tensors,
    step_of,
)
from model.dcp_reader import data_files_of, last_line_of
from train.config import SaveConfig
from train.parallel.apply import local
from train.parallel.precision import LossScale
from train.processes.group import ProcessGroup
from train.run import directory as run_dirs

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
    written: Future[None]  # this rank's part: done, or the error that writing it met


class CheckpointWriter:
    """Writes a run's checkpoints: `begin`, then `finish` at once (--save.mode sync) or some steps later (async).

    Each rank writes a share of the tensors that several ranks hold alike. Synchronous saves write the tensors in place,
    so nothing may change them until `finish` returns. Asynchronous saves copy them first: on a CPU in `begin`; on a GPU
    during the next step's forward and backward passes, so call `wait_until_staged` before that step's update.

    `attempt` makes temporary names unique to this start. `state` is what state.json holds beside progress and random
    state. `loaded` is the checkpoint that this run continued from; it is never deleted. As a context, the writer waits
    for its thread at the end, except after an error in a world of several: the thread may wait for ranks that are gone.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        attempt: int,
        model: LanguageModel,
        optimizer: torch.optim.Optimizer,
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
        self._last_try = time.monotonic()
        self._is_retrying = False  # the last save failed
        # Each thread has its own current CUDA device, and DCP copies from the current one.
        on_gpu = functools.partial(torch.cuda.set_device, group.device) if is_cuda else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saves", initializer=on_gpu)
        self._purging: Future[None] | None = None
        self._save_group = dist.new_group(backend="gloo") if group.world > 1 else None
        self._copies: dict[str, Tensor] = {}
        self._stream = torch.cuda.Stream(group.device) if is_cuda and self.is_async else None
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)

    def begin(self, progress: Progress) -> None:
        """Start writing step_N. Collective; all earlier work on the device must be done.

        Raise InputError if the disk has too little room; earlier checkpoints stay as they are.
        """
        assert self._pending is None, "finish the pending checkpoint first"
        self._last_try = time.monotonic()
        folder = self._run_dir / CHECKPOINTS
        final = folder / f"step_{progress.step:08d}"
        temporary = folder / f".{final.name}.writing_{self._attempt}"
        tensors = checkpoint_tensors(*self._parts)
        self._group.on_main(lambda: self._make_room(folder, temporary, tensors))
        content = self._state | {"progress": asdict(progress), "random": _random_state(self._group.device)}
        own, staged = share_of(tensors, self._group), None
        if self.is_async:
            own, staged = self._copy(own)
        written = self._thread.submit(self._write, own, staged, temporary, content)
        self._pending = PendingCheckpoint(progress.step, temporary, final, staged, written)

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
        """Return whether a save is pending and this rank's part of it has ended, successfully or not."""
        return self._pending is not None and self._pending.written.done()

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

    def finish(self) -> int | None:
        """Wait for the pending save, give it its final name and delete old checkpoints. Collective.

        Return its step, or None if none is pending. If any rank's part failed, remove the save and raise InputError.
        """
        if self._pending is None:
            return None
        save, self._pending = self._pending, None
        error = save.written.exception()  # Whatever it is, all ranks raise it together.
        errors: dict[str, int] = {}  # each distinct error, with the first rank that had it
        for faults in self._group.gather({} if error is None else self._faults_of(error)):
            for rank, text in faults.items():
                errors.setdefault(text, rank)
        if errors:
            self._group.on_main(lambda: shutil.rmtree(save.temporary, ignore_errors=True))
            reasons = "; ".join(f"rank {rank}: {text}" for text, rank in errors.items())
            raise InputError(
                f"{save.final}: not saved; {reasons}; fix that, then give the same command again"
            ) from error
        self._group.on_main(lambda: _rename(save.temporary, save.final))
        self.saved_step = save.step
        self._is_retrying = False
        if self._group.is_main:
            protected = {save.final} | ({self._loaded} if self._loaded else set())
            self._purging = self._thread.submit(self._purge, protected)
        return save.step

    def _faults_of(self, error: BaseException) -> dict[int, str]:
        """Return an error of this rank's thread by rank: DCP raises the errors of all ranks on each."""
        if isinstance(error, CheckpointException):
            return {rank: last_line_of(own) for rank, (own, _) in error.failures.items()}
        return {self._group.rank: last_line_of(error)}

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown(wait=kind is None or self._group.world == 1)

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

    def _write(
        self, own: dict[str, Tensor], staged: torch.cuda.Event | None, temporary: Path, state: dict[str, Any]
    ) -> None:
        """Write this rank's part, in the thread; rank 0 ends last, since it seals the whole."""
        if staged is not None:
            staged.synchronize()
        writer = dcp.FileSystemWriter(temporary)
        dcp.save(own, storage_writer=writer, process_group=self._save_group, no_dist=self._save_group is None)
        if self._group.is_main:
            _seal(temporary, state)

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
    model: LanguageModel, optimizer: torch.optim.Optimizer, loss_scale: LossScale | None = None
) -> dict[str, Tensor]:
    """Return the live tensors of a checkpoint by name: model.NAME, optimizer.NAME.KEY, loss_scale.NAME."""
    tensors = model_tensors(model)
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{name}.{key}"] = value
    return tensors if loss_scale is None else tensors | loss_scale.tensors()


def share_of(tensors: dict[str, Tensor], group: ProcessGroup) -> dict[str, Tensor]:
    """Return the tensors that this rank writes: the largest are assigned first, to the ranks with the least so far.

    One rank writes a tensor that all hold alike. The ranks of one replica write a sharded tensor, each its own shard.
    DCP would divide as evenly by itself, but only after each rank had copied everything into host memory.
    """
    loads = [0.0] * group.world
    own = {}
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].nbytes, item[0])):
        writers = min(holders_of(tensor, group), key=lambda ranks: sum(loads[rank] for rank in ranks))
        for rank in writers:
            loads[rank] += tensor.nbytes / len(writers)
        if group.rank in writers:
            own[name] = tensor
    return own


def holders_of(tensor: Tensor, group: ProcessGroup) -> list[list[int]]:
    """Return every set of ranks that together hold a whole copy of the tensor."""
    if not isinstance(tensor, DTensor):
        return [[rank] for rank in range(group.world)]
    shards = tensor.device_mesh.size(-1)  # A replica is spread over the mesh's last dimension.
    return tensor.device_mesh.mesh.reshape(-1, shards).tolist()


def _seal(temporary: Path, state: dict[str, Any]) -> None:
    """Add state.json and the hashes of all files. Raise InputError if a file of another rank is not visible here."""
    end = time.monotonic() + run_dirs.SECONDS_TO_SEE
    while missing := data_files_of(temporary) - {path.name for path in temporary.iterdir()}:
        if time.monotonic() < end:
            time.sleep(0.1)
            continue
        raise InputError(
            f"{', '.join(sorted(missing))} of other ranks cannot be seen from rank 0: "
            "--run-dir must lie on storage that all hosts share"
        )
    write_json_atomically(temporary / STATE_FILE, state)
    sums = "".join(f"{sha256_of_file(path)}  {path.name}\n" for path in sorted(temporary.iterdir()))
    write_atomically(temporary / SUMS_FILE, sums)


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
