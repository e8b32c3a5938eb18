"""Token files of other projects: adopted where they lie, read as numpy reads them, never written to."""

import hashlib
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from common.errors import InputError
from data_prep.manifest import open_split, read_manifest
from data_prep.shards import open_shard
from data_prep.textfiles import Options, prepare
from data_prep.tokenizer import BpeTokenizer
from data_prep.verify import main
from tests.helpers.data_dirs import state
from tests.helpers.runs import called

EOT = 258
Ids = npt.NDArray[np.uint16]
PROJECTS = ["llm.c", "nanogpt", "build-nanogpt"]


def random_ids(seed: int, count: int) -> Ids:
    ids = np.random.default_rng(seed).integers(0, EOT, size=count).astype("<u2")
    ids[::37] = EOT
    return ids


def write_llm_c(path: Path, ids: Ids, *, magic: int = 20240520, version: int = 1) -> None:
    path.write_bytes(struct.pack("<256i", magic, version, len(ids), *[0] * 253) + ids.tobytes())


def make_files(folder: Path, project: str) -> dict[str, Ids]:
    """Write files as that project does, and return each split's ids."""
    folder.mkdir()
    parts = {"train": [random_ids(1, 1000), random_ids(2, 777)], "val": [random_ids(3, 500)]}
    if project == "nanogpt":
        parts = {split: [np.concatenate(arrays)] for split, arrays in parts.items()}
    for split, arrays in parts.items():
        for number, ids in enumerate(arrays, start=split == "train"):
            match project:
                case "llm.c":
                    write_llm_c(folder / f"fineweb_{split}_{number:06d}.bin", ids)
                case "nanogpt":
                    ids.tofile(folder / f"{split}.bin")
                case _:
                    np.save(folder / f"edufineweb_{split}_{number:06d}.npy", ids)
    (folder / "meta.pkl").write_bytes(b"not ours to open")
    return {split: np.concatenate(arrays) for split, arrays in parts.items()}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved tokenizer of 259 ids whose last is EOT."""
    folder = tmp_path_factory.mktemp("tokenizer")
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"ab": 256, b"abc": 257}
    BpeTokenizer(ranks, name="small").save(folder)
    return str(folder / "tokenizer")


@pytest.fixture
def refusal(tokenizer: str) -> Callable[[Path], str]:
    """A function that adopts a folder which must be refused, and returns the one line."""

    def refuse(folder: Path) -> str:
        before = state(folder)
        done = called(main, "--adopt", str(folder), "--tokenizer", tokenizer)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert state(folder) == before
        return done.stderr

    return refuse


@pytest.mark.parametrize("project", PROJECTS)
def test_adopted_files_are_read_as_they_were_written(tmp_path: Path, tokenizer: str, project: str) -> None:
    data = tmp_path / "data"
    ids = make_files(data, project)
    before = state(data)
    flags = ["--adopt", str(data), "--tokenizer", tokenizer]
    assert called(main, *flags).stdout.splitlines()[-1].startswith("sound: train 1,777 tokens, val 500 tokens")
    assert before.items() <= state(data).items()
    manifest = read_manifest(data)
    for split, expected in ids.items():
        stream = open_split(data, split)
        np.testing.assert_array_equal(stream.read(0, len(stream)), expected)
        assert stream.read(490, 500).dtype == np.uint16
        assert manifest.splits[split].documents == int((expected == EOT).sum())
        assert manifest.splits[split].stream_sha256 == hashlib.sha256(expected.tobytes()).hexdigest()
    adopted = state(data)
    assert "already adopted" in called(main, *flags).stdout
    assert state(data) == adopted


@pytest.mark.parametrize("project", PROJECTS)
def test_a_file_that_changed_since_is_named(
    tmp_path: Path, tokenizer: str, refusal: Callable[[Path], str], project: str
) -> None:
    data = tmp_path / "data"
    make_files(data, project)
    assert called(main, "--adopt", str(data), "--tokenizer", tokenizer).returncode == 0
    path = sorted(data.glob("*train*"))[-1]
    content = path.read_bytes()
    path.write_bytes(content[:-2] + bytes([content[-2] ^ 1, content[-1]]))
    assert path.name in refusal(data)
    done = called(main, str(data))
    assert done.returncode == 1 and f"{path}: sha256 differs" in done.stderr
    path.write_bytes(content[:-4])
    done = called(main, str(data))
    assert done.returncode == 1 and str(path) in done.stderr
    with pytest.raises(InputError, match=path.name):
        open_split(data, "train")
    path.unlink()
    with pytest.raises(InputError, match=f"{path.name}: missing"):
        open_split(data, "train")


def test_files_of_another_format_are_refused_by_name(tmp_path: Path, refusal: Callable[[Path], str]) -> None:
    ids = random_ids(1, 100)
    shard = tmp_path / "fineweb_train_000001.bin"
    for magic, version, expected in (
        (20240801, 7, "Llama 3's uint32 tokens"),
        (20240520, 7, "version 7"),
        (20240522, 1, "HellaSwag"),
    ):
        write_llm_c(shard, ids, magic=magic, version=version)
        assert f"{shard}: " in (line := refusal(tmp_path)) and expected in line
    shard.unlink()

    array = tmp_path / "edu_train_000001.npy"
    for wrong in (*(ids.astype(dtype) for dtype in ("<u4", "<i8", ">u2", "<f4")), ids.reshape(10, 10)):
        np.save(array, wrong)
        assert f"{array}: {wrong.ndim}-dimensional {wrong.dtype.str}; token shards are" in refusal(tmp_path)
    np.save(array, np.array([{}], dtype=object), allow_pickle=True)
    assert f"{array}: 1-dimensional |O; token shards are" in refusal(tmp_path)
    np.save(array, np.asfortranarray(ids.reshape(10, 10)))
    assert f"{array}: not a readable .npy file" in refusal(tmp_path)
    array.write_bytes(b"junk")
    assert f"{array}: does not begin like a .npy file" in refusal(tmp_path)
    array.unlink()

    bare = tmp_path / "train.bin"
    bare.write_bytes(b"abc")
    assert f"{bare}: 3 bytes are not uint16 tokens" in refusal(tmp_path)
    ids[41] = EOT + 1
    ids.tofile(bare)
    assert f"{bare}: token 41 is id 259, outside the vocabulary of 259" in refusal(tmp_path)


def test_files_without_tokens_are_refused(tmp_path: Path, refusal: Callable[[Path], str]) -> None:
    none = random_ids(1, 0)
    for name, write in (
        ("train.bin", none.tofile),
        ("fineweb_train_000001.bin", lambda path: write_llm_c(path, none)),
        ("edu_train_000001.npy", lambda path: np.save(path, none)),
    ):
        write(tmp_path / name)
        assert f"{tmp_path / name}: holds no tokens" in refusal(tmp_path)
        (tmp_path / name).unlink()


def test_every_flipped_bit_of_an_npy_header_is_read_or_refused_in_one_line(tmp_path: Path) -> None:
    path, ids = tmp_path / "edu_train_000001.npy", random_ids(1, 100)
    np.save(path, ids)
    content = path.read_bytes()
    assert len(content) == 128 + 2 * 100
    num_read = 0
    for bit in range(128 * 8):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            np.testing.assert_array_equal(open_shard(path, "npy").tokens, ids)
            num_read += 1
        except InputError as error:
            assert str(path) in str(error) and str(error).isprintable()
    assert num_read < 20  # none but blanks that numpy ignores, too


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\0" * 118,
        b"{'descr': '<u2', 'fortran_order': False, 'shape': (-100,), }",
        b"{'descr': '<u2', 'fortran_order': False, 'shape': (99999999999999999999999999,), }",
        b"{'descr': '<u2', 'fortran_order': False, 'shape': (1 0 0,), }",
        b"{'descr': '<u2', 'fortran_order': False, 'shape': (), }",
        b"{'descr': '<u2', 'fortran_order': False, 'shape': (10, 10), }",
        b"{'descr': '\xb2u2', 'fortran_order': False, 'shape': (100,), }",
        b"{'descr': [('a', '<u2')], 'fortran_order': False, 'shape': (100,), }",
        b"{'descr': '<u2', 'fortran_order': False, 'shape': (100,), 'x': " + b"[" * 50_000 + b"}",
    ],
    ids=range(10),
)
def test_an_odd_npy_header_is_refused_in_one_line(
    tmp_path: Path, refusal: Callable[[Path], str], header: bytes
) -> None:
    path = tmp_path / "edu_train_000001.npy"
    start = b"\x93NUMPY\x01\x00" + (len(header) + 1).to_bytes(2, "little")
    path.write_bytes(start + header + b"\n" + random_ids(1, 100).tobytes())
    assert str(path) in refusal(tmp_path)


def test_files_of_several_sets_are_refused(tmp_path: Path, refusal: Callable[[Path], str]) -> None:
    make_files(tmp_path / "data", "llm.c")
    random_ids(5, 10).tofile(tmp_path / "data" / "fineweb_train_000009.bin")
    assert "fineweb_train_000009.bin" in refusal(tmp_path / "data")
    write_llm_c(tmp_path / "data" / "fineweb_train_000009.bin", random_ids(5, 10))
    write_llm_c(tmp_path / "data" / "fineweb_train_9.bin", random_ids(5, 10))
    assert "several files of the same split and number" in refusal(tmp_path / "data")
    (tmp_path / "data" / "fineweb_train_9.bin").rename(tmp_path / "data" / "other_val_000001.bin")
    assert "other_val_000001.bin" in refusal(tmp_path / "data")


def test_directories_without_token_files_or_of_our_own_are_refused(
    tmp_path: Path, refusal: Callable[[Path], str]
) -> None:
    assert "no such directory (--adopt)" in refusal(tmp_path / "gone")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "tokens.bin").write_bytes(b"ab")
    assert "no token file" in refusal(tmp_path / "nothing")
    (tmp_path / "text.txt").write_text("abc" * 100)
    prepare(Options((str(tmp_path / "text.txt"),), tmp_path / "own", "byte"))
    assert "nothing to adopt" in refusal(tmp_path / "own")
    (tmp_path / "own" / "manifest.json").unlink()
    assert "did not finish" in refusal(tmp_path / "own")


def test_adoption_needs_the_tokenizer_that_made_the_ids(tmp_path: Path) -> None:
    make_files(tmp_path / "data", "nanogpt")
    for flags in ([], ["--tokenizer", "char"]):
        done = called(main, "--adopt", str(tmp_path / "data"), *flags)
        assert done.returncode == 2 and "--adopt needs the --tokenizer" in done.stderr
    assert not (tmp_path / "data" / "manifest.json").exists()
