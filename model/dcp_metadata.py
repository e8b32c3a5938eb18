"""Read torch.distributed.checkpoint's description of tensors, a pickle, without unpickling it.

A pickle is a program. Even one that may name only harmless classes can change them: its BUILD opcode sets attributes of
whatever it is given, classes too. So the small part of the pickle language that torch writes is interpreted here. Every
class and function of the pickle becomes a record of its name, arguments and state, and no class is looked up. DCP's own
objects are then made from what these records hold, once all of it is checked.

The opcodes are those of CPython's Lib/pickletools.py. Time and memory grow with the number of bytes alone: nothing here
walks through nested values or compares them, so values that are nested a million deep, or that contain themselves or
one another a million times over, cost no more than others.
"""

import math
import reprlib
import struct
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

METADATA = "torch.distributed.checkpoint.metadata."
STORAGE_INFO = "torch.distributed.checkpoint.filesystem._StorageInfo"
PROTOCOLS = (2, 3, 4, 5)
MOST_BYTES = 2**27  # a GPT-2 XL on 64 ranks has 1.5e7, on 512 ranks 1.1e8
MOST_DIMENSIONS = 8
LONGEST_NUMBER = 10  # bytes; of the old format's magic number
DICT, PERSISTENT = "collections.OrderedDict", "a persistent id"
DTYPES = {
    f"torch.{name}": getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64", "int64", "uint8")
}
Sizes = tuple[int, ...]


class RefusedError(ValueError):
    """A pickle that torch does not write, or a description of tensors that contradicts itself."""


class Made:
    """The result of a call in a pickle: the called name, the arguments and what BUILD gave. Equal to itself alone."""

    __slots__ = ("arguments", "name", "state")

    def __init__(self, name: str, arguments: tuple[Any, ...]) -> None:
        self.name = name
        self.arguments = arguments
        self.state: Any = None


class Name:
    """A class, function or constant that a pickle names."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Interpreter:
    """A machine for the opcodes of which torch's pickles consist. Any other opcode is refused.

    `calls` has the names of everything that was called. An OrderedDict is a dict here, without attributes.
    """

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._at = 0
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self.calls: set[str] = set()

    @property
    def is_at_end(self) -> bool:
        return self._at == len(self._content)

    def run(self) -> Any:
        """Return the next pickle's value: None, bool, int, str, tuple, list, dict, Name or Made. Raise RefusedError."""
        self._stack, self._marks, self._memo = [], [], {}
        try:
            while (opcode := self._take(1)) != b".":
                if opcode not in self.OPCODES:
                    raise RefusedError(f"opcode {opcode!r} at byte {self._at - 1} has no place in a checkpoint")
                self.OPCODES[opcode](self)
            [value] = self._stack
        except (LookupError, struct.error, UnicodeDecodeError) as error:
            raise RefusedError(f"damaged near byte {self._at}") from error
        except ValueError as error:
            if isinstance(error, RefusedError):
                raise
            raise RefusedError(f"damaged near byte {self._at}") from error
        return value

    def _take(self, count: int) -> bytes:
        taken = self._content[self._at : self._at + count]
        if len(taken) < count:
            raise RefusedError(f"ends in the middle, at byte {len(self._content)}")
        self._at += count
        return taken

    def _number(self, form: str) -> int:
        number: int = struct.unpack(form, self._take(struct.calcsize(form)))[0]
        return number

    def _line(self) -> str:
        end = self._content.index(b"\n", self._at)
        line = self._content[self._at : end].decode("utf-8")
        self._at = end + 1
        return line

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop_to_mark(self) -> list[Any]:
        mark = self._marks.pop()
        values = self._stack[mark:]
        del self._stack[mark:]
        return values

    def _pop(self, kind: type) -> Any:
        value = self._stack.pop()
        if type(value) is not kind:
            raise RefusedError(f"a value of another kind than {kind.__name__} near byte {self._at}")
        return value

    def _top(self, kind: type) -> Any:
        value = self._pop(kind)
        self._stack.append(value)
        return value

    def _protocol(self) -> None:
        if self._number("<B") not in PROTOCOLS:
            raise RefusedError("its pickle protocol is not torch's")

    def _text(self, form: str) -> None:
        self._push(self._take(self._number(form)).decode("utf-8", "surrogatepass"))

    def _long(self) -> None:
        count = self._number("<B")
        if count > LONGEST_NUMBER:
            raise RefusedError(f"a number of {count} bytes at byte {self._at}")
        self._push(int.from_bytes(self._take(count), "little", signed=True))

    def _put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _tuple(self, count: int) -> None:
        values = tuple(self._stack[-count:])
        if len(values) < count:
            raise IndexError
        self._stack[-count:] = [values]

    def _global(self, module: str, name: str) -> None:
        self._push(Name(f"{module}.{name}"))

    def _stack_global(self) -> None:
        name, module = self._pop(str), self._pop(str)
        self._global(module, name)

    def _call(self) -> None:
        arguments, called = self._pop(tuple), self._pop(Name)
        self.calls.add(called.name)
        self._push({} if called.name == DICT and not arguments else Made(called.name, arguments))

    def _persistent(self) -> None:
        self.calls.add(PERSISTENT)
        self._push(Made(PERSISTENT, (self._stack.pop(),)))

    def _build(self) -> None:
        state = self._stack.pop()
        if type(self._stack[-1]) is dict:
            return
        made = self._top(Made)
        if made.state is not None or state is None:
            raise RefusedError(f"the state of {reprlib.repr(made.name)} is set twice or to nothing")
        made.state = state

    def _set_items(self, items: list[Any]) -> None:
        target = self._top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, Made) or key in target:
                raise RefusedError(f"a key near byte {self._at} is no name, or is there twice")
            target[key] = value

    def _append(self, values: list[Any]) -> None:
        self._top(list).extend(values)

    OPCODES: ClassVar[Mapping[bytes, Callable[["Interpreter"], object]]] = {
        b"\x80": _protocol,
        b"\x95": lambda self: self._take(8),  # FRAME: the length of the next part, which nothing needs
        b"(": lambda self: self._marks.append(len(self._stack)),
        b"N": lambda self: self._push(None),
        b"\x88": lambda self: self._push(True),
        b"\x89": lambda self: self._push(False),
        b"J": lambda self: self._push(self._number("<i")),
        b"K": lambda self: self._push(self._number("<B")),
        b"M": lambda self: self._push(self._number("<H")),
        b"\x8a": _long,
        b"\x8c": lambda self: self._text("<B"),
        b"X": lambda self: self._text("<I"),
        b")": lambda self: self._push(()),
        b"\x85": lambda self: self._tuple(1),
        b"\x86": lambda self: self._tuple(2),
        b"\x87": lambda self: self._tuple(3),
        b"t": lambda self: self._push(tuple(self._pop_to_mark())),
        b"]": lambda self: self._push([]),
        b"a": lambda self: self._append([self._stack.pop()]),
        b"e": lambda self: self._append(self._pop_to_mark()),
        b"}": lambda self: self._push({}),
        b"s": lambda self: self._set_items([self._stack.pop(-2), self._stack.pop()]),
        b"u": lambda self: self._set_items(self._pop_to_mark()),
        b"\x94": lambda self: self._put(len(self._memo)),
        b"q": lambda self: self._put(self._number("<B")),
        b"r": lambda self: self._put(self._number("<I")),
        b"h": lambda self: self._push(self._memo[self._number("<B")]),
        b"j": lambda self: self._push(self._memo[self._number("<I")]),
        b"c": lambda self: self._global(self._line(), self._line()),
        b"\x93": _stack_global,
        b"R": _call,
        b"\x81": _call,  # NEWOBJ
        b"b": _build,
        b"Q": _persistent,
    }


