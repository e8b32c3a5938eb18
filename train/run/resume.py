"""Finds where a run begins: its newest sound checkpoint, another run's weights, or new weights; and loads them."""

import base64
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from common.errors import InputError
from data_prep.tokenizer import Tokenizer, gives_same_ids, load_tokenizer
from model.base import LanguageModel
from model.checkpoint import (
    CHECKPOINTS,
    STEP_NAME,
    find_checkpoint,
    list_checkpoints,
    model_config,
    model_tensors,
    newest_sound,
    read_state,
    read_tensors,
    run_and_step,
    step_of,
)
from model.config import ModelConfig
from model.hf.folder import is_hugging_face, open_folder
from train.config import Config
from train.parallel.apply import put
from train.parallel.precision import LossScale
from train.processes.group import ProcessGroup
from train.processes.ranks import is_automatic_restart
from train.run.checkpoints import checkpoint_tensors
from train.run.identity import recorded_run

# Settings that may differ from those with which the weights were trained.
FREE_SETTINGS = ("attention", "zero_init_projections", "eot_id")


def find_start(
    run_dir: Path, *, save_every: int, give_up: Callable[[], list[str]], group: ProcessGroup
) -> tuple[Path | None, list[str]]:
    """Return the checkpoint to continue from, or None, and a line for each damaged one passed over. Collective.

    A job that Slurm restarts begins again by itself if its only checkpoint is the first that it could have: nobody may
    be there to decide, and little is lost. `give_up` then sets aside what there is, and returns a line for each.
    """

    def find() -> tuple[Path | None, list[str]]:
        for leftover in (run_dir / CHECKPOINTS).glob(".step_*"):  # left by saves and deletions that a kill interrupted
            shutil.rmtree(leftover, ignore_errors=True)
        checkpoint, faults = newest_sound(run_dir)
        if checkpoint is None and faults:
            checkpoints = list_checkpoints(run_dir)
            if is_automatic_restart() and len(checkpoints) == 1 and step_of(checkpoints[0]) <= save_every:
                return None, faults + give_up()
            newest = step_of(checkpoints[-1])
            raise InputError(
                f"{run_dir}: has no sound checkpoint ({'; '.join(faults)}); mend that, or give --no-resume too, which "
                f"keeps them aside and trains its {newest} steps again"
            )
        return checkpoint, faults

    return group.on_main(find)


def load(
    checkpoint: Path,
    *,
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    loss_scale: LossScale | None = None,
    group: ProcessGroup,
) -> dict[str, Any]:
    """Load a checkpoint into the live tensors and random generators; return its state.json. Collective."""
    state = group.on_all(lambda: read_state(checkpoint))
    read_tensors(checkpoint, checkpoint_tensors(model, optimizer, loss_scale))
    _restore_random_state(state["random"], group.device)
    return state


def settle_origin(config: Config) -> Config:
    """Return the config with --from-checkpoint as an absolute PATH@STEP, or PATH for a Hugging Face folder.

    A run's newest checkpoint changes, but the weights that this run began with do not. So the step that this run
    recorded stays, as long as the command line names the same run or folder.
    """
    if config.from_checkpoint is None:
        return config
    run, step = run_and_step(config.from_checkpoint)
    named = Path(run).resolve()
    if STEP_NAME.fullmatch(named.name):
        origin = f"{named.parents[1]}@{step_of(named)}"
    elif step is not None:
        origin = f"{named}@{step}"
    elif config.resume and (recorded := recorded_origin(config.directory, named)) is not None:
        origin = recorded
    else:
        origin = str(named) if is_hugging_face(named) else f"{named}@{step_of(find_checkpoint(named))}"
    return replace(config, from_checkpoint=origin)


def recorded_origin(run_dir: Path, named: Path) -> str | None:
    """Return the origin with which the run in `run_dir` began, if it is the run or folder `named`; else None."""
    recorded, _ = recorded_run(run_dir)
    origin = None if recorded is None else recorded.config.get("from_checkpoint")
    is_named = isinstance(origin, str) and str(named) in (origin, origin.rpartition("@")[0])
    return origin if is_named else None


def load_weights(name: str, model: LanguageModel, tokenizer: Tokenizer, group: ProcessGroup) -> str:
    """Load RUN's newest sound checkpoint, RUN@STEP or a Hugging Face folder into the model. Collective.

    Return which weights these were. Raise InputError, naming the differences, if the shape or the tokenizer differs:
    another tokenizer's ids mean other text.
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
    """Load a Hugging Face folder: every rank reads it and keeps its own shards.

    A model with a shorter context takes the folder's first positions, which leaves its outputs unchanged.
    """
    folder, ours = open_folder(path), model.config
    if ours.context_len > folder.config.context_len:
        raise InputError(
            f"--from-checkpoint {path}: has positions for {folder.config.context_len} tokens; "
            f"set --train.seq-len {folder.config.context_len} or less (it is {ours.context_len})"
        )
    theirs = replace(folder.config, context_len=ours.context_len, vocab_multiple=ours.vocab_multiple)
    if theirs.resolved_mlp_width == ours.resolved_mlp_width:  # None and a number can mean the same width.
        theirs = replace(theirs, mlp_width=ours.mlp_width)
    _refuse_misfit(str(path), theirs, folder.tokenizer, ours, tokenizer)
    for name, parameter in model.named_parameters():
        put(parameter, folder.parameter(name, ours))
    cut = folder.config.context_len - ours.context_len
    return f"{path}, without the last {cut} of its {folder.config.context_len} positions" if cut else str(path)


def _refuse_misfit(
    name: str, theirs: ModelConfig, their_tokenizer: Tokenizer, ours: ModelConfig, tokenizer: Tokenizer
) -> None:
    """Raise InputError with each difference between the weights' model and this run's."""
    old, new = asdict(theirs), asdict(ours)
    changed = [key for key in new if old[key] != new[key] and key not in FREE_SETTINGS]
    differences = [f"{key} {old[key]} (this run: {new[key]})" for key in changed]
    if not gives_same_ids(their_tokenizer, tokenizer):
        differences.append("another tokenizer")
    if differences:
        raise InputError(f"--from-checkpoint {name}: its model does not fit this run: {', '.join(differences)}")


def _restore_random_state(states: dict[str, str], device: torch.device) -> None:
    tensors = {
        name: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8) for name, text in states.items()
    }
    torch.set_rng_state(tensors["cpu"])
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)
