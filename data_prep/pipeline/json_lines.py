"""The text of one line of a .jsonl file, and every way in which a line is not what it should be."""

import re
from typing import Any

from common.reading import parse_json
from data_prep.pipeline.bad_rows import TOO_LONG, BadRowError, too_long

# A line also holds other fields and escapes, so it may be longer than --max-document-bytes by this.
EXTRA_LINE_BYTES = 2**24
# Three bytes of JSON (`{},`) become seventy bytes of Python, so a long line may hold only this many values.
LONG_LINE, MOST_VALUES = 2**22, 2**20
NUM_NAMES = 10
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON escapes can make one, though it is no character


def text_of_line(line: str, column: str, max_document_bytes: int, flag: str) -> str:
    """Return the field `column` of a line's object, with U+FFFD for a lone surrogate, as tiktoken has it.

    Raise BadRowError if the line has no such text.
    """
    if len(line) > LONG_LINE and has_many_values(line):
        raise BadRowError("too many values", f"more than {MOST_VALUES:,} values in one line")
    try:
        row = parse_json(line)
    except ValueError as error:
        raise _not_json(error, flag) from error
    if not isinstance(row, dict):
        raise BadRowError("not an object", f"a JSON {type(row).__name__}, not an object ({flag})")
    if column not in row:
        raise BadRowError("no such field", f"no field {column!r}, only {shown_names(row)}; name it with --text-column")
    text = row[column]
    if not isinstance(text, str):
        reason = "null" if text is None else "not a string"
        raise BadRowError(reason, f"{column!r} is {type(text).__name__}, not a string (--text-column)")
    try:
        num_bytes = len(text) if text.isascii() else len(text.encode("utf-8"))
    except UnicodeEncodeError:
        text = LONE_SURROGATE.sub("\ufffd", text)
        num_bytes = len(text.encode("utf-8"))
    if num_bytes > max_document_bytes:
        raise too_long(max_document_bytes)
    return text


def line_too_long(most_bytes: int) -> BadRowError:
    fault = f"a line of more than {most_bytes:,} bytes"
    return BadRowError(TOO_LONG, f"{fault}; raise --max-document-bytes, or leave it out with --on-bad-row skip")


def has_many_values(line: str) -> bool:
    """Return whether a line of JSON may hold more than MOST_VALUES values: commas and brackets outside its strings."""
    bare = line.replace("\\\\", "").replace('\\"', "")
    if bare.count('"') > 2 * MOST_VALUES:
        return True
    return sum(part.count(mark) for part in bare.split('"')[::2] for mark in ",[{") > MOST_VALUES


def shown_names(names: Any) -> str:
    """Return the first of some names for a message."""
    shown = [f"{name!r:.60}" for name, _ in zip(names, range(NUM_NAMES), strict=False)]
    return ", ".join(shown) + (f" and {len(names) - NUM_NAMES} more" if len(names) > NUM_NAMES else "") or "none"


def _not_json(error: ValueError, flag: str) -> BadRowError:
    """Return the fault of a line that json.loads refuses."""
    if isinstance(error.__cause__, RecursionError):
        reason = "nested too deeply"
    elif type(error) is ValueError:  # json.loads raises the subclass JSONDecodeError for everything else
        return BadRowError("an integer of more than 4,300 digits", f"an integer of more than 4,300 digits ({flag})")
    else:
        reason = "not JSON"
    return BadRowError(reason, f"not JSON ({error}); a .jsonl file holds one object per line ({flag})")
