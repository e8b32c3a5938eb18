"""Load a model and its tokenizer from a run directory, a checkpoint or a Hugging Face folder.

This is the read side of the checkpoint format; train/run/checkpoints.py writes it.

    RUN/checkpoints/step_00000500/
        *.distcp, .metadata   torch.distributed.checkpoint of model.*, optimizer.* and, where the run has begun to keep
                              a mean of the weights, average.*
        state.json            progress, configuration, data fingerprint, random state, versions
        SHA256SUMS            hashes of all these files, for `sha256sum -c SHA256SUMS`

A directory with such a name is complete, since it is written elsewhere and renamed. Its hashes, the form of state.json
and .metadata are checked before it counts as sound. Loading executes nothing of it and opens no file outside it
(model/dcp_reader.py). model/hf/folder.py reads Hugging Face folders.
"""

import base64
import binascii
import hashlib
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from common.errors import InputError, reading_from
from common.reading import NATURAL, Form, child, is_there, misfit, open_regular, parse_json, read_regular
from data_prep.tokenizer import Tokenizer, load_tokenizer
from model.base import HEAD, LanguageModel
from model.config import ModelConfig, with_current_names
from model.dcp_reader import Metadata, read_description, read_tensors, require_data_files, tensors_in
from model.hf.folder import is_hugging_face, open_folder
from model.ladder import make_model

CHECKPOINTS = "checkpoints"
STATE_FILE = "state.json"
WEIGHTS, AVERAGE = "model.", "average."  # before the names of weights, and of their mean
SUMS_FILE = "SHA256SUMS"
STEP_NAME = re.compile(r"step_([0-9]{8,})")
SUM_LINE = re.compile(r"([0-9a-f]{64})  (.+)")
# What is read from state.json. `config` is that of the training, of which `model_config` reads a part.
STATE_FORM: Form = {
    "progress": {"step": NATURAL, "position": NATURAL, "tokens": NATURAL, "seconds": float},
    "config": {"model": dict},
    "data": str,
    "random": {"cpu": str},
    "versions": dict,
    "wandb_id": (str, None),
}
SEAL_FORM: Form = {"bytes": NATURAL, "sha256": str}  # of the rows that the run had written (train/metrics/rows.py)


def step_of(checkpoint: Path) -> int:
    """Return 500 for .../step_00000500. Raise InputError for any other name."""
    match = STEP_NAME.fullmatch(checkpoint.name)
    if not match:
        raise InputError(f"{checkpoint}: not a checkpoint; their folders are named step_00000500")
    return int(match[1])


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first, whether their hashes hold or not."""
    return [path for path, is_folder in _named_checkpoints(run_dir) if is_folder]


def _named_checkpoints(run_dir: Path) -> list[tuple[Path, bool]]:
    """Return what has the name of a checkpoint, by step, and whether it is a folder, to which links do not count."""
    folder = run_dir / CHECKPOINTS
    with reading_from(folder):
        named = [path for path in folder.iterdir() if STEP_NAME.fullmatch(path.name)] if folder.is_dir() else []
        return [(path, path.is_dir() and not path.is_symlink()) for path in sorted(named, key=step_of)]


def fault_of(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint's files, in one line; None if it is sound. Never blocks or raises."""
    try:
        require_hashes(checkpoint, files_of(checkpoint))
        read_form(checkpoint)
    except InputError as error:
        return " ".join(str(error).split("\n"))
    return None


def files_of(checkpoint: Path) -> dict[str, str]:
    """Return the sha256 by name that each file should have. Raise InputError unless these are the files that lie there.

    No file but SHA256SUMS is opened.
    """
    with reading_from(checkpoint):
        real, folder = os.path.realpath(checkpoint), os.path.realpath(checkpoint.parent)
        if os.path.commonpath([real, folder]) != folder:
            raise InputError(f"{checkpoint}: a link out of its folder, to {real}; put the checkpoint itself there")
        present = {path.name for path in checkpoint.iterdir()} - {SUMS_FILE}
    sums = _read_sums(checkpoint)
    if STATE_FILE not in sums or present != sums.keys():
        mismatches = ", ".join(map(_shown, sorted(present ^ sums.keys()))) or STATE_FILE
        raise InputError(f"{checkpoint}: its files are not those of {SUMS_FILE}: {mismatches}")
    return sums


