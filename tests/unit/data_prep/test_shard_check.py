"""Shards held to their manifest: once per state of each file, in threads, and never beyond what is stated."""

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import InputError
from data_prep import shard_check
from data_prep.manifest import Manifest, SplitInfo, read_manifest
from data_prep.shard_check import ShardCheck, stated_files
from tests.helpers.runs import make_tiny_data


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data directory whose files have not changed for an hour."""
    made = make_tiny_data(tmp_path)
    for path in made.iterdir():
        if path.is_file():
            os.utime(path, (time.time() - 3600,) * 2)
    return made


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let files count as settled at once: nobody can set a file's time of change back."""
    monkeypatch.setattr(shard_check, "SETTLED_SECONDS", -1.0)


def check(data: Path, record: Path | None = None) -> tuple[int, list[str]]:
    """Return how many bytes were read, and the faults."""
    manifest = read_manifest(data)
    with ShardCheck(stated_files(data, manifest.splits.values()), manifest.vocab_size, record=record) as checking:
        while not checking.wait(1):
            pass
    return checking.done_bytes, list(checking.faults.values())


def overwrite(path: Path, token: int, ids: list[int]) -> None:
    with path.open("r+b") as file:
        file.seek(1024 + 2 * token)
        file.write(np.array(ids, dtype="<u2").tobytes())


def sizes(data: Path) -> int:
    return sum(path.stat().st_size for path in data.iterdir() if path.suffix in (".bin", ".idx"))


def test_every_file_is_read_once_and_again_when_anything_about_it_changes(data: Path, tmp_path: Path) -> None:
    record = tmp_path / "verified" / "host.json"
    assert check(data, record) == (sizes(data), [])
    assert check(data, record) == (0, [])
    shard = data / "train_000000.bin"

    os.utime(shard)
    assert check(data, record) == (shard.stat().st_size, [])
    content, times = shard.read_bytes(), shard.stat()
    shard.write_bytes(content)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert check(data, record) == (shard.stat().st_size, []), "its time of change tells, whatever its other times"
    shutil.copy2(shard, tmp_path / "copy")
    (tmp_path / "copy").replace(shard)
    assert check(data, record) == (shard.stat().st_size, [])
    assert check(data, record) == (0, [])

    raw = json.loads((data / "manifest.json").read_text())
    raw["splits"]["train"]["shards"][1]["sha256"] = "0" * 64
    (data / "manifest.json").write_text(json.dumps(raw))
    num_bytes, (fault,) = check(data, record)
    other = data / raw["splits"]["train"]["shards"][1]["file"]
    assert num_bytes == other.stat().st_size and fault == f"{other}: sha256 differs from the manifest's"


def test_a_change_that_keeps_size_and_time_is_found(data: Path, tmp_path: Path) -> None:
    record, shard = tmp_path / "verified" / "host.json", data / "train_000000.bin"
    check(data, record)
    times = shard.stat()
    overwrite(shard, 0, [1, 2, 1, 2])
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    for _ in range(2):  # what has not passed is not recorded
        assert check(data, record) == (shard.stat().st_size, [f"{shard}: sha256 differs from the manifest's"])


def test_a_file_that_has_just_changed_is_not_taken_as_settled(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_check, "SETTLED_SECONDS", 3600.0)
    record = tmp_path / "verified" / "host.json"
    for _ in range(2):
        assert check(data, record) == (sizes(data), [])
    assert not record.exists()


@pytest.mark.parametrize(
    "damage", ["", "{}", "[]", '{"vocab_size": 1, "files": 5}', "\xff\x00", "folder", "FIFO", "link"]
)
def test_a_damaged_record_is_made_again(data: Path, tmp_path: Path, damage: str) -> None:
    record = tmp_path / "verified" / "host.json"
    record.parent.mkdir()
    if damage == "folder":
        record.mkdir()
    elif damage == "FIFO":
        os.mkfifo(record)
    elif damage == "link":
        record.symlink_to(tmp_path / "nowhere")
    else:
        record.write_bytes(damage.encode("latin-1"))
    assert check(data, record) == (sizes(data), [])
    assert check(data, record) == (0, [])


