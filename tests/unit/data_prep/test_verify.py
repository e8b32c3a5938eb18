"""Verification of data that is sound, and of data that is damaged in every way that a disk or a person can."""

import hashlib
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from common.errors import InputError
from data_prep.textfiles import Options, prepare
from data_prep.tokenizer import BpeTokenizer, ByteTokenizer, CharTokenizer
from data_prep.verify import main

SCRIPT = str(Path(__file__).resolve().parents[3] / "data_prep" / "verify.py")
TEXTS = ["abc ab a.\n" * 20, "caf\u00e9 \U0001f600 " * 10, "the end " * 30]
EOT = 258


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three documents by a small byte-pair vocabulary: 5 shards of train, 2 of val."""
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


@pytest.fixture
def complaint(capsys: pytest.CaptureFixture[str]) -> Callable[[Path], str]:
    """Verifies a directory that must not be sound -> what was said on stderr."""

    def complain(directory: Path) -> str:
        with pytest.raises(SystemExit) as ending:
            main([str(directory)])
        assert ending.value.code == 1
        printed = capsys.readouterr()
        assert "sound" not in printed.out
        return printed.err

    return complain


def names_file(complaint: str, path: Path) -> bool:
    return any(str(path) in line for line in complaint.splitlines())


def restate(directory: Path) -> None:
    """Make the manifest's hashes those of the files as they are now, as a forger would."""
    path = directory / "manifest.json"
    raw = json.loads(path.read_text())
    lines = []
    for name, split in sorted(raw["splits"].items()):
        stream = hashlib.sha256()
        for shard in split["shards"]:
            content = (directory / shard["file"]).read_bytes()
            stream.update(content[1024:])
            shard["sha256"] = hashlib.sha256(content).hexdigest()
            shard["idx_sha256"] = hashlib.sha256(
                (directory / shard["file"]).with_suffix(".idx").read_bytes()
            ).hexdigest()
        split["stream_sha256"] = stream.hexdigest()
        lines.append(f"{name}:{stream.hexdigest()}\n")
    raw["fingerprint"] = hashlib.sha256("".join(lines).encode()).hexdigest()
    path.write_text(json.dumps(raw))


def overwrite(path: Path, offset: int, content: bytes) -> None:
    """Replace bytes in the middle of a file."""
    before = path.read_bytes()
    after = before[:offset] + content + before[offset + len(content) :]
    assert after != before
    assert len(after) == len(before)
    path.write_bytes(after)


def verify(directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, str(directory), *options], capture_output=True, text=True)


def test_sound_data_is_called_so_and_shown(sound: Path) -> None:
    done = verify(sound, "--samples", "2")
    assert (done.returncode, done.stderr) == (0, "")
    last = done.stdout.splitlines()[-1]
    fingerprint = json.loads((sound / "manifest.json").read_text())["fingerprint"]
    assert last.startswith("sound: train ")
    assert last.endswith(f"fingerprint {fingerprint[:16]}")
    assert repr(TEXTS[0][:40])[:-1] in done.stdout


@pytest.mark.parametrize("tokenizer", ["char", "byte"])
def test_sound_data_without_eot(tmp_path: Path, capsys: pytest.CaptureFixture[str], tokenizer: str) -> None:
    (tmp_path / "text.txt").write_text("".join(TEXTS), encoding="utf-8")
    prepare(Options((str(tmp_path / "text.txt"),), tmp_path / "data", tokenizer, shard_tokens=100))
    main([str(tmp_path / "data")])
    assert capsys.readouterr().out.splitlines()[-1].startswith("sound: ")


@pytest.mark.parametrize("name", ["train_000000", "train_000002", "train_000004", "val_000000"])
def test_one_flipped_bit_anywhere_is_found(data: Path, complaint: Callable[[Path], str], name: str) -> None:
    rng = random.Random(name)
    for ending in (".bin", ".idx"):
        path = data / f"{name}{ending}"
        content = path.read_bytes()
        places = set(rng.choices(range(len(content)), k=25)) if content else set()
        if ending == ".bin":
            places |= set(range(24)) | {1023, 1024, len(content) - 1}
        for place in places:
            overwrite(path, place, bytes([content[place] ^ 1 << rng.randrange(8)]))
            assert names_file(complaint(data), data / name)
            path.write_bytes(content)
    main([str(data)])


def test_a_flipped_byte_in_the_real_command(data: Path) -> None:
    path = data / "train_000003.bin"
    overwrite(path, 1100, bytes([path.read_bytes()[1100] ^ 255]))
    done = verify(data)
    assert done.returncode == 1
    assert f"{path}: sha256 differs" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("ending", [".bin", ".idx"])
@pytest.mark.parametrize("name", ["train_000000", "val_000000"])
def test_a_file_of_another_length_is_named(
    data: Path, complaint: Callable[[Path], str], name: str, ending: str
) -> None:
    path = data / f"{name}{ending}"
    content = path.read_bytes()
    assert len(content) >= 8
    for changed in (content[:-1], content[:-2], content[:-8], content[:1024][: len(content) - 1], b"", content + b"\0"):
        path.write_bytes(changed)
        assert names_file(complaint(data), data / name)
    path.unlink()
    assert names_file(complaint(data), path)


