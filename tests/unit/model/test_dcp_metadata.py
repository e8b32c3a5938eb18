"""DCP's pickles become checked data; no pickle executes anything, alters a class, or takes memory or time."""

import io
import pickle
import random
import shutil
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path, PosixPath
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from common.errors import InputError
from model.dcp_metadata import RefusedError, description, interpret
from model.dcp_reader import read_tensors, saved_tensor

TENSORS = {"model.a": torch.arange(12.0).view(3, 4), "optimizer.a.step": torch.tensor(3.0), "empty": torch.zeros(0, 2)}
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as DCP itself writes it."""
    folder = tmp_path_factory.mktemp("dcp")
    dcp.save(dict(TENSORS), storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    return folder


@pytest.fixture(scope="module")
def metadata(saved: Path) -> bytes:
    return (saved / ".metadata").read_bytes()


def as_dcp(content: bytes) -> Any:
    return pickle.loads(content)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_it_says_what_pickle_would(metadata: bytes, protocol: int) -> None:
    expected = as_dcp(metadata)
    content = pickle.dumps(expected, protocol)
    read = description(content)
    assert read.storage_data == expected.storage_data
    for name, tensor in expected.state_dict_metadata.items():
        assert isinstance(tensor, TensorStorageMetadata)
        found = read.state_dict_metadata[name]
        assert isinstance(found, TensorStorageMetadata)
        assert (found.size, found.chunks, found.properties.dtype) == (
            tensor.size,
            tensor.chunks,
            tensor.properties.dtype,
        )


def test_tensors_of_every_dtype_and_stride_are_read_as_they_were(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.rand(6, 4, generator=generator) * 100
    tensors = {str(dtype): numbers.to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}
    tensors |= {str(dtype): numbers.to(dtype) for dtype in (torch.int64, torch.uint8)}
    tensors |= {"turned": numbers.T, "scalar": torch.tensor(7.0), "part": numbers[2:4, 1:3], "empty": numbers[:0]}
    dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    into = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    read_tensors(tmp_path, into)
    assert all(torch.equal(into[name], tensor) for name, tensor in tensors.items())


def attributes() -> dict[type, dict[str, int]]:
    """Return the identity of every attribute of every class that is loaded."""
    classes: set[type] = {object}
    unvisited: list[type] = [object]
    while unvisited:
        below: set[type] = set(type.__subclasses__(unvisited.pop())) - classes
        classes |= below
        unvisited += below
    assert {Path, ChunkStorageMetadata, torch.Size, torch.nn.Module} <= classes
    return {each: {name: id(value) for name, value in vars(each).items()} for each in classes}


def planted(state: dict[str, Any], module: str = "pathlib", name: str = "PosixPath") -> bytes:
    """Return a pickle that names a class and sets its attributes by BUILD."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + pickle.dumps((None, state), 2)[2:-1] + b"b."


def test_no_class_is_altered_by_build() -> None:
    content = planted({"fly": "planted"})
    with pytest.raises(RefusedError, match="another kind than Made"):
        interpret(content)
    assert not hasattr(PosixPath, "fly")
    pickle.loads(content)
    assert PosixPath.__dict__["fly"] == "planted", "plain unpickling alters it"
    del PosixPath.fly  # type: ignore[attr-defined]


# --- Bombs ------------------------------------------------------------------------------------------------------------

