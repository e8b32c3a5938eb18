"""Finds where a run begins: its newest sound checkpoint, another run's weights, or new weights; and loads them."""

import base64
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import InputError
from data_prep.tokenizer import Tokenizer, gives_same_ids, load_tokenizer
from model.base import LanguageModel
from model.checkpoint import (
    AVERAGE,
    CHECKPOINTS,
    STEP_NAME,
    WEIGHTS,
    fault_of,
    files_of,
    find_checkpoint,
    find_place,
    has_average,
    list_checkpoints,
    model_config,
    read_form,
    read_tensors,
    require_hashes,
    run_and_step,
    step_of,
    tensors_to_read,
)
from model.config import ModelConfig
from model.dcp_reader import Metadata
from model.hf.folder import Folder, is_hugging_face, open_folder
from train.config import Config
from train.optim import Optimizer
from train.parallel.apply import put
from train.parallel.precision import LossScale
from train.processes.group import ProcessGroup
from train.processes.ranks import is_automatic_restart
from train.run.checkpoints import checkpoint_tensors
from train.run.identity import recorded_run
from train.run.shares import divide, hand_out, share_of

# Settings that may differ from those with which the weights were trained.
FREE_SETTINGS = ("attention", "dropout", "zero_init_projections", "zero_init_head", "eot_id")


@dataclass(frozen=True)
class SoundCheckpoint:
    """A checkpoint whose files are sound, with the content of its state.json and .metadata."""

    path: Path
    state: dict[str, Any]
    metadata: Metadata


def find_start(
    run_dir: Path, *, save_every: int, give_up: Callable[[], list[str]], group: ProcessGroup
) -> tuple[SoundCheckpoint | None, list[str]]:
    """Return the checkpoint to continue from, or None, and a line for each damaged one passed over. Collective.

    A job that Slurm restarts begins again by itself if its only checkpoint is the first that it could have: nobody may
    be there to decide, and little is lost. `give_up` then sets aside what there is, and returns a line for each.
    """

    def candidates() -> list[Path]:
        for leftover in (run_dir / CHECKPOINTS).glob(".step_*"):  # left by saves and deletions that a kill interrupted
            shutil.rmtree(leftover, ignore_errors=True)
        return list_checkpoints(run_dir)

    checkpoints, faults = group.on_main(candidates), list[str]()
    for checkpoint in reversed(checkpoints):
        opened = open_together(checkpoint, group)
        if isinstance(opened, SoundCheckpoint):
            return opened, faults
        faults.append(opened)

    def begin_again() -> list[str]:
        if is_automatic_restart() and len(checkpoints) == 1 and step_of(checkpoints[0]) <= save_every:
            return give_up()
        raise InputError(
            f"{run_dir}: has no sound checkpoint ({'; '.join(faults)}); mend that, or give --no-resume too, which "
            f"keeps them aside and trains its {step_of(checkpoints[-1])} steps again"
        )

    return None, faults + (group.on_main(begin_again) if faults else [])


def open_together(checkpoint: Path, group: ProcessGroup) -> SoundCheckpoint | str:
    """Return a sound checkpoint or what is wrong with it. The ranks hash its files, each some of them. Collective.

    Rank 0 alone decides what is damaged. Raise InputError if another rank finds fault with what rank 0 reads well: a
    host that cannot read must not make the run go back to an earlier checkpoint.
    """
    try:
        files = sorted(group.on_main(lambda: files_of(checkpoint)).items())
        group.on_all(lambda: require_hashes(checkpoint, dict(files[group.rank :: group.world])))
        state, metadata = group.on_main(lambda: read_form(checkpoint))
    except InputError as error:
        fault = group.on_main(lambda: fault_of(checkpoint))
        if fault is None:
            raise InputError(f"{error}; rank 0 reads it well: mend the storage of that rank's host") from error
        return fault
    return SoundCheckpoint(checkpoint, state, metadata)


