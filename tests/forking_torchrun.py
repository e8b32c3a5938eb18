"""torchrun that has imported what its workers would, and forks them (tests/forked.py).

    python -u tests/forking_torchrun.py [what torchrun takes]

Agent, store, environment, sessions, signals and exit codes are torchrun's. Workers of new interpreters are started by
test_survival.py, tests/soak.py as a command and the long soak.
"""

import subprocess
import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

from tests.forked import preload, run_forked


def fork(handler: SubprocessHandler, command: tuple[str, ...], env: dict[str, str]) -> "subprocess.Popen[str]":
    """As SubprocessHandler._popen starts `python -u SCRIPT ARGS`."""
    return run_forked(*command[2:], env=env, start_new_session=True)


if __name__ == "__main__":
    preload()
    SubprocessHandler._popen = fork  # type: ignore[assignment, method-assign]
    run.main()
