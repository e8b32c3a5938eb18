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
from data_prep.textfiles import Options, prepare
from data_prep.tokenizer import BpeTokenizer
from data_prep.verify import main

EOT = 258
Ids = npt.NDArray[np.uint16]
MADE_BY = ["llm.c", "nanogpt", "build-nanogpt"]


def random_ids(seed: int, count: int) -> Ids:
    ids = np.random.default_rng(seed).integers(0, EOT, size=count).astype("<u2")
    ids[::37] = EOT
    return ids


def write_llm_c(path: Path, ids: Ids, *, magic: int = 20240520, version: int = 1) -> None:
    path.write_bytes(struct.pack("<256i", magic, version, len(ids), *[0] * 253) + ids.tobytes())


def make_files(folder: Path, made_by: str) -> dict[str, Ids]:
    """Files as that project writes them -> each split's ids."""
    folder.mkdir()
    pieces = {"train": [random_ids(1, 1000), random_ids(2, 777)], "val": [random_ids(3, 500)]}
    if made_by == "nanogpt":
        pieces = {split: [np.concatenate(parts)] for split, parts in pieces.items()}
    for split, parts in pieces.items():
        for number, ids in enumerate(parts, start=split == "train"):
            match made_by:
                case "llm.c":
                    write_llm_c(folder / f"fineweb_{split}_{number:06d}.bin", ids)
                case "nanogpt":
                    ids.tofile(folder / f"{split}.bin")
                case _:
                    np.save(folder / f"edufineweb_{split}_{number:06d}.npy", ids)
    (folder / "meta.pkl").write_bytes(b"not ours to open")
    return {split: np.concatenate(parts) for split, parts in pieces.items()}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved tokenizer of 259 ids whose last is EOT."""
    folder = tmp_path_factory.mktemp("tokenizer")
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"ab": 256, b"abc": 257}
    BpeTokenizer(ranks, name="small").save(folder)
    return str(folder / "tokenizer")


@pytest.fixture
def refused(tokenizer: str, capsys: pytest.CaptureFixture[str]) -> Callable[[Path], str]:
    """Adopts what must be refused -> the one line, and nothing is written."""

    def refuse(folder: Path) -> str:
        before = sorted(path.name for path in folder.iterdir())
        with pytest.raises(SystemExit) as ending:
            main(["--adopt", str(folder), "--tokenizer", tokenizer])
        assert ending.value.code == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        assert sorted(path.name for path in folder.iterdir()) == before
        return line

    return refuse


@pytest.mark.parametrize("made_by", MADE_BY)
def test_adopted_files_are_read_as_they_were_written(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str], made_by: str
) -> None:
    ids = make_files(tmp_path / "data", made_by)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "data").iterdir()}
    main(["--adopt", str(tmp_path / "data"), "--tokenizer", tokenizer])
    assert capsys.readouterr().out.splitlines()[-1].startswith("sound: train 1,777 tokens, val 500 tokens")
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before} == before
    manifest = read_manifest(tmp_path / "data")
    for split, expected in ids.items():
        stream = open_split(tmp_path / "data", split)
        np.testing.assert_array_equal(stream.read(0, len(stream)), expected)
        np.testing.assert_array_equal(stream.read(490, 500), expected[490:500])
        assert manifest.splits[split].documents == int((expected == EOT).sum())
        assert manifest.splits[split].stream_sha256 == hashlib.sha256(expected.tobytes()).hexdigest()
    assert open_split(tmp_path / "data", "train").read(995, 1005).dtype == np.uint16


def test_the_fingerprint_is_of_the_tokens_whatever_holds_them(tmp_path: Path, tokenizer: str) -> None:
    for made_by in MADE_BY:
        make_files(tmp_path / made_by, made_by)
        main(["--adopt", str(tmp_path / made_by), "--tokenizer", tokenizer])
    assert len({read_manifest(tmp_path / made_by).fingerprint for made_by in MADE_BY}) == 1


@pytest.mark.parametrize("made_by", MADE_BY)
def test_adopted_twice_is_adopted_once(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str], made_by: str
) -> None:
    make_files(tmp_path / "data", made_by)
    main(["--adopt", str(tmp_path / "data"), "--tokenizer", tokenizer])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")}
    main(["--adopt", str(tmp_path / "data"), "--tokenizer", tokenizer])
    assert "already adopted" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")} == before


@pytest.mark.parametrize("made_by", MADE_BY)
def test_a_changed_file_is_named(
    tmp_path: Path, tokenizer: str, refused: Callable[[Path], str], capsys: pytest.CaptureFixture[str], made_by: str
) -> None:
    make_files(tmp_path / "data", made_by)
    main(["--adopt", str(tmp_path / "data"), "--tokenizer", tokenizer])
    path = sorted((tmp_path / "data").glob("*train*"))[-1]
    content = path.read_bytes()
    path.write_bytes(content[:-2] + bytes([content[-2] ^ 1, content[-1]]))
    assert path.name in refused(tmp_path / "data")
    with pytest.raises(SystemExit) as ending:
        main([str(tmp_path / "data")])
    assert ending.value.code == 1
    assert f"{path}: sha256 differs" in capsys.readouterr().err
    path.write_bytes(content[:-4])
    with pytest.raises((SystemExit, InputError)):
        main([str(tmp_path / "data")])
    assert str(path) in capsys.readouterr().err
    with pytest.raises(InputError, match=path.name):
        open_split(tmp_path / "data", "train")
    path.unlink()
    with pytest.raises(InputError, match=f"{path.name}: missing"):
        open_split(tmp_path / "data", "train")


def test_llama_tokens_are_refused_by_name(tmp_path: Path, refused: Callable[[Path], str]) -> None:
    write_llm_c(tmp_path / "fineweb_train_000001.bin", random_ids(1, 100), magic=20240801, version=7)
    assert "fineweb_train_000001.bin: Llama 3's uint32 tokens" in refused(tmp_path)
    write_llm_c(tmp_path / "fineweb_train_000001.bin", random_ids(1, 100), version=7)
    assert "version 7" in refused(tmp_path)
    write_llm_c(tmp_path / "fineweb_train_000001.bin", random_ids(1, 100), magic=20240522)
    assert "HellaSwag" in refused(tmp_path)


@pytest.mark.parametrize("dtype", ["<u4", "<i8", ">u2", "<f4"])
def test_arrays_of_another_type_are_refused(tmp_path: Path, refused: Callable[[Path], str], dtype: str) -> None:
    np.save(tmp_path / "edu_train_000001.npy", random_ids(1, 100).astype(dtype))
    assert "edu_train_000001.npy" in refused(tmp_path)
    assert "uint16" in refused(tmp_path)


def test_pickles_and_tables_are_refused(tmp_path: Path, refused: Callable[[Path], str]) -> None:
    path = tmp_path / "train_000001.npy"
    np.save(path, random_ids(1, 100).reshape(10, 10))
    assert "2-dimensional" in refused(tmp_path)
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    assert path.name in refused(tmp_path)
    path.write_bytes(b"junk")
    assert path.name in refused(tmp_path)


def test_an_id_beyond_the_vocabulary_is_named_with_its_place(tmp_path: Path, refused: Callable[[Path], str]) -> None:
    ids = random_ids(1, 100)
    ids[41] = EOT + 1
    ids.tofile(tmp_path / "train.bin")
    assert "train.bin: token 41 is id 259, outside the vocabulary of 259" in refused(tmp_path)


@pytest.mark.parametrize("content", [b"", b"abc"])
def test_a_headerless_file_of_odd_size_is_refused(
    tmp_path: Path, refused: Callable[[Path], str], content: bytes
) -> None:
    (tmp_path / "val.bin").write_bytes(content)
    assert "val.bin" in refused(tmp_path)


def test_mixed_kinds_and_sets_are_refused(tmp_path: Path, refused: Callable[[Path], str]) -> None:
    make_files(tmp_path / "data", "llm.c")
    random_ids(5, 10).tofile(tmp_path / "data" / "fineweb_train_000009.bin")
    assert "fineweb_train_000009.bin" in refused(tmp_path / "data")
    write_llm_c(tmp_path / "data" / "fineweb_train_000009.bin", random_ids(5, 10))
    write_llm_c(tmp_path / "data" / "other_val_000001.bin", random_ids(5, 10))
    assert "other_val_000001.bin" in refused(tmp_path / "data")


def test_directories_of_nothing_or_of_our_own_are_refused(tmp_path: Path, refused: Callable[[Path], str]) -> None:
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "tokens.bin").write_bytes(b"ab")
    assert "no token file" in refused(tmp_path / "nothing")
    (tmp_path / "text.txt").write_text("abc" * 100)
    prepare(Options((str(tmp_path / "text.txt"),), tmp_path / "own", "byte"))
    assert "nothing to adopt" in refused(tmp_path / "own")
    (tmp_path / "own" / "manifest.json").unlink()
    assert "did not finish" in refused(tmp_path / "own")


def test_adoption_needs_the_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_files(tmp_path / "data", "nanogpt")
    for arguments in ([], ["--tokenizer", "char"]):
        with pytest.raises(SystemExit):
            main(["--adopt", str(tmp_path / "data"), *arguments])
        assert "--tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "data" / "manifest.json").exists()
