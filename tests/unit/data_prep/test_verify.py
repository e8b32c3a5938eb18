"""Verification of sound data, and of data damaged in every way that a disk or a person can damage it."""

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.textfiles import Options, prepare
from data_prep.tokenizer import BpeTokenizer, ByteTokenizer, CharTokenizer
from data_prep.verify import main
from tests.helpers.runs import called

TEXTS = ["abc ab a.\n" * 20, "caf\u00e9 \U0001f600 " * 10, "the end " * 30]
EOT = 258


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three documents tokenized by a small byte-pair vocabulary: 5 shards of train, 2 of val."""
    folder = tmp_path_factory.mktemp("sound")
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"ab": 256, b"abc": 257}
    BpeTokenizer(ranks, name="small").save(folder)
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    sources = tuple(str(folder / f"{number}.txt") for number in range(3))
    options = Options(sources, folder / "data", str(folder / "tokenizer"), val_fraction=0.2, shard_tokens=90)
    manifest = prepare(options)
    assert [len(manifest.splits[split].shards) for split in ("train", "val")] == [5, 2]
    return folder / "data"


@pytest.fixture
def data(sound: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(sound, tmp_path / "data"))


def complaint(directory: Path) -> str:
    """Verify a directory that must not be sound, and return what was printed on stderr."""
    done = called(main, str(directory))
    assert done.returncode == 1 and "sound" not in done.stdout
    return done.stderr


def edit_manifest(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = directory / "manifest.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def restate(directory: Path) -> None:
    """Make the manifest's hashes those of the files as they are now, as a forger would."""

    def change(raw: dict[str, Any]) -> None:
        lines = []
        for name, split in sorted(raw["splits"].items()):
            stream = hashlib.sha256()
            for shard in split["shards"]:
                path = directory / shard["file"]
                stream.update(path.read_bytes()[1024:])
                shard["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
                shard["idx_sha256"] = hashlib.sha256(path.with_suffix(".idx").read_bytes()).hexdigest()
            split["stream_sha256"] = stream.hexdigest()
            lines.append(f"{name}:{stream.hexdigest()}\n")
        raw["fingerprint"] = hashlib.sha256("".join(lines).encode()).hexdigest()

    edit_manifest(directory, change)


def overwrite(path: Path, offset: int, content: bytes) -> None:
    """Replace bytes in the middle of a file."""
    before = path.read_bytes()
    after = before[:offset] + content + before[offset + len(content) :]
    assert after != before and len(after) == len(before)
    path.write_bytes(after)


def test_sound_data_is_called_sound_and_shown(sound: Path) -> None:
    done = called(main, str(sound), "--samples", "2")
    assert (done.returncode, done.stderr) == (0, "")
    last = done.stdout.splitlines()[-1]
    fingerprint = json.loads((sound / "manifest.json").read_text())["fingerprint"]
    assert last.startswith("sound: train ") and last.endswith(f"fingerprint {fingerprint[:16]}")
    assert repr(TEXTS[0][:40])[:-1] in done.stdout


@pytest.mark.parametrize("name", ["train_000000", "train_000002", "val_000000"])
def test_one_flipped_bit_anywhere_is_found(data: Path, name: str) -> None:
    rng = random.Random(name)
    for suffix in (".bin", ".idx"):
        path = data / f"{name}{suffix}"
        content = path.read_bytes()
        offsets = set(rng.choices(range(len(content)), k=6)) if content else set()
        if suffix == ".bin":
            offsets |= set(range(0, 24, 3)) | {1023, 1024, len(content) - 1}
        for offset in offsets:
            overwrite(path, offset, bytes([content[offset] ^ 1 << rng.randrange(8)]))
            assert str(data / name) in complaint(data)
            path.write_bytes(content)
    assert called(main, str(data)).returncode == 0


@pytest.mark.parametrize("name", ["train_000000.bin", "val_000000.idx"])
def test_a_file_of_another_length_is_named(data: Path, name: str) -> None:
    path = data / name
    content = path.read_bytes()
    for changed in (content[:-1], content[:-8], content[:1024][:-1], b"", content + b"\0"):
        path.write_bytes(changed)
        assert str(path.with_suffix("")) in complaint(data)
    path.unlink()
    assert str(path) in complaint(data)


def test_every_damaged_file_has_its_line(data: Path) -> None:
    (data / "train_000001.bin").unlink()
    overwrite(data / "train_000003.bin", 1030, b"\xff\xff")
    (data / "val_000000.idx").write_bytes(b"")
    lines = complaint(data)
    for name in ("train_000001.bin", "train_000003.bin", "val_000000.idx"):
        assert str(data / name) in lines
    assert f"{data / 'train_000003.bin'}: sha256 differs" in lines
    assert str(data / "train_000002") not in lines


def test_another_tokenizer_is_found(data: Path) -> None:
    for other in (ByteTokenizer(), CharTokenizer("abc")):
        shutil.rmtree(data / "tokenizer")
        other.save(data)
        assert f"{data}: its tokenizer is not the one in the manifest" in complaint(data)


def set_id(index: int) -> tuple[str, int, bytes]:
    return "train_000001.bin", 1024 + 2 * 17, np.array([index], dtype="<u2").tobytes()


def set_slot(slot: int) -> tuple[str, int, bytes]:
    return "train_000001.bin", 4 * slot, np.array([200], dtype="<i4").tobytes()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (set_id(EOT + 1), f"train_000001.bin: token 17 is id {EOT + 1}, outside the vocabulary of {EOT + 1}"),
        (set_id(EOT), "train_000001.bin: its index does not name exactly the positions of EOT"),
        (("train_000000.idx", 0, b"\1"), "train_000000.bin: its index does not name exactly the positions of EOT"),
        (set_slot(3), "train_000001.bin: 200 as its vocabulary, but manifest.json says 259"),
        (set_slot(4), "train_000001.bin: 200 as its EOT, but manifest.json says 258"),
        (set_slot(5), "train_000001.bin: 200 documents, but manifest.json says 1"),
    ],
)
def test_wrong_content_is_found_behind_true_hashes(data: Path, damage: tuple[str, int, bytes], expected: str) -> None:
    name, offset, content = damage
    overwrite(data / name, offset, content)
    restate(data)
    assert f"{data}/{expected}" in complaint(data)


def drop_a_shard(raw: dict[str, Any]) -> None:
    train = raw["splits"]["train"]
    dropped = train["shards"].pop()
    train["tokens"] -= dropped["tokens"]
    train["documents"] -= dropped["documents"]


def test_a_manifest_that_leaves_out_a_shard_is_found(data: Path) -> None:
    edit_manifest(data, drop_a_shard)
    assert "not the stream that the manifest names" in complaint(data)


@pytest.mark.parametrize("lost", ["manifest.json", "tokenizer/codec.json", ""])
def test_a_lost_description_or_directory_gives_one_line(data: Path, lost: str) -> None:
    if lost:
        (data / lost).unlink()
    else:
        shutil.rmtree(data)
    done = called(main, str(data))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert str(data) in done.stderr and Path(lost).name in done.stderr
