"""Tables that a command prints and puts into a page of docs/, between two marks that name it."""

import re
from collections.abc import Sequence
from pathlib import Path

from data_prep.atomic import write_atomically
from data_prep.errors import InputError


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A header and rows, padded so that they are also read in a terminal."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def put_into(path: Path, mark: str, text: str | None) -> None:
    """Replace what stands between <!-- mark --> and <!-- end -->; None: only see whether they are there."""
    content = path.read_text(encoding="utf-8") if path.is_file() else ""
    marks = re.compile(rf"(<!-- {re.escape(mark)} -->\n).*?(<!-- end -->)", re.DOTALL)
    if len(marks.findall(content)) != 1:
        raise InputError(f"{path}: --into needs one <!-- {mark} --> with an <!-- end --> after it")
    if text is not None:
        write_atomically(path, marks.sub(lambda found: f"{found[1]}{text}{found[2]}", content))
