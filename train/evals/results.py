"""Results of evaluations on disk, so that none is computed twice.

    RUN/evaluations/validation_step_00000500_0123456789abcdef.json
    RUN/evaluations/hellaswag_step_00000500_0123456789abcdef.json

A file's name ends in a hash of its key, and the file holds the key too. The key is everything that the numbers depend
on, except for rounding: weights, tokens scored, dtype.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch

from common.errors import InputError, writing_to
from common.files import write_json_atomically
from common.reading import is_there, parse_json, read_regular
from model.base import LanguageModel
from model.config import FORMER_NAMES

FOLDER = "evaluations"
Key = Mapping[str, Any]
T = TypeVar("T")


def fingerprint_of(model: LanguageModel) -> str:
    """Return the hash of a model's shape and weights, the same on every device.

    The shape is spelt as the first version spelt it, so that results that it kept are found.
    """
    former = {new: old for old, new in FORMER_NAMES.items()}
    shape = ", ".join(f"{former.get(name, name)}={value!r}" for name, value in asdict(model.config).items())
    digest = hashlib.sha256(f"ModelConfig({shape})".encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def file_name(kind: str, step: int | None, key: Key) -> str:
    """Return the name of the file that keeps a result."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return "_".join([kind, *([] if step is None else [f"step_{step:08d}"]), digest[:16]]) + ".json"


def read_result(path: Path | None, key: Key, form: type[T]) -> T | None:
    """Return the result that an earlier evaluation kept under this key, or None.

    `form` is the result's dataclass; a file may hold more than its fields. Raise InputError for any other content.
    """
    if path is None or not is_there(path):
        return None
    content = read_regular(path, inside=path.parent)
    fields = get_type_hints(form)
    try:
        record = parse_json(content)
        values = {name: record["result"][name] for name in fields}
        is_sound = record["key"] == key and all(isinstance(values[name], kind) for name, kind in fields.items())
    except (ValueError, KeyError, TypeError):
        is_sound = False
    if not is_sound:
        raise InputError(f"{path}: not the result that its name says; remove the file to evaluate again")
    return form(**values)


def write_result(path: Path | None, key: Key, result: Mapping[str, Any]) -> None:
    """Keep a result, if it has a path. Raise InputError if the directory cannot be written."""
    if path is None:
        return
    with writing_to(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomically(path, {"key": dict(key), "result": dict(result)})
