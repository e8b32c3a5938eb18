"""Read the tensors of a checkpoint that torch.distributed.checkpoint wrote. Nothing of the files is executed.

    .metadata     which tensors there are, their shapes, and where their parts lie (model/dcp_metadata.py)
    *.distcp      the parts one after the other, each a file of torch.save: a zip archive with a pickle and the numbers

torch.load is not used, with weights_only neither: it unpacks compressed entries, and calls bytearray and other
constructors with whatever sizes a file gives. A part is read only if its shape is the one in .metadata, which the
file's length bears out.
"""

import io
import itertools
import math
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from common.errors import InputError, reading_from
from common.reading import child, is_there, open_regular, read_regular
from model.dcp_metadata import PERSISTENT, RefusedError, called, description, interpret, natural, naturals, require

METADATA_FILE = ".metadata"
STORAGES = {
    "torch.FloatStorage": torch.float32,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.HalfStorage": torch.float16,
    "torch.DoubleStorage": torch.float64,
    "torch.LongStorage": torch.int64,
    "torch.ByteStorage": torch.uint8,
}
LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip archive's entry: the lengths of its name and of its extra field


class SafeReader(dcp.FileSystemReader):
    """DCP's reader, but it unpickles nothing, opens plain files of the checkpoint only, and accepts tensors only."""

    def __init__(self, checkpoint: Path, metadata: Metadata) -> None:
        super().__init__(checkpoint)
        self._metadata = metadata
        self._parts = {
            MetadataIndex(name, chunk.offsets): (chunk.sizes, tensor.properties.dtype)
            for name, tensor in tensors_in(metadata).items()
            for chunk in tensor.chunks
        }

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> "Future[None]":
        """Copy the planned parts into the planner's tensors, file by file and in the order of the files."""
        items = [(self.storage_data[item.storage_index], item) for item in plan.items]
        items.sort(key=lambda pair: (pair[0].relative_path, pair[0].offset))
        folder = Path(self.path)
        for name, places in itertools.groupby(items, key=lambda pair: pair[0].relative_path):
            path = child(folder, name)
            with open_regular(path, inside=folder) as file:
                for place, item in places:
                    with reading_from(path):
                        file.seek(place.offset)
                        content = file.read(place.length)
                    self._copy(content, item, planner, path)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _copy(self, content: bytes, item: ReadItem, planner: LoadPlanner, path: Path) -> None:
        try:
            part = saved_tensor(content)
            require((part.shape, part.dtype) == self._parts[item.storage_index], "it is not as .metadata says")
        except ValueError as error:
            raise InputError(f"{path}: refused: {item.storage_index.fqn}: {error}") from error
        target = planner.resolve_tensor(item).detach()
        target.copy_(narrow_tensor_by_index(part, item.storage_offsets, item.lengths))
        planner.commit_tensor(item, target)


def read_description(checkpoint: Path) -> Metadata:
    """Return the checked .metadata of a checkpoint, which names files inside it only.

    Raise InputError if it is damaged, or not what torch writes for dense tensors.
    """
    path = checkpoint / METADATA_FILE
    content = read_regular(path, inside=checkpoint)
    try:
        metadata = description(content)
    except RefusedError as error:
        raise InputError(f"{path}: refused: {error}") from error
    for place in metadata.storage_data.values():
        child(checkpoint, place.relative_path)
    return metadata


def saved_tensor(content: bytes) -> Tensor:
    """Return the tensor in a file of torch.save, as a view of `content`. Raise ValueError for anything else."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(content))
        entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
    except (zipfile.BadZipFile, struct.error, NotImplementedError, UnicodeDecodeError, OverflowError) as error:
        raise RefusedError("no file of torch.save") from error

    def stored(name: str) -> memoryview:
        entry = entries.get(name)
        if entry is None or entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise RefusedError(f"{name} is not there, or is compressed, which torch.save never does")
        require(entry.header_offset >= 0, f"{name} lies outside the file")
        header = content[entry.header_offset : entry.header_offset + LOCAL_HEADER.size]
        require(len(header) == LOCAL_HEADER.size, f"{name} lies outside the file")
        start = entry.header_offset + LOCAL_HEADER.size + sum(LOCAL_HEADER.unpack(header))
        require(start + entry.file_size <= len(content), f"{name} lies outside the file")
        return memoryview(content)[start : start + entry.file_size]

    require("byteorder" not in entries or stored("byteorder") == b"little", "its byte order is not this machine's")
    arguments = called(interpret(bytes(stored("data.pkl"))), "torch._utils._rebuild_tensor_v2")
    require(len(arguments) in (6, 7), "a tensor has another number of properties")
    storage, offset, shape, stride = arguments[0], natural(arguments[1]), naturals(arguments[2]), naturals(arguments[3])
    identity = called(storage, PERSISTENT)[0]
    require(type(identity) is tuple and len(identity) == 5 and type(identity[2]) is str, "a storage of another kind")
    dtype = STORAGES.get(getattr(identity[1], "name", ""))
    if dtype is None:
        raise RefusedError("a storage of another dtype")
    numbers = stored(f"data/{identity[2]}")
    require(len(shape) == len(stride) and len(numbers) % dtype.itemsize == 0, "its shape does not fit its strides")
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if not math.prod(shape):
        return torch.empty(shape, dtype=dtype)
    require(last < len(numbers) // dtype.itemsize, "its shape needs more numbers than there are")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")  # it is copied from, only
        return torch.frombuffer(numbers, dtype=dtype).as_strided(shape, stride, offset)


def read_tensors(checkpoint: Path, into: dict[str, Tensor], metadata: Metadata | None = None) -> None:
    """Fill the tensors of `into`, plain or this process's shards, from a checkpoint of any layout.

    This is never a collective operation. `metadata` is what `read_description` has returned, if it was called already.
    """
    metadata = metadata or read_description(checkpoint)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        try:
            dcp.load(dict(into), storage_reader=SafeReader(checkpoint, metadata), no_dist=True)
        except (CheckpointException, RuntimeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            for cause, _ in error.failures.values() if isinstance(error, CheckpointException) else ():
                if isinstance(cause, InputError):
                    raise cause from None
            raise InputError(f"{checkpoint}: its tensors do not fit this model: {last_line_of(error)}") from error


def last_line_of(error: BaseException) -> str:
    """Return the last line of an error's message, which says what happened, or the error's type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def require_data_files(checkpoint: Path, metadata: Metadata) -> None:
    """Raise InputError unless every file that the metadata names is there, with all the bytes that it should hold."""
    ends: dict[str, int] = {}
    for place in metadata.storage_data.values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    for name, end in sorted(ends.items()):
        path = child(checkpoint, name)
        if not is_there(path):
            raise InputError(f"{checkpoint}: {METADATA_FILE} names {name}, which is not there")
        with reading_from(path):
            num_bytes = path.stat().st_size
        if num_bytes < end:
            raise InputError(f"{path}: {num_bytes} bytes, but {METADATA_FILE} names {end}")


def tensors_in(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    """Return what `description` gave, by its type: tensors only."""
    tensors = metadata.state_dict_metadata
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, TensorStorageMetadata)}
