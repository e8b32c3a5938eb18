"""Where a run begins: its newest sound checkpoint, another run's weights, or nothing."""

import base64
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.codec import Codec, load_codec
from data_prep.errors import InputError
from model.dcp_files import read_tensors
from model.language_model import LanguageModel
from model.trained import (
    CHECKPOINTS,
    STEP_NAME,
    find_checkpoint,
    model_config,
    model_tensors,
    newest_sound,
    read_state,
    step_of,
)
from train.config import Config
from train.mesh import Mesh
from train.numerics import LossScale
from train.saves import checkpoint_tensors

# What a model may be told otherwise and still be what its weights were trained for.
NOT_IN_WEIGHTS = ("attention", "zero_init_projections", "eot_id")


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
    model: LanguageModel,
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


def load_weights(name: str, model: LanguageModel, codec: Codec, mesh: Mesh) -> Path:
    """Put the weights of RUN's newest sound checkpoint, or of RUN@STEP, into a model of the same shape. Collective.

    InputError, naming what differs, for another shape or another tokenizer: its ids would mean other text.
    """

    def find() -> Path:
        checkpoint = find_checkpoint(name)
        theirs, ours = asdict(model_config(read_state(checkpoint), checkpoint)), asdict(model.config)
        found = [
            f"{key} {theirs[key]} (this run: {ours[key]})"
            for key in ours
            if theirs[key] != ours[key] and key not in NOT_IN_WEIGHTS
        ]
        if load_codec(checkpoint.resolve().parents[1]).describe() != codec.describe():
            found.append("another tokenizer")
        if found:
            raise InputError(f"--from-checkpoint {name}: its model does not fit this run: {', '.join(found)}")
        return checkpoint

    checkpoint = mesh.on_main(find)
    read_tensors(checkpoint, model_tensors(model))
    return checkpoint


def _restore_random_state(states: dict[str, str], device: torch.device) -> None:
    tensors = {
        name: torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype=np.uint8).copy())
        for name, text in states.items()
    }
    torch.set_rng_state(tensors["cpu"])
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)
