"""Input files for data directories, and data directories as bytes, read without the package's own readers."""

import json
from pathlib import Path

import numpy as np

from data_prep.tokenizer import load_tokenizer

EOT_ID = 50_256


def write_text(path: Path, text: str) -> str:
    path.write_bytes(text.encode())
    return str(path)


def write_rows(path: Path, texts: list[str]) -> str:
    return write_text(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))


def write_stories(folder: Path, num_files: int = 12, num_stories: int = 40) -> Path:
    """Write .jsonl files of different sizes. One story of each is empty."""
    folder.mkdir()
    for number in range(num_files):
        stories = [f"Story {number}.{n} \u00e9\n" + "and then " * (n % 13) for n in range(num_stories + 9 * number)]
        write_rows(folder / f"{number:02d}.jsonl", [*stories[:3], "", *stories[4:]])
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Return bytes and modification time of every file under `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def contents(folder: Path) -> dict[str, bytes]:
    return {name: content for name, (content, _) in state(folder).items()}


def tokens(data: Path, split: str) -> list[int]:
    """Return a split's ids, read with numpy alone."""
    shards = [np.fromfile(path, dtype="<u2", offset=1024) for path in sorted(data.glob(f"{split}_*.bin"))]
    return [int(index) for shard in shards for index in shard]


def document_starts(data: Path, split: str, shard_tokens: int) -> list[int]:
    """Return the offsets of a split's documents, from its .idx files."""
    paths = sorted(data.glob(f"{split}_*.idx"))
    return [n * shard_tokens + int(start) for n, path in enumerate(paths) for start in np.fromfile(path, dtype="<u8")]


def decoded(data: Path) -> bytes:
    """Return the text of train and val, by the tokenizer that is saved with them."""
    return load_tokenizer(data).decode_bytes(tokens(data, "train") + tokens(data, "val"))