DEEP = 30_000
BOMBS = {
    "laughs": b"\x80\x04)" + b"\x94h\x00h\x00\x86" + b"".join(b"\x94h%ch%c\x86" % (n, n) for n in range(1, 200)) + b".",
    "laughing keys": b"\x80\x04})" + b"".join(b"\x94h%ch%c\x86" % (n, n) for n in range(200)) + b"Ns.",
    "deep tuples": b"\x80\x04)" + b"\x85" * DEEP + b".",
    "deep lists": b"\x80\x04" + b"]" * DEEP + b"a" * (DEEP - 1) + b".",
    "deep states": b"\x80\x04" + b"cx\ny\n)R" * DEEP + b"b" * (DEEP - 1) + b".",
    "list in itself": b"\x80\x04]\x94h\x00a.",
    "dict in itself": b"\x80\x04}\x94N.",
    "long text": b"\x80\x04X\xff\xff\xff\xff.",
    "longer text": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.",
    "bytes": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
    "bytearray": b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f.",
    "long number": b"\x80\x04\x8b\xff\xff\xff\x7f.",
    "number of 200 bytes": b"\x80\x04\x8a\xc8" + b"\xff" * 200 + b".",
    "digits": b"I" + b"9" * 100_000 + b"\n.",
    "memo far away": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "frame": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\xff.",
    "bytearray of a size": b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
    "extension": b"\x80\x02\x84\xff\xff\xff\x7f.",
    "instance": b"(ios\nsystem\n.",
    "marks": b"(" * DEEP + b".",
    "nothing": b"",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_takes_neither_memory_nor_time(name: str) -> None:
    tracemalloc.start()
    begin = time.process_time()
    try:
        with pytest.raises(RefusedError) as refusal:
            description(BOMBS[name])
        assert len(str(refusal.value)) < 300
        assert "\n" not in str(refusal.value)
        assert tracemalloc.get_traced_memory()[1] < 100e6
        assert time.process_time() - begin < 5
    finally:
        tracemalloc.stop()


# --- What contradicts itself ------------------------------------------------------------------------------------------


def first(metadata: Any) -> TensorStorageMetadata:
    tensor = metadata.state_dict_metadata["model.a"]
    assert isinstance(tensor, TensorStorageMetadata)
    return tensor


def place(metadata: Any) -> _StorageInfo:
    info = metadata.storage_data[MetadataIndex("model.a", (0, 0))]
    assert isinstance(info, _StorageInfo)
    return info


def part(*sizes: Any, offsets: tuple[Any, ...] = (0, 0)) -> ChunkStorageMetadata:
    chunk = ChunkStorageMetadata(torch.Size([]), torch.Size([]))
    chunk.offsets, chunk.sizes = torch.Size(offsets), torch.Size(sizes)
    return chunk


def become(metadata: Any, *shape: int) -> None:
    """Give the first tensor another shape, in one part."""
    first(metadata).size, first(metadata).chunks = torch.Size(shape), [part(*shape)]


LIES: dict[str, Callable[[Any], object]] = {
    "huge": lambda m: setattr(first(m), "size", torch.Size([2**30, 2**30])),
    "huge, with its part": lambda m: become(m, 2**30, 2**30),
    "more than 64 bits": lambda m: become(m, 2**62, 2**62),
    "negative": lambda m: setattr(first(m), "size", torch.Size([-3, 4])),
    "no parts": lambda m: setattr(first(m), "chunks", []),
    "no end": lambda m: setattr(first(m), "chunks", [part(2, 4)]),
    "a gap": lambda m: setattr(first(m), "chunks", [part(1, 4), part(1, 4, offsets=(2, 0))]),
    "an overlap": lambda m: setattr(first(m), "chunks", [part(2, 4), part(2, 4, offsets=(1, 0))]),
    "a part outside": lambda m: setattr(first(m), "chunks", [part(3, 4, offsets=(1, 0))]),
    "another rank": lambda m: setattr(first(m), "chunks", [part(12, offsets=(0,))]),
    "a place before the file": lambda m: setattr(place(m), "offset", -1),
    "a place at half a byte": lambda m: setattr(place(m), "offset", 0.5),
    "a place too short": lambda m: setattr(place(m), "length", 47),
    "no place": lambda m: m.storage_data.pop(MetadataIndex("model.a", (0, 0))),
    "places that overlap": lambda m: setattr(place(m), "length", place(m).length + 1),
    "a path that is no text": lambda m: setattr(place(m), "relative_path", 5),
    "transformed": lambda m: setattr(place(m), "transform_descriptors", ["zstd"]),
    "a tensor that is a number": lambda m: m.state_dict_metadata.update(a=5),
    "a dtype of another kind": lambda m: setattr(first(m).properties, "dtype", torch.complex64),
    "sparse": lambda m: setattr(first(m).properties, "layout", torch.sparse_coo),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_description_that_contradicts_itself_is_refused(metadata: bytes, lie: str) -> None:
    told = as_dcp(metadata)
    LIES[lie](told)
    tracemalloc.start()
    try:
        with pytest.raises(RefusedError) as refusal:
            description(pickle.dumps(told))
        assert "\n" not in str(refusal.value)
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()


# --- A tensor's own file ----------------------------------------------------------------------------------------------


class Call:
    """An object whose pickle calls something."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


def torch_saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def repacked(content: bytes, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """Return the same zip archive with other entries."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return out.getvalue()


def with_number(old: bytes, new: bytes) -> Callable[[str, bytes], bytes]:
    return lambda name, content: content.replace(old, new) if name.endswith("data.pkl") else content


def test_a_tensors_file_neither_calls_nor_allocates_nor_reads_elsewhere() -> None:
    whole = torch_saved(torch.arange(8.0))
    assert torch.equal(saved_tensor(whole), torch.arange(8.0))
    assert torch.equal(saved_tensor(repacked(whole, lambda _, content: content)), torch.arange(8.0))
    million = b"J" + struct.pack("<i", 10**6)
    faulty = {
        "call": torch_saved(Call(print, "executed")),
        "allocation": torch_saved(Call(bytearray, 10**11)),
        "no tensor": torch_saved({"a": 1}),
        "more numbers than there are": repacked(whole, with_number(b"K\x08", million)),
        "a stride beyond the end": repacked(whole, with_number(b"K\x01\x85", million + b"\x85")),
        "compressed": repacked(whole, lambda _, content: content, zipfile.ZIP_DEFLATED),
        "fewer numbers": repacked(whole, lambda name, content: content[:4] if name.endswith("data/0") else content),
        "another byte order": repacked(whole, lambda name, c: b"big" if name.endswith("byteorder") else c),
        "another storage": torch_saved(torch.zeros(4, dtype=torch.complex64)),
        "no archive": b"PK" + bytes(1000),
        "empty": b"",
    }
    tracemalloc.start()
    try:
        for fault, content in faulty.items():
            with pytest.raises(ValueError) as refusal:
                saved_tensor(content)
            assert "\n" not in str(refusal.value), fault
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


def test_a_part_of_another_dtype_or_shape_than_the_metadata_says_is_refused(saved: Path, tmp_path: Path) -> None:
    for number, other in enumerate((torch.zeros(3, 4, dtype=torch.int64), torch.zeros(4, 3), torch.zeros(12))):
        folder = shutil.copytree(saved, tmp_path / str(number))
        told, content = as_dcp((saved / ".metadata").read_bytes()), torch_saved(other)
        data = folder / place(told).relative_path
        place(told).offset, place(told).length = data.stat().st_size, len(content)
        data.write_bytes(data.read_bytes() + content)
        (folder / ".metadata").write_bytes(pickle.dumps(told))
        into = {name: torch.full_like(tensor, 7) for name, tensor in TENSORS.items()}
        with pytest.raises(InputError, match=r"refused: model\.a: it is not as \.metadata says"):
            read_tensors(folder, into)
        assert (into["model.a"] == 7).all()


def test_a_damaged_tensors_file_is_refused_or_read() -> None:
    content = torch_saved(torch.arange(8.0))
    num_read = 0
    for seed in range(2_000):
        rng, data = random.Random(seed), bytearray(content)
        for _ in range(rng.choice((1, 3))):
            at = rng.choice((rng.randrange(len(data)), len(data) - 1 - rng.randrange(min(500, len(data)))))
            data[at : at + rng.choice((1, 4))] = rng.choice((rng.randbytes(1), b"\xff" * 4, bytes(4)))
        try:
            num_read += len(saved_tensor(bytes(data))) >= 0
        except ValueError as error:
            assert "\n" not in str(error), seed
    assert 0 < num_read < 2_000


# --- Anything ---------------------------------------------------------------------------------------------------------

# Parts that make a mutation more than noise: opcodes, names of classes and functions, references, sizes.
PARTS = [
    *(bytes([opcode]) for opcode in b"().NRbQ\x81\x93\x94\x85\x86\x87]}aesutcih2010KJMX\x8a\x8b\x8c\x8d\x8e\x96\x95"),
    *(
        f"c{name}\n".encode()
        for name in ("pathlib\nPosixPath", "builtins\nsetattr", "builtins\nbytearray", "os\nsystem")
    ),
    *(f"ctorch\n{name}\n".encode() for name in ("Size", "Tensor", "float32", "nn.Module", "zeros")),
    *(f"ctorch.distributed.checkpoint.metadata\n{name}\n".encode() for name in ("Metadata", "MetadataIndex")),
    *(planted({"exists": 1})[2:-1], b"h\x00", b"h\x21", b"j\xff\xff\xff\x7f", b"r\xff\xff\xff\x7f"),
    *(b"X\xff\xff\xff\x7f", b"\x8a\xff", b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f", b"K\xff", b"J\xff\xff\xff\xff"),
]


def mutated(content: bytes, rng: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at, kind = rng.randrange(len(data) + 1), rng.randrange(6)
        if kind == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            data[at:at] = rng.choice(PARTS)
        elif kind == 2:
            data[at : at + rng.randrange(1, 9)] = rng.choice(PARTS)
        elif kind == 3:
            source = rng.randrange(len(data) + 1)
            data[at:at] = data[source : source + rng.randrange(1, 200)]
        elif kind == 4:
            del data[at : at + rng.randrange(1, 200)]
        else:
            data[at:at] = rng.choice(PARTS) * rng.choice((2, 50, 2000))
    return bytes(data)


def fuzz(content: bytes, num_mutations: int) -> None:
    """Read that many damaged pickles: each is refused or read, soon, and no class has changed after all of them."""
    tensor = torch_saved(torch.arange(8.0))
    with zipfile.ZipFile(io.BytesIO(tensor)) as archive:
        inner = archive.read("archive/data.pkl")
    sources = [(content, description), (inner, interpret)]
    outcomes = {"read": 0, "refused": 0}
    for each, read in sources:
        read(each)
    before = attributes()
    for seed in range(num_mutations):
        source, read = sources[seed % 4 == 3]
        data = mutated(source, random.Random(seed))
        begin = time.process_time()
        try:
            read(data)
            outcomes["read"] += 1
        except RefusedError as error:
            outcomes["refused"] += 1
            assert "\n" not in str(error), seed
        assert time.process_time() - begin < 1, seed
    after = attributes()
    changed = [
        f"{each.__module__}.{each.__qualname__}: {before[each].items() ^ after[each].items()}"
        for each in before.keys() & after.keys()
        if before[each] != after[each]
    ]
    assert changed == []
    assert min(outcomes.values()) > num_mutations // 200, outcomes


def test_damaged_pickles_are_refused_or_read_and_alter_nothing(metadata: bytes) -> None:
    fuzz(metadata, 3_000)


@pytest.mark.long(reason="a hundred thousand damaged pickles")
def test_a_hundred_thousand_damaged_pickles_alter_nothing(metadata: bytes) -> None:
    fuzz(metadata, 100_000)