def require_hashes(checkpoint: Path, files: Mapping[str, str]) -> None:
    """Raise InputError unless these files of a checkpoint are plain files of these sha256."""
    for name, sha256 in files.items():
        with open_regular(child(checkpoint, name), inside=checkpoint) as file, reading_from(checkpoint):
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise InputError(f"{checkpoint}: {_shown(name)} is damaged (its sha256 is not the one in {SUMS_FILE})")


def read_form(checkpoint: Path) -> tuple[dict[str, Any], Metadata]:
    """Return the content of state.json and .metadata.

    Raise InputError unless both have the form of a checkpoint's and .metadata names only what is there.
    """
    state, metadata = read_state(checkpoint), read_description(checkpoint)
    require_data_files(checkpoint, metadata)
    return state, metadata


def _read_sums(checkpoint: Path) -> dict[str, str]:
    """Return the sha256 of each file of a checkpoint, by name, as SHA256SUMS has them."""
    path = checkpoint / SUMS_FILE
    if not is_there(path):
        raise InputError(f"{checkpoint}: {SUMS_FILE} is missing")
    lines = read_regular(path, inside=checkpoint).decode("ascii", errors="replace").split("\n")[:-1]
    matches = [SUM_LINE.fullmatch(line) for line in lines]
    sums = {child(checkpoint, match[2]).name: match[1] for match in matches if match}
    if not sums or len(sums) != len(lines):
        raise InputError(f"{checkpoint}: {SUMS_FILE} is damaged")
    return sums


def _shown(name: str) -> str:
    return name if name.isascii() and name.isprintable() else ascii(name)


def sealed_state(checkpoint: Path) -> dict[str, Any] | None:
    """Return a checkpoint's state.json if its own hash holds, whatever became of the tensors; None if it does not."""
    try:
        content = read_regular(checkpoint / STATE_FILE, inside=checkpoint)
        is_sealed = _read_sums(checkpoint).get(STATE_FILE) == hashlib.sha256(content).hexdigest()
        return read_state(checkpoint) if is_sealed else None
    except InputError:
        return None


def newest_sound(run_dir: Path) -> tuple[Path | None, list[str]]:
    """Return the newest sound checkpoint, and the faults of the newer ones."""
    faults: list[str] = []
    for checkpoint in reversed(list_checkpoints(run_dir)):
        fault = fault_of(checkpoint)
        if fault is None:
            return checkpoint, faults
        faults.append(fault)
    return None, faults


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's state.json, of STATE_FORM. Raise InputError if it is damaged."""
    path = checkpoint / STATE_FILE
    try:
        state: dict[str, Any] = parse_json(read_regular(path, inside=checkpoint))
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: damaged ({str(error)[:200]})") from error
    fault = misfit(state, STATE_FORM) or _later_fault(state) or _random_fault(state["random"])
    if fault is None and state["progress"]["step"] != step_of(checkpoint):
        fault = f"it is of step {state['progress']['step']}"
    if fault is not None:
        raise InputError(f"{path}: damaged ({fault})")
    return state


def _later_fault(state: dict[str, Any]) -> str | None:
    """Return how the keys that older checkpoints lack differ from their form, or None."""
    fault = misfit({"found": {}, "rows": {}} | state, {"found": dict, "rows": dict})
    seals = list(state.get("rows", {}).values()) if fault is None else []
    return fault or misfit(seals, [SEAL_FORM], "'rows'")


def _random_fault(states: dict[str, Any]) -> str | None:
    """Return why the states of the random generators cannot be restored; None if they can."""
    try:
        decoded = {name: base64.b64decode(text, validate=True) for name, text in states.items()}
        torch.Generator().set_state(torch.frombuffer(bytearray(decoded["cpu"]), dtype=torch.uint8))
    except (binascii.Error, ValueError, TypeError, RuntimeError):
        return "'random' is no state of torch's generators"
    return None


