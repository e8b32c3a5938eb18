"""The manifest against the files it describes, and every way to damage it."""

import dataclasses
import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import InputError
from data_prep.manifest import Manifest, open_split, read_manifest
from data_prep.textfiles import Options, prepare

TEXT = "".join(random.Random(0).choices("etaoin shrdlu\n", k=1000))


def make_data(folder: Path, text: str = TEXT, *, shard_tokens: int = 300, val_fraction: float = 0.1) -> Manifest:
    """`text` by characters, under folder/data."""
    folder.mkdir(exist_ok=True)
    source = folder / "text.txt"
    source.write_text(text, encoding="utf-8", newline="")
    options = Options((str(source),), folder / "data", "char", val_fraction, shard_tokens)
    return prepare(options)


def refusal(directory: Path) -> str:
    """The one line with which `read_manifest` refuses."""
    with pytest.raises(InputError) as caught:
        read_manifest(directory)
    assert "\n" not in str(caught.value)
    assert str(directory) in str(caught.value)
    return str(caught.value)


def edit(directory: Path, *keys: str | int, value: Any) -> None:
    """Replace one value of manifest.json, named by its path of keys."""
    path = directory / "manifest.json"
    raw = json.loads(path.read_text())
    inner = raw
    for key in keys[:-1]:
        inner = inner[key]
    assert inner[keys[-1]] != value
    inner[keys[-1]] = value
    path.write_text(json.dumps(raw))


def test_it_reads_back_as_written(tmp_path: Path) -> None:
    written = make_data(tmp_path)
    read = read_manifest(tmp_path / "data")
    assert read == written
    assert read.fingerprint == written.fingerprint
    again = tmp_path / "again"
    again.mkdir()
    changed = dataclasses.replace(written, source={"files": [], "note": "\u00e9 \U0001f600 \u2028"})
    changed.write(again)
    assert read_manifest(again) == changed


def test_it_describes_the_files(tmp_path: Path) -> None:
    make_data(tmp_path)
    data = tmp_path / "data"
    raw = json.loads((data / "manifest.json").read_text(encoding="ascii"))
    content = TEXT.encode()
    assert raw["source"] == {
        "files": [{"name": "text.txt", "bytes": 1000, "sha256": hashlib.sha256(content).hexdigest()}],
        "empty_documents": 0,
    }
    assert raw["options"] == {
        "val_fraction": 0.1,
        "shard_tokens": 300,
        "split_documents_on": None,
        "text_column": "text",
    }
    assert (raw["format_version"], raw["tokenizer"]["kind"], raw["tokenizer"]["vocab_size"]) == (2, "char", 14)
    alphabet = sorted(set(TEXT))
    lines = ""
    for split, tokens, shards in (("train", TEXT[:900], 3), ("val", TEXT[900:], 1)):
        ids = np.array([alphabet.index(character) for character in tokens], dtype="<u2")
        described = raw["splits"][split]
        assert (described["tokens"], described["documents"]) == (len(tokens), 1)
        assert described["stream_sha256"] == hashlib.sha256(ids.tobytes()).hexdigest()
        assert [shard["file"] for shard in described["shards"]] == [f"{split}_{i:06d}.bin" for i in range(shards)]
        for shard in described["shards"]:
            content = (data / shard["file"]).read_bytes()
            assert shard["format"] == "ladder"
            assert shard["bytes"] == len(content)
            assert shard["sha256"] == hashlib.sha256(content).hexdigest()
            assert (
                shard["idx_sha256"]
                == hashlib.sha256((data / shard["file"]).with_suffix(".idx").read_bytes()).hexdigest()
            )
        np.testing.assert_array_equal(open_split(data, split).read(0, len(tokens)), ids)
        lines += f"{split}:{described['stream_sha256']}\n"
    assert raw["fingerprint"] == hashlib.sha256(lines.encode()).hexdigest()


def test_the_fingerprint_names_the_tokens_and_not_their_shards(tmp_path: Path) -> None:
    same = {make_data(tmp_path / str(size), shard_tokens=size).fingerprint for size in (7, 300, 10_000)}
    assert len(same) == 1
    others = {
        make_data(tmp_path / "text", TEXT[:-1] + ("e" if TEXT[-1] != "e" else "t")).fingerprint,
        make_data(tmp_path / "fraction", val_fraction=0.2).fingerprint,
    }
    assert len(same | others) == 3


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    assert "no such data directory" in refusal(tmp_path / "nowhere")