def load(
    checkpoint: SoundCheckpoint,
    *,
    model: LanguageModel,
    optimizer: Optimizer,
    loss_scale: LossScale | None = None,
    group: ProcessGroup,
) -> dict[str, Any]:
    """Load a checkpoint into the live tensors and random generators; return its state.json. Collective."""
    tensors = checkpoint_tensors(model, optimizer, loss_scale, step=checkpoint.state["progress"]["step"])
    _read_together(checkpoint, tensors, model, group)
    _restore_random_state(checkpoint.state["random"], group.device)
    return checkpoint.state


def _read_together(
    checkpoint: SoundCheckpoint, tensors: dict[str, Tensor], model: LanguageModel, group: ProcessGroup
) -> None:
    """Fill `tensors`, and with them the whole model: each rank reads its share and hands it out. Collective."""
    names = {name for name, _ in model.named_parameters()}
    assert any({f"{kind}{name}" for name in names} <= tensors.keys() for kind in (WEIGHTS, AVERAGE))
    division = divide(tensors, group)
    own = share_of(tensors, division, group.rank)
    group.on_all(lambda: read_tensors(checkpoint.path, own, checkpoint.metadata))
    hand_out(tensors, division, group)


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
    """Load RUN@STEP or a Hugging Face folder, as `settle_origin` names them, into the model. Collective.

    Return which weights these were. Raise InputError, naming the differences, if the shape or the tokenizer differs:
    another tokenizer's ids mean other text.
    """
    if group.on_main(lambda: is_hugging_face(Path(name))):
        return _load_folder(Path(name), model, tokenizer, group)
    path = group.on_main(lambda: find_place(name))
    checkpoint = open_together(path, group)
    if isinstance(checkpoint, str):
        raise InputError(checkpoint)
    theirs = model_config(checkpoint.state, path)
    group.on_main(
        lambda: _refuse_misfit(name, theirs, load_tokenizer(path.resolve().parents[1]), model.config, tokenizer)
    )
    _read_together(checkpoint, tensors_to_read(model, checkpoint.metadata), model, group)
    return f"{path}{', the mean of its weights' if has_average(checkpoint.metadata) else ''}"


def _load_folder(path: Path, model: LanguageModel, tokenizer: Tokenizer, group: ProcessGroup) -> str:
    """Load a Hugging Face folder: rank 0 reads it, and every rank keeps its own shards. Collective."""
    folders: list[Folder] = []  # on rank 0 alone

    def check() -> str:
        folder = open_folder(path)
        description = _refuse_misfit_of_folder(folder, model.config, tokenizer)
        for name, _ in model.named_parameters():
            folder.parameter(name, model.config)  # before any is sent: one may have numbers that are not finite
        folders.append(folder)
        return description

    description = group.on_main(check)
    for name, parameter in model.named_parameters():
        value = torch.empty(parameter.shape, device=group.device)
        for folder in folders:
            value.copy_(folder.parameter(name, model.config))
        group.broadcast_(value, 0)
        put(parameter, value)
    return description


def _refuse_misfit_of_folder(folder: Folder, ours: ModelConfig, tokenizer: Tokenizer) -> str:
    """Return which weights these are. Raise InputError if the folder's model or tokenizer does not fit this run's.

    A model with a shorter context takes the folder's first positions, which leaves its outputs unchanged.
    """
    path = folder.path
    if ours.context_len > folder.config.context_len:
        raise InputError(
            f"--from-checkpoint {path}: has positions for {folder.config.context_len} tokens; "
            f"set --train.seq-len {folder.config.context_len} or less (it is {ours.context_len})"
        )
    theirs = replace(folder.config, context_len=ours.context_len, vocab_multiple=ours.vocab_multiple)
    if theirs.resolved_mlp_width == ours.resolved_mlp_width:  # None and a number can mean the same width.
        theirs = replace(theirs, mlp_width=ours.mlp_width)
    _refuse_misfit(str(path), theirs, folder.tokenizer, ours, tokenizer)
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
