"""Read the shape, tokenizer and tensors of a Hugging Face folder of GPT-2. No code from the folder is run.

    FOLDER/
        config.json             model_type gpt2
        model.safetensors, or its parts with model.safetensors.index.json, or pytorch_model.bin, whole or in parts
        tokenizer.json, or vocab.json and merges.txt

A safetensors file can only hold tensors. A .bin file is a pickle, which torch reads through an allow-list
(weights_only). Names, shapes and types are compared with config.json before memory is allocated for the model.
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
from common.reading import open_regular
from data_prep.tokenizer import Tokenizer
from model.base import EMBEDDING, HEAD
from model.config import ModelConfig
from model.dcp_metadata import DICT, MOST_BYTES, PERSISTENT, Interpreter, RefusedError
from model.gpt import GPT
from model.hf.files import checked, has_file, read_json
from model.hf.format import POSITIONS, as_ours, from_json, to_hugging_face
from model.hf.tokenizer import read_tokenizer

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
WEIGHTS_FILES = (WEIGHTS_FILE, f"{WEIGHTS_FILE}.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
BUFFER = re.compile(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)")  # the causal mask, which old folders store
LAYER = re.compile(r"transformer\.h\.(\d+)\.")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # fp32 represents every number of each
# What a pickle of a state_dict calls.
CALLS = {"torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter", DICT, PERSISTENT}
NUM_NAMES_SHOWN = 3  # names that an error lists for one kind of fault
# Reading damaged pickles and archives raised most of these errors (tests/unit/model/test_hf_folder.py); the others may.
BROKEN_FILES = (pickle.UnpicklingError, zipfile.BadZipFile, struct.error, OSError, EOFError, MemoryError)
WRONG_VALUES = (RuntimeError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError, AssertionError)


@dataclass(frozen=True)
class Folder:
    """The checked content of a Hugging Face folder.

    `tensors` has the stored tensors by GPT2LMHeadModel's names; a tied head is there only as the embedding.
    """

    path: Path
    weights_file: str
    config: ModelConfig
    tokenizer: Tokenizer
    tensors: dict[str, Tensor]

    def parameter(self, name: str, config: ModelConfig) -> Tensor:
        """Return our parameter `name` in fp32, in the shape that `config` gives it.

        `config` may have fewer positions and another vocabulary padding than the folder. Raise InputError if the
        parameter has a number that is not finite.
        """
        stored = self.tensors[name]
        if name == POSITIONS:
            stored = stored[: config.context_len]
        value = as_ours(name, stored.float(), config)
        if not value.isfinite().all():
            raise InputError(f"{self.path}: {name} holds numbers that are not finite")
        return value


def is_hugging_face(path: Path) -> bool:
    """Return whether `path` is a folder with weights under Hugging Face's names."""
    return any(has_file(path / name) for name in WEIGHTS_FILES)


def open_folder(path: Path) -> Folder:
    """Return the content of a folder, with everything checked except that the weights are finite.

    Raise InputError, in one line, for anything that is missing, damaged or of another model.
    """
    config = from_json(read_json(path / CONFIG_FILE), path / CONFIG_FILE)
    tokenizer = read_tokenizer(path)
    if tokenizer.vocab_size != config.vocab_size:
        raise InputError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} ids, but {CONFIG_FILE} says "
            f"vocab_size {config.vocab_size}"
        )
    weights = next(path / name for name in WEIGHTS_FILES if has_file(path / name))
    stored = _read_parts(weights) if weights.suffix == ".json" else _read_file(weights)
    tensors = _check_tensors(stored, config, weights)
    return Folder(path, weights.name, replace(config, eot_id=tokenizer.eot_id), tokenizer, tensors)


def _read_parts(index: Path) -> dict[str, Tensor]:
    """Return the tensors of all files of an index. Each file must hold exactly the tensors that the index lists."""
    content = read_json(index)
    file_of = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(file_of, dict) or not file_of or not all(isinstance(file, str) for file in file_of.values()):
        raise InputError(f"{index}: has no weight_map from tensors to files")
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(file_of.values())):
        path = index.parent / file
        if Path(file).name != file or path.suffix not in (".safetensors", ".bin") or not has_file(path):
            raise InputError(f"{index}: {reprlib.repr(file)} is no weights file beside it")
        part = _read_file(path)
        if part.keys() != {name for name, part_file in file_of.items() if part_file == file}:
            raise InputError(f"{path}: its tensors are not those that {index.name} lists")
        tensors |= part
    return tensors