def model_tensors(model: LanguageModel) -> dict[str, Tensor]:
    """Return the model's tensors by their names in a checkpoint; a tied weight appears once."""
    state_dict, is_tied = model.state_dict(), model.is_tied
    return {f"{WEIGHTS}{name}": tensor for name, tensor in state_dict.items() if not (is_tied and name == HEAD)}


def has_average(metadata: Metadata) -> bool:
    """Return whether a checkpoint has a mean of the weights (--optim.average-fraction)."""
    return any(name.startswith(AVERAGE) for name in tensors_in(metadata))


def tensors_to_read(model: LanguageModel, metadata: Metadata) -> dict[str, Tensor]:
    """Return the model's tensors by the names in a checkpoint of what they become: of the mean, where there is one."""
    kind = AVERAGE if has_average(metadata) else WEIGHTS
    return {f"{kind}{name.removeprefix(WEIGHTS)}": tensor for name, tensor in model_tensors(model).items()}


@dataclass(frozen=True)
class TrainedModel:
    """A model in eval mode, its tokenizer, its step and the checkpoint that it came from.

    For a Hugging Face folder, which records no step, `step` is None and `checkpoint` is the folder. `is_averaged`: the
    weights are the checkpoint's mean.
    """

    model: LanguageModel
    tokenizer: Tokenizer
    step: int | None
    checkpoint: Path
    is_averaged: bool = False


def run_and_step(name: str) -> tuple[str, int | None]:
    """Return ("RUN", 500) for RUN@500, and (name, None) for any other name."""
    run, at, step = name.rpartition("@")
    return (run, int(step)) if at and re.fullmatch(r"[0-9]{1,18}", step) else (name, None)


def find_place(name: str | Path) -> Path:
    """Return the folder of RUN, of RUN@STEP's checkpoint, or at a path. Raise InputError if there is none."""
    path = Path(name)
    with reading_from(path):
        run, step = (str(name), None) if path.exists() else run_and_step(str(name))
        if step is not None:
            path = Path(run) / CHECKPOINTS / f"step_{step:08d}"
            if Path(run).is_dir() and not path.is_dir():
                steps = ", ".join(str(step_of(checkpoint)) for checkpoint in list_checkpoints(Path(run)))
                raise InputError(f"{run}: no checkpoint of step {step}; there are {steps or 'none'}")
        if not path.is_dir():
            raise InputError(f"{path}: no such run directory or checkpoint")
    return path


def find_checkpoint(name: str | Path) -> Path:
    """Return RUN's newest sound checkpoint, that of RUN@STEP, or the checkpoint at a path.

    Print a warning for each damaged one that is passed over, as training does; under torchrun only rank 0 prints.
    Raise InputError if there is none or it is damaged.
    """
    path = find_place(name)
    if STEP_NAME.fullmatch(path.name):
        fault = fault_of(path)
        newest, faults = (path, []) if fault is None else (None, [fault])
    else:
        newest, faults = newest_sound(path)
        for other, is_folder in _named_checkpoints(path):
            if not is_folder and (newest is None or step_of(other) > step_of(newest)):
                faults.append(f"{other}: not a checkpoint")
    if newest is None:
        no_weights = f"{path}: no checkpoint in it yet, and no weights as Hugging Face names them"
        raise InputError("; ".join(faults) or no_weights)
    if os.environ.get("RANK", "0") == "0":
        for fault in faults:
            print(f"warning: passed over {fault}", file=sys.stderr, flush=True)
    return newest


