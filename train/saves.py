"""The write side of checkpoints, and continuing from one. The format is described in model/trained.py."""

import base64
import json
import shutil
import sys
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from data_prep.atomic import fsync_directory, sha256_of_file, write_atomically, write_json_atomically
from data_prep.codec import Codec, load_codec
from data_prep.errors import InputError
from model.dcp_files import data_files_of, last_line_of, read_tensors
from model.gpt import GPT
from model.trained import (
    CHECKPOINTS,
    STATE_FILE,
    STEP_NAME,
    SUMS_FILE,
    find_checkpoint,
    list_checkpoints,
    model_config,
    model_tensors,
    newest_sound,
    read_state,
    step_of,
)
from train.config import Config, SaveConfig
from train.mesh import Mesh
from train.numerics import LossScale

SPARE_BYTES = 16 * 2**20  # for state.json, .metadata and the file system's own needs


@dataclass(frozen=True)
class Progress:
    """Where a run stands: optimizer steps done, windows consumed, tokens seen, seconds of training."""

    step: int = 0
    position: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def advanced(self, *, windows: int, tokens: int) -> "Progress":
        return replace(self, step=self.step + 1, position=self.position + windows, tokens=self.tokens + tokens)


def checkpoint_tensors(
    model: GPT, optimizer: torch.optim.Optimizer, loss_scale: LossScale | None = None
) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by name: model.NAME, optimizer.NAME.KEY, loss_scale.NAME; views of the live ones."""
    tensors = model_tensors(model)
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{name}.{key}"] = value
    return tensors if loss_scale is None else tensors | loss_scale.tensors()


def save(
    run_dir: Path,
    *,
    model: GPT,
    optimizer: torch.optim.Optimizer,
    loss_scale: LossScale | None = None,
    progress: Progress,
    state: dict[str, Any],
    config: SaveConfig,
    loaded: Path | None,
    mesh: Mesh,
) -> Path:
    """Write step_N atomically, then delete what `config` no longer keeps. Collective; returns the checkpoint.

    Raises InputError when there is no room, leaving every earlier checkpoint as it was.
    """
    folder = run_dir / CHECKPOINTS
    final = folder / f"step_{progress.step:08d}"
    temporary = folder / f".{final.name}.writing"
    tensors = checkpoint_tensors(model, optimizer, loss_scale)
    mesh.on_main(lambda: _make_room(folder, temporary, tensors))
    error = _write_tensors(tensors, temporary, mesh)
    errors: dict[str, int] = {}  # every distinct one, by the first rank that met it
    for rank, text in enumerate(mesh.gather(error)):
        if text is not None:
            errors.setdefault(text, rank)
    if errors:
        mesh.on_main(lambda: shutil.rmtree(temporary, ignore_errors=True))
        raise InputError(f"{final}: not saved; {'; '.join(f'rank {rank}: {text}' for text, rank in errors.items())}")
    content = state | {"progress": asdict(progress), "random": _random_state(mesh.device)}
    mesh.on_main(lambda: _commit(temporary, final, content))
    mesh.on_main(lambda: _purge(run_dir, config, {final} | ({loaded} if loaded else set())))
    return final


def _make_room(folder: Path, temporary: Path, tensors: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) + SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"{folder}: {free / 1e9:.2f} GB free, but a checkpoint needs {needed / 1e9:.2f} GB; "
            "make room or set --run-dir elsewhere, then give the same command again"
        )
    temporary.mkdir()


def _write_tensors(tensors: dict[str, Tensor], directory: Path, mesh: Mesh) -> str | None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        try:
            dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(directory), no_dist=mesh.world == 1)
        except (CheckpointException, OSError, RuntimeError) as error:
            return last_line_of(error)
    return None


def _commit(temporary: Path, final: Path, state: dict[str, Any]) -> None:
    missing = data_files_of(temporary) - {path.name for path in temporary.iterdir()}
    if missing:
        shutil.rmtree(temporary, ignore_errors=True)
        raise InputError(
            f"{final}: not saved; {', '.join(sorted(missing))} of other ranks cannot be seen from rank 0: "
            "--run-dir must lie on storage that all hosts share"
        )
    write_json_atomically(temporary / STATE_FILE, state)
    sums = "".join(f"{sha256_of_file(path)}  {path.name}\n" for path in sorted(temporary.iterdir()))
    write_atomically(temporary / SUMS_FILE, sums)
    if final.exists():  # an unsound one of the same step, passed over when this run started
        shutil.rmtree(final)
    temporary.rename(final)
    fsync_directory(final.parent)


def _purge(run_dir: Path, config: SaveConfig, held: set[Path]) -> None:
    checkpoints = list_checkpoints(run_dir)
    for checkpoint in checkpoints[: -config.keep]:
        is_nth = config.keep_every is not None and step_of(checkpoint) % config.keep_every == 0
        if checkpoint in held or is_nth:
            continue
        doomed = checkpoint.with_name(f".{checkpoint.name}.deleting")
        try:
            shutil.rmtree(doomed, ignore_errors=True)
            checkpoint.rename(doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            print(f"warning: {checkpoint} could not be deleted: {error}", file=sys.stderr)


def find_start(run_dir: Path, *, mesh: Mesh) -> tuple[Path | None, list[str]]:
    """The checkpoint to continue from, if any, with a line for each broken one passed over. Collective."""

    def look() -> tuple[Path | None, list[str]]:
        for leftover in (run_dir / CHECKPOINTS).glob(".step_*"):  # of saves and deletions cut short by a kill
            shutil.rmtree(leftover, ignore_errors=True)
        checkpoint, faults = newest_sound(run_dir)
        if checkpoint is None and faults:
            raise InputError(f"{run_dir}: has no sound checkpoint ({'; '.join(faults)}); move it away to start afresh")
        return checkpoint, faults

    return mesh.on_main(look)


def load(
    checkpoint: Path,
    *,
    model: GPT,
    optimizer: torch.optim.Optimizer,
    loss_scale: LossScale | None = None,
    mesh: Mesh,
) -> dict[str, Any]:
    """Put a checkpoint's tensors into the live ones and its random state back; its state.json. Collective."""
    state = mesh.on_all(lambda: read_state(checkpoint))
    read_tensors(checkpoint, checkpoint_tensors(model, optimizer, loss_scale))
    _restore_random_state(state["random"], mesh.device)
    return state


