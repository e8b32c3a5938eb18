"""A command whose output cannot be written ends quietly (a closed pipe) or in one line (a full disk)."""

import subprocess
import sys
from pathlib import Path

from tests.helpers.runs import ROOT

ENDLESS = "from common.errors import one_line_errors\nwith one_line_errors('prog'):\n    while True: print('text')"


def test_a_closed_pipe_ends_a_command_without_a_word() -> None:
    done = subprocess.run(
        ["bash", "-c", '"$1" -c "$2" | head -1; exit ${PIPESTATUS[0]}', "bash", sys.executable, ENDLESS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (141, "text\n", "")


def test_a_full_disk_for_its_output_ends_a_command_in_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", ENDLESS], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    line = "prog: its output cannot be written ([Errno 28] No space left on device)\n"
    assert (done.returncode, done.stderr) == (2, line)