def check_device(device: str) -> None:
    """Raise InputError if --device names a GPU and torch sees none."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {device}: torch {torch.__version__} sees no GPU here; use --device cpu")


def load_model(
    name: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> TrainedModel:
    """Return the model of a RUN, RUN@STEP, checkpoint path or Hugging Face folder.

    The model computes in `dtype`; its weights are fp32. Raise InputError in one line for anything unusable.
    """
    if is_hugging_face(Path(name)):
        return _load_folder(Path(name), device=device, dtype=dtype)
    return load_checkpoint(find_checkpoint(name), device=device, dtype=dtype)


def load_checkpoint(
    checkpoint: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> TrainedModel:
    """Return the model of a sound checkpoint (see `find_checkpoint`), with the mean of its weights if it has one."""
    config, metadata = model_config(read_state(checkpoint), checkpoint), read_description(checkpoint)
    _refuse_other_shapes(config, metadata, checkpoint)
    model = make_model(config, compute_dtype=dtype)
    read_tensors(checkpoint, tensors_to_read(model, metadata), metadata)
    tokenizer = load_tokenizer(checkpoint.resolve().parents[1])
    if tokenizer.vocab_size != model.config.vocab_size:
        raise InputError(
            f"{checkpoint}: its tokenizer has {tokenizer.vocab_size} ids, "
            f"its model {model.config.vocab_size}; they do not belong together"
        )
    return TrainedModel(model.to(device).eval(), tokenizer, step_of(checkpoint), checkpoint, has_average(metadata))


def _refuse_other_shapes(config: ModelConfig, metadata: Metadata, checkpoint: Path) -> None:
    """Raise InputError if the checkpoint's tensors are not this model's. Memory is allocated for the model only then.

    The files bear out the sizes in .metadata, but nothing bears out those in state.json.
    """
    saved = {name: tensor.size for name, tensor in tensors_in(metadata).items()}
    fault = f"{checkpoint}: its tensors do not fit this model"
    if config.num_layers > len(saved):  # before that many layers are made
        raise InputError(f"{fault}: there are {len(saved)} for {config.num_layers} layers")
    try:
        with torch.device("meta"):
            model = make_model(config)
    except RuntimeError as error:  # sizes whose product has more than 64 bits
        raise InputError(f"{fault}: {str(error).splitlines()[0]}") from error
    tensors = model_tensors(model) | tensors_to_read(model, metadata)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    for name in sorted(shapes.keys() | {name for name in saved if name.startswith((WEIGHTS, AVERAGE))}):
        if shapes.get(name) != saved.get(name):
            needed, there = (list(sizes[name]) if name in sizes else "none" for sizes in (shapes, saved))
            raise InputError(f"{fault}: {_shown(name)} is needed in shape {needed}, but has {there}")


@torch.no_grad()
def _load_folder(path: Path, *, device: torch.device | str, dtype: torch.dtype) -> TrainedModel:
    folder = open_folder(path)
    with torch.device("meta"):
        model = make_model(folder.config, compute_dtype=dtype)
    model.to_empty(device=device)
    model.tie_weights()
    for parameter_name, parameter in model.named_parameters():
        parameter.copy_(folder.parameter(parameter_name, folder.config))
    return TrainedModel(model.eval(), folder.tokenizer, None, path)


def model_config(state: Mapping[str, Any], checkpoint: Path) -> ModelConfig:
    """Return the model's configuration as a checkpoint's state.json records it."""
    path = checkpoint / STATE_FILE
    recorded = with_current_names(state["config"]["model"])
    hints = get_type_hints(ModelConfig)
    unknown = ", ".join(sorted(recorded.keys() - hints.keys()))
    fault = f"it has no {unknown}" if unknown else misfit(recorded, {name: _form(hints[name]) for name in recorded})
    if fault is not None:
        raise InputError(f"{path}: no model of this code: {fault}")
    config = ModelConfig(**recorded)
    faults = config.faults() or [f"{name} 0" for name in ("vocab_size", "context_len") if getattr(config, name) < 1]
    if faults:
        raise InputError(f"{path}: no model of this code: {'; '.join(faults)}")
    return config


def _form(hint: Any) -> Form:
    """Return the form of a ModelConfig's field in JSON from its type."""
    if get_origin(hint) is Literal:
        return frozenset(get_args(hint))
    if get_origin(hint) is UnionType:
        return tuple(_form(each) for each in get_args(hint))
    return {int: range(2**31), NoneType: None}.get(hint, hint)
