"""Random damage to one file of a run or data directory."""

import hashlib
import json
import os
import random
import shutil
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# What stands in place of a JSON value: one of every type, and the odd ones of each.
VALUES: list[Any] = [None, True, -1, 0, 5, 2**70, 1.5, "", "x", "5", [], [None], {}, {"x": 1}]
RAW_VALUES = ["NaN", "1e999", "9" * 5000, "[" * 100_000]  # accepted by Python's parser, or too much for it
KINDS = (
    *("truncated", "flipped", "json", "raw json", "binary", "empty", "other text", "appended"),
    *("directory", "full directory", "link to nothing", "link outside", "link to a device", "FIFO", "socket"),
    *("absent", "unreadable"),
)


def damage(path: Path, rng: random.Random, outside: Path, kinds: Sequence[str] = KINDS) -> str:
    """Damage a file, and return how. `outside` is a folder for the file that a link leads to."""
    kind = rng.choice(kinds)
    content = path.read_bytes()
    if kind in ("json", "raw json") and not _is_json(content):
        kind = "flipped"
    match kind:
        case "truncated":
            # Every class of length: nothing, one byte, around a block, all but one.
            length = max(0, rng.choice([1, len(content) - 1, rng.randrange(len(content) + 1)]))
            path.write_bytes(content[:length])
            return f"truncated to {length} of {len(content)} bytes"
        case "flipped" if content:
            where, mask = rng.randrange(len(content)), rng.randint(1, 255)
            path.write_bytes(content[:where] + bytes([content[where] ^ mask]) + content[where + 1 :])
            return f"byte {where} of {len(content)} xor {mask}"
        case "json" | "raw json":
            return _alter_json(path, json.loads(content), rng, raw=kind == "raw json")
        case "binary":
            path.write_bytes(rng.randbytes(rng.randint(1, 2000)))
        case "other text":
            path.write_text(rng.choice(["5\n", "{}\n", "[]\n", "null\n", '"x"\n', "\n", "{}\n5\n"]))
        case "appended":
            path.write_bytes(content + rng.choice([b"5\n", b"{}\n", b"\xff\n", b'{"step": 1', b"\0" * 100]))
        case _:
            _replace(path, kind, outside)
    return kind


def reseal(checkpoint: Path) -> None:
    """Write a checkpoint's hashes anew, so that only the form of its files can tell the damage."""
    files = sorted(path for path in checkpoint.iterdir() if path.name != "SHA256SUMS")
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (checkpoint / "SHA256SUMS").write_text("".join(sums))


def _is_json(content: bytes) -> bool:
    try:
        return isinstance(json.loads(content), dict)
    except ValueError:
        return False


def _places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of keys to every value in a JSON object."""
    if place:
        yield place
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from _places(value[key], (*place, key))


def _alter_json(path: Path, value: Any, rng: random.Random, *, raw: bool) -> str:
    """Exchange the value at a key for one of another type, or remove the key."""
    place = rng.choice(sorted(_places(value), key=str))
    holder = value
    for key in place[:-1]:
        holder = holder[key]
    if raw:
        text = rng.choice(RAW_VALUES)
        holder[place[-1]] = "HERE"
        path.write_text(json.dumps(value).replace('"HERE"', text))
        return f"{place} is {text[:10]}"
    if rng.random() < 0.5 and isinstance(holder, dict):
        del holder[place[-1]]
        change = f"{place} is absent"
    else:
        holder[place[-1]] = rng.choice(VALUES)
        change = f"{place} is {holder[place[-1]]!r}"
    path.write_text(json.dumps(value, indent=2) + "\n")
    return change


def _replace(path: Path, kind: str, outside: Path) -> None:
    """Put something else in a file's place."""
    if kind == "link outside":
        shutil.move(path, outside / path.name)
        path.symlink_to(outside / path.name)
        return
    if kind == "unreadable":
        path.chmod(0)
        return
    path.unlink()
    match kind:
        case "directory":
            path.mkdir()
        case "full directory":
            (path / "sub").mkdir(parents=True)
            (path / "sub" / "file").write_text("x")
        case "link to nothing":
            path.symlink_to("nothing")
        case "link to a device":
            path.symlink_to("/dev/zero")
        case "FIFO":
            os.mkfifo(path)
        case "socket":
            before = Path.cwd()
            os.chdir(path.parent)  # the path of a socket has at most 107 bytes
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(path.name)
            os.chdir(before)
        case "empty":
            path.touch()
