"""Any damage to any file of a data directory: it reads as before, or it is refused in one line."""

import hashlib
import json
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import InputError
from data_prep.manifest import open_split
from data_prep.textfiles import Options, prepare
from data_prep.tokenizer import BpeTokenizer, load_tokenizer
from data_prep.verify import main
from tests.helpers.runs import called

FILES = ["manifest.json", "train_000000.bin", "train_000000.idx", "tokenizer/codec.json", "tokenizer/ranks.tiktoken"]
TEXTS = ["abc ab a.\n" * 20, "caf\u00e9 " * 10, "the end " * 30]
VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2.0,
    1e400,
    2**70,
    "",
    "x",
    "../x.bin",
    "/x",
    "\0",
    "\ud800",
    "(",
    [],
    {},
    [1],
]
HUGE = "1" * 5000
KINDS = [
    *(
        "truncated",
        "flipped",
        "other value",
        "other value",
        "no key",
        "huge number",
        "deep",
        "binary",
        "empty",
        "absent",
    ),
    *("directory", "fifo", "link outside", "link to nowhere", "link to a device", "link to itself"),
]
Reading = tuple[list[int], list[int], dict[str, Any]]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Several shards of two splits by a small byte-pair vocabulary."""
    folder = tmp_path_factory.mktemp("sound")
    BpeTokenizer({bytes([byte]): byte for byte in range(256)} | {b"ab": 256, b"abc": 257}, name="small").save(folder)
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    sources = tuple(str(folder / f"{number}.txt") for number in range(3))
    prepare(Options(sources, folder / "data", str(folder / "tokenizer"), val_fraction=0.2, shard_tokens=150))
    return folder / "data"


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each container in a JSON value, with each of its keys."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from places(inner)


def edit_json(path: Path, kind: str, rng: random.Random) -> None:
    """Replace or remove a value at any key, and half of the time make the file's own check fit."""
    record = json.loads(path.read_bytes())
    container, key = rng.choice(list(places(record)))
    match kind:
        case "no key":
            del container[key]
        case "other value":
            container[key] = rng.choice(VALUES)
        case _:
            container[key] = "HERE"
    if path.name == "codec.json" and rng.random() < 0.5:
        record.pop("check", None)
        record["check"] = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    text = json.dumps(record)
    path.write_text(text.replace('"HERE"', HUGE if kind == "huge number" else "[" * 5000 + "]" * 5000))


def damage(path: Path, kind: str, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if kind in ("other value", "no key", "huge number", "deep"):
        if path.suffix == ".json":
            return edit_json(path, kind, rng)
        kind = rng.choice(["truncated", "flipped"])
    path.unlink()
    match kind:
        case "truncated":
            path.write_bytes(content[: rng.randrange(len(content))])
        case "flipped":
            content[rng.choice([rng.randrange(len(content)), rng.randrange(min(32, len(content)))])] ^= (
                1 << rng.randrange(8)
            )
            path.write_bytes(content)
        case "binary":
            path.write_bytes(rng.randbytes(len(content)))
        case "empty":
            path.write_bytes(b"")
        case "directory":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "link outside":
            outside = path.parents[len(path.parents) - 1 - path.parts.index("data")] / f"outside_{path.name}"
            outside.write_bytes(content)
            path.symlink_to(outside)
        case "link to nowhere":
            path.symlink_to("nowhere")
        case "link to a device":
            path.symlink_to("/dev/zero")
        case "link to itself":
            path.symlink_to(path.name)
    return None


def read(directory: Path) -> Reading:
    """Return a split's tokens, the offsets of documents in its shards, and the tokenizer's description."""
    stream = open_split(directory, "train")
    starts = [int(start) for shard, *_ in stream.ranges(0, len(stream)) for start in shard.document_starts()]
    return stream.read(0, len(stream)).tolist(), starts, load_tokenizer(directory).describe()


def check(sound: Path, name: str, kind: str, rng: random.Random) -> None:
    expected = read(sound)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(shutil.copytree(sound, Path(folder) / "data"))
        damage(directory / name, kind, rng)
        actual = None
        try:
            actual = read(directory)
        except InputError as error:
            assert str(directory) in str(error) and str(error).isprintable()
        done = called(main, str(directory))
        assert "\n\n" not in done.stderr and all(folder in line for line in done.stderr.splitlines())
        if done.returncode == 0:
            assert actual == expected
        else:
            assert done.returncode in (1, 2) and done.stderr
        if actual is not None and actual != expected:  # Only `verify` hashes.
            assert not name.endswith(".json") and "differs from the manifest's" in done.stderr


CASES = given(name=st.sampled_from(FILES), kind=st.sampled_from(KINDS), rng=st.randoms(use_true_random=False))


@settings(max_examples=100, derandomize=True, deadline=None)
@CASES
def test_damage_is_harmless_or_refused(sound: Path, name: str, kind: str, rng: random.Random) -> None:
    check(sound, name, kind, rng)


@pytest.mark.long(reason="1,000 cases, 100 of which are in `make test`")
@settings(max_examples=1000, derandomize=True, deadline=None)
@CASES
def test_more_damage_is_harmless_or_refused(sound: Path, name: str, kind: str, rng: random.Random) -> None:
    check(sound, name, kind, rng)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", sorted({*KINDS}))
def test_every_kind_of_damage_to_every_file(sound: Path, name: str, kind: str) -> None:
    check(sound, name, kind, random.Random(f"{name} {kind}"))


@pytest.mark.parametrize("bad", ["../../x.bin", "/etc/passwd", "sub/x.bin", "a\0b", "a\nb", "", ".", "..", "\ud800", 5])
def test_a_shard_of_another_folder_is_refused_by_its_name(sound: Path, tmp_path: Path, bad: object) -> None:
    directory = Path(shutil.copytree(sound, tmp_path / "in" / "data"))
    (tmp_path / "x.bin").write_bytes((directory / "train_000000.bin").read_bytes())
    raw = json.loads((directory / "manifest.json").read_text())
    raw["splits"]["train"]["shards"][0]["file"] = bad
    (directory / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match=r"not a name inside this folder|damaged") as refusal:
        open_split(directory, "train")
    assert str(refusal.value).isprintable()


def test_a_folder_behind_a_link_is_read_and_a_shard_behind_one_that_leaves_it_is_not(
    sound: Path, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(sound, tmp_path / "data"))
    (tmp_path / "link").symlink_to(directory)
    assert read(tmp_path / "link") == read(sound)
    (directory / "tokenizer").rename(tmp_path / "tokenizer")
    (directory / "tokenizer").symlink_to(tmp_path / "tokenizer")
    with pytest.raises(InputError, match=r"codec\.json: a link out of"):
        load_tokenizer(directory)
