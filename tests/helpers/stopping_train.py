"""train/main.py whose rank 1 stops itself with SIGSTOP in its thirteenth step, as test_watchdog.py wants it."""

import os
import signal
import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from train import loop
from train.main import main

take_step = loop.take_step


def stopping(run: loop.Run) -> loop.StepResult:
    if run.state.progress.step == 12 and run.processes.group.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    return take_step(run)


if __name__ == "__main__":
    loop.take_step = stopping
    main()
