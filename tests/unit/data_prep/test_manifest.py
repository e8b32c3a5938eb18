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
    """Prepare `text` by characters under folder/data."""
    folder.mkdir(exist_ok=True)
    source = folder / "text.txt"
    source.write_text(text, encoding="utf-8", newline="")
    return prepare(Options((str(source),), folder / "data", "char", val_fraction, shard_tokens))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make_data(folder)
    return folder / "data"


@pytest.fixture
def data(made: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(made, tmp_path / "data"))


def refusal(directory: Path) -> str:
    """Return the one line with which `read_manifest` refuses."""
    with pytest.raises(InputError) as caught:
        read_manifest(directory)
    assert "\n" not in str(caught.value) and str(directory) in str(caught.value)
    return str(caught.value)


def edited(content: dict[str, Any], keys: tuple[str | int, ...], value: Any) -> str:
    """Return the manifest with one value replaced, or without it if the value is `...`."""
    inner: Any = content
    for key in keys[:-1]:
        inner = inner[key]
    assert repr(inner[keys[-1]]) != repr(value)
    if value is ...:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = value
    return json.dumps(content)


def test_it_reads_back_as_written(made: Path, tmp_path: Path) -> None:
    manifest = read_manifest(made)
    changed = dataclasses.replace(manifest, source={"files": [], "note": "\u00e9 \U0001f600 \u2028"})
    changed.write(tmp_path)
    assert read_manifest(tmp_path) == changed
    assert read_manifest(tmp_path).fingerprint == manifest.fingerprint


def test_it_describes_the_files(made: Path) -> None:
    raw = json.loads((made / "manifest.json").read_text(encoding="ascii"))
    sha256 = hashlib.sha256(TEXT.encode()).hexdigest()
    assert raw["source"] == {"files": [{"name": "text.txt", "bytes": 1000, "sha256": sha256}], "empty_documents": 0}
    others = {"split_documents_on": None, "text_column": "text"}
    assert raw["options"] == {"val_fraction": 0.1, "shard_tokens": 300, **others}
    assert (raw["format_version"], raw["tokenizer"]["kind"], raw["tokenizer"]["vocab_size"]) == (2, "char", 14)
    alphabet = sorted(set(TEXT))
    lines = ""
    for split, text, num_shards in (("train", TEXT[:900], 3), ("val", TEXT[900:], 1)):
        ids = np.array([alphabet.index(character) for character in text], dtype="<u2")
        described = raw["splits"][split]
        assert (described["tokens"], described["documents"]) == (len(text), 1)
        assert described["stream_sha256"] == hashlib.sha256(ids.tobytes()).hexdigest()
        assert [shard["file"] for shard in described["shards"]] == [f"{split}_{i:06d}.bin" for i in range(num_shards)]
        for shard in described["shards"]:
            content, index = ((made / shard["file"]).with_suffix(suffix).read_bytes() for suffix in (".bin", ".idx"))
            assert (shard["format"], shard["bytes"]) == ("ladder", len(content))
            assert shard["sha256"] == hashlib.sha256(content).hexdigest()
            assert shard["idx_sha256"] == hashlib.sha256(index).hexdigest()
        np.testing.assert_array_equal(open_split(made, split).read(0, len(text)), ids)
        lines += f"{split}:{described['stream_sha256']}\n"
    assert raw["fingerprint"] == hashlib.sha256(lines.encode()).hexdigest()


def test_the_fingerprint_names_the_tokens_and_not_their_shards(made: Path, tmp_path: Path) -> None:
    fingerprints = [
        read_manifest(made).fingerprint,
        make_data(tmp_path / "shards", shard_tokens=97).fingerprint,
        make_data(tmp_path / "text", TEXT[:-1] + ("e" if TEXT[-1] != "e" else "t")).fingerprint,
        make_data(tmp_path / "fraction", val_fraction=0.2).fingerprint,
    ]
    assert fingerprints[0] == fingerprints[1] and len(set(fingerprints)) == 3