def settle_origin(config: Config) -> Config:
    """--from-checkpoint as PATH@STEP, with the path absolute: what RUN's newest is changes, what a run began with not.

    What this run's config.json says stays, as long as the command line names the same run.
    """
    if config.from_checkpoint is None:
        return config
    run, at, step = config.from_checkpoint.rpartition("@")
    named = Path(run if at and step.isdigit() else config.from_checkpoint).resolve()
    if STEP_NAME.fullmatch(named.name):
        named, step = named.parents[1], str(step_of(named))
    elif not (at and step.isdigit()):
        step = kept_step(config.directory, named) or str(step_of(find_checkpoint(named)))
    return replace(config, from_checkpoint=f"{named}@{int(step)}")


def kept_step(run_dir: Path, named: Path) -> str | None:
    """The step of run `named` that config.json says `run_dir` began with."""
    try:
        kept = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))["config"]["from_checkpoint"]
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        return None  # a damaged file is reported where the run is compared with it
    path, _, step = (kept or "").rpartition("@")
    return step if path == str(named) else None


def load_weights(name: str, model: GPT, codec: Codec, mesh: Mesh) -> Path:
    """Put the weights of RUN's newest sound checkpoint, or of RUN@STEP, into a model of the same shape. Collective.

    InputError, naming what differs, for another shape or another tokenizer: its ids would mean other text.
    """

    def find() -> Path:
        checkpoint = find_checkpoint(name)
        theirs, ours = asdict(model_config(read_state(checkpoint), checkpoint)), asdict(model.config)
        found = [f"{key} {theirs[key]} (this run: {ours[key]})" for key in ours if theirs[key] != ours[key]]
        if load_codec(checkpoint.resolve().parents[1]).describe() != codec.describe():
            found.append("another tokenizer")
        if found:
            raise InputError(f"--from-checkpoint {name}: its model does not fit this run: {', '.join(found)}")
        return checkpoint

    checkpoint = mesh.on_main(find)
    read_tensors(checkpoint, model_tensors(model))
    return checkpoint


def _random_state(device: torch.device) -> dict[str, str]:
    """Rank 0's generators. Nothing in training draws from them today; what will must find them as they were."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {name: base64.b64encode(value.numpy().tobytes()).decode("ascii") for name, value in states.items()}


def _restore_random_state(states: dict[str, str], device: torch.device) -> None:
    tensors = {
        name: torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype=np.uint8).copy())
        for name, text in states.items()
    }
    torch.set_rng_state(tensors["cpu"])
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)
