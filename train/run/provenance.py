"""What made a run, as provenance.json keeps it: code, command, host, versions. Secrets are left out."""

import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy
import torch

from common.files import ROOT
from common.reading import Form, read_own_json
from common.redaction import DIFF, redacted_diff, redacted_words
from train.config import Config
from train.processes.ranks import slurm_job

SNAPSHOT_FILE = "SNAPSHOT.json"
SNAPSHOT_FORM: Form = {"commit": (str, None), "changes": (str, None)}  # what is read of it here


def provenance(config: Config) -> dict[str, Any]:
    """Return what made this run: commit, uncommitted changes, command, host, versions, precision, threads."""
    cpu = platform.processor() or platform.machine()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join([sys.executable, *redacted_words(sys.argv)]),
        "directory": str(Path.cwd()),
        **code(),
        "host": socket.gethostname(),
        "job": slurm_job(os.environ),
        "world": int(os.environ.get("WORLD_SIZE", "1")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "device": device,
        "dtype": config.train.dtype,
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
    }


def code() -> dict[str, Any]:
    """Return the commit and changes of this checkout, or those recorded in a job's snapshot (launch/snapshot.py)."""
    record = read_own_json(ROOT / SNAPSHOT_FILE, SNAPSHOT_FORM, remedy="submit the job again")
    if record is None:
        record = {"commit": _git("rev-parse", "HEAD"), "changes": _git(*DIFF)}
    changes = record["changes"]
    return {
        "code": str(ROOT),
        "commit": record["commit"],
        "changes": None if changes is None else redacted_diff(changes),
    }


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *args], capture_output=True, text=True, errors="replace", check=False
        )
    except FileNotFoundError:  # no git on this machine
        return None
    return done.stdout.strip() if done.returncode == 0 else None
