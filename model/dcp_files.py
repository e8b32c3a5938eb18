"""Tensors out of torch.distributed.checkpoint's files, without running any code that stands in them."""

import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from data_prep.errors import InputError


class AllowListUnpickler(pickle.Unpickler):
    """Builds DCP's description of tensors, and refuses every other name before it is imported."""

    ALLOWED = frozenset(
        {
            ("torch.distributed.checkpoint.metadata", name)
            for name in (
                "ChunkStorageMetadata",
                "Metadata",
                "MetadataIndex",
                "StorageMeta",
                "TensorProperties",
                "TensorStorageMetadata",
                "_MEM_FORMAT_ENCODING",
            )
        }
        | {
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch.serialization", "_get_layout"),
            ("torch", "Size"),
            ("pathlib", "Path"),
            ("pathlib", "PosixPath"),
            ("pathlib", "WindowsPath"),
        }
        | {("torch", name) for name in ("float32", "bfloat16", "float16", "float64", "int64", "uint8")}
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's metadata")
        return super().find_class(module, name)


class SafeReader(dcp.FileSystemReader):
    """DCP's reader with its pickle replaced by the allow-list, and for tensors only."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            metadata = AllowListUnpickler(io.BytesIO(path.read_bytes())).load()
        except (
            pickle.UnpicklingError,
            EOFError,
            AttributeError,
            ValueError,
            TypeError,
            IndexError,
            KeyError,
        ) as error:
            raise InputError(f"{path}: refused: {error}") from error
        entries = metadata.state_dict_metadata.values() if isinstance(metadata, Metadata) else [None]
        if not all(isinstance(entry, TensorStorageMetadata) for entry in entries):
            raise InputError(f"{path}: refused: a checkpoint holds tensors only")
        assert metadata.storage_meta is not None
        metadata.storage_meta.load_id = self.load_id
        return metadata


def read_tensors(checkpoint: Path, into: dict[str, Tensor], *, alone: bool = False) -> None:
    """Fill the tensors of `into` from a checkpoint of any layout.

    Plain or sharded ones, and collective if there is a group; `alone`: plain ones, and this process by itself.
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
    """The line of a long message that says what happened."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def data_files_of(checkpoint: Path) -> set[str]:
    """Names of the files that hold a checkpoint's tensors, as its metadata has them."""
    return {entry.relative_path for entry in SafeReader(checkpoint).read_metadata().storage_data.values()}
