"""Load a model and its tokenizer from a run directory, a checkpoint or a Hugging Face folder.

This is the read side of the checkpoint format; train/run/checkpoints.py writes it.

    RUN/checkpoints/step_00000500/
        *.distcp, .metadata   torch.distributed.checkpoint of model.* and optimizer.*
        state.json            progress, configuration, data fingerprint, random state, versions
        SHA256SUMS            hashes of all these files, for `sha256sum -c SHA256SUMS`

A directory with such a name is complete, since it is written elsewhere and renamed. Loading never executes code from
it: hashes are checked first, and DCP's pickled .metadata is read through an allow-list. model/hf/folder.py reads
Hugging Face folders.
"""

import hashlib
import io
import json
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from common.errors import InputError, reading_from
from common.files import sha256_of_file
from common.reading import parse_json, read_regular
from data_prep.tokenizer import Tokenizer, load_tokenizer
from model.base import HEAD, LanguageModel
from model.config import ModelConfig, with_current_names
from model.hf.folder import is_hugging_face, open_folder
from model.ladder import make_model

CHECKPOINTS = "checkpoints"
STATE_FILE = "state.json"
SUMS_FILE = "SHA256SUMS"
STEP_NAME = re.compile(r"step_(\d{8,})")


def step_of(checkpoint: Path) -> int:
    """Return 500 for .../step_00000500. Raise InputError for any other name."""
    match = STEP_NAME.fullmatch(checkpoint.name)
    if not match:
        raise InputError(f"{checkpoint}: not a checkpoint; their folders are named step_00000500")
    return int(match[1])


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first, whether their hashes hold or not."""
    folder = run_dir / CHECKPOINTS
    with reading_from(folder):
        named = [path for path in folder.iterdir() if STEP_NAME.fullmatch(path.name)] if folder.is_dir() else []
        return sorted((path for path in named if path.is_dir() and not path.is_symlink()), key=step_of)


def fault_of(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint's files, in one line; None if every hash holds."""
    try:
        lines = (checkpoint / SUMS_FILE).read_text(encoding="ascii").splitlines()
        sums = {name: sha256 for sha256, name in (line.split("  ", 1) for line in lines)}
    except FileNotFoundError:
        return f"{checkpoint}: {SUMS_FILE} is missing"
    except OSError as error:
        return f"{checkpoint}: unreadable: {error}"
    except (UnicodeDecodeError, ValueError):
        return f"{checkpoint}: {SUMS_FILE} is damaged"
    try:
        present = {path.name for path in checkpoint.iterdir()} - {SUMS_FILE}
        if STATE_FILE not in sums or present != set(sums):
            mismatches = ", ".join(sorted(present ^ set(sums))) or STATE_FILE
            return f"{checkpoint}: its files are not those of {SUMS_FILE}: {mismatches}"
        for name, sha256 in sums.items():
            if sha256_of_file(checkpoint / name) != sha256:
                return f"{checkpoint}: {name} is damaged (its sha256 is not the one in {SUMS_FILE})"
    except OSError as error:
        return f"{checkpoint}: unreadable: {error}"
    return None


def sealed_state(checkpoint: Path) -> dict[str, Any] | None:
    """Return a checkpoint's state.json if its own hash holds, whatever became of the tensors; None if it does not."""
    try:
        lines = read_regular(checkpoint / SUMS_FILE, inside=checkpoint).decode("ascii").splitlines()
        content = read_regular(checkpoint / STATE_FILE, inside=checkpoint)
        state = parse_json(content)
    except ValueError:  # an InputError is one
        return None
    is_sealed = f"{hashlib.sha256(content).hexdigest()}  {STATE_FILE}" in lines
    return state if is_sealed and isinstance(state, dict) else None


