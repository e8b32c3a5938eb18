"""status.json: how far a run is and how its last attempt ended. Launchers read it, not exit codes."""

from __future__ import annotations  # launch/requeue.py runs on Python 3.9

from pathlib import Path
from typing import Any

from common.errors import InputError, warn
from common.reading import NATURAL, read_own_json

STATUS_FILE = "status.json"
FORM = {
    "state": frozenset({"running", "stopped", "done", "failed"}),
    "step": NATURAL,  # of the newest checkpoint
    "reason": (str, None),
    "attempt": NATURAL,
}


def read_status(run_dir: Path) -> dict[str, Any] | None:
    """Return {state, step, reason, attempt}; None before the first start. Raise InputError if the file is damaged."""
    return read_own_json(run_dir / STATUS_FILE, FORM, remedy="the next start writes it again")


def read_status_or_warn(run_dir: Path, program: str) -> dict[str, Any] | None:
    """Return status.json like `read_status`, but None with a warning if it is damaged: the next start mends it."""
    try:
        return read_status(run_dir)
    except InputError as error:
        warn(program, str(error))
        return None
