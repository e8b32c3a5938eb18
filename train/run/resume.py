"""Where a run begins: its newest sound checkpoint, another run's weights, or nothing."""

import base64
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.errors import InputError
from data_prep.tokenizer import Tokenizer, gives_same_ids, load_tokenizer
from model.base import LanguageModel
from model.checkpoint import (
    CHECKPOINTS,
    STEP_NAME,
    find_checkpoint,
    model_config,
    model_tensors,
    newest_sound,
    read_state,
    read_tensors,
    step_of,
)
from model.config import ModelConfig
from model.hf.folder import is_hugging_face, open_folder
from train.config import Config
from train.parallel.apply import put
from train.parallel.precision import LossScale
from train.processes.group import ProcessGroup
from train.run.checkpoints import checkpoint_tensors

# What a model may be told otherwise and still be what its weights were trained for.
NOT_IN_WEIGHTS = ("attention", "zero_init_projections", "eot_id")


def find_start(run_dir: Path, *, group: ProcessGroup) -> tuple[Path | None, list[str]]:
    """The checkpoint to continue from, if any, with a line for each broken one passed over. Collective."""

    def look() -> tuple[Path | None, list[str]]:
        for leftover in (run_dir / CHECKPOINTS).glob(".step_*"):  # of saves and deletions cut short by a kill
            shutil.rmtree(leftover, ignore_errors=True)
        checkpoint, faults = newest_sound(run_dir)
        if checkpoint is None and faults:
            raise InputError(f"{run_dir}: has no sound checkpoint ({'; '.join(faults)}); move it away to start afresh")
        return checkpoint, faults

    return group.on_main(look)


def load(
    checkpoint: Path,
    *,
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    loss_scale: LossScale | None = None,
    group: ProcessGroup,
) -> dict[str, Any]:
    """Put a checkpoint's tensors into the live ones and its random state back; its state.json. Collective."""
    state = group.on_all(lambda: read_state(checkpoint))
    read_tensors(checkpoint, checkpoint_tensors(model, optimizer, loss_scale))
    _restore_random_state(state["random"], group.device)
    return state


def settle_origin(config: Config) -> Config:
    """--from-checkpoint as PATH@STEP, with the path absolute: what RUN's newest is changes, what a run began with not.
    A Hugging Face folder has no steps, and is its path.

    What this run's config.json says stays, as long as the command line names the same run or folder.
    """
    if config.from_checkpoint is None:
        return config
    run, at, step = config.from_checkpoint.rpartition("@")
    named = Path(run if at and step.isdigit() else config.from_checkpoint).resolve()
    if STEP_NAME.fullmatch(named.name):
        origin = f"{named.parents[1]}@{step_of(named)}"
    elif at and step.isdigit():
        origin = f"{named}@{int(step)}"
    elif (kept := kept_origin(config.directory, named)) is not None:
        origin = kept
    else:
        origin = str(named) if is_hugging_face(named) else f"{named}@{step_of(find_checkpoint(named))}"
    return replace(config, from_checkpoint=origin)


def kept_origin(run_dir: Path, named: Path) -> str | None:
    """What config.json says `run_dir` began with, if that is run or folder `named`."""
    try:
        kept = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))["config"]["from_checkpoint"]
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        return None  # a damaged file is reported where the run is compared with it
    return kept if kept is not None and str(named) in (kept, kept.rpartition("@")[0]) else None


def load_weights(name: str, model: LanguageModel, tokenizer: Tokenizer, group: ProcessGroup) -> str:
    """Put the weights of RUN's newest sound checkpoint, of RUN@STEP or of a Hugging Face folder into a model of the
    same shape; which they were. Collective.

    InputError, naming what differs, for another shape or another tokenizer: its ids would mean other text.
    """
    if group.on_main(lambda: is_hugging_face(Path(name))):
        return group.on_all(lambda: _load_folder(Path(name), model, tokenizer))

    def find() -> Path:
        checkpoint = find_checkpoint(name)
        theirs = model_config(read_state(checkpoint), checkpoint)
        _refuse_misfit(name, theirs, load_tokenizer(checkpoint.resolve().parents[1]), model.config, tokenizer)
        return checkpoint

    checkpoint = group.on_main(find)
    read_tensors(checkpoint, model_tensors(model))
    return str(checkpoint)


def _load_folder(path: Path, model: LanguageModel, tokenizer: Tokenizer) -> str:
    """Every rank reads the folder and keeps what is its own.

    A context shorter than the folder's takes the first of its positions, with which the model is what it was there.
    """
    folder, ours = open_folder(path), model.config
    if ours.context_len > folder.config.context_len:
        raise InputError(
            f"--from-checkpoint {path}: has positions for {folder.config.context_len} tokens; "
            f"set --train.seq-len {folder.config.context_len} or less (it is {ours.context_len})"
        )
    theirs = replace(folder.config, context_len=ours.context_len, vocab_multiple=ours.vocab_multiple)
    if theirs.resolved_mlp_width == ours.resolved_mlp_width:  # which None and a number can both say
        theirs = replace(theirs, mlp_width=ours.mlp_width)
    _refuse_misfit(str(path), theirs, folder.tokenizer, ours, tokenizer)
    for name, parameter in model.named_parameters():
        put(parameter, folder.parameter(name, ours))
    cut = folder.config.context_len - ours.context_len
    return f"{path}, without the last {cut} of its {folder.config.context_len} positions" if cut else str(path)


def _refuse_misfit(
    name: str, theirs: ModelConfig, their_codec: Tokenizer, ours: ModelConfig, tokenizer: Tokenizer
) -> None:
    there, here = asdict(theirs), asdict(ours)
    found = [
        f"{key} {there[key]} (this run: {here[key]})"
        for key in here
        if there[key] != here[key] and key not in NOT_IN_WEIGHTS
    ]
    if not gives_same_ids(their_codec, tokenizer):
        found.append("another tokenizer")
    if found:
        raise InputError(f"--from-checkpoint {name}: its model does not fit this run: {', '.join(found)}")


def _restore_random_state(states: dict[str, str], device: torch.device) -> None:
    tensors = {
        name: torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype=np.uint8).copy())
        for name, text in states.items()
    }
    torch.set_rng_state(tensors["cpu"])
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)
