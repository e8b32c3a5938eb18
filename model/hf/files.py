"""Open the files of a Hugging Face folder: plain files inside it, or links inside the Hub's own cache."""

from pathlib import Path
from typing import Any

from common.errors import InputError, reading_from
from common.reading import parse_json, read_regular, require_regular

LARGEST_FILE_BYTES = 64_000_000  # of all but weights; a tokenizer of 65,536 ids takes 5 MB


def boundary_of(folder: Path) -> Path:
    """Return the folder that links in `folder` may not leave: `folder`, or its whole repository in the Hub's cache.

    The cache has models--X/snapshots/REVISION/FILE -> ../../blobs/HASH.
    """
    with reading_from(folder):
        snapshots = folder.resolve().parent
    is_cache = snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--")
    return snapshots.parent if is_cache else folder


def has_file(path: Path) -> bool:
    with reading_from(path):
        return path.is_file()


def checked(path: Path) -> Path:
    """Return the path of a file that may be opened. Raise InputError for what is no plain file in its folder."""
    require_regular(path, inside=boundary_of(path.parent))
    return path


def read_content(path: Path) -> bytes:
    """Return the bytes of a small file. Raise InputError if it is missing or implausibly large."""
    with reading_from(path):
        if not path.exists():
            raise InputError(f"{path}: no such file; a Hugging Face folder has one")
        num_bytes = path.stat().st_size
    if num_bytes > LARGEST_FILE_BYTES:
        raise InputError(f"{path}: {num_bytes:,} bytes, but such a file has at most {LARGEST_FILE_BYTES:,}")
    return read_regular(path, inside=boundary_of(path.parent))


def read_json(path: Path) -> Any:
    """Return the content of a JSON file. Raise InputError if it is missing, damaged or implausibly large."""
    content = read_content(path)
    try:
        return parse_json(content)
    except ValueError as error:
        raise InputError(f"{path}: damaged ({type(error).__name__}: {error})") from error