def newest_sound(run_dir: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint whose hashes hold, and the faults of the newer ones."""
    faults: list[str] = []
    for checkpoint in reversed(list_checkpoints(run_dir)):
        fault = fault_of(checkpoint)
        if fault is None:
            return checkpoint, faults
        faults.append(fault)
    return None, faults


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's state.json. Raise InputError if it is damaged."""
    path = checkpoint / STATE_FILE
    try:
        with reading_from(path):
            state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: damaged ({error})") from error
    return state


def model_tensors(model: LanguageModel) -> dict[str, Tensor]:
    """Return the model's tensors by their names in a checkpoint; a tied weight appears once."""
    state_dict, is_tied = model.state_dict(), model.is_tied
    return {f"model.{name}": tensor for name, tensor in state_dict.items() if not (is_tied and name == HEAD)}


@dataclass(frozen=True)
class TrainedModel:
    """A model in eval mode, its tokenizer, its step and the checkpoint that it came from.

    For a Hugging Face folder, which records no step, `step` is None and `checkpoint` is the folder.
    """

    model: LanguageModel
    tokenizer: Tokenizer
    step: int | None
    checkpoint: Path


def find_checkpoint(name: str | Path) -> Path:
    """Return RUN's newest sound checkpoint, that of RUN@STEP, or the checkpoint at a path.

    Raise InputError if there is none or its hashes do not hold.
    """
    with reading_from(name):
        path = Path(name)
        run, separator, step = str(name).rpartition("@")
        if separator and step.isdigit() and not path.exists():
            path = Path(run) / CHECKPOINTS / f"step_{int(step):08d}"
            if Path(run).is_dir() and not path.is_dir():
                steps = ", ".join(str(step_of(checkpoint)) for checkpoint in list_checkpoints(Path(run)))
                raise InputError(f"{run}: no checkpoint of step {step}; there are {steps or 'none'}")
        if not path.is_dir():
            raise InputError(f"{path}: no such run directory or checkpoint")
        if STEP_NAME.fullmatch(path.name):
            fault = fault_of(path)
            newest, faults = (path, []) if fault is None else (None, [fault])
        else:
            newest, faults = newest_sound(path)
        if newest is None:
            no_weights = f"{path}: no checkpoint in it yet, and no weights as Hugging Face names them"
            raise InputError("; ".join(faults) or no_weights)
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
    """Return the model of a sound checkpoint (see `find_checkpoint`). This is never a collective operation."""
    model = make_model(model_config(read_state(checkpoint), checkpoint), compute_dtype=dtype)
    read_tensors(checkpoint, model_tensors(model), alone=True)
    tokenizer = load_tokenizer(checkpoint.resolve().parents[1])
    if tokenizer.vocab_size != model.config.vocab_size:
        raise InputError(
            f"{checkpoint}: its tokenizer has {tokenizer.vocab_size} ids, "
            f"its model {model.config.vocab_size}; they do not belong together"
        )
    return TrainedModel(model.to(device).eval(), tokenizer, step_of(checkpoint), checkpoint)


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
    try:
        return ModelConfig(**with_current_names(state["config"]["model"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{checkpoint / STATE_FILE}: no model of this code: {error}") from error


# --- Tensors from torch.distributed.checkpoint's files ----------------------------------------------------------------


class AllowListUnpickler(pickle.Unpickler):
    """An unpickler for DCP's description of tensors that refuses every other name before it is imported."""

    NAMES: ClassVar = {
        "torch.distributed.checkpoint.metadata": "ChunkStorageMetadata Metadata MetadataIndex StorageMeta "
        "TensorProperties TensorStorageMetadata _MEM_FORMAT_ENCODING",
        "torch.distributed.checkpoint.filesystem": "_StorageInfo",
        "torch.serialization": "_get_layout",
        "torch": "Size float32 bfloat16 float16 float64 int64 uint8",
        "pathlib": "Path PosixPath WindowsPath",
    }
    ALLOWED = frozenset((module, name) for module, names in NAMES.items() for name in names.split())

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's metadata")
        return super().find_class(module, name)


class SafeReader(dcp.FileSystemReader):
    """DCP's reader, but it unpickles through the allow-list and accepts tensors only."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        with reading_from(path):
            content = path.read_bytes()
        try:
            metadata = AllowListUnpickler(io.BytesIO(content)).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, ValueError, TypeError, LookupError) as error:
            raise InputError(f"{path}: refused: {error}") from error
        entries = metadata.state_dict_metadata.values() if isinstance(metadata, Metadata) else [None]
        if not all(isinstance(entry, TensorStorageMetadata) for entry in entries):
            raise InputError(f"{path}: refused: a checkpoint holds tensors only")
        assert metadata.storage_meta is not None
        metadata.storage_meta.load_id = self.load_id
        return metadata


def read_tensors(checkpoint: Path, into: dict[str, Tensor], *, alone: bool = False) -> None:
    """Fill the tensors of `into`, plain or sharded, from a checkpoint of any layout.

    This is a collective operation if there is a process group. With `alone` this process reads by itself, into plain
    tensors.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        try:
            dcp.load(dict(into), storage_reader=SafeReader(checkpoint), no_dist=alone or not dist.is_initialized())
        except (CheckpointException, RuntimeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{checkpoint}: its tensors do not fit this model: {last_line_of(error)}") from error


def last_line_of(error: BaseException) -> str:
    """Return the last line of an error's message, which says what happened, or the error's type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def data_files_of(checkpoint: Path) -> set[str]:
    """Return the names of the files that hold a checkpoint's tensors, according to its metadata."""
    return {entry.relative_path for entry in SafeReader(checkpoint).read_metadata().storage_data.values()}