def _read_file(path: Path) -> dict[str, Tensor]:
    return _read_safetensors(checked(path)) if path.suffix == ".safetensors" else _read_bin(checked(path))


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, mapped into memory."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise InputError(f"{path}: reading it needs safetensors: pip install -e '.[hf]'") from error
    if "\\udc" in ascii(path):
        raise InputError(f"{path}: safetensors opens no path that is not UTF-8; rename the folder")
    with reading_from(path):
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                return {name: file.get_tensor(name) for name in file.offset_keys()}
        except (SafetensorError, RuntimeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            raise InputError(f"{path}: damaged ({first_line(error)})") from error


def _read_bin(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a pickle. Any other object is refused before its module is imported."""
    try:
        if zipfile.is_zipfile(path):  # The format before torch 1.6 is no zip file and has no checksums.
            _check_archive(path)
        else:
            _check_old_format(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Torch warns of other pickle versions; an unreadable one raises too.
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except (*BROKEN_FILES, *WRONG_VALUES) as error:
        raise InputError(f"{path}: refused: {first_line(error)}") from error
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    ):
        raise InputError(f"{path}: refused: it is not a dict of tensors by name")
    return content


def _check_archive(path: Path) -> None:
    """Raise InputError for a wrong checksum or a compressed entry in a .bin file.

    torch.load ignores the checksums. It also unpacks compressed entries, which torch.save never writes, so that a small
    file could fill the memory.
    """
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise InputError(f"{path}: refused: it is compressed, and torch.save never compresses")
        for entry in archive.infolist():
            if entry.filename.endswith("/data.pkl"):
                with archive.open(entry) as file:
                    _check_calls(file.read(MOST_BYTES + 1), num_pickles=1)
        damaged = archive.testzip()
        if damaged is not None:
            raise InputError(f"{path}: damaged: the checksum of {_list([damaged])} is wrong")


def _check_old_format(path: Path) -> None:
    """Raise RefusedError for other calls in the pickles before the numbers: magic, version, system, tensors, keys."""
    with open_regular(path) as file:
        _check_calls(file.read(MOST_BYTES), num_pickles=5)


def _check_calls(content: bytes, *, num_pickles: int) -> None:
    """Raise RefusedError if a pickle of torch.save calls anything but what makes tensors and dicts.

    torch.load with weights_only also calls bytearray and storages of whatever size the file says.
    """
    interpreter = Interpreter(content)
    for _ in range(num_pickles):
        interpreter.run()
    other = sorted(interpreter.calls - CALLS)
    if other:
        raise RefusedError(f"{_list(other)} has no place in a dict of tensors")


def _check_tensors(stored: dict[str, Tensor], config: ModelConfig, path: Path) -> dict[str, Tensor]:
    """Return exactly the model's tensors by GPT2LMHeadModel's names.

    Raise InputError for missing and unknown tensors, other shapes and other types.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if BUFFER.fullmatch(name):
            continue
        full_name = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
        if full_name in tensors:
            raise InputError(f"{path}: has {_list([full_name])} twice, with and without 'transformer.'")
        tensors[full_name] = tensor
    # This comes first, so that n_layer cannot ask for more shapes below than the folder has tensors.
    num_layers = len({match[1] for name in tensors if (match := LAYER.match(name))})
    if num_layers != config.num_layers:
        raise InputError(
            f"{path}: has tensors of {num_layers} layers, but {CONFIG_FILE} says n_layer {config.num_layers}"
        )
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in to_hugging_face(GPT(config).state_dict(), config).items()}
    if config.tie and HEAD not in tensors:
        del shapes[HEAD]
    faults = {
        "lacks": shapes.keys() - tensors.keys(),
        "has tensors that GPT-2 does not have:": tensors.keys() - shapes.keys(),
        f"has other shapes than {CONFIG_FILE} says:": {
            f"{name} {list(tensors[name].shape)}, not {list(shape)}"
            for name, shape in shapes.items()
            if name in tensors and tensors[name].shape != shape
        },
        "has tensors that are not plain fp32, fp16 or bf16:": {
            name
            for name, tensor in tensors.items()
            if tensor.dtype not in DTYPES or tensor.layout != torch.strided or tensor.device.type != "cpu"
        },
    }
    messages = [f"{fault} {_list(names)}" for fault, names in faults.items() if names]
    if messages:
        raise InputError(f"{path}: {'; '.join(messages)}")
    if config.tie and HEAD in tensors and not torch.equal(tensors.pop(HEAD), tensors[EMBEDDING]):
        raise InputError(f"{path}: {HEAD} is not {EMBEDDING}, but {CONFIG_FILE} says tie_word_embeddings")
    return tensors


def _list(names: Iterable[str]) -> str:
    """Return the first names on one line, whatever strings the file has as names."""
    ordered = sorted(names)
    shown = [
        name if name.isprintable() and len(name) < 100 else reprlib.repr(name) for name in ordered[:NUM_NAMES_SHOWN]
    ]
    more = len(ordered) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