def interpret(content: bytes) -> Any:
    """Return the value of a pickle of torch's; see `Interpreter.run`. Nothing in it is executed or imported."""
    if len(content) > MOST_BYTES:
        raise RefusedError(f"it has {len(content)} bytes, more than the {MOST_BYTES} that any checkpoint needs")
    interpreter = Interpreter(content)
    value = interpreter.run()
    if not interpreter.is_at_end:
        raise RefusedError("goes on after its end")
    return value


# --- What the records hold --------------------------------------------------------------------------------------------


def require(is_so: bool, fault: str) -> None:
    if not is_so:
        raise RefusedError(fault)


def called(value: Any, name: str) -> tuple[Any, ...]:
    """Return the arguments of a record that calls `name`."""
    if type(value) is Made and value.name == name:
        return value.arguments
    kind = value.name if type(value) in (Made, Name) else type(value).__name__
    raise RefusedError(f"{reprlib.repr(kind)} has no place where {name} belongs")


def fields_of(value: Any, name: str, *fields: str) -> list[Any]:
    """Return the fields of a record of the dataclass `name`."""
    require(called(value, name) == (), f"{name} has arguments")
    state = value.state
    require(type(state) is dict and all(field in state for field in fields), f"{name} lacks a field")
    return [state[field] for field in fields]


def text(value: Any) -> str:
    require(type(value) is str, "a name is no text")
    result: str = value
    return result


def natural(value: Any) -> int:
    require(type(value) is int and 0 <= value < 2**63, "a size or an offset is no number from 0 to 2^63 - 1")
    result: int = value
    return result


def naturals(value: Any) -> Sizes:
    require(type(value) is tuple and len(value) <= MOST_DIMENSIONS, f"a size is no {MOST_DIMENSIONS} numbers or fewer")
    return tuple(natural(each) for each in value)


