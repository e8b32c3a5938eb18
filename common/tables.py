"""Tables that commands print and put into a page of docs/, and the figures beside them."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import InputError, reading_from, writing_to
from common.files import write_atomically


def markdown(rows: Sequence[Sequence[str]], *, right_from: int | None = None) -> str:
    """Return a Markdown table of `rows`, the header first, padded to be read in a terminal too.

    Columns from `right_from` on are aligned to the right.
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    is_right = [right_from is not None and column >= right_from for column in range(len(widths))]
    rule = "|".join(f"{'-' * (w + 1)}:" if right else "-" * (w + 2) for w, right in zip(widths, is_right, strict=True))
    lines = [
        " | ".join(
            cell.rjust(w) if right else cell.ljust(w) for cell, w, right in zip(row, widths, is_right, strict=True)
        )
        for row in rows
    ]
    header, *others = (f"| {line} |" for line in lines)
    return "\n".join([header, f"|{rule}|", *others]) + "\n"


def put_into(path: Path, mark: str, text: str | None) -> None:
    """Replace the text between <!-- mark --> and <!-- end --> in a page; None: only check that both marks are there."""
    with reading_from(path):
        content = path.read_text(encoding="utf-8") if path.is_file() else ""
    marks = re.compile(rf"(<!-- {re.escape(mark)} -->\n).*?(<!-- end -->)", re.DOTALL)
    if len(marks.findall(content)) != 1:
        raise InputError(f"{path}: --into needs one <!-- {mark} --> with an <!-- end --> after it")
    if text is not None:
        with writing_to(path):
            write_atomically(path, marks.sub(lambda match: f"{match[1]}{text}{match[2]}", content))


def new_figure(*, figsize: tuple[float, float] | None = None) -> Any:
    """Return an empty matplotlib figure of `figsize` inches; raise InputError if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("the picture needs matplotlib: pip install -e '.[plots]'") from error
    return Figure(figsize=figsize, layout="constrained")