def test_every_damaged_file_has_its_line(data: Path, complaint: Callable[[Path], str]) -> None:
    (data / "train_000001.bin").unlink()
    overwrite(data / "train_000003.bin", 1030, b"\xff\xff")
    (data / "val_000000.idx").write_bytes(b"")
    said = complaint(data)
    for name in ("train_000001.bin", "train_000003.bin", "val_000000.idx"):
        assert names_file(said, data / name)
    assert not names_file(said, data / "train_000002")


def test_two_swapped_shards_are_found(data: Path, complaint: Callable[[Path], str]) -> None:
    first, second = (data / f"train_00000{number}.bin" for number in (1, 2))
    contents = first.read_bytes(), second.read_bytes()
    assert contents[0] != contents[1]
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    said = complaint(data)
    assert names_file(said, first)
    assert names_file(said, second)


@pytest.mark.parametrize("other", [ByteTokenizer(), CharTokenizer("abc")])
def test_a_swapped_tokenizer_is_found(
    data: Path, complaint: Callable[[Path], str], other: ByteTokenizer | CharTokenizer
) -> None:
    shutil.rmtree(data / "tokenizer")
    other.save(data)
    assert f"{data}: its tokenizer is not the one in the manifest" in complaint(data)


def test_a_tokenizer_with_two_pieces_exchanged_is_found(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = data / "tokenizer" / "ranks.tiktoken"
    lines = path.read_bytes().splitlines(keepends=True)
    swapped = [lines[0].split()[0] + b" 1\n", lines[1].split()[0] + b" 0\n"]
    path.write_bytes(b"".join([*swapped, *lines[2:]]))
    with pytest.raises(SystemExit) as ending:
        main([str(data)])
    assert ending.value.code in (1, 2)
    assert str(path.parent) in capsys.readouterr().err


def test_an_id_outside_the_vocabulary_is_found_behind_true_hashes(data: Path, complaint: Callable[[Path], str]) -> None:
    overwrite(data / "train_000001.bin", 1024 + 2 * 17, np.array([EOT + 1], dtype="<u2").tobytes())
    restate(data)
    assert f"{data / 'train_000001.bin'}: holds id {EOT + 1}, vocabulary is {EOT + 1}" in complaint(data)


def test_an_eot_that_the_index_does_not_name_is_found_behind_true_hashes(
    data: Path, complaint: Callable[[Path], str]
) -> None:
    overwrite(data / "train_000001.bin", 1024 + 2 * 17, np.array([EOT], dtype="<u2").tobytes())
    restate(data)
    assert f"{data / 'train_000001.bin'}: its index does not name exactly the positions of EOT" in complaint(data)


def test_an_index_of_another_place_is_found_behind_true_hashes(data: Path, complaint: Callable[[Path], str]) -> None:
    overwrite(data / "train_000000.idx", 0, np.array([1], dtype="<u8").tobytes())
    restate(data)
    assert f"{data / 'train_000000.bin'}: its index does not name exactly the positions of EOT" in complaint(data)


@pytest.mark.parametrize("slot", [3, 4, 5])
def test_a_header_of_other_numbers_is_found_behind_true_hashes(
    data: Path, complaint: Callable[[Path], str], slot: int
) -> None:
    overwrite(data / "train_000001.bin", 4 * slot, np.array([200], dtype="<i4").tobytes())
    restate(data)
    assert f"{data / 'train_000001.bin'}: (tokens, documents, bytes, vocabulary, EOT) " in complaint(data)


@pytest.mark.parametrize("total", ["tokens", "documents"])
def test_a_wrong_total_is_found(data: Path, complaint: Callable[[Path], str], total: str) -> None:
    path = data / "manifest.json"
    raw = json.loads(path.read_text())
    raw["splits"]["train"][total] += 1
    path.write_text(json.dumps(raw))
    assert f"{raw['splits']['train'][total] - 1} {total} in shards" in complaint(data)


def test_a_shard_left_out_of_the_manifest_is_found(data: Path, complaint: Callable[[Path], str]) -> None:
    path = data / "manifest.json"
    raw = json.loads(path.read_text())
    train = raw["splits"]["train"]
    dropped = train["shards"].pop(2)
    train["tokens"] -= dropped["tokens"]
    train["documents"] -= dropped["documents"]
    path.write_text(json.dumps(raw))
    assert "not the stream that the manifest names" in complaint(data)


def test_an_altered_shard_hash_in_the_manifest_is_found(data: Path, complaint: Callable[[Path], str]) -> None:
    path = data / "manifest.json"
    raw = json.loads(path.read_text())
    raw["splits"]["val"]["shards"][0]["sha256"] = "0" * 64
    path.write_text(json.dumps(raw))
    assert f"{data / 'val_000000.bin'}: sha256 differs" in complaint(data)


@pytest.mark.parametrize("lost", ["manifest.json", "tokenizer/codec.json"])
def test_a_lost_description_gives_one_line(data: Path, lost: str) -> None:
    (data / lost).unlink()
    done = verify(data)
    assert done.returncode in (1, 2)
    assert done.stderr.count("\n") == 1
    assert str(data) in done.stderr
    assert Path(lost).name in done.stderr


def test_no_such_directory_gives_one_line(tmp_path: Path) -> None:
    done = verify(tmp_path / "nowhere")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert str(tmp_path / "nowhere") in done.stderr


def test_whatever_was_prepared_can_be_verified(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a")
    try:
        prepare(Options((str(tmp_path / "text.txt"),), tmp_path / "data", "char"))
    except InputError:
        return  # too short for two splits: refusing is as good
    main([str(tmp_path / "data")])