def torch_size(value: Any) -> Sizes:
    """Return the numbers in a record of torch.Size."""
    arguments = called(value, "torch.Size")
    require(len(arguments) == 1, "torch.Size takes one tuple")
    return naturals(arguments[0])


def dtype_of(value: Any) -> torch.dtype:
    dtype = DTYPES.get(value.name) if type(value) is Name else None
    if dtype is None:
        raise RefusedError("a tensor's dtype is none of " + ", ".join(DTYPES))
    return dtype


def tensor_of(value: Any, name: str) -> TensorStorageMetadata:
    """Return the checked description of one tensor and its chunks."""
    properties, size, chunks = fields_of(value, f"{METADATA}TensorStorageMetadata", "properties", "size", "chunks")
    require(called(properties, f"{METADATA}TensorProperties") == (), "TensorProperties has arguments")
    require(type(properties.state) is tuple and len(properties.state) == 5, "TensorProperties has not five properties")
    dtype, layout = properties.state[:2]
    layout_name = called(layout, "torch.serialization._get_layout")
    require(len(layout_name) == 1 and layout_name[0] == "torch.strided", f"{name} is not dense")
    shape = torch_size(size)
    require(type(chunks) is list, f"the parts of {name} are no list")
    parts = []
    for chunk in chunks:
        offsets, sizes = map(torch_size, fields_of(chunk, f"{METADATA}ChunkStorageMetadata", "offsets", "sizes"))
        parts.append((offsets, sizes))
    require_tiles(parts, shape, name)
    return TensorStorageMetadata(
        TensorProperties(dtype=dtype_of(dtype)),
        torch.Size(shape),
        [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in parts],
    )


def require_tiles(parts: list[tuple[Sizes, Sizes]], shape: Sizes, name: str) -> None:
    """Raise RefusedError unless the parts fill the shape without gap or overlap, cut along one dimension.

    DCP would leave what no part covers as it was.
    """
    fault = f"the parts of {reprlib.repr(name)} do not make up its shape"
    require(math.prod(shape) < 2**63, fault)
    require(bool(parts), fault)
    for offsets, sizes in parts:
        require(len(offsets) == len(sizes) == len(shape), fault)
        require(all(o + s <= whole for o, s, whole in zip(offsets, sizes, shape, strict=True)), fault)
    filled = sorted(part for part in parts if math.prod(part[1]))
    cut = [dim for dim in range(len(shape)) if any(sizes[dim] != shape[dim] for _, sizes in filled)]
    require(len(cut) <= 1, fault)
    position = 0
    for offsets, sizes in filled:
        along = cut[0] if cut else 0
        require(not shape or offsets[along] == position, fault)
        position += sizes[along] if shape else 1
    whole = (shape[cut[0] if cut else 0] if shape else 1) if math.prod(shape) else 0
    require(position == whole, fault)


def description(content: bytes) -> Metadata:
    """Return the checked content of a checkpoint's .metadata. Raise RefusedError.

    Every tensor has a place in a file for each of its parts; the places are large enough and do not overlap. Whether
    the files are there is not known here. What loading does not need, such as the path of the save, is left out.
    """
    tensors, places = fields_of(interpret(content), f"{METADATA}Metadata", "state_dict_metadata", "storage_data")
    require(type(tensors) is dict and type(places) is dict, "it has no tensors by name")
    # A pickle may use one list of parts for many tensors.
    parts = [fields_of(value, f"{METADATA}TensorStorageMetadata", "chunks")[0] for value in tensors.values()]
    num_parts = sum(len(each) for each in parts if type(each) is list)
    require(num_parts <= len(content), f"{num_parts} parts of tensors in {len(content)} bytes")
    described = {text(name): tensor_of(value, name) for name, value in tensors.items()}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for index, place in places.items():
        fqn, offset = fields_of(index, f"{METADATA}MetadataIndex", "fqn", "offset")
        path, start, length = fields_of(place, STORAGE_INFO, "relative_path", "offset", "length")
        require(not place.state.get("transform_descriptors"), "its tensors are transformed")
        key = MetadataIndex(text(fqn), torch.Size(torch_size(offset)))
        require(key not in storage, f"a part of {reprlib.repr(fqn)} has two places")
        storage[key] = _StorageInfo(text(path), natural(start), natural(length))
    for name, tensor in described.items():
        for chunk in tensor.chunks:
            place = storage.get(MetadataIndex(name, chunk.offsets))
            num_bytes = math.prod(chunk.sizes) * tensor.properties.dtype.itemsize
            require(place is not None and place.length >= num_bytes, f"{reprlib.repr(name)} has no place for its bytes")
    ends: dict[str, int] = {}
    for info in sorted(storage.values(), key=lambda info: info.offset):
        require(info.offset >= ends.get(info.relative_path, 0), f"places overlap in {reprlib.repr(info.relative_path)}")
        ends[info.relative_path] = info.offset + info.length
    return Metadata(dict(described), storage_data=storage, storage_meta=StorageMeta())
