"""status.json: how far a run is and how its last attempt ended. Launchers read it, not exit codes."""

from __future__ import annotations  # launch/requeue.py runs on Python 3.9

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.reading import NATURAL, read_own_json

STATUS_FILE = "status.json"
FORM = {
    "state": frozenset({"running", "stopped", "done", "failed"}),
    "step": NATURAL,  # of the newest checkpoint
    "reason": (str, None),
    "attempt": NATURAL,
}
UNKNOWN_ATTEMPT = -1  # of a run whose status.json is damaged


def read_status(run_dir: Path) -> dict[str, Any] | None:
    """Return {state, step, reason, attempt}; None before the first start. Raise InputError if the file is damaged."""
    return read_own_json(run_dir / STATUS_FILE, FORM, remedy="the next start writes it again")


def find_status(run_dir: Path) -> dict[str, Any] | None:
    """Return status.json; None if the run never began.

    If the file is damaged, or gone while there are checkpoints, `attempt` is UNKNOWN_ATTEMPT, `step` is that of the
    newest checkpoint by its name, and `reason` is what is wrong with the file.
    """
    path, step = run_dir / STATUS_FILE, newest_step(run_dir)
    try:
        status = read_own_json(path, FORM, remedy=f"by their names its checkpoints go up to step {step}")
    except InputError as error:
        fault = str(error)
    else:
        if status is not None or step == 0:
            return status
        fault = f"{path}: gone; by their names its checkpoints go up to step {step}"
    return {"state": "running", "step": step, "reason": fault, "attempt": UNKNOWN_ATTEMPT}


def newest_step(run_dir: Path) -> int:
    """Return the step in the newest checkpoint's name; 0 if there is none, or the disk does not say."""
    steps = [0]
    with suppress(OSError), os.scandir(run_dir / "checkpoints") as entries:
        for entry in entries:
            match = re.fullmatch(r"step_([0-9]{8,15})", entry.name)
            if match is not None and entry.is_dir(follow_symlinks=False):
                steps.append(int(match[1]))
    return max(steps)