def test_a_missing_directory_or_manifest_is_named(data: Path, tmp_path: Path) -> None:
    assert "no such data directory" in refusal(tmp_path / "nowhere")
    (data / "manifest.json").unlink()
    assert "did not finish" in refusal(data)
    with pytest.raises(InputError, match="did not finish"):
        open_split(data, "train")


def test_a_truncated_or_foreign_manifest_is_refused(data: Path) -> None:
    path = data / "manifest.json"
    content = path.read_bytes()
    lengths = [0, 1, len(content) - 2, *random.Random(1).sample(range(2, len(content) - 2), 30)]
    others = [b"[]", b"null", b"{}", b"3", b"\xff\xfe", b"{'a': 1}", b'{"format_version": 2}', b"\0" * 9]
    for damaged in [*(content[:length] for length in lengths), *others]:
        path.write_bytes(damaged)
        assert "damaged" in refusal(data)


@pytest.mark.parametrize(
    ("keys", "value", "complaint"),
    [
        *(((key,), ..., f"'{key}'") for key in ("source", "options", "tokenizer", "splits", "fingerprint")),
        (("format_version",), ..., "'format_version'"),
        (("splits",), None, "damaged"),
        (("splits",), [], "damaged"),
        (("splits", "train"), 3, "damaged"),
        (("splits", "train", "shards"), None, "damaged"),
        (("splits", "train", "shards", 0), {"file": "train_000000.bin"}, "damaged"),
        (("splits", "train", "shards", 0), {"unknown": 1}, "damaged"),
        (("splits", "train", "shards", 0, "format"), "pickle", "damaged"),
        (("splits", "val", "stream_sha256"), "0" * 64, "fingerprint does not fit"),
        (("fingerprint",), "0" * 64, "fingerprint does not fit"),
        (("splits",), {}, "it has no splits"),
        (("splits", "val", "shards"), [], "0 tokens in the shards of 'val', 100 in all"),
        (("splits", "train", "tokens"), 901, "900 tokens in the shards of 'train', 901 in all"),
        (("splits", "train", "documents"), 2, "1 documents in the shards of 'train', 2 in all"),
        (("splits", "train", "tokens"), 900.0, "damaged"),
        (("splits", "train", "shards", 0, "tokens"), -300, "damaged"),
        (("splits", "train", "shards", 0, "documents"), True, "damaged"),
        (("splits", "train", "shards", 1, "file"), "train_000000.bin", "'train_000000.bin' is listed 2 times"),
        (("splits", "train", "shards", 1, "file"), "train_000007.bin", "shard 1 of 'train' is 'train_000007.bin'"),
        (("splits", "train", "shards", 0, "file"), ["train_000000.bin"], "damaged"),
        (("tokenizer", "vocab_size"), "14", "damaged"),
        (("tokenizer", "vocab_size"), 65_537, "damaged"),
        (("tokenizer", "eot_id"), 14, "EOT 14 is outside its vocabulary"),
        (("tokenizer", "eot_id"), -1, "damaged"),
        (("format_version",), 3, "format version 3"),
    ],
)
def test_an_edited_manifest_is_refused(
    made: Path, tmp_path: Path, keys: tuple[str | int, ...], value: Any, complaint: str
) -> None:
    content = json.loads((made / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(edited(content, keys, value))
    assert complaint in refusal(tmp_path)


def test_a_shard_that_is_missing_or_of_another_length_is_named(data: Path) -> None:
    path = data / "train_000001.bin"
    content = path.read_bytes()
    assert len(content) == 1024 + 2 * 300
    for changed, complaint in (
        (content[:-1], "truncated or altered"),
        (content[:-600], "truncated or altered"),
        (content[:1000], "too short"),
        ((data / "val_000000.bin").read_bytes(), "100 tokens, .* says 300"),
        (None, "missing"),
    ):
        path.unlink()
        if changed is not None:
            path.write_bytes(changed)
        with pytest.raises(InputError, match=rf"train_000001\.bin: .*{complaint}"):
            open_split(data, "train")
    assert len(open_split(data, "val")) == 100
