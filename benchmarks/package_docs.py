"""Write the docstrings of all installed packages as documents, for experiments that read no token twice.

    python benchmarks/package_docs.py text/package-docs        # a minute of one core

FOLDER/val.jsonl has 4 % of them, and FOLDER/train.jsonl the rest. Equal docstrings count once. Their order is that of a
hash of their text, so that every part is a sample of all packages. With all extras installed it is 44 MB. It depends on
the versions of the packages; the last line, JSON, has the sizes and a hash of the whole.
"""

import hashlib
import json
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import tyro

from common.errors import InputError, one_line_errors, writing_to
from common.files import write_atomically
from data_prep.pipeline.python_docs import docstrings_of

VAL_SHARE = 0.04
SHORTEST = 40  # characters; shorter ones are mostly a name said again


@dataclass(frozen=True)
class Options:
    """Write the docstrings of all installed packages as documents."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder for train.jsonl and val.jsonl."""


def documents() -> Iterator[str]:
    """Yield every docstring in the Python files of the installed packages."""
    root = Path(sysconfig.get_paths()["purelib"])
    for path in sorted(root.rglob("*.py")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # other people's escapes
            try:
                yield from docstrings_of(path)
            except (ValueError, RecursionError):  # files that Python itself cannot compile
                continue


def main(args: list[str] | None = None) -> None:
    with one_line_errors("package_docs"):
        folder = tyro.cli(Options, args=args, description=__doc__).folder
        by_hash = {hashlib.sha256(text.encode()).digest(): text for text in documents() if len(text) >= SHORTEST}
        if not by_hash:
            raise InputError(f"{sysconfig.get_paths()['purelib']} has no packages with docstrings")
        with writing_to(folder):
            folder.mkdir(parents=True, exist_ok=True)
        digests = sorted(by_hash)
        num_val = round(VAL_SHARE * len(digests))
        for name, part in (("val", digests[:num_val]), ("train", digests[num_val:])):
            with writing_to(folder):
                lines = [json.dumps({"text": by_hash[digest]}) + "\n" for digest in part]
                write_atomically(folder / f"{name}.jsonl", "".join(lines))
        whole = hashlib.sha256(b"".join(digests)).hexdigest()[:16]
        num_characters = sum(map(len, by_hash.values()))
        print(json.dumps({"characters": num_characters, "documents": len(digests), "sha256": whole}))


if __name__ == "__main__":
    main()