def test_entries_of_another_form_count_for_nothing(data: Path, tmp_path: Path) -> None:
    record = tmp_path / "verified" / "host.json"
    check(data, record)
    content = json.loads(record.read_text())
    values: list[Any] = [None, 5, [], {}, "", {"sha256": "x"}]
    for value in values:
        record.write_text(json.dumps(content | {"files": dict.fromkeys(content["files"], value)}))
        assert check(data, record) == (sizes(data), [])


def test_the_first_token_outside_the_vocabulary_is_named(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_check, "BLOCK_BYTES", 4096)
    manifest, shard = read_manifest(data), data / "train_000001.bin"
    for token, ids in ((4321, [manifest.vocab_size, 65535]), (6999, [65535]), (0, [60000])):
        content = shard.read_bytes()
        overwrite(shard, token, ids)
        fault = f"token {token} is id {ids[0]}, outside the vocabulary of {manifest.vocab_size}"
        assert check(data)[1] == [f"{shard}: sha256 differs from the manifest's; {fault}"]
        shard.write_bytes(content)


@pytest.mark.parametrize("format", ["headerless", "npy"])
def test_tokens_of_other_formats_are_counted_from_their_first(tmp_path: Path, format: str) -> None:
    tokens = np.arange(500, dtype="<u2") % 256
    tokens[77] = 300
    path = tmp_path / "train.bin"
    if format == "npy":
        np.save(tmp_path / "train.npy", tokens)
        (tmp_path / "train.npy").rename(path)
    else:
        tokens.tofile(path)
    stated = shard_check.StatedFile(path, "0" * 64, path.stat().st_size, 1000)
    with ShardCheck([stated], 256) as checking:
        assert checking.wait(10)
    assert checking.faults[path].endswith("token 77 is id 300, outside the vocabulary of 256")


def test_names_and_links_that_leave_the_directory_are_refused(data: Path, tmp_path: Path) -> None:
    shard = data / "train_000000.bin"
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    assert "a link out of" in check(data)[1][0]
    shard.unlink()
    os.mkfifo(shard)
    assert "a FIFO, not a regular file" in check(data)[1][0]
    manifest = read_manifest(data)
    raw = json.loads((data / "manifest.json").read_text())
    raw["splits"]["val"]["shards"][0]["file"] = "../elsewhere"
    (data / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match=r"'\.\./elsewhere'"):
        read_manifest(data)
    with pytest.raises(InputError, match="not a name inside this folder"):
        stated_files(data, [SplitInfo.of([replace(manifest.splits["val"].shards[0], file="../elsewhere")], "")])
    assert isinstance(manifest, Manifest)


def test_an_interrupted_check_ends_within_a_block_and_goes_on_where_it_was(tmp_path: Path) -> None:
    """Twenty sparse files of a gigabyte are half a minute's work; the first two are small, and recorded."""
    files, zeros = [], "0" * 64
    for number in range(20):
        path = tmp_path / f"{number}.bin"
        path.touch()
        os.truncate(path, 2**30)
        files.append(shard_check.StatedFile(path, zeros, 2**30))
    small = tmp_path / "small.bin"
    small.write_bytes(b"ab")
    files.insert(0, shard_check.StatedFile(small, shard_check.hashlib.sha256(b"ab").hexdigest(), 2))
    record = tmp_path / "verified" / "host.json"
    began = time.monotonic()
    with ShardCheck(files, 256, record=record) as checking:
        assert not checking.wait(0.2)
    assert time.monotonic() - began < 2
    assert list(json.loads(record.read_text())["files"]) == [str(small)]
    with ShardCheck(files[:1], 256, record=record) as checking:
        assert checking.wait(5) and checking.total_bytes == 0
