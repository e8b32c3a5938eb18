"""A command whose output nobody reads any more ends quietly."""

import subprocess
import sys

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
