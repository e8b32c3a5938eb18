"""What evaluations leave on disk so that none is done twice: results, and of a killed one what it had scored.

    RUN/evaluations/
        validation_step_00000500_0123456789abcdef.json   a result
        hellaswag_step_00000500_0123456789abcdef.jsonl   the endings' losses, a line for each question as it is scored
        hellaswag_step_00000500_0123456789abcdef.json    the result made of them

The name ends in a hash of the key, which is all that the numbers depend on but for rounding: weights, tokens scored,
dtype. Each file carries its key, and each record a checksum: what was altered is refused, never read as a result.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from common.errors import InputError, reading_from, writing_to
from common.files import write_atomically, write_json_atomically
from model.base import LanguageModel

FOLDER = "evaluations"
Key = Mapping[str, Any]


def fingerprint_of(model: LanguageModel) -> str:
    """Of a model's shape and weights, wherever they came from and on whatever device they are."""
    digest = hashlib.sha256(repr(model.config).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def record_name(kind: str, step: int | None, key: Key) -> str:
    """Without its suffix."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return "_".join([kind, *([] if step is None else [f"step_{step:08d}"]), digest[:16]])


def read_result(path: Path, key: Key) -> dict[str, Any] | None:
    """What was found before under this key; None if nothing was."""
    with reading_from(path):
        if not path.is_file():
            return None
        content = path.read_bytes()
    record = _checked(content, str(path))
    if record.get("key") != key:
        raise InputError(f"{path}: of another model or other tokens than its name says; remove it")
    found: dict[str, Any] = record["result"]
    return found


def write_result(path: Path, key: Key, result: Mapping[str, Any]) -> None:
    """InputError, in one line, where the directory cannot be written."""
    with writing_to(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomically(path, _with_check({"key": dict(key), "result": dict(result)}))


class ScoreLog:
    """The losses of each question's endings, on disk as soon as they are found. For rank 0.

    `losses`: by the question's number, what an evaluation under the same key has come to. A last line cut short by a
    kill is dropped.
    """

    def __init__(self, path: Path, key: Key, *, num_questions: int, num_endings: int) -> None:
        self._path = path
        self.losses: dict[int, list[float]] = {}
        with writing_to(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            whole = path.read_bytes().rpartition(b"\n")[0] if path.is_file() else b""
            for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
                record = _checked(line, f"{path}:{number}")
                if not (record.get("key") == key if number == 1 else _is_answer(record, num_questions, num_endings)):
                    raise InputError(f"{path}:{number}: of another evaluation than its name says; remove the file")
                if number > 1:
                    self.losses[record["question"]] = record["losses"]
            if whole:
                with path.open("r+b") as file:
                    file.truncate(len(whole) + 1)
            else:
                write_atomically(path, _line({"key": dict(key)}))

    def add(self, losses: Mapping[int, Sequence[float]]) -> None:
        """By the question's number. They are on disk afterwards."""
        lines = "".join(_line({"question": question, "losses": list(each)}) for question, each in losses.items())
        with writing_to(self._path.parent), self._path.open("a", encoding="ascii") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
        self.losses |= {question: list(each) for question, each in losses.items()}


def _is_answer(record: Mapping[str, Any], num_questions: int, num_endings: int) -> bool:
    question, losses = record.get("question"), record.get("losses")
    return (
        question in range(num_questions)
        and isinstance(losses, list)
        and len(losses) == num_endings
        and all(isinstance(loss, float) for loss in losses)
    )


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(_with_check(record)) + "\n"


def _with_check(record: Mapping[str, Any]) -> dict[str, Any]:
    return {**record, "check": zlib.crc32(json.dumps(record, sort_keys=True).encode())}


def _checked(content: bytes, where: str) -> dict[str, Any]:
    """A record that is as it was written; InputError for anything else."""
    try:
        record: dict[str, Any] = json.loads(content)
        check = record.pop("check")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{where}: damaged ({type(error).__name__}); remove the file to evaluate anew") from error
    if _with_check(record)["check"] != check:
        raise InputError(f"{where}: was altered since it was written; remove the file to evaluate anew")
    return record
