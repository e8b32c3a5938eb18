"""A folder of Hugging Face's GPT-2 -> shape, tokenizer and tensors, without running anything that stands in it.

    FOLDER/
        config.json             model_type gpt2
        model.safetensors, or its parts with model.safetensors.index.json, or pytorch_model.bin, whole or in parts
        tokenizer.json, or vocab.json and merges.txt

safetensors can hold nothing but tensors; a .bin is a pickle, which torch reads through an allow-list (weights_only).
Names, shapes and types are held against config.json before the model has any memory.
"""

import pickle
import re
import reprlib
import struct
import warnings
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import InputError, first_line, reading_from
from data_prep.tokenizer import Tokenizer
from model.base import EMBEDDING, HEAD
from model.config import ModelConfig
from model.gpt import GPT
from model.hf.format import POSITIONS, as_ours, from_json, read_json, to_hugging_face
from model.hf.tokenizer import read_tokenizer

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
WEIGHTS_FILES = (WEIGHTS_FILE, f"{WEIGHTS_FILE}.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
BUFFER = re.compile(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)")  # the causal mask, which old folders keep
LAYER = re.compile(r"transformer\.h\.(\d+)\.")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # all are fp32 numbers
NUM_NAMED = 3  # of many faults of one kind
# What reading a damaged pickle or archive was seen to raise (tests/unit/model/test_hf_folder.py), or may.
UNREADABLE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    ArithmeticError,
    AssertionError,
    MemoryError,
)


@dataclass(frozen=True)
class Folder:
    """`tensors` by GPT2LMHeadModel's names, as they are stored; of a tied head there is the embedding alone."""

    path: Path
    weights_file: str
    config: ModelConfig
    tokenizer: Tokenizer
    tensors: dict[str, Tensor]

    def parameter(self, name: str, config: ModelConfig) -> Tensor:
        """Our parameter `name` in fp32, for a model that may have fewer positions and other padding than the folder's.

        InputError if it holds anything but finite numbers.
        """
        stored = self.tensors[name]
        if name == POSITIONS:
            stored = stored[: config.context_len]
        value = as_ours(name, stored.float(), config)
        if not value.isfinite().all():
            raise InputError(f"{self.path}: {name} holds numbers that are not finite")
        return value


def is_hugging_face(path: Path) -> bool:
    """Does a folder hold weights as Hugging Face names them?"""
    with reading_from(path):
        return any((path / name).is_file() for name in WEIGHTS_FILES)


def open_folder(path: Path) -> Folder:
    """The folder, everything in it checked but the numbers. InputError in one line for whatever is unusable."""
    config = from_json(read_json(path / CONFIG_FILE), path / CONFIG_FILE)
    tokenizer = read_tokenizer(path)
    if tokenizer.vocab_size != config.vocab_size:
        raise InputError(
            f"{path}: its tokenizer has {tokenizer.vocab_size} ids, its {CONFIG_FILE} says "
            f"vocab_size {config.vocab_size}"
        )
    weights = next(path / name for name in WEIGHTS_FILES if (path / name).is_file())
    stored = _read_parts(weights) if weights.suffix == ".json" else _read_file(weights)
    return Folder(
        path, weights.name, replace(config, eot_id=tokenizer.eot_id), tokenizer, _fitted(stored, config, weights)
    )


def _read_parts(index: Path) -> dict[str, Tensor]:
    """The tensors of several files; each must hold what the index says of it, and nothing else."""
    content = read_json(index)
    where = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(where, dict) or not where or not all(isinstance(file, str) for file in where.values()):
        raise InputError(f"{index}: has no weight_map of tensors and files")
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(where.values())):
        path = index.parent / file
        if Path(file).name != file or path.suffix not in (".safetensors", ".bin") or not path.is_file():
            raise InputError(f"{index}: {reprlib.repr(file)} is no weights file beside it")
        found = _read_file(path)
        if found.keys() != {name for name, part in where.items() if part == file}:
            raise InputError(f"{path}: its tensors are not those that {index.name} names")
        tensors |= found
    return tensors


def _read_file(path: Path) -> dict[str, Tensor]:
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_bin(path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """Mapped, not read."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise InputError(f"{path}: reading it needs safetensors: pip install -e '.[hf]'") from error
    with reading_from(path):
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                return {name: file.get_tensor(name) for name in file.offset_keys()}
        except (SafetensorError, RuntimeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            raise InputError(f"{path}: damaged ({first_line(error)})") from error


def _read_bin(path: Path) -> dict[str, Tensor]:
    """A pickle of tensors. Whatever else it names is refused before it is imported."""
    try:
        if zipfile.is_zipfile(path):  # torch's form since 1.6; the one before has no checksums
            _check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other versions of pickle: what cannot be read is an error as well
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except UNREADABLE as error:
        raise InputError(f"{path}: refused: {first_line(error)}") from error
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    ):
        raise InputError(f"{path}: refused: a model's weights are tensors by name")
    return content


def _check_archive(path: Path) -> None:
    """torch holds nothing against the checksums in it, and would unpack what it never packs: a small file into much."""
    with zipfile.ZipFile(path) as archive:
        if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
            raise InputError(f"{path}: refused: it is compressed, which torch's files are not")
        damaged = archive.testzip()
        if damaged is not None:
            raise InputError(f"{path}: damaged: the checksum of {_list([damaged])} does not fit")


def _fitted(stored: dict[str, Tensor], config: ModelConfig, path: Path) -> dict[str, Tensor]:
    """Exactly the model's tensors, by GPT2LMHeadModel's names. InputError for another set, shape or type."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if BUFFER.fullmatch(name):
            continue
        full = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
        if full in tensors:
            raise InputError(f"{path}: has {_list([full])} twice, with and without 'transformer.'")
        tensors[full] = tensor
    # First, so that the shapes below are no more than the tensors that are there.
    num_layers = len({match[1] for name in tensors if (match := LAYER.match(name))})
    if num_layers != config.num_layers:
        raise InputError(f"{path}: has tensors of {num_layers} layers, {CONFIG_FILE} says n_layer {config.num_layers}")
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in to_hugging_face(GPT(config).state_dict(), config).items()}
    if config.tie and HEAD not in tensors:
        del shapes[HEAD]
    faults = {
        "lacks": shapes.keys() - tensors.keys(),
        "has what GPT-2 has not:": tensors.keys() - shapes.keys(),
        f"has in another shape than {CONFIG_FILE} says:": {
            f"{name} {list(tensors[name].shape)}, not {list(shape)}"
            for name, shape in shapes.items()
            if name in tensors and tensors[name].shape != shape
        },
        "has in another form than plain fp32, fp16 or bf16:": {
            name
            for name, tensor in tensors.items()
            if tensor.dtype not in DTYPES or tensor.layout != torch.strided or tensor.device.type != "cpu"
        },
    }
    said = [f"{kind} {_list(names)}" for kind, names in faults.items() if names]
    if said:
        raise InputError(f"{path}: {'; '.join(said)}")
    if config.tie and HEAD in tensors and not torch.equal(tensors.pop(HEAD), tensors[EMBEDDING]):
        raise InputError(f"{path}: {HEAD} is not {EMBEDDING}, though {CONFIG_FILE} says tie_word_embeddings")
    return tensors


def _list(names: Iterable[str]) -> str:
    """Names that a file may have made up: short, on one line."""
    in_order = sorted(names)
    shown = [name if name.isprintable() and len(name) < 100 else reprlib.repr(name) for name in in_order[:NUM_NAMED]]
    return ", ".join(shown) + (f" and {len(in_order) - NUM_NAMED} more" if len(in_order) > NUM_NAMED else "")