def test_a_directory_without_manifest_is_unfinished(tmp_path: Path) -> None:
    make_data(tmp_path)
    (tmp_path / "data" / "manifest.json").unlink()
    assert "did not finish" in refusal(tmp_path / "data")
    with pytest.raises(InputError, match="did not finish"):
        open_split(tmp_path / "data", "train")


def test_a_truncated_manifest_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    make_data(tmp_path)
    path = tmp_path / "data" / "manifest.json"
    content = path.read_bytes()
    assert content.endswith(b"}\n")
    for length in [0, 1, len(content) - 2, *random.Random(1).sample(range(2, len(content) - 2), 60)]:
        path.write_bytes(content[:length])
        assert "damaged" in refusal(tmp_path / "data")
    path.write_bytes(content[:-1])
    read_manifest(tmp_path / "data")  # only the last newline is gone


@pytest.mark.parametrize(
    "content", [b"[]", b"null", b"{}", b'"text"', b"3", b"\xff\xfe", b"{'a': 1}", b'{"format_version": 2}', b"\0" * 9]
)
def test_what_is_not_a_manifest_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    assert "damaged" in refusal(tmp_path)


@pytest.mark.parametrize("key", ["source", "options", "tokenizer", "splits", "format_version", "fingerprint"])
def test_a_missing_part_is_named(tmp_path: Path, key: str) -> None:
    make_data(tmp_path)
    path = tmp_path / "data" / "manifest.json"
    raw = json.loads(path.read_text())
    del raw[key]
    path.write_text(json.dumps(raw))
    assert repr(key) in refusal(tmp_path / "data")


@pytest.mark.parametrize(
    ("keys", "value", "complaint"),
    [
        (("splits",), None, "damaged"),
        (("splits", "train", "shards", 0, "format"), "pickle", "damaged"),
        (("splits",), [], "damaged"),
        (("splits", "train"), 3, "damaged"),
        (("splits", "train", "shards"), None, "damaged"),
        (("splits", "train", "shards", 0), {"file": "train_000000.bin"}, "damaged"),
        (("splits", "train", "shards", 0), {"unknown": 1}, "damaged"),
        (("splits", "train", "stream_sha256"), "0" * 64, "fingerprint does not fit"),
        (("splits", "val", "stream_sha256"), "0" * 64, "fingerprint does not fit"),
        (("fingerprint",), "0" * 64, "fingerprint does not fit"),
        (("fingerprint",), None, "fingerprint does not fit"),
        (("splits",), {}, "fingerprint does not fit"),
        (("format_version",), 3, "format version 3"),
    ],
)
def test_an_edited_manifest_is_refused(tmp_path: Path, keys: tuple[str | int, ...], value: Any, complaint: str) -> None:
    make_data(tmp_path)
    edit(tmp_path / "data", *keys, value=value)
    assert complaint in refusal(tmp_path / "data")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    make_data(tmp_path)
    path = tmp_path / "data" / "train_000001.bin"
    path.unlink()
    with pytest.raises(InputError, match=r"train_000001\.bin: missing"):
        open_split(tmp_path / "data", "train")
    assert len(open_split(tmp_path / "data", "val")) == 100


@pytest.mark.parametrize("lost", [1, 2, 600, 1624])
def test_a_truncated_shard_is_named(tmp_path: Path, lost: int) -> None:
    make_data(tmp_path)
    path = tmp_path / "data" / "train_000001.bin"
    content = path.read_bytes()
    assert len(content) == 1024 + 2 * 300
    path.write_bytes(content[:-lost])
    with pytest.raises(InputError, match=r"train_000001\.bin: "):
        open_split(tmp_path / "data", "train")


def test_a_sound_shard_of_another_length_is_named(tmp_path: Path) -> None:
    make_data(tmp_path)
    shutil.copy(tmp_path / "data" / "val_000000.bin", tmp_path / "data" / "train_000001.bin")
    with pytest.raises(InputError, match=r"train_000001\.bin: 100 tokens, .* says 300"):
        open_split(tmp_path / "data", "train")


def test_an_unknown_split_is_refused_with_those_there_are(tmp_path: Path) -> None:
    make_data(tmp_path)
    with pytest.raises(InputError, match="no split 'test', only train, val"):
        open_split(tmp_path / "data", "test")
