"""Rows and documents that cannot be read: the limit of their size, why each is bad, and the count of those left out.

--on-bad-row stop ends the command at the first bad row, with its place. --on-bad-row skip leaves bad rows out, as if
they were not there, and counts them by reason. Only a row is ever left out. A damaged file (gzip, parquet) always ends
the command, because nobody knows how many rows are lost.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from common.errors import InputError

OnBadRow = Literal["stop", "skip"]
MAX_DOCUMENT_BYTES = 2**27
NUM_PLACES = 10
TOO_LONG = "longer than --max-document-bytes"


class BadRowError(InputError):
    """A row that cannot be read.

    reason: the same words for all rows of its kind. position: the fault's own, None for the beginning of the row.
    """

    def __init__(self, reason: str, fault: str, position: int | None = None) -> None:
        super().__init__(fault)
        self.reason = reason
        self.position = position


def too_long(max_document_bytes: int) -> BadRowError:
    """Return the fault of a document that is longer than --max-document-bytes."""
    fault = f"a document of more than {max_document_bytes:,} bytes"
    return BadRowError(TOO_LONG, f"{fault}; raise --max-document-bytes, or leave it out with --on-bad-row skip")


@dataclass
class Skipped:
    """The rows that were left out: how many for each reason, and (position, reason) of the first NUM_PLACES."""

    reasons: dict[str, int] = field(default_factory=dict)
    first: list[tuple[int, str]] = field(default_factory=list)

    @classmethod
    def of(cls, record: dict[str, Any]) -> "Skipped":
        """Return what `dataclasses.asdict` made a record of, also after a way through JSON."""
        reasons = {str(reason): int(count) for reason, count in record["reasons"].items()}
        return cls(reasons, [(int(position), str(reason)) for position, reason in record["first"]])

    def add(self, position: int, reason: str) -> None:
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        if len(self.first) < NUM_PLACES:
            self.first.append((position, reason))


def count_reasons(skipped: Iterable[Skipped]) -> dict[str, int]:
    """Return the number of rows for each reason, in the order of the reasons' words."""
    total: Counter[str] = Counter()
    for each in skipped:
        total.update(each.reasons)
    return dict(sorted(total.items()))


def skipped_line(record: dict[str, Any]) -> str:
    """Return the report's line about the manifest's record of the rows that were left out."""
    reasons, first = shown_reasons(record["reasons"]), "; ".join(record["first"][:3])
    return f"{record['rows']:,} bad rows left out ({reasons}), first {first}"


def shown_reasons(reasons: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())


def options_of_bad_rows(max_document_bytes: int) -> dict[str, int]:
    """Return what a manifest's options record: --max-document-bytes, unless it is the default.

    --on-bad-row is not there, since it changes nothing where no row is bad; elsewhere the source says what is left out.
    """
    return {} if max_document_bytes == MAX_DOCUMENT_BYTES else {"max_document_bytes": max_document_bytes}


def check_max_document_bytes(value: int) -> None:
    if not 1 <= value < 2**31:
        raise InputError(f"--max-document-bytes {value} must lie between 1 and {2**31 - 1}")
